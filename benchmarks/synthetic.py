"""MDS folders of any number of documents, written fast: documents of one length, and shards under several names.

A shard file is written once and given other names by hard links, so that an index of 10^4 shards and 10^9 documents
takes the disk of a few shards. What is real: every index, every name, every offset table that is mapped and counted.
What is not: the payloads repeat, and the page cache holds a few shards' bytes where it would hold terabytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


def write_shard(path: Path, documents: int, tokens: int, seed: int) -> None:
    """A raw shard of `documents` documents of `tokens` uint16 tokens, 1 to 255."""
    config = json.dumps({"column_names": ["tokens"], "format": "mds"}).encode()
    sample = np.dtype([("size", "<u4"), ("shape", "u1"), ("tokens", "u1"), ("values", "<u2", (tokens,))])
    first = 4 + 4 * (documents + 1) + len(config)
    samples = np.zeros(documents, sample)
    samples["size"], samples["shape"], samples["tokens"] = 2 + 2 * tokens, 4, tokens
    samples["values"] = np.random.default_rng(seed).integers(0, 50_000, (documents, tokens), np.uint16)
    with path.open("wb") as file:
        file.write(np.uint32(documents).tobytes())
        file.write((first + sample.itemsize * np.arange(documents + 1, dtype=np.uint32)).tobytes())
        file.write(config)
        file.write(samples.tobytes())


def write_folder(folder: Path, files: Sequence[Path], documents: int) -> None:
    """An MDS folder whose shards are links to `files`, each of `documents` documents."""
    folder.mkdir(parents=True)
    entries: list[dict[str, Any]] = []
    for number, file in enumerate(files):
        name = f"shard.{number:05d}.mds"
        os.link(file, folder / name)
        data = {"basename": name, "bytes": file.stat().st_size, "hashes": {}}
        entries.append(
            {
                "version": 2, "format": "mds", "column_names": ["tokens"], "column_sizes": [None],
                "column_encodings": ["ndarray:uint16"], "compression": None, "hashes": [], "size_limit": 1 << 26,
                "samples": documents, "raw_data": data, "zip_data": None,
            }
        )  # fmt: skip
    (folder / "index.json").write_text(json.dumps({"version": 2, "shards": entries}))


def write_domains(root: Path, domains: int, shards: int, documents: int, tokens: int, files: int) -> None:
    """`domains` folders of `shards` shards of `documents` documents, from `files` different shard files."""
    root.mkdir(parents=True)
    made = [root / f".{k}.mds" for k in range(files)]
    for k, path in enumerate(made):
        write_shard(path, documents, tokens, seed=k)
    for k in range(domains):
        chosen = [made[(k * shards + j) % files] for j in range(shards)]
        write_folder(root / f"domain{k:04d}", chosen, documents)
