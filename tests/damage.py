"""Damage to a sound MDS folder, for the table in `tests/corruptions.py`.

A sound folder has three shards of four documents of 40 uint16 tokens. Its variant is `raw` or `zstd`, with hashes, or
`bare`: raw without hashes, so that only sizes, offsets and shapes can tell.
"""

from __future__ import annotations

import io
import json
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

from mds_builder import pack, raw_shard
from velopath.mds import MdsWriter

DOCUMENTS = [np.arange(40, dtype="uint16") + 100 * k for k in range(12)]


class Folder:
    """A sound MDS folder to be damaged; `index` is written back by `save`."""

    def __init__(self, path: Path, variant: str) -> None:
        self.path = path
        hashes = {"raw": ["sha1"], "zstd": ["xxh64"], "bare": []}[variant]
        compression = "zstd" if variant == "zstd" else None
        with MdsWriter(path, compression=compression, hashes=hashes, size_limit=600) as writer:
            for document in DOCUMENTS:
                writer.write(document)
        self.index: Any = json.loads((path / "index.json").read_text())
        assert [entry["samples"] for entry in self.index["shards"]] == [4, 4, 4]

    def save(self) -> None:
        (self.path / "index.json").write_text(json.dumps(self.index))

    def file(self, shard: int = 1) -> Path:
        entry = self.index["shards"][shard]
        return self.path / (entry["zip_data"] or entry["raw_data"])["basename"]  # type: ignore[no-any-return]

    def patch(self, at: int, content: bytes) -> None:
        """Bytes of shard 1, from the front or, negative, from the back."""
        data = bytearray(self.file().read_bytes())
        at %= len(data)
        data[at : at + len(content)] = content
        self.file().write_bytes(data)

    def replace(self, content: bytes, **raw: Any) -> None:
        """Other content for shard 1, with the size that the index then needs; `raw` changes raw_data."""
        self.file().write_bytes(content)
        entry = self.index["shards"][1]
        (entry["zip_data"] or entry["raw_data"]).update({"bytes": len(content), "hashes": {}})
        entry["raw_data"].update({"hashes": {}} | raw)
        self.save()

    def samples(self, samples: list[bytes], **columns: Any) -> None:
        """Other samples for shard 1, and columns if given."""
        self.index["shards"][1].update({"samples": len(samples)} | columns)
        self.replace(raw_shard(samples))


@dataclass(frozen=True)
class Case:
    """A row of the table."""

    name: str
    variant: str
    damage: Callable[[Folder], object]
    error: str  # of read_documents; of the sampler too, unless it has its own
    sampler: str | None = None


def index(*path: Any, to: Any) -> Callable[[Folder], None]:
    """Sets one value of index.json."""

    def damage(folder: Folder) -> None:
        place = folder.index
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = to
        folder.save()

    return damage


def entry(*path: Any, to: Any) -> Callable[[Folder], None]:
    return index("shards", 1, *path, to=to)


def text(content: str | bytes) -> Callable[[Folder], object]:
    data = content.encode() if isinstance(content, str) else content
    return lambda f: (f.path / "index.json").write_bytes(data)


def patch(at: int, content: bytes) -> Callable[[Folder], None]:
    return lambda f: f.patch(at, content)


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def no_file(make: Callable[[Path], object]) -> Callable[[Folder], None]:
    """Something else in the place of index.json."""

    def damage(folder: Folder) -> None:
        (folder.path / "index.json").unlink()
        make(folder.path / "index.json")

    return damage


def linked(folder: Folder) -> None:
    outside = folder.path.parent / "outside.mds"
    folder.file().rename(outside)
    folder.file().symlink_to(outside)


def linked_folder(folder: Folder) -> None:
    outside = folder.path.parent / "outside"
    outside.mkdir()
    folder.file().rename(outside / "shard.00001.mds")
    (folder.path / "sub").symlink_to(outside)
    entry("raw_data", "basename", to="sub/shard.00001.mds")(folder)


def swapped(folder: Folder) -> None:
    first, second = folder.file(1), folder.file(2)
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)


def swapped_entries(folder: Folder) -> None:
    """Hashes and names agree, but one shard stands in for another of the same size: only its name tells."""
    folder.index["shards"][2] = folder.index["shards"][1]
    folder.save()


def as_directory(folder: Folder) -> None:
    folder.file().unlink()
    folder.file().mkdir()


def as_pipe(folder: Folder) -> None:
    folder.file().unlink()
    os.mkfifo(folder.file())


def raw_of(folder: Folder) -> bytes:
    return zstandard.decompress(folder.file().read_bytes())


def truncated_frame(folder: Folder) -> None:
    folder.replace(folder.file().read_bytes()[:-9])


def trailing_garbage(folder: Folder) -> None:
    folder.replace(folder.file().read_bytes() + b"garbage!")


def second_frame(folder: Folder) -> None:
    folder.replace(folder.file().read_bytes() + zstandard.compress(b"more"))


def short_frame(folder: Folder) -> None:
    folder.replace(zstandard.compress(raw_of(folder)[:-2]))


def bomb(folder: Folder) -> None:
    """16 kB that inflate to 512 MB."""
    folder.replace(b"".join([zstandard.ZstdCompressor(19).compress(bytes(1 << 26))] * 8))


def bomb_in_index(folder: Folder) -> None:
    """The index itself asks for 4 GB; the frame has 64 MB of zeros behind a sound header of 4 samples."""
    folder.replace(zstandard.compress(raw_of(folder)[:24] + bytes(1 << 20)), bytes=(1 << 32) - 1)


def false_size(folder: Folder) -> None:
    """A frame whose header claims 2^60 bytes: magic, descriptor with 8 bytes of size, and a raw block."""
    folder.replace(b"\x28\xb5\x2f\xfd" + b"\xe0" + struct.pack("<Q", 1 << 60) + b"\x01\x00\x00")


def wide_window(folder: Folder) -> None:
    """A frame that asks its reader for a window of 2 GiB."""
    raw = raw_of(folder)
    settings = zstandard.ZstdCompressionParameters.from_level(3, window_log=31, enable_ldm=True)
    out = io.BytesIO()
    with zstandard.ZstdCompressor(compression_params=settings).stream_writer(out, closefd=False) as writer:
        writer.write(raw)
    folder.replace(out.getvalue())


def sizes_wrap(folder: Folder) -> None:
    """Two variable columns whose sizes have the right sum modulo 2^32."""
    value = b"\x04\x02\x05\x00\x06\x00"
    head = u32(0xFFFFFFFF) + u32(len(value) + 2)
    folder.samples([pack([b"x", value], [None, None]), head + b"x" + value], **TWO_COLUMNS)


TWO_COLUMNS = {
    "column_names": ["a", "tokens"],
    "column_encodings": ["bytes", "ndarray:uint16"],
    "column_sizes": [None, None],
}


def values(*payloads: bytes, encoding: str = "ndarray:uint16") -> Callable[[Folder], None]:
    return lambda f: f.samples([pack([p], [None]) for p in payloads], column_encodings=[encoding])
