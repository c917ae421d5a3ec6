"""Writing MDS: documents of tokens to raw or zstd shards that mosaicml-streaming 0.13 reads too."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import zstandard
from numpy.typing import ArrayLike

from velopath.durable import make_folder, write_durably
from velopath.errors import ConfigError, DataError
from velopath.mds.format import MAX_SHARD_BYTES, TOKEN_DTYPES, hasher

_COMPRESSION = re.compile(r"zstd(?::([1-9]|1[0-9]|2[0-2]))?\Z")
_DEFAULT_LEVEL = 3


def compression_level(compression: str | None) -> int | None:
    """zstd level of "zstd" (3, the reference writer's) or "zstd:LEVEL"; None for None. Else `ConfigError`."""
    if compression is None:
        return None
    match = _COMPRESSION.match(compression)
    if match is None:
        raise ConfigError(
            f"compression is {compression!r}; expected none, zstd or zstd:LEVEL with LEVEL 1 to 22"
        )
    return int(match[1] or _DEFAULT_LEVEL)


class MdsWriter:
    """Writes documents into one MDS folder, one column `ndarray:<dtype>`; a context manager.

    A shard is closed before it would pass `size_limit` raw bytes (a longer document gets a shard of its own).
    Each finished shard is fsynced and renamed; `index.json` is written last, when the block ends well, so a
    folder without it is unfinished. `hashes` names hashes of hashlib or xxhash, kept for raw and zstd bytes.
    `compression` is None, "zstd" or "zstd:LEVEL". Raises `ConfigError` on a setting that is wrong or a folder
    that holds an index already.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        dtype: str = "uint16",
        column: str = "tokens",
        compression: str | None = "zstd",
        hashes: Sequence[str] = ("xxh64",),
        size_limit: int = 1 << 26,
    ) -> None:
        level = compression_level(compression)
        if dtype not in TOKEN_DTYPES:
            raise ConfigError(f"dtype is {dtype!r}; expected one of {', '.join(TOKEN_DTYPES)}")
        unknown = [name for name in hashes if hasher(name) is None]
        if unknown:
            raise ConfigError(f"hash {unknown[0]!r} is not known to hashlib or xxhash")
        if not 1 <= size_limit <= MAX_SHARD_BYTES:
            raise ConfigError(f"size_limit is {size_limit}; expected 1 to {MAX_SHARD_BYTES} bytes")
        self.folder = Path(folder)
        if (self.folder / "index.json").exists():
            raise ConfigError(
                f"{self.folder} holds an index.json already; write to another folder or delete it"
            )
        make_folder(self.folder)
        self.documents = 0
        self.tokens = 0
        self._dtype = np.dtype(dtype)
        self._zstd = zstandard.ZstdCompressor(level) if level is not None else None
        self._config: dict[str, Any] = {
            "version": 2,
            "format": "mds",
            "compression": compression,
            "hashes": sorted(hashes),
            "size_limit": size_limit,
            "column_names": [column],
            "column_encodings": [f"ndarray:{dtype}"],
            "column_sizes": [None],
        }
        self._header = json.dumps(self._config, sort_keys=True).encode()
        self._shards: list[dict[str, Any]] = []
        self._clear()

    def write(self, tokens: ArrayLike) -> None:
        """Add one document, a 1-D array of integers of at least one token.

        Raises `DataError` when it is empty, not 1-D, not of integers, or holds an id that does not fit the dtype.
        """
        given = np.asarray(tokens)
        if given.ndim != 1 or given.dtype.kind not in "iu" or not given.size:
            raise DataError(
                f"a document of shape {given.shape} and type {given.dtype}; expected 1-D, integers, not empty",
                path=self.folder,
                sample=self.documents,
            )
        limits = np.iinfo(self._dtype)
        for extreme in (int(given.min()), int(given.max())):
            if not max(limits.min, 0) <= extreme <= limits.max:
                raise DataError(
                    f"token id {extreme} does not fit {self._dtype} (0 to {limits.max}); choose a wider dtype",
                    path=self.folder,
                    sample=self.documents,
                )
        values = given.astype(self._dtype.newbyteorder("<"), copy=False).tobytes()
        width = max(0, (given.size.bit_length() + 7) // 8 - 1).bit_length()  # log2 of the bytes of the length
        array = bytes([(1 << 2) | width]) + given.size.to_bytes(1 << width, "little") + values
        sample = len(array).to_bytes(4, "little") + array
        if self._samples and self._bytes + len(sample) + 4 > self._config["size_limit"]:
            self._flush()
        if self._bytes + len(sample) + 4 > MAX_SHARD_BYTES:
            raise DataError(
                f"a document of {given.size} tokens is larger than a shard can be", path=self.folder
            )
        self._samples.append(sample)
        self._bytes += len(sample) + 4
        self.documents += 1
        self.tokens += given.size

    def close(self) -> None:
        """Write the last shard and the index. A writer that is left without it leaves no index."""
        if self._samples:
            self._flush()
        index = {"version": 2, "shards": self._shards}
        write_durably(self.folder / "index.json", json.dumps(index, sort_keys=True).encode())

    def __enter__(self) -> MdsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()

    def _clear(self) -> None:
        self._samples: list[bytes] = []
        self._bytes = 4 + 4 + len(self._header)

    def _flush(self) -> None:
        count = len(self._samples)
        sizes = np.fromiter(map(len, self._samples), np.int64, count)
        first = 4 + 4 * (count + 1) + len(self._header)
        offsets = (first + np.concatenate([[0], np.cumsum(sizes)])).astype("<u4")
        raw = b"".join([count.to_bytes(4, "little"), offsets.tobytes(), self._header, *self._samples])
        basename = f"shard.{len(self._shards):05d}.mds"
        raw_data, zip_data = self._describe(basename, raw), None
        if self._zstd is not None:
            raw = self._zstd.compress(raw)
            basename += ".zstd"
            zip_data = self._describe(basename, raw)
        write_durably(self.folder / basename, raw)
        self._shards.append({"samples": count, "raw_data": raw_data, "zip_data": zip_data, **self._config})
        self._clear()

    def _describe(self, basename: str, content: bytes) -> dict[str, Any]:
        hashes = {}
        for name in self._config["hashes"]:
            make = hasher(name)
            assert make is not None  # checked when the writer was made
            running = make()
            running.update(content)
            hashes[name] = running.hexdigest()
        return {"basename": basename, "bytes": len(content), "hashes": hashes}
