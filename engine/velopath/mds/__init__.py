"""MDS folders: the index, checked once, and the documents of its shards.

`index.json` is `{"version": 2, "shards": [...]}`; see `velopath.mds.format` for the shards. Nothing that an index says
is believed: every name, size and type is checked, and an error names the file, the shard and the field.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from velopath.errors import DataError
from velopath.mds.format import (
    MAX_SHARD_BYTES,
    Columns,
    ShardEntry,
    TokenColumn,
    check_hashes,
    fixed_size,
    hasher,
    sample_offsets,
    sample_tokens,
    token_column,
)
from velopath.mds.inflate import inflate, inflate_bytes
from velopath.mds.write import MdsWriter
from velopath.remote import DEFAULT_POLICY, FetchPolicy, read
from velopath.urls import below, is_url, redact

__all__ = [
    "Columns",
    "MdsFolder",
    "MdsWriter",
    "ShardEntry",
    "TokenColumn",
    "load_index",
    "read_documents",
    "read_shard",
    "shard_token_column",
    "token_column",
]


@dataclass(frozen=True)
class MdsFolder:
    """An MDS folder whose index was checked: its shards in index order. `folder` is a path, or a URL."""

    folder: str | Path
    shards: tuple[ShardEntry, ...]

    def __repr__(self) -> str:
        return f"MdsFolder({redact(str(self.folder))!r}, {len(self.shards)} shards)"

    @property
    def columns(self) -> Columns:
        """Columns of the first shard (each shard carries its own). Raises `DataError` when there are no shards."""
        if not self.shards:
            raise DataError(
                "the index lists no shards",
                path=redact(str(below(self.folder, "index.json"))),
                field="shards",
            )
        return self.shards[0].columns

    @property
    def samples(self) -> int:
        """Documents in all shards."""
        return sum(s.samples for s in self.shards)

    @property
    def fingerprint(self) -> str:
        """Hash of what the index says about the raw shards; how they are compressed does not matter."""
        shards = [
            [s.samples, s.raw_bytes, sorted(s.raw_hashes.items()), s.columns.names, s.columns.encodings]
            for s in self.shards
        ]
        return hashlib.sha256(json.dumps(shards).encode()).hexdigest()[:32]


def load_index(folder: str | Path, *, files: bool = True) -> MdsFolder:
    """Read and check `folder/index.json`, and with `files` that each shard's file is there in its stated size.

    Refused with `DataError` (file, shard and field named): malformed JSON, another version or format, wrong
    types, negative or impossible sizes, unknown hashes or encodings, `pkl` columns, compressions other than
    zstd without a raw file beside, and names that leave the folder by `..`, an absolute path or a link.
    The files of a remote folder (a URL) are not looked for; its entries have the URLs to fetch them.
    """
    url = folder if isinstance(folder, str) and is_url(folder) else None
    folder = folder if url is not None else Path(folder)
    path = Path(redact(url) if url is not None else folder) / "index.json"
    content = _index_bytes(path) if url is None else read(str(below(url, "index.json")))
    shown = path if url is None else redact(str(below(url, "index.json")))
    try:
        index = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"not valid JSON: {error}", path=shown) from error
    if not isinstance(index, dict) or index.get("version") != 2 or isinstance(index["version"], bool):
        version = index.get("version") if isinstance(index, dict) else None
        raise DataError(f"version is {version!r}; expected MDS version 2", path=shown, field="version")
    listed = index.get("shards")
    if not isinstance(listed, list):
        raise DataError(f"shards is {_shown(listed)}; expected a list", path=shown, field="shards")
    reader = _IndexReader(path, shown, files=files and url is None, url=url)
    return MdsFolder(folder, tuple(reader.shard(k, entry) for k, entry in enumerate(listed)))


def _index_bytes(path: Path) -> bytes:
    if not path.is_file():
        problem = "not a file" if os.path.lexists(path) else "no such file"
        raise DataError(f"{problem}; expected a folder of MDS shards with an index.json", path=path)
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", path=path) from error


def read_documents(folder: str | Path, *, bytes_dtype: str = "int64") -> Iterator[NDArray[np.integer[Any]]]:
    """Yield the documents of one MDS folder, or of a remote one, as 1-D integer arrays, in index order.

    Pure numpy, no cache: one shard is in memory at a time (a raw one is mapped, a remote one fetched). Hashes are
    checked where the index has them. Arrays are new and of the stored type; a `bytes` column is read as
    `bytes_dtype`. Raises `DataError` naming shard and sample.
    """
    for entry in load_index(folder).shards:
        yield from read_shard(entry, bytes_dtype=bytes_dtype)


def read_shard(entry: ShardEntry, *, bytes_dtype: str = "int64") -> Iterator[NDArray[np.integer[Any]]]:
    """Yield the documents of one shard; see `read_documents`."""
    if entry.url is not None:
        yield from _documents(memoryview(fetch_shard(entry)), entry, bytes_dtype)
    elif entry.path.is_file():
        if not entry.path.stat().st_size:
            raise DataError("the file is empty", path=entry.path)
        with open(entry.path, "rb") as file:
            # Not closed by hand: an error's traceback may still hold a view of it.
            raw = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        check_hashes(raw, entry.raw_hashes, entry.path)
        yield from _documents(raw, entry, bytes_dtype)
    else:
        yield from _documents(memoryview(b"".join(inflate(entry))), entry, bytes_dtype)


def fetch_shard(entry: ShardEntry, policy: FetchPolicy = DEFAULT_POLICY) -> bytes:
    """The raw bytes of a remote shard, checked like a local one."""
    assert entry.url is not None
    content = read(
        entry.url, size=entry.raw_bytes if entry.zip_path is None else entry.zip_bytes, policy=policy
    )
    if entry.zip_path is not None:
        return b"".join(inflate_bytes(content, entry))
    check_hashes(content, entry.raw_hashes, entry.place)
    return content


def shard_token_column(entry: ShardEntry, *, bytes_dtype: str = "int64") -> TokenColumn:
    """`token_column` of one shard; its `DataError` names the shard."""
    try:
        return token_column(entry.columns, bytes_dtype=bytes_dtype)
    except DataError as error:
        raise DataError(error.problem, path=entry.raw_place, field=error.field) from None


def _documents(raw: memoryview, entry: ShardEntry, bytes_dtype: str) -> Iterator[NDArray[np.integer[Any]]]:
    column = shard_token_column(entry, bytes_dtype=bytes_dtype)
    offsets = sample_offsets(raw, entry).tolist()
    for k, (begin, end) in enumerate(zip(offsets[:-1], offsets[1:], strict=True)):
        try:
            tokens = sample_tokens(raw[begin:end], entry.columns, column)
        except ValueError as error:
            raise DataError(str(error), path=entry.raw_place, sample=k, field=column.name) from error
        yield tokens


# Commands that inflate a shard of the reference's other compressions; the raw file beside it is then read.
_SNAPPY = "import snappy; open('{name}', 'wb').write(snappy.decompress(open('{name}.snappy', 'rb').read()))"
_INFLATE = {
    "gz": "gunzip -k {name}.gz",
    "bz2": "bunzip2 -k {name}.bz2",
    "br": "brotli -d -k -o {name} {name}.br",
    "snappy": f'python -c "{_SNAPPY}"',
}


def _shown(value: object) -> str:
    """A value for an error message, cut to a readable length."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


class _IndexReader:
    """Checks the shard entries of one index; every error names the index, the shard and the field."""

    def __init__(self, path: Path, shown: str | Path, *, files: bool, url: str | None = None) -> None:
        self.path, self.shown, self.files, self.url = path, shown, files, url
        self.root = os.path.realpath(path.parent)
        self.seen: dict[str, str] = {}
        self.columns: dict[tuple[Any, ...], Columns] = {}

    def wrong(self, where: str, value: object, expected: str) -> DataError:
        return DataError(f"{where} is {_shown(value)}; expected {expected}", path=self.shown, field=where)

    def shard(self, number: int, entry: object) -> ShardEntry:
        where = f"shards[{number}]"
        if not isinstance(entry, dict):
            raise self.wrong(where, entry, "an object")
        if entry.get("version", 2) != 2:
            raise self.wrong(f"{where}.version", entry["version"], "2")
        if entry.get("format") != "mds":
            raise self.wrong(f"{where}.format", entry.get("format"), "'mds'")
        samples = self.size(f"{where}.samples", entry.get("samples"))
        raw_path, raw_bytes, raw_hashes = self.file(f"{where}.raw_data", entry.get("raw_data"))
        if raw_bytes > MAX_SHARD_BYTES:
            raise self.wrong(
                f"{where}.raw_data.bytes", raw_bytes, "less than 4 GiB, offsets are 32 bits wide"
            )
        if 4 + 4 * (samples + 1) > raw_bytes:
            raise self.wrong(f"{where}.samples", samples, f"what fits a shard of {raw_bytes} bytes")
        zip_path, zip_bytes, zip_hashes = self.zipped(where, entry, raw_path)
        self.first_use(where, raw_path)
        found = ShardEntry(
            path=raw_path,
            zip_path=zip_path,
            compression=entry.get("compression"),
            samples=samples,
            raw_bytes=raw_bytes,
            zip_bytes=zip_bytes,
            raw_hashes=raw_hashes,
            zip_hashes=zip_hashes,
            columns=self.column_table(where, entry),
            url=self.url_of(zip_path or raw_path),
        )
        if self.files:
            self.check_files(where, found)
        return found

    def zipped(
        self, where: str, entry: dict[str, Any], raw_path: Path
    ) -> tuple[Path | None, int | None, dict[str, str]]:
        compression, zip_data = entry.get("compression"), entry.get("zip_data")
        if compression is None:
            if zip_data is not None:
                raise self.wrong(f"{where}.zip_data", zip_data, "null where compression is null")
            return None, None, {}
        if not isinstance(compression, str):
            raise self.wrong(f"{where}.compression", compression, "null, 'zstd' or 'zstd:LEVEL'")
        if compression.split(":")[0] != "zstd":
            if raw_path.is_file():
                return None, None, {}
            advice = "null, 'zstd' or 'zstd:LEVEL'"
            if convert := _INFLATE.get(compression.split(":")[0]):
                advice += f"; inflate every shard beside itself: {convert.format(name=raw_path.name)}"
            raise self.wrong(f"{where}.compression", compression, advice)
        if zip_data is None:
            raise self.wrong(f"{where}.zip_data", zip_data, f"a file, as compression is {compression!r}")
        return self.file(f"{where}.zip_data", zip_data)

    def file(self, where: str, info: object) -> tuple[Path, int, dict[str, str]]:
        if not isinstance(info, dict):
            raise self.wrong(where, info, "an object with basename, bytes and hashes")
        hashes = info.get("hashes", {})
        if not isinstance(hashes, dict) or not all(isinstance(h, str) for h in hashes.values()):
            raise self.wrong(f"{where}.hashes", hashes, "an object of hash name to hex text")
        for name in hashes:
            if hasher(name) is None:
                raise self.wrong(f"{where}.hashes", name, "a hash of hashlib or xxhash")
        size = self.size(f"{where}.bytes", info.get("bytes"))
        return self.inside(f"{where}.basename", info.get("basename")), size, dict(hashes)

    def size(self, where: str, value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise self.wrong(where, value, "a whole number, 0 or more")
        return value

    def inside(self, where: str, name: object) -> Path:
        """The file `name` below the folder; a path with folders is what merged indexes of sub-folders have."""
        expected = "the name of a file inside the folder"
        if not isinstance(name, str) or not name or "\0" in name or "\\" in name:
            raise self.wrong(where, name, expected)
        parts = PurePosixPath(name).parts
        leaves = name.startswith("/") or any(p in ("..", ".") or ":" in p for p in name.split("/"))
        long = len(name) > 1024 or any(len(p.encode(errors="replace")) > 255 for p in parts)
        if leaves or long or not parts or not name.isprintable():
            raise self.wrong(where, name, expected)
        place = self.path.parent
        for part in parts:
            place = place / part
            if place.is_symlink():
                real = os.path.realpath(place)
                if os.path.commonpath([real, self.root]) != self.root:
                    raise self.wrong(where, name, f"{expected}, but it links to {real}")
        return place

    def first_use(self, where: str, path: Path) -> None:
        first = self.seen.setdefault(str(path), where)
        if first != where:
            raise self.wrong(f"{where}.raw_data.basename", path.name, f"another file than that of {first}")

    def column_table(self, where: str, entry: dict[str, Any]) -> Columns:
        lists = [entry.get(f"column_{part}") for part in ("names", "encodings", "sizes")]
        for part, values in zip(("names", "encodings", "sizes"), lists, strict=True):
            if not isinstance(values, list):
                raise self.wrong(f"{where}.column_{part}", values, "a list")
        names, encodings, sizes = (list(v) for v in lists if v is not None)
        if not len(names) == len(encodings) == len(sizes) or not names:
            counts = (len(names), len(encodings), len(sizes))
            raise self.wrong(
                f"{where}.column_names", counts, "as many names as encodings and sizes, 1 or more"
            )
        for field, values in (("names", names), ("encodings", encodings)):
            for value in values:
                if not isinstance(value, str):
                    raise self.wrong(f"{where}.column_{field}", value, "text")
        if len(set(names)) != len(names):
            raise self.wrong(f"{where}.column_names", names, "names that do not repeat")
        for name, encoding, size in zip(names, encodings, sizes, strict=True):
            try:
                fixed = fixed_size(encoding)
            except ValueError as error:
                raise DataError(
                    f"column {name!r}: {error}", path=self.shown, field=f"{where}.column_encodings"
                ) from error
            if size != fixed or isinstance(size, (bool, float)):
                raise self.wrong(
                    f"{where}.column_sizes", size, f"{fixed} for {name!r} of encoding {encoding!r}"
                )
        key = (*names, None, *encodings)
        return self.columns.setdefault(key, Columns(tuple(names), tuple(encodings), tuple(sizes)))

    def url_of(self, path: Path) -> str | None:
        if self.url is None:
            return None
        return str(below(self.url, *path.relative_to(self.path.parent).parts))

    def check_files(self, where: str, entry: ShardEntry) -> None:
        pairs = [(entry.path, entry.raw_bytes), (entry.zip_path, entry.zip_bytes)]
        present = [
            (path, size, path.stat().st_size) for path, size in pairs if path is not None and path.is_file()
        ]
        if not present:
            missing = entry.zip_path or entry.path
            raise DataError(
                f"the file of {where} is missing; fetch it or write the folder again", path=missing
            )
        for path, size, found in present:
            if size is not None and found != size:
                raise DataError(
                    f"the file has {found} bytes, {where} of its index says {size}", path=path, field="bytes"
                )
