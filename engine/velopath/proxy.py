"""Target losses from a proxy trunk: one constant-rate run at weights that do not move, read at several points.

The trunk starts from the run's own starting model and warms up like the main path, so a point at D tokens shows
what the undecayed main path would reach there. The held-out sample is the controller's own: l_target, l_init and
l_t then share its sampling error, which cancels in the velocity.
"""

from __future__ import annotations

import math
import shutil

from velopath.config import ProxyConfig
from velopath.domains import DomainTable, check_weights
from velopath.errors import ConfigError, DataError
from velopath.lineage import Cost
from velopath.plots import plot_targets
from velopath.run import Piece, Run
from velopath.runlineage import read_lineage, record_cost
from velopath.targets import Targets

SEGMENT = "proxy"


def proxy_points(proxy: ProxyConfig, warmup_steps: int) -> list[int]:
    """Steps at which the trunk is evaluated: `points` of them, evenly spread in log steps, the last at the end.

    The first lies at `first * steps`, and not inside the warm-up: a loss at a smaller rate belongs to another
    curve. Raises `ConfigError` where that leaves too few different steps.
    """
    first = max(round(proxy.first * proxy.steps), warmup_steps, 1)
    ratio = proxy.steps / first
    last = proxy.points - 1
    points = sorted({round(first * ratio ** (i / last)) for i in range(proxy.points)})
    if first >= proxy.steps or len(points) < proxy.points:
        raise ConfigError(
            f"proxy.steps {proxy.steps} leave no room for {proxy.points} points after step {first} "
            f"(warm-up {warmup_steps}); raise proxy.steps or lower proxy.points"
        )
    return points


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

    `force` trains the proxy again from its start.
    """
    found = run.folder.read_json("targets.json")
    if found is not None and not force:
        run.note(SEGMENT, "targets.json is there already; --force fits it anew")
        return Targets.from_json(found)
    what = SEGMENT
    if force and run.dist.is_main:
        shutil.rmtree(run.checkpoints(SEGMENT), ignore_errors=True)
        before = sum(known.startswith(SEGMENT) for known, _ in read_lineage(run.folder).spent)
        what = f"{SEGMENT} {before + 1}" if before else SEGMENT  # each trunk was paid for
    run.dist.barrier()
    targets = train_proxy(run)
    if run.dist.is_main:
        cost = Cost(
            proxy_steps=targets.proxy_steps,
            tokens=targets.proxy_tokens,
            evaluation_tokens=targets.evaluation_tokens,
        )
        record_cost(run.folder, what, cost)
        run.folder.write_json("targets.json", targets.to_json())
        plot_targets(targets, run.folder.path / "targets.png")
    run.dist.barrier()
    return targets


def train_proxy(run: Run) -> Targets:
    """Train (or resume) the trunk in segment "proxy", fit the laws and read them at the end of the first slice.

    A domain whose law ends above its last proxy loss keeps that loss as its target, with a warning.
    """
    config = run.config
    points = proxy_points(config.proxy, config.path.warmup_steps)
    root = run.checkpoints(SEGMENT)
    loop, checkpoint = run.loop_at(root)
    state = checkpoint.state if checkpoint is not None else None
    slice_name = next(iter(config.data.slices))
    piece = Piece(slice_name, 0, 0 if state is None else state["step"], points[-1])
    curves: dict[str, list[tuple[float, float]]] = {}
    tokens_read = 0
    known = {r["step"]: r for r in run.folder.metrics("eval", SEGMENT) if r["step"] in points}
    with run.session(piece, segment=SEGMENT, path=run.main_path(), state=state) as session:
        if session.step == 0 and (first := first_shares(config.proxy, session.sampler.table)) is not None:
            session.sampler.push(first, reason="proxy.shares")
        shares = dict(session.weights)
        tokens_per_step = session.sampler.global_rows * session.sampler.row_tokens
        run.begin(SEGMENT, session.step, points[-1])
        for point in points:
            if session.step < point:
                loop.run(session, until=point, slice_name=slice_name, checkpoints=root)
                known.pop(point, None)
            if point not in known:
                if session.step > point:
                    raise DataError(
                        f"no evaluation at step {point} of the proxy, which is at step {session.step}; "
                        f"delete {root} and run `velopath targets` again",
                        path=run.folder.path / "metrics.jsonl",
                    )
                loss = loop.evaluate(config.control.heldout_tokens, session=session, slice_name=slice_name)
                known[point] = {"loss": dict(loss), "tokens": dict(zip(loss.names, loss.tokens, strict=True))}
            tokens_read += sum(known[point]["tokens"].values())
            for name, value in known[point]["loss"].items():
                curves.setdefault(name, []).append((point * tokens_per_step, value))
    targets = Targets.fit(
        curves,
        run.tokens_at_slice_end(slice_name, tokens_per_step),
        shares=shares,
        proxy_steps=points[-1],
        proxy_tokens=points[-1] * tokens_per_step,
        evaluation_tokens=tokens_read,
        law=config.proxy.law,
        above_last="last",
    )
    worst = max((d.error or 0.0 for d in targets.domains.values()), default=math.nan)
    run.note(
        SEGMENT, f"targets fitted on {len(points)} points; largest leave-last-out error {worst:.3f} nats"
    )
    return targets
