"""Sources of `prepare`: the input files of a domain, cut into pieces that workers read on their own.

A piece is a byte range of a text file, some row groups of a Parquet file, some batches of an Arrow file or one
shard of an MDS folder. Where a piece is cut depends on the file alone, never on the number of processes.
"""

from __future__ import annotations

import glob
import hashlib
import json
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from velopath.errors import ConfigError, DataError
from velopath.mds import load_index, token_column
from velopath.prepare.tables import arrow_cuts, parquet_cuts

TEXT_KINDS = (".txt", ".jsonl")
PACKED = ("", ".gz", ".zst")
TABLES = (".parquet", ".arrow")
SUFFIXES = tuple(kind + packed for kind in TEXT_KINDS for packed in PACKED) + TABLES
MAX_DOCUMENT_BYTES = 1 << 28
"""A longer document is refused: it must be in memory at once, and encoding takes some twenty times its size."""
_INDEX = "index.json"


@dataclass(frozen=True)
class Reading:
    """How files become documents: the `field` of a line or column that holds the text, and the .txt `separator`."""

    field: str = "text"
    separator: str | None = None


@dataclass(frozen=True)
class Source:
    """One piece of an input file; for MDS `path` is the folder's index.json.

    `form` is "txt", "jsonl", "parquet", "arrow", "mds text" or "mds tokens". The piece is `first` to `last` (left
    out), counted in bytes, row groups, batches or shards; `size` is about its bytes. Documents of a form that
    gives no place to seek to are copied to `plain` by the scan; else, or where nothing may be written, it is None.
    """

    path: Path
    form: str
    first: int
    last: int
    size: int
    plain: Path | None = None

    @property
    def packed(self) -> str:
        """Suffix of the compression of a text file, or ""."""
        return self.path.suffix if self.path.suffix in PACKED else ""

    @property
    def in_place(self) -> bool:
        """Whether documents are read from the file itself by their byte offset."""
        return self.form in ("txt", "jsonl") and not self.packed

    @property
    def holds_tokens(self) -> bool:
        """Whether the documents are token ids and not text."""
        return self.form == "mds tokens"

    def key(self) -> str:
        """sha256 hex of the piece and the state of its file (size, time of change), not of its content."""
        found = self.path.stat()
        known = f"{self.path} {self.form} {self.first} {self.last} {found.st_size} {found.st_mtime_ns}"
        return hashlib.sha256(known.encode()).hexdigest()


def find_files(inputs: Sequence[str | Path]) -> list[Path]:
    """Files of the given files, folders (searched whole, hidden names left out) and glob patterns, sorted.

    An MDS folder is given by its index.json; of a folder that `datasets` saved, the files that its state.json
    lists. Raises `ConfigError` when a path does not exist or holds no file of a known kind.
    """
    found: set[Path] = set()
    for given in inputs:
        path = Path(given)
        if path.is_dir():
            matches = _below(path)
        elif path.exists():
            matches = [path]
        else:
            matches = [Path(p) for p in glob.glob(str(given), recursive=True) if Path(p).is_file()]
            if not matches:
                raise ConfigError(f"no such file or folder: {given}")
        for match in matches:
            if not match.name.endswith(SUFFIXES) and match.name != _INDEX:
                raise ConfigError(
                    f"{match} is of no known kind; expected one of {', '.join(SUFFIXES)}, or MDS"
                )
            found.add(match)
    return sorted(found)


def _below(folder: Path) -> list[Path]:
    below = [
        p
        for p in folder.rglob("*")
        if not any(x.startswith(".") for x in p.relative_to(folder).parts) and p.is_file()
    ]
    saved = {p.parent: _saved_files(p) for p in below if p.name == "state.json"}
    shards = {p.parent for p in below if ".mds" in p.suffixes}
    matches = [
        p
        for p in below
        if (p.name.endswith(SUFFIXES) and p.name in saved.get(p.parent, (p.name,)))
        or (p.name == _INDEX and p.parent in shards)
    ]
    if not matches:
        others = sorted({p.suffix or p.name for p in below})
        held = f"it holds {', '.join(others[:8])}" if others else "it holds no file"
        raise ConfigError(f"{folder} has none of {', '.join(SUFFIXES)}, or MDS shards; {held}")
    return matches


def _saved_files(state: Path) -> list[str]:
    """Data files that the state.json of a saved `datasets` folder lists."""
    try:
        names = [str(entry["filename"]) for entry in json.loads(state.read_bytes())["_data_files"]]
    except (ValueError, KeyError, TypeError):
        return [p.name for p in state.parent.iterdir()]  # another program's state.json
    for name in names:
        if not (state.parent / name).is_file():
            raise DataError(f"the data file {name!r} that it lists is missing", path=state)
    return names


def cut_file(path: Path, reading: Reading, piece_bytes: int) -> list[Source]:
    """The pieces of one file, about `piece_bytes` each. Raises `DataError` when it is no sound file of its kind,
    `ConfigError` when a package that reads it is not installed."""
    path = path.absolute()
    if path.name == _INDEX:
        return _cut_mds(path, reading)
    size = path.stat().st_size
    if path.suffix == ".parquet":
        return [Source(path, "parquet", *c) for c in parquet_cuts(path, reading.field, piece_bytes)]
    if path.suffix == ".arrow":
        return [Source(path, "arrow", *c) for c in arrow_cuts(path, reading.field, piece_bytes)]
    packed = path.suffix if path.suffix in PACKED else ""
    form = "jsonl" if path.name.removesuffix(packed).endswith(".jsonl") else "txt"
    if packed or size <= piece_bytes or (form == "txt" and reading.separator is None):
        return [Source(path, form, 0, size, size)]
    mark = b"\n" if form == "jsonl" else (reading.separator or "").encode()
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        ends = [_boundary(content, at, mark) for at in range(piece_bytes, size, piece_bytes)]
    cuts = sorted({0, *(e for e in ends if e < size), size})
    return [Source(path, form, a, b, b - a) for a, b in zip(cuts[:-1], cuts[1:], strict=True)]


def _cut_mds(path: Path, reading: Reading) -> list[Source]:
    sources = []
    for number, entry in enumerate(load_index(path.parent).shards):
        names = dict(zip(entry.columns.names, entry.columns.encodings, strict=True))
        if names.get(reading.field) == "str":
            form = "mds text"
        else:
            try:
                token_column(entry.columns)
            except DataError as error:
                problem = f"no column {reading.field!r} of text (str) and none of tokens: {error.problem}"
                raise DataError(problem, path=path, field=f"shards[{number}].column_names") from error
            form = "mds tokens"
        sources.append(Source(path, form, number, number + 1, entry.raw_bytes))
    return sources


def _boundary(content: mmap.mmap, at: int, mark: bytes) -> int:
    """End of the first `mark` from `at` on that surely is a border for a reader from the start of the file.

    Where marks overlap (a run of line breaks), such a reader takes the run's first one and goes on from its end;
    so only a mark that no other one reaches into from the left is sure.
    """
    while (found := content.find(mark, at)) >= 0:
        if content.find(mark, max(0, found - len(mark) + 1), found + len(mark) - 1) < 0:
            return found + len(mark)
        at = found + 1
    return len(content)
