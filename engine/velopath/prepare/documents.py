"""Documents: what the pieces of a domain's files hold, where each document lies, and its text.

A .txt file is one document, or several around a separator; a .jsonl file has one document a line, in a chosen
field; either may be compressed. Tables have one a row; an MDS folder has texts, or tokens that stay as they are.
A document is known by the xxh3-128 of its UTF-8 text (of its tokens as u32).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from velopath.durable import durable
from velopath.errors import ConfigError, DataError
from velopath.mds import Columns, load_index, read_shard
from velopath.prepare.filters import Filters
from velopath.prepare.near_duplicates import PERMUTATIONS, sketcher
from velopath.prepare.records import text_documents, text_of
from velopath.prepare.sources import MAX_DOCUMENT_BYTES, Reading, Source
from velopath.prepare.tables import arrow_texts, parquet_texts

Content = str | NDArray[np.uint32]
"""A document: its text, or its tokens."""
DOCUMENT = np.dtype(
    [("high", "<u8"), ("low", "<u8"), ("file", "<i4"), ("begin", "<i8"), ("stored", "<i8"), ("bytes", "<i8")]
)
"""One document: halves of its xxh3-128, number of its piece, place and length of its record in bytes (in the file
or its copy; without either, the number of the document in its piece), and the bytes of its text or tokens."""


@dataclass(frozen=True)
class Scan:
    """Documents of some pieces (an array of `DOCUMENT`), and how many were left out, by reason.

    `first` is to be added to the documents' file numbers. `keys` (n, b) and `sketches` (n, `PERMUTATIONS`) are those
    of `near_duplicates.Sketcher`, b = 0 and no sketches where they were not asked for. A path is that of an .npy file.
    """

    documents: NDArray[np.void] | Path
    dropped: dict[str, int]
    keys: NDArray[np.uint64]
    sketches: NDArray[np.uint8] | Path
    first: int = 0


class _Found(NamedTuple):
    """A document of a piece: place and stored bytes of its record, line or sample, and content."""

    begin: int
    stored: int
    line: int | None
    sample: int | None
    content: Content


def scan(source: Source, number: int, reading: Reading, filters: Filters, near: float | None) -> Scan:
    """Read the piece once: place, hash and size of every document; `number` is kept as its file number.

    Documents that have no place to seek to are copied to `source.plain` where that is set. `near` is the
    similarity threshold of near-duplicates or None. Raises `DataError` (file and line or sample) on an empty
    file, bad UTF-8, bad JSON, a missing field, text that is none, and a document over `MAX_DOCUMENT_BYTES`.
    """
    blocks: list[NDArray[np.void]] = []
    rows: list[tuple[int, int, int, int, int, int]] = []
    dropped: Counter[str] = Counter()
    maker = sketcher(near) if near is not None else None
    made = []
    with ExitStack() as stack:
        spool = stack.enter_context(durable(source.plain)) if source.plain is not None else None
        spooled = 0
        for found in _documents(source, reading):
            content, begin, stored = found.content, found.begin, found.stored
            reason = _reason(content, filters)
            if reason is not None:
                dropped[reason] += 1
                continue
            raw = _content_bytes(content, source, found)
            if spool is not None:
                spool.write(raw)
                begin, stored, spooled = spooled, len(raw), spooled + len(raw)
            digest = xxhash.xxh3_128_intdigest(raw)
            rows.append((digest >> 64, digest & (1 << 64) - 1, number, begin, stored, len(raw)))
            if maker is not None:
                made.append(
                    maker.sketch(content if isinstance(content, str) else " ".join(map(str, content)))
                )
            if len(rows) == 1 << 16:
                blocks.append(np.array(rows, dtype=DOCUMENT))
                rows.clear()
    documents = np.concatenate([*blocks, np.array(rows, dtype=DOCUMENT)])
    if maker is None:
        none = np.zeros((len(documents), 0))
        return Scan(documents, dict(dropped), none.astype(np.uint64), none.astype(np.uint8))
    keys = np.array([k for k, _ in made], dtype=np.uint64).reshape(len(made), maker.bands)
    sketches = np.array([s for _, s in made], dtype=np.uint8).reshape(len(made), PERMUTATIONS)
    return Scan(documents, dict(dropped), keys, sketches)


def _reason(content: Content, filters: Filters) -> str | None:
    if isinstance(content, str):
        return filters.reason(content)
    return None if content.size else "empty"


def _content_bytes(content: Content, source: Source, found: _Found) -> bytes:
    """UTF-8 of a text, or tokens as u32. JSON can spell half a surrogate pair, which has none: `DataError`."""
    try:
        raw = content.encode("utf-8") if isinstance(content, str) else content.astype("<u4").tobytes()
    except UnicodeEncodeError as error:
        half = ord(error.object[error.start])
        problem = f"the text holds half a surrogate pair (\\u{half:04x}), which is no character"
        raise DataError(problem, path=source.path, line=found.line, sample=found.sample) from error
    if len(raw) > MAX_DOCUMENT_BYTES:
        problem = (
            f"a document of {len(raw):,} bytes; expected at most {MAX_DOCUMENT_BYTES:,}: cut it, a .txt file by "
            "a separator"
        )
        raise DataError(problem, path=source.path, line=found.line, sample=found.sample)
    return raw


def _documents(source: Source, reading: Reading) -> Iterator[_Found]:
    """Yield the documents of a piece. `begin` is a byte offset where the source is read in place, else a number."""
    if source.form in ("txt", "jsonl"):
        if source.form == "txt" and reading.separator is None and source.size > MAX_DOCUMENT_BYTES:
            problem = f"one document of {source.size:,} bytes; cut it into documents by a separator"
            raise DataError(problem, path=source.path)
        for order, (begin, line, record, text) in enumerate(text_documents(source, reading)):
            yield _Found(begin if source.in_place else order, len(record), line, None, text)
    elif source.form in ("parquet", "arrow"):
        texts = parquet_texts if source.form == "parquet" else arrow_texts
        for order, (row, text) in enumerate(texts(source.path, reading.field, source.first, source.last)):
            yield _Found(order, 0, None, row, text)
    else:
        yield from _mds_documents(source, reading)


def _mds_documents(source: Source, reading: Reading) -> Iterator[_Found]:
    (entry,) = load_index(source.path.parent).shards[source.first : source.last]
    if source.holds_tokens:
        for order, tokens in enumerate(read_shard(entry)):
            if tokens.size and int(tokens.max()) > np.iinfo(np.uint32).max:
                problem = f"token id {tokens.max()} is larger than 32 bits hold"
                raise DataError(problem, path=entry.path, sample=order)
            yield _Found(order, 0, None, order, tokens.astype(np.uint32))
        return
    # The reader of tokens gives the bytes of the text column when that is named as one of u8 tokens.
    place = entry.columns.names.index(reading.field)
    names = tuple("tokens" if k == place else f"other {k}" for k in range(len(entry.columns.names)))
    kinds = tuple("bytes" if k == place else e for k, e in enumerate(entry.columns.encodings))
    bytewise = entry.__class__(**{**vars(entry), "columns": Columns(names, kinds, entry.columns.sizes)})
    for order, raw in enumerate(read_shard(bytewise, bytes_dtype="uint8")):
        try:
            yield _Found(order, 0, None, order, raw.tobytes().decode("utf-8"))
        except UnicodeDecodeError as error:
            raise DataError(f"not UTF-8: {error.reason}", path=entry.path, sample=order) from error


def read_contents(sources: Sequence[Source], documents: NDArray[np.void], reading: Reading) -> list[Content]:
    """Contents of the documents, in their order; their file numbers index `sources`.

    Raises `DataError` when a file is no longer what was scanned.
    """
    contents: list[Content] = [""] * len(documents)
    for number in np.unique(documents["file"]):
        source = sources[int(number)]
        places = np.flatnonzero(documents["file"] == number)
        ordered = places[np.argsort(documents["begin"][places])]
        file = source.path if source.in_place else source.plain
        found = _pick(source, documents[ordered], reading) if file is None else None
        with ExitStack() as stack:
            stream = stack.enter_context(open(file, "rb")) if file is not None else None
            for k in ordered:
                row = documents[k]
                content: Content | None
                if stream is not None:
                    stream.seek(int(row["begin"]))
                    content = _decoded(stream.read(int(row["stored"])), source, reading)
                else:
                    assert found is not None
                    content = next(found, None)
                if content is None or _digest(content) != int(row["high"]) << 64 | int(row["low"]):
                    where = f"at byte {row['begin']}" if source.in_place else f"number {row['begin']}"
                    problem = f"the document {where} changed since it was scanned; run prepare again"
                    raise DataError(problem, path=source.path)
                contents[k] = content
    return contents


def _pick(source: Source, documents: NDArray[np.void], reading: Reading) -> Iterator[Content]:
    """Contents of the documents of one piece, in the order of their numbers there, from a second reading of it."""
    wanted = iter(documents["begin"].tolist())
    following = next(wanted, None)
    for found in _documents(source, reading):
        if following is None:
            return
        if found.begin == following:
            yield found.content
            following = next(wanted, None)


def _decoded(raw: bytes, source: Source, reading: Reading) -> Content | None:
    try:
        if source.in_place:
            return text_of(raw, source, reading, None)
        return np.frombuffer(raw, "<u4").astype(np.uint32) if source.holds_tokens else raw.decode("utf-8")
    except (DataError, UnicodeDecodeError, ValueError):
        return None


def _digest(content: Content) -> int:
    try:
        raw = content.encode() if isinstance(content, str) else content.astype("<u4").tobytes()
    except UnicodeEncodeError:
        return -1
    return int(xxhash.xxh3_128_intdigest(raw))


def check_forms(name: str, sources: Sequence[Source], filters: Filters) -> None:
    """Raise `ConfigError` where a domain mixes text and tokens, or where tokens should be filtered as text."""
    tokens: list[Path] = [s.path for s in sources if s.holds_tokens]
    if tokens and len(tokens) < len(sources):
        raise ConfigError(f"domain {name!r} mixes text with tokens ({tokens[0]}); make two domains of it")
    if tokens and filters.needs_text:
        raise ConfigError(
            f"domain {name!r} holds tokens ({tokens[0]}); length and language filters need text"
        )
