"""The lineage of a run on disk: one event a line in lineage.jsonl, appended durably; see `velopath.lineage`."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from velopath.errors import DataError
from velopath.lineage import Cost, Lineage, Version
from velopath.mds import load_index
from velopath.runfolder import RunFolder

ORIGIN = "velopath.json"
"""Beside an exported model: what made it, at what cost; read when a run continues from that folder."""


def read_lineage(folder: RunFolder) -> Lineage:
    """The lineage that the run's events build up; empty before the first."""
    return Lineage.from_events(folder.events())


def record_main(folder: RunFolder, step: int, slice: str, **facts: Any) -> None:
    """Note the main checkpoint at `step`, reached by reading `slice`, unless it is noted already."""
    lineage = read_lineage(folder)
    grown = lineage.with_main(step, slice, **facts)
    if grown is not lineage:
        node = next(n for n in grown.main if n.step == step)
        folder.append_event({"event": "main", **node.to_json()})


def record_version(folder: RunFolder, version: Version) -> Version:
    """Note a version; returns it as the lineage has it (its parent resolved). Raises `ConfigError` if it cannot be."""
    known = read_lineage(folder).add(version).find(version.name)
    folder.append_event({"event": "version", **known.to_json()})
    return known


def record_export(folder: RunFolder, name: str, exported: Path) -> None:
    """Note where version `name` was exported to, relative to the run folder."""
    place = os.path.relpath(exported, folder.path)
    if read_lineage(folder).find(name).export != place:
        folder.append_event({"event": "export", "name": name, "export": place})


def record_cost(folder: RunFolder, what: str, cost: Cost) -> None:
    """Note a cost beside the tree (base model, proxy), once per `what`."""
    if all(known != what for known, _ in read_lineage(folder).spent):
        folder.append_event({"event": "spend", "what": what, "cost": asdict(cost)})


def kept_steps(root: Path) -> list[int]:
    """The steps of the checkpoints in `root`, a segment's folder, in order."""
    steps = (folder.name.removeprefix("step-") for folder in root.glob("step-*"))
    return sorted(int(step) for step in steps if step.isdigit())  # a killed save leaves `step-N.replaced`


def edge_seconds(folder: RunFolder, segment: str, start: int, end: int) -> float:
    """Wall time of a segment's updates from `start` to `end`, evaluations and saves between them included, of all
    attempts: what a kill made void was spent too."""
    return sum(
        float(r.get("seconds") or 0.0)
        for r in folder.records()
        if r.get("kind") == "step"
        and r.get("segment") == segment
        and "change" not in r
        and start < r["step"] <= end
    )


def data_hash(folders: Mapping[str, str | Path]) -> str:
    """16 hex digits of the shards of a slice: domains, samples, sizes and hashes as their indexes state them."""
    known = {name: load_index(folder, files=False).fingerprint for name, folder in sorted(folders.items())}
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]


def weights_head(log: Path) -> dict[str, Any]:
    """Name, number of records and hash of the last one of a log of weights: all before it follows from the hash."""
    lines = log.read_bytes().split(b"\n")[:-1]  # without a line that a kill left unfinished
    return {"file": f"audit/{log.name}", "records": len(lines), "hash": json.loads(lines[-1])["hash"]}


def origin_cost(model_folder: str | Path) -> Cost | None:
    """What an exported model has cost by its `velopath.json`; None for a model from elsewhere."""
    path = Path(model_folder) / ORIGIN
    if not path.is_file():
        return None
    origin = RunFolder(model_folder).read_json(ORIGIN)
    numbers: list[Any] = [origin.get(k) for k in ("steps", "tokens")] if isinstance(origin, dict) else [None]
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise DataError(f"steps and tokens are {numbers}; expected whole numbers", path=path)
    return Cost(base_steps=numbers[0], tokens=numbers[1])
