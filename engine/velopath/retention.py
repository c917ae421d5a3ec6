"""What of a run's checkpoints its lineage needs, and deleting the rest (`velopath gc`)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from velopath.configured_plan import plan_of, slice_steps
from velopath.rollback import FOLDER, kept_aside
from velopath.runchange import change
from velopath.runconfig import recorded_config
from velopath.runfolder import RunFolder
from velopath.runlineage import kept_steps, read_lineage


@dataclass(frozen=True)
class Kept:
    """A checkpoint or folder of the run: `path` relative to it, its bytes, and why it is kept ("" : it is not)."""

    path: str
    bytes: int
    reason: str


def survey(folder: RunFolder) -> list[Kept]:
    """Every checkpoint of a run with the reason to keep it.

    Kept are: the last checkpoint of each version and of each segment that is under way, the main checkpoints that
    versions were cut from or are planned to be, the last `train.keep_last` of the main path and its last one at the
    end of a slice. Not kept: other
    rolling checkpoints, what a rollback took back (it cannot be undone afterwards), leftovers of killed saves.
    """
    found = []
    for segment in sorted((folder.path / "checkpoints").glob("*")):
        reasons = _reasons(folder, segment)
        for root in sorted(p for p in segment.iterdir() if p.is_dir()):
            step = root.name.removeprefix("step-")
            reason = reasons.get(int(step), "") if step.isdigit() else ""
            found.append(Kept(str(root.relative_to(folder.path)), _bytes(root), reason))
    for root in sorted((folder.path / FOLDER).glob("*")):
        found.append(Kept(str(root.relative_to(folder.path)), _bytes(root), ""))
    return found


def collect(folder: RunFolder) -> list[Kept]:
    """Delete what `survey` gives no reason to keep, on record; returns it. The caller holds the lock."""
    gone = [kept for kept in survey(folder) if not kept.reason]
    if gone:
        event = {
            "event": "gc",
            "removed": [kept.path for kept in gone],
            "bytes": sum(kept.bytes for kept in gone),
            "rollbacks": kept_aside(folder),
        }
        change(folder, event, removes=[kept.path for kept in gone])
    return gone


def _reasons(folder: RunFolder, segment: Path) -> dict[int, str]:
    """Step -> reason to keep the checkpoint of a segment at that step."""
    config, lineage = recorded_config(folder), read_lineage(folder)
    steps = kept_steps(segment)
    if segment.name != "main":
        version = next((v for v in lineage.versions if v.name == segment.name), None)
        if version is not None:
            return {version.step: "the version"}
        return dict.fromkeys(steps[-1:], "under way")
    last = min(config.train.keep_last, len(steps))
    reasons = dict.fromkeys(steps[len(steps) - last :], "the main path goes on from here")
    for branch in plan_of(config).branches:
        reasons[branch.start_step] = f"{branch.name} is planned from here"
    ends = [end for end in accumulate(slice_steps(config).values()) if end in steps]
    for end in ends[-1:]:
        reasons.setdefault(end, "the last slice border: one can roll back to here")
    for version in lineage.versions:
        reasons[version.branch_step] = f"{version.name} was cut from here"
    return reasons


def _bytes(root: Path) -> int:
    return sum(p.lstat().st_size for p in root.rglob("*") if not p.is_dir())
