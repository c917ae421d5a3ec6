"""The MDS format, version 2: columns, encodings that hold tokens, hashes, and the bounds of a raw shard.

Little-endian throughout. A raw shard is `u32 n`, `u32 offset[n+1]`, a JSON text, then n samples back to back;
a sample is a u32 size for each variable column, then the columns' payloads. n is the number of samples.
Source: mosaicml-streaming 0.13, `streaming/base/format/mds`.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from velopath.errors import DataError
from velopath.urls import redact

MAX_SHARD_BYTES = (1 << 32) - 1
"""Offsets are u32, so a raw shard is smaller than 4 GiB."""
TOKEN_COLUMNS = ("tokens", "input_ids")
"""Column names that are taken for tokens, in this order of preference."""

# Code of a value type in an `ndarray` column without a dtype of its own.
_CODES = {
    8: "uint8", 9: "int8", 16: "uint16", 17: "int16", 18: "float16", 32: "uint32", 33: "int32", 34: "float32",
    64: "uint64", 65: "int64", 66: "float64",
}  # fmt: skip
TOKEN_DTYPES = ("uint8", "uint16", "int16", "uint32", "int32", "uint64", "int64")
_SCALAR_BYTES = {"int": 8} | {d: np.dtype(d).itemsize for d in _CODES.values()}
_IMAGES = {"pil", "jpeg", "jpeg_array", "jpegarray", "png", "list[pil]", "list[jpeg]", "list[png]"}
_VARIABLE = {"bytes", "str", "str_int", "str_float", "str_decimal", "json"} | _IMAGES
_NDARRAY = re.compile(r"ndarray(?::(?P<dtype>[a-z]+[0-9]+)(?::(?P<shape>[0-9]+(?:,[0-9]+)*))?)?\Z")


@dataclass(frozen=True)
class Columns:
    """Columns of a shard in stored order: parallel names, encodings and fixed sizes in bytes (None = variable)."""

    names: tuple[str, ...]
    encodings: tuple[str, ...]
    sizes: tuple[int | None, ...]


@dataclass(frozen=True)
class ShardEntry:
    """One shard of an index: `path` is the raw file, `zip_path` the zstd file or None where there is none.

    `raw_bytes` and `zip_bytes` are the sizes that the index states; the hashes map an algorithm to hex. `url` is that
    of the file to fetch, with its credentials, where the folder is remote; the paths are then only names.
    """

    path: Path
    zip_path: Path | None
    compression: str | None
    samples: int
    raw_bytes: int
    zip_bytes: int | None
    raw_hashes: Mapping[str, str]
    zip_hashes: Mapping[str, str]
    columns: Columns
    url: str | None = field(default=None, repr=False)

    @property
    def place(self) -> str:
        """The file that is fetched or read, for messages: no credentials."""
        return redact(self.url) if self.url is not None else str(self.zip_path or self.path)

    @property
    def raw_place(self) -> str:
        """The shard, for messages about what its raw bytes hold."""
        return redact(self.url) if self.url is not None else str(self.path)


@dataclass(frozen=True)
class TokenColumn:
    """The column that holds tokens: its place, and how to read it.

    `dtype` None: each sample begins with a byte for it. `length` None: each sample states its shape (never
    for `plain`, raw values whose number follows from the size).
    """

    index: int
    name: str
    encoding: str
    dtype: str | None
    length: int | None
    plain: bool


def fixed_size(encoding: str) -> int | None:
    """Bytes of one value of `encoding`, None where it varies. Raises `ValueError` on an encoding that is not
    known, and on `pkl`, which runs code when it is read."""
    if encoding == "pkl":
        raise ValueError(
            "encoding 'pkl' runs code when it is read and is refused; write the column as 'ndarray' or 'json'"
        )
    if encoding in _SCALAR_BYTES:
        return _SCALAR_BYTES[encoding]
    if encoding in _VARIABLE:
        return None
    match = _NDARRAY.match(encoding)
    if match is None or (match["dtype"] is not None and match["dtype"] not in _CODES.values()):
        raise ValueError(f"encoding {encoding!r} is not one of MDS version 2")
    if match["shape"] is None:
        return None
    shape = [int(d) for d in match["shape"].split(",")]
    if min(shape) < 1:
        raise ValueError(f"encoding {encoding!r} has an axis of length 0")
    return math.prod(shape) * np.dtype(match["dtype"]).itemsize


def token_column(columns: Columns, *, bytes_dtype: str = "int64") -> TokenColumn:
    """The column named `tokens`, else `input_ids`; a `bytes` column holds `bytes_dtype` values.

    Raises `DataError` when there is none, or when its encoding cannot hold a 1-D array of integers.
    """
    name = next((n for n in TOKEN_COLUMNS if n in columns.names), None)
    if name is None:
        raise DataError(
            f"no column of tokens among {list(columns.names)}; expected one named tokens or input_ids"
        )
    index = columns.names.index(name)
    encoding = columns.encodings[index]
    if encoding == "bytes":
        if bytes_dtype not in TOKEN_DTYPES:
            raise DataError(
                f"bytes columns cannot hold {bytes_dtype!r} tokens; expected one of {TOKEN_DTYPES}",
                field=name,
            )
        return TokenColumn(index, name, encoding, bytes_dtype, None, plain=True)
    match = _NDARRAY.match(encoding)
    if match is None or (match["dtype"] not in TOKEN_DTYPES and match["dtype"] is not None):
        raise DataError(
            f"encoding {encoding!r} holds no token array; expected ndarray:TYPE or bytes, TYPE one of {TOKEN_DTYPES}",
            field=name,
        )
    if match["shape"] is None:
        return TokenColumn(index, name, encoding, match["dtype"], None, plain=False)
    if "," in match["shape"]:
        raise DataError(
            f"encoding {encoding!r} has more than one axis; expected a 1-D array of tokens", field=name
        )
    return TokenColumn(index, name, encoding, match["dtype"], int(match["shape"]), plain=False)


def sample_offsets(shard: memoryview, entry: ShardEntry) -> NDArray[np.int64]:
    """Offsets of the n samples of a raw shard and of its end, int64 (n+1,), after checking every bound.

    Raises `DataError` when size, number of samples or offsets do not fit each other and the index.
    """

    def wrong(problem: str, field: str) -> DataError:
        return DataError(problem, path=entry.raw_place, field=field)

    if len(shard) != entry.raw_bytes:
        raise wrong(f"the shard has {len(shard)} bytes, its index says {entry.raw_bytes}", "raw_data.bytes")
    if len(shard) < 8:
        raise wrong(f"a shard of {len(shard)} bytes has no header", "raw_data.bytes")
    samples = int.from_bytes(shard[:4], "little")
    if samples != entry.samples:
        raise wrong(f"the shard holds {samples} samples, its index says {entry.samples}", "samples")
    head = 4 + 4 * (samples + 1)
    if head > len(shard):
        raise wrong(f"{samples} samples need a table of {head} bytes, the shard has {len(shard)}", "samples")
    offsets = np.frombuffer(shard[4:head], "<u4").astype(np.int64)
    if offsets[0] < head:
        raise wrong(f"the first offset, {offsets[0]}, lies inside the table, which ends at {head}", "offset")
    falling = np.flatnonzero(np.diff(offsets) < 0)
    if falling.size:
        first = int(falling[0])
        raise DataError(
            f"offsets fall from {offsets[first]} to {offsets[first + 1]}",
            path=entry.raw_place,
            sample=first,
            field="offset",
        )
    if offsets[-1] != len(shard):
        raise wrong(f"the last sample ends at {offsets[-1]}, the shard at {len(shard)}", "offset")
    return offsets


def sample_tokens(sample: memoryview, columns: Columns, column: TokenColumn) -> NDArray[np.integer[Any]]:
    """Tokens of one sample as a new 1-D array of the stored type.

    Raises `ValueError` when sizes, type or shape do not fit; the caller adds shard and sample.
    """
    head = 4 * columns.sizes.count(None)
    if head > len(sample):
        raise ValueError(f"the sample has {len(sample)} bytes, the sizes of its columns alone need {head}")
    begin = head
    place = (0, 0)
    variable = 0
    for k, fixed in enumerate(columns.sizes):
        size = fixed
        if size is None:
            size = int.from_bytes(sample[4 * variable : 4 * variable + 4], "little")
            variable += 1
        if k == column.index:
            place = (begin, begin + size)
        begin += size
    if begin != len(sample):
        raise ValueError(f"the columns need {begin} bytes, the sample has {len(sample)}")
    tokens = _decode(sample[place[0] : place[1]], column)
    if tokens.dtype.kind == "i" and tokens.size and tokens.min() < 0:
        raise ValueError(f"token id {tokens.min()} is negative")
    return tokens


def _decode(value: memoryview, column: TokenColumn) -> NDArray[np.integer[Any]]:
    dtype, begin, length = column.dtype, 0, column.length
    if dtype is None:
        if not len(value):
            raise ValueError("the array is empty; expected a byte for its type")
        if _CODES.get(value[0]) not in TOKEN_DTYPES:
            raise ValueError(
                f"type code {value[0]} is not one of integers; expected a code of {TOKEN_DTYPES}"
            )
        dtype, begin = _CODES[value[0]], 1
    if not column.plain and length is None:
        if len(value) <= begin:
            raise ValueError("the array ends before its shape")
        axes, width = value[begin] >> 2, 1 << (value[begin] & 3)
        if axes != 1:
            raise ValueError(f"the array has {axes} axes; expected 1")
        if len(value) < begin + 1 + width:
            raise ValueError("the array ends inside its shape")
        length = int.from_bytes(value[begin + 1 : begin + 1 + width], "little")
        begin += 1 + width
    item = np.dtype(dtype).itemsize
    if column.plain:
        length, rest = divmod(len(value), item)
        if rest:
            raise ValueError(f"{len(value)} bytes are no whole number of {dtype} values")
    if length is None or length * item != len(value) - begin:
        raise ValueError(f"{length} values of {dtype} do not fit the {len(value) - begin} bytes of the array")
    return np.frombuffer(value[begin:], np.dtype(dtype).newbyteorder("<")).astype(dtype)


def hasher(name: str) -> Callable[[], Any] | None:
    """Constructor of the hash called `name` in hashlib or xxhash, None where it is not known.

    The object has `update(bytes)` and `hexdigest()`. shake hashes have no length of their own: not known.
    """
    if name in xxhash.algorithms_available:
        found: Callable[[], Any] = getattr(xxhash, name)
        return found
    if name in hashlib.algorithms_available and not name.startswith("shake"):
        return lambda: hashlib.new(name, usedforsecurity=False)
    return None


def check_hashes(content: bytes | memoryview, expected: Mapping[str, str], path: str | Path) -> None:
    """Raise `DataError` unless `content` has every hash of `expected` (algorithm -> hex)."""
    for name, digest in expected.items():
        make = hasher(name)
        if make is None:
            raise DataError(f"hash {name!r} is not known to hashlib or xxhash", path=path, field="hashes")
        running = make()
        running.update(content)
        compare_hash(name, running.hexdigest(), digest, path)


def compare_hash(name: str, found: str, expected: str, path: str | Path) -> None:
    """Raise `DataError` unless the two hex digests are the same."""
    if found != expected.lower():
        raise DataError(
            f"{name} is {found}, the index says {expected}: the file is damaged; fetch or write it again",
            path=path,
            field="hashes",
        )
