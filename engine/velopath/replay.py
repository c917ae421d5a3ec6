"""Replays: the stream of (step, domain, row) ids that a run read, made again from its audit logs alone.

A log's opening record holds the order of rows, its pushes the weights, so the plan of every step follows, without
model or data. The rolling hash of the ids is compared with those in `metrics.jsonl` and in the checkpoints: a run read
what its logs say exactly if they agree.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from velopath.audit import WeightsLog, weights_log
from velopath.config import load_config
from velopath.configured_plan import slice_steps
from velopath.domains import integer_shares
from velopath.errors import ConfigError, DataError
from velopath.runfolder import RunFolder
from velopath.stream_order import next_hash

_CHUNK_ROWS = 1 << 16
"""Rows planned in one call of the core."""


class Step(NamedTuple):
    """The G rows of one step: `domains` (G,) as indexes into `names`, `row_ids` (G,); the stream's hash behind it."""

    step: int
    names: tuple[str, ...]
    domains: NDArray[np.int32]
    row_ids: NDArray[np.int64]
    hash: str


@dataclass(frozen=True)
class Stretch:
    """What a segment read of one slice: updates `start` to `end` (exclusive), by the `log` at `path`.

    `recorded` maps numbers of updates done to the hashes found there, with the file and line of each.
    """

    slice: str
    path: Path
    log: WeightsLog
    start: int
    end: int
    recorded: dict[int, list[tuple[str, Path, int | None]]]


def steps(log: WeightsLog, until: int) -> Iterator[Step]:
    """The steps of a stream from its first to `until` (exclusive); fewer where the exhaustion policy ends it."""
    order, step, hash = log.order, log.order.start_step, log.order.first_hash()
    drawn = error = [0] * len(order.names)
    mixes = [(step, log.first), *((push.step, push.weights) for push in log.pushes)]
    for at, (begin, weights) in enumerate(mixes):
        end = min(until, mixes[at + 1][0] if at + 1 < len(mixes) else until)
        if end <= begin:
            continue
        shares = integer_shares([weights[name] for name in order.names])
        while step < end:
            count = min(end - step, max(1, _CHUNK_ROWS // order.global_rows))
            domains, row_ids, drawn, error = order.draw(step, count, shares, drawn, error)
            for of_step, ids in zip(domains, row_ids, strict=True):
                hash = next_hash(hash, step, of_step, ids)
                yield Step(step, order.names, of_step, ids, hash)
                step += 1
            if len(domains) < count:
                return


def stretches(folder: RunFolder, segment: str) -> list[Stretch]:
    """The logs of a segment in the order it read them, with the hashes recorded along the way.

    Raises `ConfigError` naming the segments that there are, where the run has no log of this one.
    """
    config = load_config(folder.path / "config.yaml")
    found, first = [], 0
    for name, count in slice_steps(config).items():
        path, last = folder.audit(segment, name), first + count
        if path.is_file():
            log = weights_log(path)
            recorded = _recorded(folder, segment, name, first, last if segment == "main" else None)
            found.append(Stretch(name, path, log, log.begin, max(recorded, default=log.begin), recorded))
        first = last
    if not found:
        known = ", ".join(segments(folder)) or "none yet"
        raise ConfigError(f"no segment {segment!r} in {folder.path}; there are {known}")
    return found


def segments(folder: RunFolder) -> list[str]:
    """The segments that have an audit log: the main path, versions, the proxy."""
    slices = load_config(folder.path / "config.yaml").data.slices
    names = {
        path.name.removesuffix(f".{name}.jsonl")
        for name in slices
        for path in (folder.path / "audit").glob(f"*.{name}.jsonl")
    }
    return sorted(names, key=lambda name: (name != "main", name))


def replay(stretch: Stretch, start: int, end: int) -> Iterator[Step]:
    """The steps from `start` to `end` (exclusive) of a stretch, while every hash recorded there is compared.

    Goes on to the first record at or behind `end`, so that the last steps are covered too. Raises `DataError` naming
    the record that differs, and `ConfigError` where `end` lies behind what was recorded.
    """
    if end > stretch.end:
        raise ConfigError(f"steps up to {end} were asked for; what is recorded ends at step {stretch.end}")
    until = min((s for s in stretch.recorded if s >= end), default=end)
    agreed = None
    done = 0
    for step in steps(stretch.log, until):
        done = step.step + 1
        for hash, path, line in stretch.recorded.get(done, ()) if done > start else ():
            if hash != step.hash:
                since = "the start" if agreed is None else f"step {agreed}"
                raise DataError(
                    f"the hash of the stream up to step {done} is {hash}, the replay gives {step.hash}; "
                    f"what was read differs from the log of weights after {since}, or a record was changed",
                    path=path,
                    line=line,
                    field="stream",
                )
            agreed = done
        if start <= step.step < end:
            yield step
    if until > done and until > start:
        raise DataError(f"the stream ends before step {until}, which is recorded", path=stretch.path)


def _recorded(
    folder: RunFolder, segment: str, slice: str, first: int, last: int | None
) -> dict[int, list[tuple[str, Path, int | None]]]:
    """Updates done -> hashes recorded there: step records behind `first` up to `last`, and checkpoints of the slice."""
    found: dict[int, list[tuple[str, Path, int | None]]] = {}
    metrics = folder.path / "metrics.jsonl"
    for line, record in enumerate(folder.records(), 1):
        if record.get("segment") != segment:
            continue
        if record["kind"] == "resume":
            found = {step: hashes for step, hashes in found.items() if step <= record["step"]}
        elif record["kind"] == "step" and first < record["step"] and (last is None or record["step"] <= last):
            found[record["step"]] = [(str(record.get("stream")), metrics, line)]
    for path in sorted((folder.path / "checkpoints" / segment).glob("step-*/state.json")):
        state = RunFolder(path.parent).read_json(path.name)
        if state["slice"] == slice:
            found.setdefault(state["step"], []).append((str(state["session"].get("stream")), path, None))
    return found
