"""Taking the main path back to an earlier checkpoint, on record, and undoing that.

Nothing is deleted: later checkpoints move to `rolled-back/N/main`, their metrics records are copied to
`rolled-back/N/metrics.jsonl`, and slices that had not begun by then leave the configuration.
"""

from __future__ import annotations

import json
from typing import Any

from velopath.config import validate_config
from velopath.configured_plan import slice_steps
from velopath.durable import write_durably
from velopath.errors import ConfigError
from velopath.runchange import change
from velopath.runconfig import recorded_config
from velopath.runfolder import Record, RunFolder
from velopath.runlineage import kept_steps, read_lineage

FOLDER = "rolled-back"
MAIN = "checkpoints/main"


def roll_back(folder: RunFolder, step: int) -> dict[str, Any]:
    """Take the main path of a run back to its kept checkpoint at `step`; returns the recorded event.

    Versions that were cut stay. Slices that begin at `step` or later leave the configuration, so that other data can
    follow; a slice that `step` lies in stays. The caller holds the lock. Raises `ConfigError` where `step` has no
    checkpoint. Where nothing lies beyond `step`, nothing changes and the last rollback to it is returned.
    """
    config, kept = recorded_config(folder), kept_steps(folder.path / MAIN)
    if step not in kept:
        raise ConfigError(
            f"no main checkpoint at step {step} to roll back to; kept are {', '.join(map(str, kept)) or 'none'}"
        )
    trained = [r["step"] for r in folder.metrics("step", "main")]
    last = max([*kept, *trained, *(node.step for node in read_lineage(folder).main)])
    rollbacks = _rollbacks(folder)
    if last == step:
        if rollbacks and rollbacks[-1]["step"] == step:
            return rollbacks[-1]
        raise ConfigError(f"the main path is at step {step} already: there is nothing behind it to take back")
    number = 1 + sum(e.get("event") == "rollback" for e in folder.events())
    aside = f"{FOLDER}/{number}"
    later = [r for r in folder.metrics(segment="main") if (r.get("step") or 0) > step]
    (folder.path / aside).mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(record) + "\n" for record in later)
    write_durably(folder.path / aside / "metrics.jsonl", text.encode())
    tree = config.model_dump(mode="json")
    first, unread = 0, {}
    for name, steps in slice_steps(config).items():
        if 0 < step <= first:
            unread[name] = tree["data"]["slices"].pop(name)
        first += steps
    event = {"event": "rollback", "number": number, "step": step, "from": last, "slices": unread}
    change(
        folder,
        event,
        config=validate_config(tree, where="the rollback").to_yaml(),
        moves=[(f"{MAIN}/step-{s:08d}", f"{aside}/main/step-{s:08d}") for s in kept if s > step],
        mark={"kind": "resume", "segment": "main", "step": step},
    )
    return event


def undo(folder: RunFolder) -> dict[str, Any]:
    """Undo the last rollback that is in force; returns the recorded event.

    Possible until `velopath gc` or until the main path has trained on from there. The caller holds the lock.
    """
    rollbacks = _rollbacks(folder)
    if not rollbacks:
        raise ConfigError("nothing to undo: no rollback of this run is in force")
    last = rollbacks[-1]
    number, step, aside = last["number"], int(last["step"]), f"{FOLDER}/{last['number']}"
    if number not in kept_aside(folder):
        raise ConfigError(f"rollback {number} cannot be undone: `velopath gc` has deleted what it took back")
    trained = [r["step"] for r in folder.metrics("step", "main")] + kept_steps(folder.path / MAIN)
    if max(trained) > step:
        raise ConfigError(
            f"rollback {number} cannot be undone: the main path has trained on from step {step} to {max(trained)}"
        )
    tree = recorded_config(folder).model_dump(mode="json")
    if clash := sorted(set(last["slices"]) & set(tree["data"]["slices"])):
        raise ConfigError(
            f"rollback {number} cannot be undone: a new slice {clash[0]!r} has taken the old one's name"
        )
    tree["data"]["slices"] |= last["slices"]
    event = {"event": "undo", "number": number, "step": step, "slices": last["slices"]}
    change(
        folder,
        event,
        config=validate_config(tree, where="the undone rollback").to_yaml(),
        moves=[
            (f"{aside}/main/step-{s:08d}", f"{MAIN}/step-{s:08d}")
            for s in kept_steps(folder.path / aside / "main")
        ],
        records=f"{aside}/metrics.jsonl",
    )
    return event


def kept_aside(folder: RunFolder) -> list[int]:
    """Numbers of the rollbacks in force whose checkpoints are still there."""
    return [r["number"] for r in _rollbacks(folder) if (folder.path / FOLDER / str(r["number"])).is_dir()]


def _rollbacks(folder: RunFolder) -> list[Record]:
    """The rollbacks in force, in order."""
    found: dict[int, Record] = {}
    for event in folder.events():
        if event.get("event") == "rollback":
            found[event["number"]] = event
        elif event.get("event") == "undo":
            found.pop(event["number"], None)
    return list(found.values())
