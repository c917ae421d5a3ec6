"""A whole plan in one go: targets, main path, branches, exports, downstream scores, health; resumable at any point."""

from __future__ import annotations

from velopath.control import check_controllers
from velopath.controllers import needs_targets
from velopath.downstream import score_version
from velopath.errors import ConfigError, StoppedError, VelopathError
from velopath.export import export_version
from velopath.proxy import find_targets
from velopath.run import Run
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
        cut_version(run, segment.name)
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


def _ensure_targets(run: Run) -> None:
    if not needs_targets(run.config.control.controller):
        return
    try:
        check_controllers(run, run.plan.main_steps)
    except ConfigError:
        if run.folder.read_json("targets.json") is not None or isinstance(run.config.control.targets, str):
            raise
        find_targets(run)
