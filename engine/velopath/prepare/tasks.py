"""What the worker processes of `prepare` do: scan files and encode parts; and the
writing of a domain from its parts.

A part is a run of documents of one domain and split in their final order; its tokens lie in a temporary file
until the domain is written. The same task gives the same bytes in every process.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from velopath.durable import durable, sync_folder
from velopath.mds import MdsWriter
from velopath.prepare.documents import Reading, Scan, Source, read_texts, scan
from velopath.tokenizer import TextTokenizer


@dataclass(frozen=True)
class ScanTask:
    """Files of one domain to scan; `numbers` are their file numbers in it."""

    domain: int
    numbers: tuple[int, ...]
    sources: tuple[Source, ...]
    reading: Reading
    copy: bool
    stored_bytes: int


def scan_files(task: ScanTask) -> list[Scan]:
    """Scan each file of the task; raises as `documents.scan`."""
    return [
        scan(source, number, task.reading, copy=task.copy)
        for number, source in zip(task.numbers, task.sources, strict=True)
    ]


@dataclass(frozen=True)
class PartTask:
    """Documents to encode into the file `path`; their file numbers index `sources`."""

    domain: int
    path: Path
    sources: tuple[Source, ...]
    documents: NDArray[np.void]
    reading: Reading
    tokenizer: Path
    dtype: str


def encode_part(task: PartTask) -> None:
    """Encode the documents and write the part durably: their token counts, then their tokens, as two arrays.

    A part that is there already, from a run that was killed, is left as it is.
    """
    if task.path.exists():
        return
    texts = read_texts(task.sources, task.documents, task.reading)
    encoded = [ids for ids in _tokenizer(task.tokenizer).encode(texts) if ids.size]
    counts = np.array([ids.size for ids in encoded], dtype=np.int64)
    tokens = np.concatenate([*encoded, np.zeros(0, np.uint32)]).astype(task.dtype)
    with durable(task.path) as file:
        np.save(file, counts, allow_pickle=False)
        np.save(file, tokens, allow_pickle=False)


@lru_cache(maxsize=1)
def _tokenizer(path: Path) -> TextTokenizer:
    return TextTokenizer(path.read_text(encoding="utf-8"), eos="")


def read_part(path: Path) -> Iterator[NDArray[np.unsignedinteger[Any]]]:
    """Yield the token arrays of a part's documents."""
    with open(path, "rb") as file:
        counts = np.load(file, allow_pickle=False)
        tokens = np.load(file, allow_pickle=False)
    yield from np.split(tokens, np.cumsum(counts)[:-1]) if counts.size else ()


def write_domain(
    parts: Mapping[str, Sequence[Path]],
    name: str,
    *,
    data: Path,
    scratch: Path,
    dtype: str,
    compression: str | None,
    shard_bytes: int,
) -> dict[str, tuple[int, int]]:
    """Write the parts of one domain (split -> files in order) to `data/<split>/<name>`, by way of `scratch`.

    Returns (documents, tokens) by split; tokens are those of the documents, without end-of-text tokens.
    """
    counts = {}
    for split, files in parts.items():
        folder = scratch / split
        shutil.rmtree(folder, ignore_errors=True)
        with MdsWriter(folder, dtype=dtype, compression=compression, size_limit=shard_bytes) as writer:
            for part in files:
                for tokens in read_part(part):
                    writer.write(tokens)
        counts[split] = (writer.documents, writer.tokens)
    for split in parts:
        target = data / split / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(scratch / split, target)
        sync_folder(target.parent)
    return counts
