"""What of a run can be proven from its folder: logs, streams, checkpoints, lineage, exports; see `verify_run`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from velopath.audit import read_log, weights_log
from velopath.checkpoint import load_checkpoint, step_folder
from velopath.errors import ConfigError, DataError, VelopathError
from velopath.hf import load_hf
from velopath.lineage import Lineage, Version
from velopath.replay import replay, segments, stretches
from velopath.runfolder import RunFolder
from velopath.runlineage import ORIGIN
from velopath.tensor_files import load_tensors, named_tensors, read_json

MAIN = "main"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: what it is, what was found, and the error that it gave, if any."""

    kind: str
    name: str
    found: str
    error: DataError | None = None


def verify_run(path: Path) -> Iterator[Finding]:
    """Look at everything in a run folder and yield a finding each, damaged or not.

    Logs: every chain of hashes, rewinds and forks. Streams: replayed and compared with the recorded hashes.
    Checkpoints: sizes and SHA-256 of all files. Lineage: its digests are those of the checkpoints. Exports: every
    tensor bit for bit that of its checkpoint. Shards are `velopath inspect --verify`'s. Raises `DataError` where
    `path` is no run folder.
    """
    folder = RunFolder(path)
    if not (path / "config.yaml").is_file():
        raise DataError("not a run folder: it has no config.yaml", path=path)
    yield _look("record", "metrics.jsonl", lambda: f"{len(folder.metrics()):,} records in force")
    for log in sorted((path / "audit").glob("*.jsonl")):
        yield _look("log", f"audit/{log.name}", partial(_log, log))
    for segment in segments(folder):
        yield _look("stream", segment, partial(_stream, folder, segment))
    digests: dict[Path, str] = {}
    for root in sorted([*path.glob("checkpoints/*/step-*"), *path.glob("rolled-back/*/main/step-*")]):
        if not root.name.endswith(".replaced"):
            name = f"{root.parent.name}@{int(root.name.removeprefix('step-'))}"
            yield _look("checkpoint", name, partial(_checkpoint, root, digests))
    yield from _lineage(folder, digests)
    for export in sorted((path / "exports").glob("*")):
        if export.is_dir() and not export.name.startswith("."):
            yield _look("export", export.name, partial(_export, folder, export))


def _look(kind: str, name: str, check: Callable[[], str]) -> Finding:
    try:
        return Finding(kind, name, check())
    except VelopathError as error:
        found = error if isinstance(error, DataError) else DataError(str(error))
        return Finding(kind, name, "damaged", found)


def _log(path: Path) -> str:
    records, log = read_log(path), weights_log(path)
    kinds = {kind: sum(r["kind"] == kind for r in records) for kind in ("push", "rewind", "fork")}
    left_out = {s["shard"] for r in records if r["kind"] == "quarantine" for s in r["details"]["shards"]}
    kinds |= {"shard left out": len(left_out)} if left_out else {}
    seen = ", ".join(f"{kind} {n}" for kind, n in kinds.items())
    return f"{len(records)} records ({seen}); pushes in force: {len(log.pushes)}"


def _stream(folder: RunFolder, segment: str) -> str:
    parts = []
    for stretch in stretches(folder, segment):
        for _ in replay(stretch, stretch.start, stretch.end):
            pass
        compared = sum(len(hashes) for hashes in stretch.recorded.values())
        parts.append(f"{stretch.slice} {stretch.start}:{stretch.end}, {compared} hashes agree")
    return "; ".join(parts)


def _checkpoint(root: Path, digests: dict[Path, str]) -> str:
    checkpoint = load_checkpoint(root)
    expected = (root.parent.name, root.name)
    found = (checkpoint.state.get("segment"), f"step-{checkpoint.state.get('step', 0):08d}")
    if found != expected:
        raise DataError(
            f"it is {'/'.join(map(str, found))}; expected {'/'.join(expected)}", path=root / "state.json"
        )
    digests[root] = checkpoint.digest
    return f"sha256 {checkpoint.digest[:12]}"


def _lineage(folder: RunFolder, digests: dict[Path, str]) -> Iterator[Finding]:
    """The lineage's own order, and each node's digest against the checkpoint that is there."""
    path = folder.path / "lineage.jsonl"
    lineage = Lineage()
    lines: dict[str, int] = {}
    try:
        for line, event in enumerate(folder.events(), 1):
            try:
                lineage = lineage.apply(event)
            except ConfigError as error:
                raise DataError(str(error), path=path, line=line) from error
            lines |= {node.name: line for node in lineage.nodes if node.name not in lines}
    except DataError as error:
        yield Finding("lineage", path.name, "damaged", error)
        return
    for node in lineage.nodes:
        yield _look("lineage", node.name, partial(_node, folder, node, digests, path, lines[node.name]))


def _node(folder: RunFolder, node: Version, digests: dict[Path, str], path: Path, line: int) -> str:
    segment = MAIN if node.kind == MAIN else node.name
    parent = folder.path / ("checkpoints" if node.rolled_back is None else f"rolled-back/{node.rolled_back}")
    root = step_folder(parent / segment, node.step)
    if root not in digests:
        if node.kind == MAIN and not root.exists():
            return "its checkpoint was not kept"
        raise DataError(f"no whole checkpoint {root.relative_to(folder.path)}", path=path, line=line)
    if node.checkpoint is not None and node.checkpoint != digests[root]:
        raise DataError(
            f"the digest of {root.relative_to(folder.path)} is {digests[root][:12]}, {node.name} has "
            f"{node.checkpoint[:12]}",
            path=path,
            line=line,
            field="checkpoint",
        )
    return f"step {node.step} of {node.slice}, digest agrees"


def _export(folder: RunFolder, export: Path) -> str:
    origin: Any = read_json(export / ORIGIN)
    if not isinstance(origin, dict) or not isinstance(origin.get("model"), str):
        raise DataError("expected the model that was exported", path=export / ORIGIN, field="model")
    if not isinstance(origin.get("step"), int):
        raise DataError("expected the step that was exported", path=export / ORIGIN, field="step")
    segment, _, step = origin["model"].partition("@")
    root = step_folder(folder.path / "checkpoints" / segment, int(step or origin["step"]))
    if not root.is_dir() and segment == MAIN:
        return f"of {origin['model']}, whose checkpoint was not kept"
    if not root.is_dir():
        raise DataError(f"no checkpoint {root.relative_to(folder.path)}", path=export / ORIGIN, field="model")
    _, decoder = load_hf(export)
    weights = load_tensors(root / "model.safetensors")
    exported = named_tensors(decoder)
    for name in sorted(set(exported) | set(weights)):
        if (
            name not in exported
            or name not in weights
            or not torch.equal(exported[name], weights[name].float())
        ):
            raise DataError(f"tensor {name!r} is not that of {root.relative_to(folder.path)}", path=export)
    return f"of {origin['model']}: {len(exported)} tensors agree bit for bit"
