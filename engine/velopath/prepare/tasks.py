"""What the worker processes of `prepare` do first: scan pieces of files, then encode parts (`shards` comes last).

A part is a run of documents of one domain and split in their final order; its tokens lie in a temporary file
until the domain is written. The same task gives the same bytes in every process.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from velopath.durable import durable
from velopath.errors import DataError
from velopath.prepare.documents import DOCUMENT, Scan, read_contents, scan
from velopath.prepare.filters import Filters
from velopath.prepare.sources import Reading, Source
from velopath.tokenizer import TextTokenizer, one_thread


@dataclass(frozen=True)
class ScanTask:
    """Pieces of one domain to scan, the first of which has number `first` in it.

    `results` is the folder where the scan is kept for a restart, or None.
    """

    domain: int
    first: int
    sources: tuple[Source, ...]
    reading: Reading
    filters: Filters
    near: float | None
    results: Path | None

    @property
    def bytes(self) -> int:
        """About the bytes of the pieces."""
        return sum(source.size for source in self.sources)

    def key(self) -> str:
        """sha256 hex of all that the scan depends on."""
        known = f"{[s.key() for s in self.sources]} {self.reading} {self.filters} {self.near}"
        return hashlib.sha256(known.encode()).hexdigest()


def scan_pieces(task: ScanTask) -> Scan:
    """Scan the pieces of the task, or find what an earlier run kept of this scan.

    Raises as `documents.scan`.
    """
    kept = task.results / task.key() if task.results is not None else None
    if kept is not None and kept.is_file():
        with open(kept, "rb") as file:
            _, dropped, keys = (np.load(file, allow_pickle=False) for _ in range(3))
        found = Scan(kept, json.loads(str(dropped)), keys, kept.with_name(kept.name + ".npy"))
    else:
        found = _merged(
            [scan(s, number, task.reading, task.filters, task.near) for number, s in enumerate(task.sources)]
        )
        if kept is not None:
            sketches = kept.with_name(kept.name + ".npy")
            if isinstance(found.sketches, np.ndarray):
                with durable(sketches) as file:
                    np.save(file, found.sketches, allow_pickle=False)
            with durable(kept) as file:  # last: it says that copies and sketches are whole
                for array in (np.asarray(found.documents), np.array(json.dumps(found.dropped)), found.keys):
                    np.save(file, array, allow_pickle=False)
            found = replace(found, documents=kept, sketches=sketches)
    return replace(found, first=task.first)


def _merged(scans: Sequence[Scan]) -> Scan:
    dropped: Counter[str] = Counter()
    for one in scans:
        dropped.update(one.dropped)
    return Scan(
        np.concatenate(
            [np.zeros(0, DOCUMENT), *(s.documents for s in scans if isinstance(s.documents, np.ndarray))]
        ),
        dict(dropped),
        np.concatenate([s.keys for s in scans]),
        np.concatenate([s.sketches for s in scans if isinstance(s.sketches, np.ndarray)]),
    )


@dataclass(frozen=True)
class PartTask:
    """Documents to encode into the file `path`; their file numbers index `sources`.

    `eos` is the id of the end-of-text token, which is cut off where stored tokens end with it. `threads`: encode
    with the tokenizer's own threads.
    """

    domain: int
    path: Path
    sources: tuple[Source, ...]
    documents: NDArray[np.void]
    reading: Reading
    tokenizer: Path
    eos: int | None
    dtype: str
    threads: bool


def encode_part(task: PartTask) -> None:
    """Encode the documents and write the part durably: their token counts, then their tokens, as two arrays.

    A part that is there already, from a run that was killed, is left as it is. Raises `DataError` on stored tokens
    that are not of the tokenizer.
    """
    if task.path.exists():
        return
    codec = _tokenizer(task.tokenizer)
    contents = read_contents(task.sources, task.documents, task.reading)
    texts = [content for content in contents if isinstance(content, str)]
    with one_thread(not task.threads):
        encoded = codec.encode(texts)
    for number, content in enumerate(contents):
        if not isinstance(content, str):
            if content.size and int(content.max()) >= codec.vocab_size:
                source = task.sources[int(task.documents["file"][number])]
                problem = f"token id {content.max()} is not below the tokenizer's {codec.vocab_size} entries"
                raise DataError(f"{problem}; give the tokenizer that made the tokens", path=source.path)
            encoded.append(content[:-1] if content[-1] == task.eos else content)
    encoded = [ids for ids in encoded if ids.size]
    counts = np.array([ids.size for ids in encoded], dtype=np.int64)
    tokens = np.concatenate([*encoded, np.zeros(0, np.uint32)]).astype(task.dtype)
    with durable(task.path) as file:
        np.save(file, counts, allow_pickle=False)
        np.save(file, tokens, allow_pickle=False)


@lru_cache(maxsize=1)
def _tokenizer(path: Path) -> TextTokenizer:
    return TextTokenizer(path.read_text(encoding="utf-8"), eos="")
