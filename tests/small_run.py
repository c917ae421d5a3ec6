"""Runs of a few dozen steps on the `data` fixture, and what of a run folder must be bit-identical."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import yaml

from velopath.config import RunConfig, validate_config
from velopath.runfolder import RunFolder

# Two slices of 40 steps, alpha 0.6: branches of 24 steps at 16 and 56. Domain "tables" starts below its share, so
# that the controller has something to raise. 5 does not divide 16: a branch begins between two controls.
TREE: dict[str, Any] = {
    "title": "small",
    "data": {
        "slices": {
            "one": {"steps": 40, "weights": {"code": 0.5, "prose": 0.3, "tables": 0.2}},
            "two": {"steps": 40},
        }
    },
    "model": {
        "overrides": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
        }
    },
    "control": {
        "targets": {"code": 1.0, "prose": 1.2, "tables": 1.4},
        "every": 5,
        "heldout_tokens": 200,
    },
    "path": {"peak": 1e-2, "warmup_steps": 4},
    "train": {"rows": 4, "row_tokens": 32, "log_every": 1, "checkpoint_every": 7, "device": "cpu"},
    "proxy": {"steps": 30, "points": 5, "first": 0.2},
    "evaluate": {"tokens": 400},
}
TIMINGS = ("tokens_per_second", "flops_per_second", "mfu", "data_wait_share", "seconds", "phase_seconds")


def tree(data: Path, **changes: Any) -> dict[str, Any]:
    """`TREE` on `data` with changes; a double underscore stands for the dot: `train__rows=2`."""
    made = copy.deepcopy(TREE)
    for entry in made["data"]["slices"].values():
        entry["root"] = str(data)
    for key, value in changes.items():
        *parents, last = key.split("__")
        node = made
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return made


def config(data: Path, **changes: Any) -> RunConfig:
    return validate_config(tree(data, **changes))


def write_config(path: Path, data: Path, **changes: Any) -> Path:
    path.write_text(yaml.safe_dump(tree(data, **changes), sort_keys=False))
    return path


def in_force(folder: Path, kind: str | None = None, segment: str | None = None) -> list[dict[str, Any]]:
    """The metrics in force without what a clock says, sorted."""
    found = [
        {k: v for k, v in record.items() if k not in TIMINGS}
        for record in RunFolder(folder).metrics(kind, segment)
        if record["kind"] != "sampler"
    ]
    return sorted(found, key=lambda r: (r["segment"], r["step"], r["kind"], r.get("slice", "")))


def newest(folder: Path) -> dict[str, str]:
    """Segment -> manifest of its last checkpoint: sizes and sha256 of model, optimiser, generators and state."""
    found = {}
    for segment in sorted((folder / "checkpoints").iterdir()):
        last = max(p for p in segment.glob("step-????????"))
        found[f"{segment.name}/{last.name}"] = (last / "manifest.json").read_text()
    return found


def timeless(event: dict[str, Any]) -> dict[str, Any]:
    """A lineage event without wall time, machine and the log of weights, in which a resume leaves a record."""
    notes = {k: v for k, v in event.get("notes", {}).items() if k not in ("hardware", "weights_log")}
    return {k: v for k, v in event.items() if k != "seconds"} | ({"notes": notes} if "notes" in event else {})


def outcome(folder: Path) -> dict[str, Any]:
    """Everything of a run that a kill and a resume must leave bit for bit as it would have been."""
    exports = {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted((folder / "exports").rglob("*.safetensors"))
    }
    lineage = sorted(json.dumps(timeless(e), sort_keys=True) for e in RunFolder(folder).events())
    return {
        "checkpoints": newest(folder),
        "exports": exports,
        "metrics": in_force(folder),
        "lineage": lineage,
    }
