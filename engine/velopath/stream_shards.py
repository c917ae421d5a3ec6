"""Shards as the core takes them, and everything that is in one, decoded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from velopath import _core
from velopath.mds import ShardEntry, shard_token_column

_TYPE_CODES = {"uint8": 8, "uint16": 16, "int16": 17, "uint32": 32, "int32": 33, "uint64": 64, "int64": 65}
_READ_TOKENS = 1 << 20


def shard_of(entry: ShardEntry, bytes_dtype: str, path: str | Path) -> _core._Shard:
    """The shard whose raw file is at `path`. Raises `DataError` where its columns are not understood."""
    column = shard_token_column(entry, bytes_dtype=bytes_dtype)
    # No sample can be larger than its shard, so a larger fixed size is as good as any too large one.
    sizes = [-1 if s is None else min(s, 1 << 32) for s in entry.columns.sizes]
    code = 0 if column.dtype is None else _TYPE_CODES[column.dtype]
    length = None if column.length is None else min(column.length, 1 << 32)
    names = entry.columns.names
    return (str(path), entry.samples, entry.raw_bytes, names, sizes, column.index, column.plain, code, length)


def decode(shard: _core._Shard) -> NDArray[np.uint32]:
    """The tokens of each document, without end-of-text token, once each was decoded. Raises `DataError`."""
    stream = _core.TokenStream(
        [shard], 0
    )  # with end-of-text tokens, so that empty documents are looked at, too
    for position in range(0, stream.tokens, _READ_TOKENS):
        stream.read(position, min(_READ_TOKENS, stream.tokens - position))
    return stream.lengths - np.uint32(1)
