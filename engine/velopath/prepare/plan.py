"""The plan of `prepare`: which documents each domain has, in which split and order.

Documents are known by the hash of their text. Exact copies within a domain are dropped; hash % 10,000 decides
the split, so the same text falls on the same side in every domain; the hash is also the order, which is thus
shuffled and independent of file names and of the number of processes. Our choice throughout.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from velopath.errors import ConfigError, DataError
from velopath.mds.write import compression_level
from velopath.prepare.documents import DOCUMENT, Reading, Scan, Source, find_files, read_texts
from velopath.prepare.tasks import ScanTask, scan_files
from velopath.tokenizer import TextTokenizer
from velopath.workers import Workers

Progress = Callable[[str, int, int], None]
"""Called with the stage ("scan", "train" or "encode") and the bytes of text done and in all."""
Inputs = Mapping[str, str | Path | Sequence[str | Path]]

_SPLIT_PARTS = 10_000
_SAMPLE_BYTES = 1 << 18
_SCAN_BYTES = 32 << 20
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


@dataclass(frozen=True)
class DomainPlan:
    """What a domain holds: its files, and the documents of both splits in their final order.

    `duplicates` and `empty` count documents left out. `tokens` estimates the train tokens from a sample.
    """

    name: str
    sources: tuple[Source, ...]
    train: NDArray[np.void]
    heldout: NDArray[np.void]
    duplicates: int
    empty: int
    tokens: int = 0

    @property
    def bytes(self) -> int:
        """UTF-8 bytes of the text of the train documents."""
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
            known.update(_hashes(documents))
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


def plan_domains(
    inputs: Inputs, settings: Settings, plain: Path | None, workers: Workers, progress: Progress
) -> tuple[DomainPlan, ...]:
    """Scan all files and plan every domain, in name order.

    Compressed files are inflated into `plain`, or only read where it is None. Raises as `documents.scan`, and
    `DataError` when a split of a domain has no document.
    """
    names = sorted(inputs)
    sources = [_sources(name, inputs[name], plain) for name in names]
    scans: list[list[Scan]] = [[] for _ in names]
    tasks = list(_scan_tasks(sources, settings.reading, copy=plain is not None))
    done, total = 0, sum(t.stored_bytes for t in tasks)
    for number, found in workers.run(scan_files, tasks):
        scans[tasks[number].domain] += found
        done += tasks[number].stored_bytes
        progress("scan", done, total)
    return tuple(
        _plan(n, s, f, settings.heldout_percent) for n, s, f in zip(names, sources, scans, strict=True)
    )


def estimate_tokens(
    plans: Sequence[DomainPlan], codec: TextTokenizer, reading: Reading
) -> tuple[DomainPlan, ...]:
    """The plans with `tokens` estimated from the first documents of each domain, about 256 kB of text."""
    counted = []
    for plan in plans:
        taken = plan.train[: _reach(plan.train, _SAMPLE_BYTES)]
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
    return read_texts(plan.sources, documents, reading)


def _reach(documents: NDArray[np.void], limit_bytes: int) -> int:
    """How many of the first documents have at most `limit_bytes` of text; at least 1."""
    return max(1, int(np.searchsorted(np.cumsum(documents["bytes"]), limit_bytes, side="right")))


def _sources(name: str, given: str | Path | Sequence[str | Path], plain: Path | None) -> tuple[Source, ...]:
    try:
        paths = find_files([given] if isinstance(given, (str, Path)) else given)
    except ConfigError as error:
        raise ConfigError(f"domain {name!r}: {error}") from error
    sources = []
    for number, path in enumerate(paths):
        source = Source(path.absolute(), path.absolute())
        if source.packed and plain is not None:
            source = replace(source, plain=plain / name / f"{number}.plain")
            source.plain.parent.mkdir(parents=True, exist_ok=True)
        sources.append(source)
    return tuple(sources)


def _scan_tasks(sources: Sequence[tuple[Source, ...]], reading: Reading, *, copy: bool) -> Iterator[ScanTask]:
    """Group the files of each domain so that a task has about 32 MB or 512 files."""
    for domain, listed in enumerate(sources):
        numbers: list[int] = []
        size = 0
        for number, source in enumerate(listed):
            numbers.append(number)
            size += source.path.stat().st_size
            if size >= _SCAN_BYTES or len(numbers) == 512 or number == len(listed) - 1:
                taken = tuple(listed[n] for n in numbers)
                yield ScanTask(domain, tuple(numbers), taken, reading, copy, size)
                numbers, size = [], 0


def _plan(name: str, sources: tuple[Source, ...], scans: Sequence[Scan], percent: float) -> DomainPlan:
    found = np.concatenate([np.zeros(0, DOCUMENT), *(s.documents for s in scans)])
    # Copies of a text stand together, the one that comes first in the files first.
    ordered = found[np.lexsort((found["begin"], found["file"], found["low"], found["high"]))]
    fresh = np.ones(len(ordered), dtype=bool)
    fresh[1:] = (ordered["high"][1:] != ordered["high"][:-1]) | (ordered["low"][1:] != ordered["low"][:-1])
    kept = ordered[fresh]
    held = kept["low"] % _SPLIT_PARTS < round(percent * _SPLIT_PARTS / 100)
    plan = DomainPlan(
        name, sources, kept[~held], kept[held], len(found) - len(kept), sum(s.empty for s in scans)
    )
    _check_splits(plan, len(kept), percent)
    return plan


def _check_splits(plan: DomainPlan, kept: int, percent: float) -> None:
    more = "give it more documents, cut its .txt files by a separator, or change the held-out share"
    if not kept:
        raise DataError(
            f"domain {plan.name!r} has no document: {plan.empty} are empty", path=plan.sources[0].path.parent
        )
    if not len(plan.train):
        raise DataError(
            f"domain {plan.name!r}: all of its {kept} documents are held out ({percent} %); {more}"
        )
    if percent and not len(plan.heldout):
        raise DataError(
            f"domain {plan.name!r}: none of its {kept} documents is held out ({percent} %); {more}"
        )
