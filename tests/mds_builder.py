"""Hand-built MDS folders for tests: written from the format's description, without velopath's own writer."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import zstandard


def raw_shard(samples: list[bytes], config: dict[str, Any] | None = None) -> bytes:
    """A raw shard: u32 n, u32 offset[n+1], config JSON, samples."""
    header = json.dumps(config or {"version": 2}, sort_keys=True).encode()
    offsets = [4 + 4 * (len(samples) + 1) + len(header)]
    for sample in samples:
        offsets.append(offsets[-1] + len(sample))
    return struct.pack(f"<{len(offsets) + 1}I", len(samples), *offsets) + header + b"".join(samples)


def pack(values: list[bytes], sizes: list[int | None]) -> bytes:
    """A sample: u32 sizes of the variable columns, then the payloads."""
    heads = [struct.pack("<I", len(v)) for v, size in zip(values, sizes, strict=True) if size is None]
    return b"".join(heads + values)


def write_folder(
    folder: Path,
    samples: list[list[bytes]],
    columns: dict[str, tuple[str, int | None]],
    *,
    zstd: bool = False,
    hashes: tuple[str, ...] = (),
) -> dict[str, Any]:
    """One shard with `columns` (name -> encoding, fixed size) and its index, which is returned."""
    folder.mkdir(parents=True, exist_ok=True)
    sizes = [size for _, size in columns.values()]
    raw = raw_shard([pack(values, sizes) for values in samples])
    zipped = zstandard.compress(raw) if zstd else None
    (folder / ("shard.00000.mds.zstd" if zstd else "shard.00000.mds")).write_bytes(zipped or raw)

    def describe(name: str, content: bytes) -> dict[str, Any]:
        digests = {h: hashlib.new(h, content).hexdigest() for h in hashes}
        return {"basename": name, "bytes": len(content), "hashes": digests}

    entry = {
        "version": 2,
        "format": "mds",
        "column_names": list(columns),
        "column_encodings": [encoding for encoding, _ in columns.values()],
        "column_sizes": sizes,
        "compression": "zstd" if zstd else None,
        "hashes": list(hashes),
        "size_limit": 1 << 26,
        "samples": len(samples),
        "raw_data": describe("shard.00000.mds", raw),
        "zip_data": describe("shard.00000.mds.zstd", zipped) if zipped else None,
    }
    index = {"version": 2, "shards": [entry]}
    (folder / "index.json").write_text(json.dumps(index))
    return index
