"""A whole plan in one go: targets, main path, branches, exports, downstream scores, health; resumable at any point."""

from __future__ import annotations

from velopath.alarm_watch import run_command
from velopath.control import check_controllers
from velopath.controllers import needs_targets
from velopath.downstream import score_version
from velopath.errors import AlarmError, ConfigError, StoppedError, VelopathError
from velopath.export import export_version
from velopath.proxy import find_targets
from velopath.run import Run
from velopath.runhealth import run_health
from velopath.runlineage import read_lineage
from velopath.segments import cut_version, train_main


def execute_plan(run: Run, *, score: bool = True) -> None:
    """Train what the plan names, in its order, and cut, export and score each version; what is done is passed over.

    Target losses that the controller needs and nobody gave come from a proxy first. A downstream command that fails
    does not stop the training: the rest is done first, then its error is raised.
    """
    if score:
        _ensure_targets(run)
    failed: VelopathError | None = None
    for segment in run.plan.segments:
        if segment.kind == "main":
            train_main(run, segment.end_step)
            continue
        if run.config.control.in_branch == "replay":  # needs the main path's weights up to the branch's end
            train_main(run, segment.end_step)
        fresh = segment.name not in {v.name for v in read_lineage(run.folder).versions}
        if score and fresh:
            _judge(run, None)
        cut_version(run, segment.name)
        if score and fresh:
            _judge(run, segment.name)
        model = run.folder.path / "exports" / segment.name
        if read_lineage(run.folder).find(segment.name).export is None or not model.is_dir():
            model = export_version(run, segment.name)
            run.note("export", str(model))
        try:
            if score:
                score_version(run, segment.name, model)
        except StoppedError:
            raise
        except VelopathError as error:
            run.note(segment.name, f"downstream evaluation failed: {error}")
            failed = failed or error
    if failed is not None:
        raise failed


def _judge(run: Run, name: str | None) -> None:
    """Look at the main path's or a version's health, tell, and stop where `health.halt` asks for it."""
    if not run.dist.is_main:
        return
    settings = run.config.health
    found = run_health(run.folder, name)
    if found.verdict == "ok":
        return
    reasons = [f.text for f in found.findings if f.level == found.verdict]
    run.note(found.name, f"health: {found.verdict}: {'; '.join(reasons)}")
    if settings.command is not None:
        problem = run_command(settings.command, {"run": str(run.folder.path.resolve()), **found.to_json()})
        if problem is not None:
            run.note(found.name, f"health.command: {problem}")
    if settings.halt and found.verdict == "stop":
        raise AlarmError(
            f"health of {found.name} at step {found.step}: stop: {'; '.join(reasons)}. Look at `velopath health`; roll "
            "back, or set health.halt=false to go on"
        )


def _ensure_targets(run: Run) -> None:
    if not needs_targets(run.config.control.controller):
        return
    try:
        check_controllers(run, run.plan.main_steps)
    except ConfigError:
        if run.folder.read_json("targets.json") is not None or isinstance(run.config.control.targets, str):
            raise
        find_targets(run)
