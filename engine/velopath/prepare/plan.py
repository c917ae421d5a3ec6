"""The plan of `prepare`: which documents each domain has, in which split and order.

Documents are known by the hash of their text. Exact copies within a domain are dropped, near-duplicates where that
is asked for (the one of the smallest hash stays); hash % 10,000 decides
the split, so the same text falls on the same side in every domain; the hash is also the order, which is thus
shuffled and independent of file names and of the number of processes. Our choice throughout.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from velopath.errors import ConfigError, DataError
from velopath.mds.write import compression_level
from velopath.prepare.documents import Scan, check_forms, read_contents
from velopath.prepare.filters import REASONS, WORDS, Filters
from velopath.prepare.near_duplicates import near_copies, sketcher
from velopath.prepare.order import BUCKET, joined, remainders, sorted_by_hash, taken
from velopath.prepare.sources import Reading, Source, cut_file, find_files
from velopath.prepare.tasks import ScanTask, scan_pieces
from velopath.tokenizer import TextTokenizer
from velopath.workers import Workers

Progress = Callable[[str, int, int], None]
"""Called with the stage ("scan", "train", "encode", "write") and the bytes done and in all: of text, then of shards."""
Inputs = Mapping[str, str | Path | Sequence[str | Path]]

PIECE_BYTES = 32 << 20
"""Bytes of a piece of a file: what a worker scans at a time."""
_SPLIT_PARTS = 10_000
_SAMPLE_BYTES = 1 << 18
_DOMAIN_NAME = re.compile(r"\w[\w.+-]*\Z")


@dataclass(frozen=True)
class Settings:
    """Settings of `prepare` that decide what is written; see there."""

    reading: Reading
    heldout_percent: float
    eos: str | None
    dtype: str | None
    shard_bytes: int
    compression: str | None
    filters: Filters = Filters()
    near_duplicates: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.heldout_percent < 100:
            raise ConfigError(
                f"heldout_percent is {self.heldout_percent}; expected 0 or more and less than 100"
            )
        if self.reading.separator == "":
            raise ConfigError("the separator is empty; expected some text, such as a form feed")
        if not 1 << 10 <= self.shard_bytes < 1 << 32:
            raise ConfigError(f"shard_size is {self.shard_bytes}; expected 1024 bytes to less than 4 GiB")
        if self.dtype not in (None, "uint16", "uint32"):
            raise ConfigError(f"dtype is {self.dtype!r}; expected uint16 or uint32")
        compression_level(self.compression)
        if self.near_duplicates is not None:
            sketcher(self.near_duplicates)


@dataclass(frozen=True)
class DomainPlan:
    """What a domain holds: its files, and the documents of both splits in their final order.

    `sources` are pieces of the files. `dropped` counts documents left out by reason, one for each of
    `filters.REASONS`. `tokens` estimates the train tokens from a sample.
    """

    name: str
    sources: tuple[Source, ...]
    train: NDArray[np.void]
    heldout: NDArray[np.void]
    dropped: Mapping[str, int]
    tokens: int = 0

    @property
    def files(self) -> int:
        """Input files (an MDS folder counts one)."""
        return len({source.path for source in self.sources})

    @property
    def holds_tokens(self) -> bool:
        """Whether its documents are tokens that stay as they are."""
        return self.sources[0].holds_tokens

    def reasons(self) -> str:
        """What was left out, in words."""
        words = [f"{n:,} are {WORDS[reason]}" for reason, n in self.dropped.items() if n]
        return ", ".join(words) or "nothing was left out"

    @property
    def bytes(self) -> int:
        """UTF-8 bytes of the text of the train documents (4 a token where they are tokens)."""
        return int(self.train["bytes"].sum())

    @property
    def splits(self) -> dict[str, NDArray[np.void]]:
        """Documents by split; no "heldout" where nothing is held out."""
        return {"train": self.train, "heldout": self.heldout} if len(self.heldout) else {"train": self.train}

    def digest(self, codec: TextTokenizer, dtype: str, settings: Settings) -> str:
        """sha256 hex of all that decides the written tokens: documents in order, splits, tokenizer, format."""
        parts = (codec.sha256, codec.eos, dtype, settings.shard_bytes, settings.compression)
        known = hashlib.sha256(f"velopath prepare 1 {parts}".encode())
        for split, documents in self.splits.items():
            known.update(f" {split} {len(documents)} ".encode())
            for at in range(0, len(documents), BUCKET):
                known.update(_hashes(documents[at : at + BUCKET]))
        return known.hexdigest()


def check_names(inputs: Inputs, notes: Mapping[str, Mapping[str, str]]) -> None:
    """Raise `ConfigError` on a domain name that can be no folder, and on notes (licences ...) of no domain."""
    if not inputs:
        raise ConfigError("no domains: name at least one")
    for name in inputs:
        if not _DOMAIN_NAME.match(name):
            raise ConfigError(f"domain name {name!r} can be no folder; expected letters, digits and . _ + -")
    for what, by_domain in notes.items():
        for name in by_domain:
            if name not in inputs:
                raise ConfigError(
                    f"{what} given for unknown domain {name!r}; the domains are {', '.join(sorted(inputs))}"
                )


def find_sources(inputs: Inputs, settings: Settings) -> list[tuple[Source, ...]]:
    """The pieces of every domain's files, domains in name order. Raises as `find_files` and `cut_file`."""
    listed = []
    for name in sorted(inputs):
        given = inputs[name]
        try:
            paths = find_files([given] if isinstance(given, (str, Path)) else given)
            pieces = [s for path in paths for s in cut_file(path, settings.reading, PIECE_BYTES)]
            check_forms(name, pieces, settings.filters)
        except ConfigError as error:
            raise ConfigError(f"domain {name!r}: {error}") from error
        listed.append(tuple(pieces))
    return listed


def plan_domains(
    names: Sequence[str],
    sources: Sequence[tuple[Source, ...]],
    settings: Settings,
    work: Path | None,
    workers: Workers,
    progress: Progress,
) -> tuple[DomainPlan, ...]:
    """Scan all pieces and plan every domain, in the order of `names`.

    Copies of documents and finished scans are kept below `work`; where it is None, nothing is written. Raises as
    `documents.scan`, and `DataError` when a split of a domain has no document.
    """
    if work is not None:
        sources = [tuple(_with_copy(s, settings, work / "plain") for s in listed) for listed in sources]
        for folder in ("plain", "scans", "plan"):
            (work / folder).mkdir(exist_ok=True)
    scans: list[dict[int, Scan]] = [{} for _ in names]
    tasks = list(_scan_tasks(sources, settings, work / "scans" if work is not None else None))
    done, total = 0, sum(task.bytes for task in tasks)
    for number, found in workers.run(scan_pieces, tasks):
        scans[tasks[number].domain][number] = found
        done += tasks[number].bytes
        progress("scan", done, total)
    plans = []
    for domain, name in enumerate(names):  # one after the other, so that scans can be freed
        held, scans[domain] = scans[domain], {}
        place = work / "plan" / name if work is not None else None
        plans.append(_plan(name, sources[domain], [held.pop(k) for k in sorted(held)], settings, place))
    return tuple(plans)


def estimate_tokens(
    plans: Sequence[DomainPlan], codec: TextTokenizer, reading: Reading
) -> tuple[DomainPlan, ...]:
    """The plans with `tokens` estimated from the first documents of each domain, about 256 kB of text."""
    counted = []
    for plan in plans:
        taken = plan.train[: _reach(plan.train, _SAMPLE_BYTES)]
        if plan.holds_tokens:
            per_byte = 1 / 4
        else:
            ids = sum(len(e) for e in codec.encode(_texts(plan, taken, reading)))
            per_byte = ids / max(1, int(taken["bytes"].sum()))
        ends = len(plan.train) if codec.eos is not None else 0
        counted.append(replace(plan, tokens=round(plan.bytes * per_byte) + ends))
    return tuple(counted)


def training_texts(plans: Sequence[DomainPlan], reading: Reading, limit_bytes: int) -> Iterator[str]:
    """Yield train documents of every domain in their order, up to an even share of `limit_bytes` each."""
    for plan in plans:
        end = _reach(plan.train, limit_bytes // len(plans))
        for first in range(0, end, 256):
            yield from _texts(plan, plan.train[first : min(first + 256, end)], reading)


def training_set(plans: Sequence[DomainPlan], limit_bytes: int) -> tuple[str, int]:
    """sha256 hex of the documents that `training_texts` yields, and their bytes."""
    known = hashlib.sha256()
    size = 0
    for plan in plans:
        taken = plan.train[: _reach(plan.train, limit_bytes // len(plans))]
        known.update(_hashes(taken))
        size += int(taken["bytes"].sum())
    return known.hexdigest(), size


def _hashes(documents: NDArray[np.void]) -> bytes:
    # Not `documents[["high", "low"]]`: that view keeps the other fields' bytes, which tell where a document lies.
    return np.column_stack((documents["high"], documents["low"])).tobytes()


def _texts(plan: DomainPlan, documents: NDArray[np.void], reading: Reading) -> list[str]:
    contents = read_contents(plan.sources, documents, reading)
    return [content for content in contents if isinstance(content, str)]


def _reach(documents: NDArray[np.void], limit_bytes: int) -> int:
    """How many of the first documents have at most `limit_bytes` of text; at least 1."""
    return max(1, int(np.searchsorted(np.cumsum(documents["bytes"]), limit_bytes, side="right")))


def _with_copy(source: Source, settings: Settings, folder: Path) -> Source:
    """The source with the place of the copy of its documents, where it needs one."""
    if source.in_place:
        return source
    known = f"{source.key()} {settings.reading} {settings.filters}"
    return replace(source, plain=folder / hashlib.sha256(known.encode()).hexdigest())


def _scan_tasks(
    sources: Sequence[tuple[Source, ...]], settings: Settings, results: Path | None
) -> Iterator[ScanTask]:
    """Group the pieces of each domain so that a task has about `PIECE_BYTES` or 512 pieces."""
    for domain, listed in enumerate(sources):
        first, size = 0, 0
        for end, source in enumerate(listed, 1):
            size += source.size
            if size >= PIECE_BYTES or end - first == 512 or end == len(listed):
                taken = listed[first:end]
                yield ScanTask(
                    domain,
                    first,
                    taken,
                    settings.reading,
                    settings.filters,
                    settings.near_duplicates,
                    results,
                )
                first, size = end, 0


def _plan(
    name: str, sources: tuple[Source, ...], scans: list[Scan], settings: Settings, place: Path | None
) -> DomainPlan:
    """Tables of documents go to files that begin with `place`, or stay in memory."""

    def table(split: str) -> Path | None:
        return place.with_name(f"{place.name}.{split}") if place is not None else None

    dropped: Counter[str] = Counter()
    for one in scans:
        dropped.update(one.dropped)
    found = joined(scans, table("all"))
    keys = np.concatenate([s.keys for s in scans])
    sketches = [s.sketches for s in scans]
    counts = [len(s.keys) for s in scans]
    scans.clear()  # their documents are in `found`
    order = sorted_by_hash(found)
    dropped["duplicates"] = len(found) - len(order)
    if settings.near_duplicates is not None:
        near = _near_copies(np.cumsum(counts), keys, sketches, order, settings.near_duplicates)
        dropped["near_duplicates"] = int(near.sum())
        order = order[~near]
    held = remainders(found, order, _SPLIT_PARTS) < round(settings.heldout_percent * _SPLIT_PARTS / 100)
    train, heldout = taken(found, order[~held], table("train")), taken(found, order[held], table("heldout"))
    reasons = {reason: dropped[reason] for reason in REASONS}
    plan = DomainPlan(name, sources, train, heldout, reasons)
    _check_splits(plan, len(order), settings.heldout_percent)
    return plan


def _near_copies(
    ends: NDArray[np.int64],
    keys: NDArray[np.uint64],
    files: Sequence[NDArray[np.uint8] | Path],
    order: NDArray[np.int64],
    threshold: float,
) -> NDArray[np.bool_]:
    """`near_copies` of the documents in `order`, which indexes those of all scans; scan k ends before `ends[k]`."""
    stored = [np.load(f, mmap_mode="r", allow_pickle=False) if isinstance(f, Path) else f for f in files]

    def sketches(places: list[int]) -> NDArray[np.uint8]:
        rows = []
        for k in order[places].tolist():
            scan = int(np.searchsorted(ends, k, side="right"))
            rows.append(stored[scan][k - ends[scan]])  # counted from the scan's end: below 0
        return np.array(rows, dtype=np.uint8)

    return near_copies(keys[order], sketches, threshold)


def _check_splits(plan: DomainPlan, kept: int, percent: float) -> None:
    more = "give it more documents, cut its .txt files by a separator, or change the held-out share"
    if not kept:
        raise DataError(
            f"domain {plan.name!r} has no document: {plan.reasons()}", path=plan.sources[0].path.parent
        )
    if not len(plan.train):
        raise DataError(
            f"domain {plan.name!r}: all of its {kept} documents are held out ({percent} %); {more}"
        )
    if percent and not len(plan.heldout):
        raise DataError(
            f"domain {plan.name!r}: none of its {kept} documents is held out ({percent} %); {more}"
        )
