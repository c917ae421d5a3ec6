"""Shards of a prepared domain, each written from parts by a task of its own, and put together at the end.

Which documents a shard holds depends on their token counts alone, so any process may write it, and a killed run
keeps those that are finished.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from velopath.durable import sync_folder, write_durably
from velopath.mds import MdsWriter, load_index
from velopath.token_counts import write_counts

_SAMPLE_OVERHEAD = 24
_SHARD_OVERHEAD = 512
"""Bytes that MDS adds to a document and to a shard, at most."""


@dataclass(frozen=True)
class ShardFormat:
    """How shards are stored: token type, compression and largest raw size."""

    dtype: str
    compression: str | None
    shard_bytes: int


@dataclass(frozen=True)
class ShardTask:
    """Write `documents` documents, those of `parts` after the first `skip`, as the one shard of the MDS `folder`;
    `bytes` is about its raw size, `tokens` what the documents hold without ends."""

    domain: int
    parts: tuple[Path, ...]
    skip: int
    documents: int
    bytes: int
    tokens: int
    folder: Path
    form: ShardFormat


@dataclass(frozen=True)
class SplitShards:
    """The shards of one split of a domain, in order, and what they hold: documents, and tokens without ends."""

    tasks: tuple[ShardTask, ...]
    documents: int
    tokens: int


def plan_shards(domain: int, parts: Sequence[Path], folder: Path, form: ShardFormat) -> SplitShards:
    """Cut the documents of `parts` into shards of at most `form.shard_bytes`, but for a document that is larger."""
    counts = [_part_counts(path) for path in parts]
    starts = np.cumsum([0, *map(len, counts)])
    lengths = np.concatenate([np.zeros(0, np.int64), *counts])
    del counts
    ends = lengths * np.dtype(form.dtype).itemsize
    ends += _SAMPLE_OVERHEAD
    np.cumsum(ends, out=ends)
    tasks: list[ShardTask] = []
    first = 0
    while first < len(lengths):
        before = int(ends[first - 1]) if first else 0
        last = int(np.searchsorted(ends, before + form.shard_bytes - _SHARD_OVERHEAD, side="right"))
        last = max(last, first + 1)
        a = int(np.searchsorted(starts, first, side="right")) - 1
        b = int(np.searchsorted(starts, last, side="left"))
        tasks.append(
            ShardTask(
                domain,
                tuple(parts[a:b]),
                skip=first - int(starts[a]),
                documents=last - first,
                bytes=int(ends[last - 1]) - before,
                tokens=int(lengths[first:last].sum()),
                folder=folder / f"{len(tasks):05d}",
                form=form,
            )
        )
        first = last
    return SplitShards(tuple(tasks), len(lengths), int(lengths.sum()))


def write_shard(task: ShardTask) -> None:
    """Write the shard, unless an earlier run finished it."""
    if (task.folder / "index.json").is_file():
        return
    shutil.rmtree(task.folder, ignore_errors=True)
    form = task.form
    documents = (tokens for part in task.parts for tokens in _read_part(part))
    with MdsWriter(
        task.folder, dtype=form.dtype, compression=form.compression, size_limit=form.shard_bytes
    ) as writer:
        for tokens in islice(documents, task.skip, task.skip + task.documents):
            writer.write(tokens)


def join_shards(tasks: Sequence[ShardTask], target: Path) -> None:
    """Move the shards of `tasks` into the MDS folder `target`, with its index and the tokens of each shard."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    entries: list[dict[str, Any]] = []
    for number, task in enumerate(tasks):
        (entry,) = json.loads((task.folder / "index.json").read_bytes())["shards"]
        for data in (entry["raw_data"], entry["zip_data"]):
            if data is not None:
                name = data["basename"]
                data["basename"] = name.replace("00000", f"{number:05d}", 1)
                if (task.folder / name).is_file():
                    _link(task.folder / name, target / data["basename"])
        entries.append(entry)
    write_durably(
        target / "index.json", json.dumps({"version": 2, "shards": entries}, sort_keys=True).encode()
    )
    write_counts(load_index(target), [task.tokens for task in tasks])
    sync_folder(target.parent)


def _link(path: Path, target: Path) -> None:
    """Give the file a second name, not another one: a run that is killed now finds it where it was."""
    try:
        os.link(path, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(path, target)


def _part_counts(path: Path) -> NDArray[np.int64]:
    with open(path, "rb") as file:
        counts: NDArray[np.int64] = np.load(file, allow_pickle=False)
    return counts


def _read_part(path: Path) -> Iterator[NDArray[np.unsignedinteger[Any]]]:
    """Yield the token arrays of a part's documents."""
    with open(path, "rb") as file:
        counts = np.load(file, allow_pickle=False)
        tokens = np.load(file, allow_pickle=False)
    yield from np.split(tokens, np.cumsum(counts)[:-1]) if counts.size else ()
