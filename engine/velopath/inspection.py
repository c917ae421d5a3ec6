"""Inspection of prepared data: what each domain holds, how long its documents are, how far domains lie apart, and
whether all of it is sound."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from velopath.cache import local_copy
from velopath.errors import ConfigError, DataError
from velopath.inspection_separation import Separation, TokenUse, document_hashes, separate, token_use
from velopath.mds import MdsFolder, ShardEntry, load_index, read_documents, read_shard
from velopath.remote import has
from velopath.stream_data import COUNTS, domain_folders, read_table
from velopath.tokenizer import TextTokenizer, load_tokenizer
from velopath.urls import below, is_url, last_name, redact
from velopath.workers import Workers

MEASURED_SHARDS = 8
"""Shards of a domain whose document lengths are read where not all of them are."""
COUNTED_IDS = 1 << 20
"""Token ids are counted where all are below this: larger vocabularies are not in use, larger ids are damage."""
_ALONE_BYTES = 1 << 25  # below this, starting processes takes longer than reading


@dataclass(frozen=True)
class Lengths:
    """Document lengths in tokens; `histogram[i]` counts those of 2^i to 2^(i+1) - 1. `shards` were read, of `of`."""

    shards: int
    of: int
    documents: int
    tokens: int
    mean: float
    median: float
    longest: int
    histogram: tuple[int, ...]


@dataclass(frozen=True)
class DomainReport:
    """One domain. `tokens` are train tokens as the sampler counts them, an end-of-text token per document included.

    `share` is its part of all train tokens; `lengths` and `token_use` are of the shards that were read. None stands
    for what the folder does not say.
    """

    name: str
    documents: int
    tokens: int | None
    share: float | None
    bytes_per_token: float | None
    heldout_documents: int | None
    heldout_tokens: int | None
    licence: str | None
    source: str | None
    lengths: Lengths
    token_use: TokenUse | None = None
    samples: tuple[str, ...] = ()


@dataclass(frozen=True)
class Inspection:
    """Result of `inspect_data`: the domains in name order; `problems` is None where they were not looked for.

    `separation` is None where fewer than two domains were read; `commonest` are texts of the ids in `token_use`.
    """

    folder: str
    dtype: str
    vocab_size: int | None
    eos: int | None
    domains: tuple[DomainReport, ...]
    problems: tuple[str, ...] | None = None
    separation: Separation | None = None
    commonest: Mapping[int, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        return asdict(self)


@dataclass
class _Domain:
    name: str
    train: MdsFolder
    heldout: MdsFolder | None
    stated: Mapping[str, Any] = field(default_factory=dict)


def inspect_data(
    data: str | Path,
    *,
    domain: str | None = None,
    samples: int = 0,
    verify: bool = False,
    processes: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Inspection:
    """Describe a prepared folder, a folder of MDS folders, or one MDS folder; of a URL, what is read is fetched.

    Lengths, token counts and the separation of domains are those of all train documents with `verify`, else of the
    first `MEASURED_SHARDS` shards of a domain.
    `samples` documents of each domain are decoded (the first ones; prepare shuffles). `verify` reads every
    sample of both splits: hashes, bounds, token ids below the vocabulary's size, counts of domains.json and
    the tokenizer's hash; what is wrong is listed in `problems`. `progress` gets shards done and in all.

    Raises `DataError` when there is no readable index, `ConfigError` on an unknown `domain`.
    """
    folder = data if is_url(data) else Path(data)
    table = _read_table(folder)
    domains = _find_domains(folder, table)
    if domain is not None and domain not in (d.name for d in domains):
        raise ConfigError(f"unknown domain {domain!r}; the domains are {', '.join(d.name for d in domains)}")
    chosen = [d for d in domains if domain in (None, d.name)]
    vocab_size = table["tokenizer"]["vocab_size"] if table else None
    tasks = list(_shard_tasks(chosen, vocab_size, everything=verify))
    measured: dict[int, _Measured | str] = {}
    counts = {place.name: _Counts() for place in chosen}
    worth_workers = sum(task.entry.raw_bytes for task in tasks) > _ALONE_BYTES
    with Workers(processes if worth_workers else 1) as workers:
        for number, found in workers.run(_measure, tasks):
            if isinstance(found, _Measured):
                if tasks[number].split == "train":
                    counts[tasks[number].domain].add(found.counts)
                found = replace(found, counts=None)  # a vocabulary's worth for each shard would be much
            measured[number] = found
            if progress is not None:
                progress(len(measured), len(tasks))
    problems = [m for n in range(len(tasks)) if isinstance(m := measured[n], str)]
    if problems and not verify:
        raise DataError(f"{problems[0]} (velopath inspect --verify lists everything)")
    codec = _codec(folder, table, problems if verify else None) if table else None
    total = sum(d.stated.get("tokens", 0) for d in domains)
    read: dict[str, list[_Measured]] = {}
    reports = []
    for place in chosen:
        found_here = {
            s: [measured[n] for n, t in enumerate(tasks) if (t.domain, t.split) == (place.name, s)]
            for s in _SPLITS
        }
        if verify and not any(isinstance(x, str) for x in [*found_here["train"], *found_here["heldout"]]):
            lengths = {s: [m.lengths for m in x if isinstance(m, _Measured)] for s, x in found_here.items()}
            problems += _compare_counts(place, lengths, table)
        read[place.name] = [x for x in found_here["train"] if isinstance(x, _Measured)]
        shown = tuple(_sample_texts(place, samples, codec)) if samples and not problems else ()
        reports.append(_report(place, read[place.name], counts[place.name].total, total, table, shown))
    dtype = table["dtype"] if table else domains[0].train.columns.encodings[0]
    eos = table["eos"] if table else None
    return Inspection(
        redact(str(folder)),
        dtype,
        vocab_size,
        eos,
        tuple(reports),
        tuple(problems) if verify else None,
        _separation({n: c.total for n, c in counts.items() if c.total is not None}, read),
        _commonest(reports, codec),
    )


_SPLITS = ("train", "heldout")
_COUNTED_TOGETHER = 256


@dataclass(frozen=True)
class _ShardTask:
    domain: str
    split: str
    entry: ShardEntry
    vocab_size: int | None


@dataclass(frozen=True)
class _Measured:
    """Of the documents of a shard: lengths, hashes, and counts of the token ids (None: ids too large to count)."""

    lengths: NDArray[np.int64]
    hashes: NDArray[np.uint64]
    counts: NDArray[np.int64] | None


def _measure(task: _ShardTask) -> _Measured | str:
    """What the shard holds, or what is wrong with it."""
    lengths: list[int] = []
    hashes: list[NDArray[np.uint64]] = []
    counts: NDArray[np.int64] | None = np.zeros(0, np.int64)
    waiting: list[NDArray[np.integer[Any]]] = []

    def count() -> None:
        nonlocal counts
        hashes.append(document_hashes(waiting))
        together = np.concatenate([np.zeros(0, np.int64), *waiting]).astype(np.int64)
        if counts is None or (together.size and int(together.max()) >= COUNTED_IDS):
            counts = None
        else:
            new = np.bincount(together, minlength=len(counts))
            new[: len(counts)] += counts
            counts = new
        waiting.clear()

    try:
        for number, tokens in enumerate(read_shard(task.entry)):
            if task.vocab_size is not None and tokens.size and int(tokens.max()) >= task.vocab_size:
                problem = (
                    f"token id {int(tokens.max())} is not below the vocabulary's size, {task.vocab_size}"
                )
                raise DataError(problem, path=task.entry.path, sample=number)
            lengths.append(tokens.size)
            waiting.append(tokens)
            if len(waiting) == _COUNTED_TOGETHER:
                count()
    except DataError as error:
        return str(error)
    count()
    return _Measured(np.array(lengths, dtype=np.int64), np.concatenate(hashes), counts)


class _Counts:
    """Sum of the token counts of shards; `total` is None where ids were too large to count."""

    def __init__(self) -> None:
        self.total: NDArray[np.int64] | None = np.zeros(0, np.int64)

    def add(self, counts: NDArray[np.int64] | None) -> None:
        if self.total is None or counts is None:
            self.total = None
        else:
            longer, shorter = sorted((self.total, counts), key=len, reverse=True)
            longer[: len(shorter)] += shorter
            self.total = longer


def _separation(
    counts: Mapping[str, NDArray[np.int64]], read: Mapping[str, list[_Measured]]
) -> Separation | None:
    if len(counts) < 2:
        return None
    width = max(map(len, counts.values()))
    padded = {name: np.pad(c, (0, width - len(c))) for name, c in counts.items()}
    none = [np.zeros(0, np.uint64)]
    return separate(padded, {n: np.concatenate([*none, *(m.hashes for m in read[n])]) for n in counts})


def _commonest(reports: Sequence[DomainReport], codec: TextTokenizer | None) -> dict[int, str]:
    ids = {i for r in reports if r.token_use is not None for i, _ in r.token_use.commonest}
    return {i: codec.decode([i]) for i in sorted(ids)} if codec is not None else {}


def _shard_tasks(domains: Sequence[_Domain], vocab_size: int | None, *, everything: bool) -> list[_ShardTask]:
    tasks = []
    for place in domains:
        train = place.train.shards if everything else place.train.shards[:MEASURED_SHARDS]
        tasks += [_ShardTask(place.name, "train", entry, vocab_size) for entry in train]
        if everything and place.heldout is not None:
            tasks += [_ShardTask(place.name, "heldout", entry, vocab_size) for entry in place.heldout.shards]
    return tasks


def _read_table(folder: str | Path) -> dict[str, Any] | None:
    """domains.json of a prepared folder, with all keys that are read here; None where there is none."""
    table = read_table(folder)
    if table is None:
        return None
    try:
        table["domains"], table["tokenizer"]["vocab_size"], table["tokenizer"]["sha256"]  # noqa: B018
        for entry in table["domains"].values():
            for key in COUNTS:
                operator.index(entry[key])
        table["dtype"], table["eos"]  # noqa: B018
    except (KeyError, TypeError) as error:
        path = redact(str(below(folder, "domains.json")))
        raise DataError(f"not a domains.json of prepare: {error!r}", path=path) from error
    return table


def _find_domains(folder: str | Path, table: dict[str, Any] | None) -> list[_Domain]:
    if table is not None:
        found = []
        for name in sorted(table["domains"]):
            held = below(folder, "heldout", name)
            heldout = load_index(held) if table["domains"][name]["heldout_documents"] else None
            train = load_index(below(folder, "train", name))
            found.append(_Domain(name, train, heldout, table["domains"][name]))
        return found
    if isinstance(folder, str):
        if has(str(below(folder, "index.json"))):
            return [_Domain(last_name(folder), load_index(folder), None)]
        return [_Domain(name, load_index(place), None) for name, place in domain_folders(folder).items()]
    if (folder / "index.json").exists():
        return [_Domain(folder.resolve().name, load_index(folder), None)]
    inner = sorted(p.parent for p in folder.glob("*/index.json"))
    if not inner:
        raise DataError("no domains.json, no index.json, and no sub-folder with one", path=folder)
    return [_Domain(p.name, load_index(p), None) for p in inner]


def _codec(folder: str | Path, table: dict[str, Any], problems: list[str] | None) -> TextTokenizer | None:
    """The folder's tokenizer; where `problems` are collected, what is wrong with it is added there."""
    try:
        place = below(folder, "tokenizer.json")
        found = local_copy(place)
        if found is None:
            raise DataError(
                "cannot be read (no such file); expected a tokenizer.json", path=redact(str(place))
            )
        codec = load_tokenizer(found)
        if codec.sha256 != table["tokenizer"]["sha256"]:
            raise DataError(
                "another tokenizer than the one of domains.json",
                path=redact(str(place)),
                field="sha256",
            )
    except DataError as error:
        if problems is None:
            raise
        problems.append(str(error))
        return None
    return codec


def _compare_counts(
    place: _Domain, lengths: Mapping[str, list[Any]], table: dict[str, Any] | None
) -> list[str]:
    if table is None:
        return []
    problems = []
    for split, prefix in (("train", ""), ("heldout", "heldout_")):
        documents = sum(len(x) for x in lengths[split])
        ends = documents if table["eos"] is not None else 0
        tokens = sum(int(x.sum()) for x in lengths[split]) + ends
        for key, count in (("documents", documents), ("tokens", tokens)):
            stated = place.stated[prefix + key]
            if count != stated:
                problems.append(f"domain {place.name}: {split} has {count} {key}, domains.json says {stated}")
    return problems


def _report(
    place: _Domain,
    measured: list[_Measured],
    counts: NDArray[np.int64] | None,
    total: int,
    table: dict[str, Any] | None,
    samples: tuple[str, ...],
) -> DomainReport:
    lengths = np.concatenate([np.zeros(0, np.int64), *(m.lengths for m in measured)])
    tokens = place.stated.get("tokens")
    ends = place.train.samples if table and table["eos"] is not None else 0
    inner = (tokens or 0) - ends
    return DomainReport(
        name=place.name,
        documents=place.train.samples,
        tokens=tokens,
        share=tokens / total if tokens is not None and total else None,
        bytes_per_token=place.stated["bytes"] / inner if inner > 0 and place.stated["bytes"] else None,
        heldout_documents=place.stated.get("heldout_documents"),
        heldout_tokens=place.stated.get("heldout_tokens"),
        licence=place.stated.get("licence"),
        source=place.stated.get("source"),
        lengths=_lengths(lengths, len(measured), len(place.train.shards)),
        token_use=token_use(counts) if counts is not None else None,
        samples=samples,
    )


def _lengths(lengths: NDArray[np.int64], shards: int, of: int) -> Lengths:
    if not lengths.size:
        return Lengths(shards, of, 0, 0, 0.0, 0.0, 0, ())
    # frexp gives the exact power of two below each length; a length of 0 counts with 1.
    powers = np.frexp(np.maximum(lengths, 1).astype(float))[1] - 1
    return Lengths(
        shards=shards,
        of=of,
        documents=len(lengths),
        tokens=int(lengths.sum()),
        mean=float(lengths.mean()),
        median=float(np.median(lengths)),
        longest=int(lengths.max()),
        histogram=tuple(np.bincount(powers).tolist()),
    )


def _sample_texts(place: _Domain, count: int, codec: TextTokenizer | None) -> list[str]:
    documents = islice(read_documents(place.train.folder), count)
    return [codec.decode(d) if codec is not None else " ".join(map(str, d.tolist())) for d in documents]
