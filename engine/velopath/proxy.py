"""Target losses from a constant-rate stretch at weights that do not move, read at several points.

The stretch is a proxy trunk of its own, or the first steps of the main path itself: both start from the run's starting
model and warm up alike, so a point at D tokens shows what the undecayed main path reaches there. With `proxy.decay` a
short branch decays from each point before it is read: they share the trunk, so each costs only its decay. The held-out
sample is the controller's own: l_target, l_init and l_t then share its sampling error, which cancels in the velocity.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from velopath.checkpoint import step_folder
from velopath.config_proxy import ProxyConfig
from velopath.configured_plan import branch_path, slice_steps
from velopath.controllers import needs_targets
from velopath.domains import DomainLoss, DomainTable, check_weights
from velopath.errors import ConfigError, DataError
from velopath.lineage import Cost
from velopath.plots import plot_targets
from velopath.proxy_points import proxy_decays, proxy_points, training_steps
from velopath.run import MAIN, Piece, Run
from velopath.runconfig import slice_folders
from velopath.runfolder import Record, RunFolder, is_proxy
from velopath.runlineage import read_lineage, record_cost
from velopath.targets import Targets

SEGMENT = "proxy"


def first_shares(proxy: ProxyConfig, table: DomainTable) -> dict[str, float] | None:
    """The shares that the trunk is read at, by domain; None: those of the slice, which need no change.

    Targets hold for these shares only. Natural ones say what the run would reach if nothing moved; a domain that the
    natural shares hardly read then has a high target, so the rule does not ask much of it. Uniform ones ask of every
    domain what an equal part of the run brings; in our study such targets served better. Raises `ConfigError` where
    given shares name other domains.
    """
    if proxy.shares == "slice":
        return None
    if proxy.shares == "natural":
        return table.prior
    if proxy.shares == "uniform":
        return {name: 1 / len(table.names) for name in table.names}
    assert isinstance(proxy.shares, dict)
    check_weights(proxy.shares, table.names)
    return {name: proxy.shares[name] for name in table.names}


def find_targets(run: Run, force: bool = False) -> Targets:
    """The run's targets: those in targets.json, or fitted now, written there and drawn into targets.png.

    With `proxy.source` "main" this trains the main path over the points. `force` trains a trunk again from its start.
    """
    found = run.folder.read_json("targets.json")
    if found is not None and not force:
        run.note(SEGMENT, "targets.json is there already; --force fits it anew")
        return Targets.from_json(found)
    if run.config.proxy.source == "main":
        if force and found is not None:
            raise ConfigError(
                "the points are the main path's own (proxy.source main) and cannot be trained again; "
                "set proxy.source=trunk to fit others"
            )
        targets = train_points(run, MAIN)
        assert targets is not None
        return targets
    what = SEGMENT
    if force and run.dist.is_main:
        for root in filter(lambda root: is_proxy(root.name), run.checkpoints(SEGMENT).parent.glob("*")):
            shutil.rmtree(root, ignore_errors=True)
        for segment in {r["segment"] for r in run.folder.records() if is_proxy(r["segment"])}:
            run.begin(segment, 0, 0)  # its records are void
        before = sum(known.startswith(SEGMENT) for known, _ in read_lineage(run.folder).spent)
        what = f"{SEGMENT} {before + 1}" if before else SEGMENT  # each trunk was paid for
    run.dist.barrier()
    targets = train_points(run, SEGMENT, what=what)
    assert targets is not None
    return targets


def awaits_targets(run: Run) -> bool:
    """Whether the main path is to give the controller its targets first, from its own first steps."""
    config = run.config
    return (
        config.proxy.source == "main"
        and needs_targets(config.control.controller)
        and not isinstance(config.control.targets, str)
        and run.folder.read_json("targets.json") is None
    )


def first_losses(run: Run) -> DomainLoss | None:
    """The starting model's losses, from which a controller that begins after the main path's points starts."""
    if run.config.proxy.source != "main":
        return None
    record = next((r for r in run.folder.metrics("eval", MAIN) if r["step"] == 0), None)
    record = run.dist.broadcast_json(record)
    if record is None:
        return None
    names = tuple(slice_folders(run.config, first_slice(run)))
    errors = record.get("stderr")
    counts = tuple(record["tokens"][name] for name in names)
    nats = tuple(record["loss"][name] * count for name, count in zip(names, counts, strict=True))
    return DomainLoss(names, nats, counts, None if errors is None else tuple(errors[name] for name in names))


def first_slice(run: Run) -> str:
    """The name of the slice whose beginning the points are read from."""
    return next(iter(run.config.data.slices))


def train_points(run: Run, segment: str, until: int | None = None, what: str = SEGMENT) -> Targets | None:
    """Train (or resume) `segment`, "proxy" or "main", over the points; fit the laws, read them at the first slice's
    end, write targets.json. None where `until` ends the main path before the last point.

    A domain whose law ends above its last proxy loss keeps that loss as its target, with a warning.
    """
    config = run.config
    points = proxy_points(config.proxy, run.main_path().warmup_steps)
    name = first_slice(run)
    if segment == MAIN and points[-1] > (steps := slice_steps(config)[name]):
        raise ConfigError(f"proxy.steps {points[-1]} reach beyond the first slice of {steps} steps")
    root = run.checkpoints(segment)
    loop, checkpoint = run.loop_at(root)
    state = checkpoint.state if checkpoint is not None else None
    start = 0 if state is None else int(state["step"])
    end = points[-1] if until is None else min(until, points[-1])
    keep = frozenset(points) if config.proxy.decay else frozenset()
    with run.session(
        Piece(name, 0, start, max(start, end)), segment=segment, path=run.main_path(), state=state
    ) as session:
        first = first_shares(config.proxy, session.sampler.table) if start == 0 else None
        if first is not None:  # never on the main path: its points are read at its own shares
            session.sampler.push(first, reason="proxy.shares")
        shares = dict(session.weights)
        per_step = session.sampler.global_rows * session.sampler.row_tokens
        if start < end:
            run.begin(segment, start, end)
            at = frozenset({*points, 0} if segment == MAIN else points)
            loop.run(session, until=end, slice_name=name, checkpoints=root, keep=keep, evaluate_at=at)
    if end < points[-1]:
        return None
    read = {point: _evaluated(run, segment, point) for point in points}
    curves = _curves({point * per_step: record for point, record in read.items()})
    decayed = _read_decays(run, segment)
    size = loop.step.decoder.n_params
    targets = _fit(run, curves, [*read.values(), *decayed.values()], decayed, shares, per_step, size)
    if run.dist.is_main:
        _write(run, targets, what)
    run.dist.barrier()
    return targets


def _fit(
    run: Run,
    curves: Mapping[str, list[tuple[float, float]]],
    records: Sequence[Record],
    decayed: Mapping[int, Record],
    shares: Mapping[str, float],
    per_step: int,
    parameters: int,
) -> Targets:
    """The laws of the points, decayed or not; `decayed` are the records after each decay by the steps done there."""
    proxy = run.config.proxy
    tokens = run.tokens_at_slice_end(first_slice(run), per_step)
    steps = training_steps(proxy, run.main_path().warmup_steps)
    facts: dict[str, Any] = {
        "shares": shares,
        "proxy_steps": steps,
        "proxy_tokens": steps * per_step,
        "evaluation_tokens": sum(sum(record["tokens"].values()) for record in records),
        "parameters": parameters,
    }
    laws: dict[str, Any] = {
        "law": proxy.law,
        "above_last": "last",
        "siblings": _siblings(proxy),
        "size_exponent": proxy.size_exponent,
    }
    if decayed:
        last = max(decayed)
        undecayed = Targets.fit(curves, last * per_step, law=proxy.law, above_last="last").losses
        gain = {name: loss - decayed[last]["loss"][name] for name, loss in undecayed.items()}
        curves = _curves({step * per_step: record for step, record in decayed.items()})
        facts |= {"decay": proxy.decay, "decay_gain": gain}
    targets = Targets.fit(curves, tokens, **facts, **laws)
    worst = max((d.error or 0.0 for d in targets.domains.values()), default=math.nan)
    count = len(next(iter(curves.values())))
    run.note(SEGMENT, f"targets fitted on {count} points; largest leave-last-out error {worst:.3f} nats")
    return targets


def _curves(records: Mapping[int, Record]) -> dict[str, list[tuple[float, float]]]:
    """Domain -> (tokens, nats) pairs, from records by tokens."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for tokens, record in records.items():
        for name, loss in record["loss"].items():
            curves.setdefault(name, []).append((tokens, loss))
    return curves


def _evaluated(run: Run, segment: str, step: int) -> Record:
    """The evaluation of a segment after `step` updates, the same on all ranks."""
    found = next((r for r in run.folder.metrics("eval", segment) if r["step"] == step), None)
    record: Record | None = run.dist.broadcast_json(found)
    if record is None:
        again = "run `velopath targets --force`" if segment != MAIN else "set proxy.source=trunk"
        raise DataError(
            f"no evaluation at step {step} of {segment}, which is past it; {again}",
            path=run.folder.path / "metrics.jsonl",
        )
    return record


def _read_decays(run: Run, segment: str) -> dict[int, Record]:
    """The evaluation after the decay of each point, by the steps done; what is evaluated already is passed over."""
    slice_name, found = first_slice(run), {}
    for start, end in proxy_decays(run.config.proxy, run.main_path().warmup_steps):
        name = f"{SEGMENT}-{start}"
        if all(r["step"] != end for r in run.folder.metrics("eval", name)):
            loop, checkpoint = run.loop_at(
                run.checkpoints(name), step_folder(run.checkpoints(segment), start)
            )
            if checkpoint is None:
                raise DataError(
                    f"no checkpoint at step {start} of {segment} to decay from", path=run.checkpoints(segment)
                )
            state = checkpoint.state
            step = int(state["step"])
            run.begin(name, step, end)
            decay = branch_path(run.config, slice_name, start, end - start)
            piece = Piece(slice_name, 0, step, end)
            with run.session(piece, segment=name, path=decay, state=state) as session:
                loop.run(
                    session,
                    until=end,
                    slice_name=slice_name,
                    checkpoints=run.checkpoints(name),
                    evaluate_at=frozenset({end}),
                )
        found[end] = _evaluated(run, name, end)
    return found


def _siblings(proxy: ProxyConfig) -> dict[str, Targets]:
    found = {}
    for name, place in proxy.siblings.items():
        path = Path(place)
        value = RunFolder(path.parent).read_json(path.name)
        if value is None:
            raise ConfigError(
                f"proxy.siblings.{name} is {place}, which is not there; give a run's targets.json"
            )
        found[name] = Targets.from_json(value)
    return found


def _write(run: Run, targets: Targets, what: str) -> None:
    """targets.json, its picture, and in the lineage what the points have cost, as `what`."""
    cost = Cost(
        proxy_steps=targets.proxy_steps,
        tokens=targets.proxy_tokens,
        evaluation_tokens=targets.evaluation_tokens,
    )
    record_cost(run.folder, what, cost)
    run.folder.write_json("targets.json", targets.to_json())
    plot_targets(targets, run.folder.path / "targets.png")
