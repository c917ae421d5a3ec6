"""What a run trains: the main path, and the branches that become versions (learning-rate path switching)."""

from __future__ import annotations

from typing import Any

from velopath.checkpoint import load_checkpoint, step_folder
from velopath.configured_plan import branch_path
from velopath.control import check_controllers, controller_for
from velopath.domains import DomainLoss
from velopath.environment import describe_environment
from velopath.errors import ConfigError
from velopath.lineage import Version
from velopath.loop import Loop
from velopath.proxy import awaits_targets, first_losses, first_slice, train_points
from velopath.run import MAIN, Piece, Run
from velopath.runconfig import slice_folders
from velopath.runfolder import is_proxy
from velopath.runlineage import (
    data_hash,
    edge_seconds,
    origin_cost,
    read_lineage,
    record_cost,
    record_main,
    record_version,
    weights_head,
)
from velopath.schedule import LrPath
from velopath.session import Session


def train_main(run: Run, until: int | None = None) -> int:
    """Train the main path up to step `until` (default: the last branch point), or resume it; returns the step.

    A checkpoint stays at every planned branch point and at the end of each slice, to which one can roll back. At the
    start of a slice the controller starts again: first losses measured there, targets read at the slice's end, weights
    as the slice says. With `proxy.source` "main" its first steps give the targets, and the controller begins behind
    them, from the starting model's losses.
    """
    goal = run.plan.main_steps if until is None else until
    waits = awaits_targets(run)
    check_controllers(run, goal, known=slice_folders(run.config, first_slice(run)) if waits else ())
    for branch in run.plan.branches:
        _check_has_parent(branch.name, branch.start_step)  # a version that could not be cut is refused now
        branch_path(run.config, branch.slice, branch.start_step, branch.steps)
    root = run.checkpoints(MAIN)
    if waits:
        _note_base(run)
        train_points(run, MAIN, goal)
    loop, checkpoint = run.loop_at(root)
    state = checkpoint.state if checkpoint is not None else None
    step = 0 if state is None else int(state["step"])
    slice_ends = {piece.end for piece in run.pieces(0, sum(length for _, length in run.plan.slices))}
    if checkpoint is not None and (step == goal or step in slice_ends):  # killed before it was noted, perhaps
        _note_main(run, str(checkpoint.state["slice"]), step, checkpoint.digest)
    if step >= goal:
        run.note(MAIN, f"is at step {step} already")
        return step
    keep = frozenset(branch.start_step for branch in run.plan.branches) | slice_ends
    _note_base(run)
    run.begin(MAIN, step, goal)
    for piece in run.pieces(step, goal):
        controller = controller_for(run, piece.slice)
        with run.session(
            piece, segment=MAIN, path=run.main_path(), state=state, controller=controller
        ) as session:
            if piece.first == 0:
                session.initial = first_losses(run)
            digest = loop.run(
                session,
                until=piece.end,
                slice_name=piece.slice,
                checkpoints=root,
                keep=keep,
                evaluate_end=True,
            )
        _note_main(run, piece.slice, piece.end, digest)
    return goal


def cut_version(
    run: Run, name: str, *, at: int | None = None, steps: int | None = None, shape: str | None = None
) -> Version:
    """Branch `name` off the main checkpoint at step `at`, decay over `steps`, evaluate and record it; resumable.

    Defaults: the plan's branch of that name; `steps` to the end of the slice that `at` lies in; the `shape` that the
    config has for that slice. The branch copies the main path's sampler, optimiser and (for `in_branch=live`)
    controller; the main path keeps its own. A version that is recorded already is returned as it is; `ConfigError`
    where it, or a branch of that name that was begun, left elsewhere, is of another length or decays otherwise.
    """
    known = {v.name: v for v in read_lineage(run.folder).versions}
    if name in known:
        _check_recorded(known[name], at, steps, shape)
        run.note(name, "is cut already")
        return known[name]
    piece = _branch_piece(run, name, at, steps)
    start = step_folder(run.checkpoints(MAIN), piece.start)
    if not start.is_dir():
        kept = ", ".join(map(str, run.kept_main_steps())) or "none"
        raise ConfigError(
            f"no main checkpoint at step {piece.start} to branch {name!r} from; kept are {kept}: choose one with --at, "
            "or train the main path to that step"
        )
    path = branch_path(run.config, piece.slice, piece.start, piece.end - piece.start, shape)
    parent = load_checkpoint(start)
    loop, checkpoint = run.loop_at(run.checkpoints(name), start)
    assert checkpoint is not None
    state = checkpoint.state
    if state["segment"] == name and (begun := LrPath.from_json(state["path"])) != path:
        raise ConfigError(
            f"branch {name!r} was begun on another path: {begun.describe()}; asked for is {path.describe()}. "
            "Finish it as it was begun, or choose another name"
        )
    step = int(state["step"])
    live = run.config.control.in_branch == "live"
    run.begin(name, step, piece.end)
    with run.session(
        Piece(piece.slice, piece.first, step, piece.end),
        segment=name,
        path=path,
        state=state,
        controller=controller_for(run, piece.slice) if live else None,
    ) as session:
        tokens = run.config.evaluate.tokens
        before = _measured(run, loop, session, name, piece.start, tokens, piece.slice)
        if run.config.control.in_branch == "replay":
            _replay_main(run, session, piece)
        digest = loop.run(
            session,
            until=piece.end,
            slice_name=piece.slice,
            checkpoints=run.checkpoints(name),
            watch=True,
        )
        after = _measured(run, loop, session, name, piece.end, tokens, piece.slice)
        trained = (piece.end - piece.start) * session.sampler.global_rows * session.sampler.row_tokens
    if not digest:  # it was killed after its last save
        digest = checkpoint.digest
    version = Version(
        name,
        MAIN,
        piece.start,
        piece.end - piece.start,
        piece.slice,
        tokens=trained,
        evaluation_tokens=sum(before["tokens"].values()) + sum(after["tokens"].values()),
        path=path,
        seconds=edge_seconds(run.folder, name, piece.start, piece.end),
        heldout_loss=after["loss"],
        checkpoint=digest,
        notes={
            "before": before["loss"],
            "parent_checkpoint": parent.digest,
            "config_hash": run.config.hash,
            **edge_facts(run, name, piece.slice),
        },
    )
    if run.dist.is_main:
        record_main(run.folder, piece.start, piece.slice, checkpoint=parent.digest)
        version = record_version(run.folder, version)
    run.dist.barrier()
    mean = sum(after["loss"].values()) / len(after["loss"])
    was = sum(before["loss"].values()) / len(before["loss"])
    run.note(name, f"cut: mean held-out loss {was:.3f} -> {mean:.3f} nats")
    return version


def _check_recorded(version: Version, at: int | None, steps: int | None, shape: str | None) -> None:
    decay = version.path.segments[-1].shape if version.path is not None else shape
    for what, given, found in (
        ("it left the main path at step {}", at, version.branch_step),
        ("it has {} steps", steps, version.steps),
        ("it decays by {}", shape, decay),
    ):
        if given is not None and given != found:
            raise ConfigError(
                f"version {version.name!r} exists: {what.format(found)}, not {given}; choose another name"
            )


def _note_main(run: Run, slice_name: str, step: int, digest: str) -> None:
    """The main checkpoint at `step` as a node of the lineage, with the tokens since the node before it."""
    if not run.dist.is_main:
        return
    train = run.config.train
    before = max((n.step for n in read_lineage(run.folder).main if n.step < step), default=0)
    tokens = (step - before) * train.rows * run.dist.world * train.row_tokens
    record_main(
        run.folder,
        step,
        slice_name,
        tokens=tokens,
        seconds=edge_seconds(run.folder, MAIN, before, step),
        path=run.main_path(),
        checkpoint=digest,
        notes=edge_facts(run, MAIN, slice_name),
    )


def edge_facts(run: Run, segment: str, slice_name: str) -> dict[str, Any]:
    """What made an edge besides its steps: hardware, hash of the slice's data, head of the log of weights."""
    environment = describe_environment(run.dist.device)
    return {
        "hardware": {**environment["hardware"], "ranks": run.dist.world},
        "data": data_hash(slice_folders(run.config, slice_name)),
        "weights_log": weights_head(run.folder.audit(segment, slice_name)),
    }


def _note_base(run: Run) -> None:
    """What the starting model has cost, where a run of ours made it: beside the comparison, not in it."""
    cost = origin_cost(run.config.model.hf) if run.config.model.hf is not None else None
    if cost is not None and run.dist.is_main:
        record_cost(run.folder, "base", cost)
        if not run.folder.metrics("base"):
            run.log({"kind": "base", "segment": "base", "step": cost.base_steps, "tokens": cost.tokens})


def _branch_piece(run: Run, name: str, at: int | None, steps: int | None) -> Piece:
    if (
        name in (MAIN, "base")
        or is_proxy(name)
        or not name.replace("-", "").replace("_", "").replace(".", "").isalnum()
    ):
        raise ConfigError(
            f"version name {name!r}; expected letters, digits, '-', '_' or '.', and not 'main', 'base', 'proxy' or "
            "'proxy-STEP'"
        )
    planned = {branch.name: branch for branch in run.plan.branches}.get(name)
    if at is None:
        if planned is None:
            raise ConfigError(
                f"the plan has no version {name!r} (it names {', '.join(run.plan.versions)}); give --at STEP"
            )
        at = planned.start_step
    total = sum(length for _, length in run.plan.slices)
    within = next((p for p in run.pieces(0, total) if p.start <= at < p.end), None)
    if within is None:
        raise ConfigError(f"step {at} lies outside the slices, which end at step {total}")
    _check_has_parent(name, at)
    end = within.end if steps is None else at + steps
    if end <= at:
        raise ConfigError(f"a branch of {steps} steps; expected 1 or more")
    return Piece(within.slice, within.first, at, end)


def _check_has_parent(name: str, at: int) -> None:
    """A branch needs a main checkpoint to leave from, and the main path has none before its first update."""
    if at == 0:
        raise ConfigError(
            f"version {name!r} would leave the main path at step 0, before its first update: lower the branch share "
            "of the first slice below 1 (data.slices.NAME.branch_share, or path.branch_share for all), or branch later"
        )


def _measured(
    run: Run, loop: Loop, session: Session, name: str, step: int, tokens: int, slice_name: str
) -> dict[str, Any]:
    """The `version` record at `step`: read where a resumed branch has it, else measured now."""
    for record in run.folder.metrics("version", name):
        if record["step"] == step and session.step >= step:
            return record
    losses: DomainLoss = loop.evaluate(tokens, session=session, slice_name=slice_name, kind="version")
    return {"loss": dict(losses), "tokens": dict(zip(losses.names, losses.tokens, strict=True))}


def _replay_main(run: Run, session: Session, piece: Piece) -> None:
    """Push what the main path pushed on this stretch, at the same steps: the branch then reads the same rows."""
    controls = [r for r in run.folder.metrics("control", MAIN) if piece.start < r["step"] < piece.end]
    done = max((r["step"] for r in run.folder.metrics("step", MAIN)), default=0)
    if done < piece.end:
        raise ConfigError(
            f"control.in_branch=replay needs the main path's weights up to step {piece.end}, it is at {done}; "
            f"train it with --until {piece.end} first"
        )
    pending = {int(w["from_step"]) for w in session.sampler.state_dict()["weights"][1:]}
    for record in controls:
        if not record.get("shadow") and record["step"] >= session.step and record["step"] not in pending:
            session.sampler.push(record["weights"], at_step=record["step"], reason="replay of main")
