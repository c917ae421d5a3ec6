"""Text documents: which files a domain has, where each document lies in them, and its text.

A .txt file is one document, or several around a separator; a .jsonl file has one document a line, in a chosen
field. Each may be compressed (.gz, .zst). A document is known by the xxh3-128 of its UTF-8 text.
"""

from __future__ import annotations

import codecs
import glob
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import xxhash
import zstandard
from numpy.typing import NDArray

from velopath.errors import ConfigError, DataError

KINDS = (".txt", ".jsonl")
PACKED = ("", ".gz", ".zst")
SUFFIXES = tuple(kind + packed for kind in KINDS for packed in PACKED)

DOCUMENT = np.dtype(
    [("high", "<u8"), ("low", "<u8"), ("file", "<i4"), ("begin", "<i8"), ("stored", "<i8"), ("bytes", "<i8")]
)
"""One document: halves of its xxh3-128, number of its file, place and length of its record there in bytes,
and the UTF-8 bytes of its text."""


@dataclass(frozen=True)
class Reading:
    """How files become documents: the JSONL `field` that holds the text, and the .txt `separator` or None."""

    field: str = "text"
    separator: str | None = None


@dataclass(frozen=True)
class Source:
    """One input file. `plain` is where its inflated bytes lie: the file itself, or a copy of a compressed one."""

    path: Path
    plain: Path

    @property
    def is_jsonl(self) -> bool:
        return self.path.name.removesuffix(self.packed).endswith(".jsonl")

    @property
    def packed(self) -> str:
        return self.path.suffix if self.path.suffix in PACKED else ""


@dataclass(frozen=True)
class Scan:
    """Documents of some files (an array of `DOCUMENT`), and how many empty ones were left out."""

    documents: NDArray[np.void]
    empty: int


def find_files(inputs: Sequence[str | Path]) -> list[Path]:
    """Files of the given files, folders (searched whole, hidden names left out) and glob patterns, sorted.

    Raises `ConfigError` when a path does not exist or holds no file of a known kind.
    """
    found: set[Path] = set()
    for given in inputs:
        path = Path(given)
        if path.is_dir():
            below = [
                p for p in path.rglob("*") if not any(x.startswith(".") for x in p.relative_to(path).parts)
            ]
            matches = [p for p in below if p.name.endswith(SUFFIXES) and p.is_file()]
            others = sorted({p.suffix or p.name for p in below if p.is_file()})
            if not matches:
                held = f"it holds {', '.join(others[:8])}" if others else "it holds no file"
                raise ConfigError(f"{path} has none of {', '.join(SUFFIXES)}; {held}")
        elif path.exists():
            matches = [path]
        else:
            matches = [Path(p) for p in glob.glob(str(given), recursive=True) if Path(p).is_file()]
            if not matches:
                raise ConfigError(f"no such file or folder: {given}")
        for match in matches:
            if not match.name.endswith(SUFFIXES):
                raise ConfigError(f"{match} is of no known kind; expected one of {', '.join(SUFFIXES)}")
            found.add(match)
    return sorted(found)


class _ZstdStream(io.RawIOBase):
    """Inflates zstd frames; unlike the package's own reader it raises `EOFError` where the last is cut short."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._inside = False
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            if self._frame.eof:
                packed = self._frame.unused_data
                self._frame = zstandard.ZstdDecompressor().decompressobj()
                self._inside = False
            else:
                packed = b""
            packed = packed or self._file.read(1 << 16)
            if not packed:
                if self._inside:
                    raise EOFError("the last zstd frame is cut short")
                return 0
            self._inside = True
            self._ready = memoryview(self._frame.decompress(packed))
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count


@contextmanager
def open_source(source: Source) -> Iterator[BinaryIO]:
    """Open the file for reading, inflating .gz and .zst. Raises `DataError` when it is no sound one."""
    try:
        with open(source.path, "rb") as file:
            if source.packed == ".gz":
                yield cast(BinaryIO, gzip.GzipFile(fileobj=file))
            elif source.packed == ".zst":
                yield io.BufferedReader(_ZstdStream(file), 1 << 20)
            else:
                yield file
    except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
        raise DataError(f"not a sound compressed file: {error}", path=source.path) from error


def scan(source: Source, number: int, reading: Reading, *, copy: bool) -> Scan:
    """Read the file once: place, hash and size of every document; `number` is kept as its file number.

    With `copy`, the inflated bytes of a compressed file are written to `source.plain` on the way. Raises
    `DataError` (file and line) on an empty file, bad UTF-8, bad JSON, a missing field, or text that is none.
    """
    blocks: list[NDArray[np.void]] = []
    rows: list[tuple[int, int, int, int, int, int]] = []
    empty = 0
    with ExitStack() as stack:
        spool = stack.enter_context(open(source.plain, "wb")) if copy and source.packed else None
        stream = stack.enter_context(open_source(source))
        for begin, line, record in _records(stream, source, reading, spool):
            text = text_of(record, source, reading, line)
            if not text.strip():
                empty += 1
                continue
            content = encode_text(text, source, line)
            digest = xxhash.xxh3_128_intdigest(content)
            rows.append((digest >> 64, digest & (1 << 64) - 1, number, begin, len(record), len(content)))
            if len(rows) == 1 << 16:
                blocks.append(np.array(rows, dtype=DOCUMENT))
                rows.clear()
    return Scan(np.concatenate([*blocks, np.array(rows, dtype=DOCUMENT)]), empty)


def read_texts(sources: Sequence[Source], documents: NDArray[np.void], reading: Reading) -> list[str]:
    """Texts of the documents, in their order; their file numbers index `sources`.

    Raises `DataError` when a file is no longer what was scanned.
    """
    texts = [""] * len(documents)
    for number in np.unique(documents["file"]):
        source = sources[int(number)]
        places = np.flatnonzero(documents["file"] == number)
        at = 0
        with open_source(source) if source.plain == source.path else open(source.plain, "rb") as stream:
            for k in places[np.argsort(documents["begin"][places])]:
                row = documents[k]
                if (
                    source.plain == source.path and source.packed
                ):  # only forward, as nothing was inflated to a file
                    while skip := min(int(row["begin"]) - at, 1 << 20):
                        at += len(stream.read(skip)) or skip
                    at += int(row["stored"])
                else:
                    stream.seek(int(row["begin"]))
                record = stream.read(int(row["stored"]))
                try:
                    text = text_of(record, source, reading, None)
                    same = xxhash.xxh3_128_intdigest(text.encode()) == int(row["high"]) << 64 | int(
                        row["low"]
                    )
                except (DataError, UnicodeEncodeError):
                    text, same = "", False
                if not same:
                    problem = (
                        f"the document at byte {row['begin']} changed since it was scanned; run prepare again"
                    )
                    raise DataError(problem, path=source.path)
                texts[k] = text
    return texts


def _records(
    stream: BinaryIO, source: Source, reading: Reading, spool: BinaryIO | None
) -> Iterator[tuple[int, int, bytes]]:
    """Yield (first byte, first line, bytes) of each record of an inflated file."""
    begin = 0
    if source.is_jsonl:
        for line, content in enumerate(stream, 1):
            if spool is not None:
                spool.write(content)
            mark = len(codecs.BOM_UTF8) if line == 1 and content.startswith(codecs.BOM_UTF8) else 0
            if content.strip():
                yield begin + mark, line, content[mark:]
            begin += len(content)
        if not begin:
            raise DataError("the file is empty; delete it or fill it", path=source.path)
        return
    content = stream.read()
    if spool is not None:
        spool.write(content)
    if not content:
        raise DataError("the file is empty; delete it or fill it", path=source.path)
    if content.startswith(codecs.BOM_UTF8):
        begin = len(codecs.BOM_UTF8)
    if reading.separator is None:
        yield begin, 1, content[begin:]
        return
    mark_bytes = reading.separator.encode()
    line = 1
    for piece in content[begin:].split(mark_bytes):
        yield begin, line, piece
        begin += len(piece) + len(mark_bytes)
        line += piece.count(b"\n") + mark_bytes.count(b"\n")


def text_of(record: bytes, source: Source, reading: Reading, line: int | None) -> str:
    """Text of one record. Raises `DataError` naming file and line."""
    try:
        text = record.decode("utf-8")
    except UnicodeDecodeError as error:
        at = (line or 1) + record.count(b"\n", 0, error.start)
        problem = f"not UTF-8: byte 0x{record[error.start]:02x} ({error.reason}); convert the file to UTF-8"
        raise DataError(problem, path=source.path, line=at) from error
    if not source.is_jsonl:
        return text
    try:
        value: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"not valid JSON: {error}", path=source.path, line=line) from error
    if not isinstance(value, dict):
        problem = (
            f"the line holds a {type(value).__name__}; expected an object with a field {reading.field!r}"
        )
        raise DataError(problem, path=source.path, line=line)
    if reading.field not in value:
        fields = ", ".join(sorted(value)[:12]) or "none"
        raise DataError(
            f"no such field; the fields there are: {fields}", path=source.path, line=line, field=reading.field
        )
    found = value[reading.field]
    if not isinstance(found, str):
        problem = f"the value is of type {type(found).__name__}; expected text"
        raise DataError(problem, path=source.path, line=line, field=reading.field)
    return found


def encode_text(text: str, source: Source, line: int) -> bytes:
    """UTF-8 of a text. JSON can spell half a surrogate pair, which has none: `DataError`."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        problem = (
            f"the text holds half a surrogate pair (\\u{ord(text[error.start]):04x}), which is no character"
        )
        raise DataError(problem, path=source.path, line=line) from error
