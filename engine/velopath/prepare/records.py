"""Records of text files: the lines of a .jsonl, or the documents of a .txt between separators, a block in memory."""

from __future__ import annotations

import codecs
import gzip
import io
import itertools
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, cast

import zstandard

from velopath.errors import DataError
from velopath.prepare.sources import MAX_DOCUMENT_BYTES, Reading, Source

_BLOCK_BYTES = 1 << 20
MAX_RECORD_BYTES = 4 * MAX_DOCUMENT_BYTES
"""JSON may write a document several times as long as its text."""


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
                yield io.BufferedReader(_ZstdStream(file), _BLOCK_BYTES)
            else:
                yield file
    except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
        raise DataError(f"not a sound compressed file: {error}", path=source.path) from error


def text_documents(source: Source, reading: Reading) -> Iterator[tuple[int, int, bytes, str]]:
    """Yield (first byte, first line in the piece, record, text) of each document of a piece of a text file.

    Raises `DataError` naming file and line.
    """
    with open_source(source) as stream:
        try:
            for begin, line, record in _records(stream, source, reading):
                yield begin, line, record, text_of(record, source, reading, line)
        except DataError as error:
            if error.line is None or not source.first:
                raise
            line = error.line + _lines_before(source)
            raise DataError(error.problem, path=error.path, line=line, field=error.field) from error


def _lines_before(source: Source) -> int:
    """Line breaks ahead of the piece."""
    lines, left = 0, source.first
    with open(source.path, "rb") as file:
        while left and (block := file.read(min(left, _BLOCK_BYTES))):
            lines += block.count(b"\n")
            left -= len(block)
    return lines


def _records(stream: BinaryIO, source: Source, reading: Reading) -> Iterator[tuple[int, int, bytes]]:
    """Yield (first byte, first line in the piece, bytes) of each record that begins in the piece."""
    begin, end = source.first, None if source.packed else source.last
    if begin:
        stream.seek(begin)
    if source.form == "jsonl":
        pieces = _lines(stream, begin, end, source)
    elif reading.separator is None:
        content = stream.read()
        pieces = iter([(begin, 1, content)] if content else [])
    else:
        pieces = _between(stream, begin, end, reading.separator.encode(), source)
    empty = True
    for at, line, record in pieces:
        mark = len(codecs.BOM_UTF8) if at == 0 and record.startswith(codecs.BOM_UTF8) else 0
        empty = False
        if source.form == "jsonl" and not record.strip():
            continue
        yield at + mark, line, record[mark:]
    if empty and not begin:
        raise DataError("the file is empty; delete it or fill it", path=source.path)


def _lines(stream: BinaryIO, begin: int, end: int | None, source: Source) -> Iterator[tuple[int, int, bytes]]:
    for line in itertools.count(1):
        content = stream.readline(MAX_RECORD_BYTES) if end is None or begin < end else b""
        if not content:
            return
        if len(content) == MAX_RECORD_BYTES:
            raise DataError(f"a line of {MAX_RECORD_BYTES:,} bytes or more", path=source.path, line=line)
        yield begin, line, content
        begin += len(content)


def _between(
    stream: BinaryIO, begin: int, end: int | None, mark: bytes, source: Source
) -> Iterator[tuple[int, int, bytes]]:
    """What lies between the separators; each is the first one behind the one before, as `str.split` takes them."""
    line, held, searched, more = 1, bytearray(), 0, True
    while more:
        size = _BLOCK_BYTES if end is None else min(_BLOCK_BYTES, end - begin - len(held))
        block = stream.read(size) if size > 0 else b""
        more = bool(block)
        held += block
        first = 0
        while (found := held.find(mark, searched)) >= 0:
            record = bytes(held[first:found])
            yield begin + first, line, record
            line += record.count(b"\n") + mark.count(b"\n")
            first = searched = found + len(mark)
        del held[:first]
        begin += first
        searched = max(0, len(held) - len(mark) + 1)
        if len(held) > MAX_RECORD_BYTES:
            problem = f"no separator {mark.decode()!r} within {MAX_RECORD_BYTES:,} bytes"
            raise DataError(problem, path=source.path, line=line)
    if held:
        yield begin, line, bytes(held)


def text_of(record: bytes, source: Source, reading: Reading, line: int | None) -> str:
    """Text of one record. Raises `DataError` naming file and line."""
    try:
        text = record.decode("utf-8")
    except UnicodeDecodeError as error:
        at = (line or 1) + record.count(b"\n", 0, error.start)
        problem = f"not UTF-8: byte 0x{record[error.start]:02x} ({error.reason}); convert the file to UTF-8"
        raise DataError(problem, path=source.path, line=at) from error
    if source.form != "jsonl":
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
