"""Prepare: text (or tokens) per domain -> token shards per domain and split, with their counts in domains.json.

Everything is made in `OUT.partial` and renamed at the end, so a folder `OUT` is complete. A killed run leaves
`OUT.partial`; the next one takes its finished domains and parts where inputs and settings are the same.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from velopath.durable import locked, write_durably
from velopath.errors import ConfigError, DataError
from velopath.prepare.filters import Filters
from velopath.prepare.job import Job, json_bytes, read_json
from velopath.prepare.plan import (
    DomainPlan,
    Inputs,
    Progress,
    Settings,
    check_names,
    estimate_tokens,
    find_sources,
    plan_domains,
    training_set,
    training_texts,
)
from velopath.prepare.sources import Reading
from velopath.tokenizer import TextTokenizer, load_tokenizer, one_thread, train_bpe
from velopath.workers import Workers

TRAINING_BYTES = 16 << 20
"""Text bytes that a tokenizer is trained on, shared evenly by the domains."""
ALONE_BYTES = 8 << 20
"""Less text than this is prepared faster in one process, by the tokenizer's threads, than in several."""


@dataclass(frozen=True)
class Prepared:
    """Outcome of `prepare`. `table` is domains.json, None after a dry run; `reused` names domains found finished.

    `disk_needed` (an estimate, parts included) and `disk_free` are in bytes.
    """

    out: Path
    plans: tuple[DomainPlan, ...]
    table: dict[str, Any] | None
    vocab_size: int
    disk_needed: int
    disk_free: int
    reused: tuple[str, ...] = ()


def prepare(
    inputs: Inputs,
    out: str | Path,
    *,
    tokenizer: str | Path,
    field: str = "text",
    separator: str | None = None,
    heldout_percent: float = 5.0,
    eos: str | None = None,
    dtype: str | None = None,
    processes: int | None = None,
    shard_size: int = 1 << 26,
    compression: str | None = "zstd:3",
    min_chars: int = 0,
    max_chars: int | None = None,
    languages: Sequence[str] = (),
    near_duplicates: float | None = None,
    licences: Mapping[str, str] | None = None,
    sources: Mapping[str, str] | None = None,
    dry_run: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> Prepared:
    """Tokenise the text of each domain into `out/train/<domain>` and `out/heldout/<domain>`.

    `inputs` maps a domain to files, folders or glob patterns of .txt and .jsonl (.gz, .zst), .parquet, folders that
    Hugging Face `datasets` saved, or MDS folders, whose text is taken from the column `field` (a str) and whose
    tokens, where there is no such column, stay as they are but for an end-of-text token at the end. `tokenizer`
    is a tokenizers file, or "train:SIZE" for a byte-level BPE of SIZE entries trained on the train split.
    `separator` cuts .txt files into documents. `heldout_percent` of the documents are held out (0: none). `eos`
    names the end-of-text token (None: looked for, "": none), `dtype` the stored type (None: uint16 where all ids
    fit). `shard_size` is in raw bytes.

    Exact copies are dropped, and by choice documents of less than `min_chars` or more than `max_chars` characters,
    of other `languages` (ISO 639-1), and those like an earlier one by a Jaccard similarity of `near_duplicates` or
    more; domains.json counts them under `dropped`. `dry_run` reads the inputs and writes nothing; `force` replaces
    an `out` that `prepare` made.

    The result does not depend on `processes`. Each uses one core; None is one per core, or for less text than
    `ALONE_BYTES` a single one in which the tokenizer uses all cores.

    Raises `ConfigError` on wrong settings and an `out` with other content, `DataError` (file and line) on text
    that cannot be read, a domain with no document in a split, and a disk that is too full.
    """
    settings = Settings(
        Reading(field, separator),
        heldout_percent,
        eos,
        dtype,
        shard_size,
        compression,
        Filters(min_chars, max_chars, tuple(languages)),
        near_duplicates,
    )
    notes = {"licence": licences or {}, "source": sources or {}}
    check_names(inputs, notes)
    report: Progress = progress or (lambda stage, done, total: None)
    out = Path(out).absolute()
    _refuse_foreign(out)
    names, pieces = sorted(inputs), find_sources(inputs, settings)
    with _workers(processes, sum(s.size for listed in pieces for s in listed)) as workers:
        if dry_run:
            plans = plan_domains(names, pieces, settings, None, workers, report)
            codec, _ = _tokenizer(tokenizer, plans, settings, [], report)
            plans = estimate_tokens(plans, codec, settings.reading)
            needed = _disk_needed(plans, dtype or codec.dtype)
            return Prepared(out, plans, None, codec.vocab_size, needed, _disk_free(out))
        with _workplace(out) as work:
            plans = plan_domains(names, pieces, settings, work, workers, report)
            with one_thread(processes == 1):
                codec, trained = _tokenizer(tokenizer, plans, settings, [work / "trained", out], report)
            plans = estimate_tokens(plans, codec, settings.reading)
            job = Job(out, work, plans, codec, settings, trained=trained, notes=notes)
            needed, reused = _disk_needed(plans, job.dtype), tuple(plan.name for plan in plans)
            if not job.is_done():
                if out.exists() and any(out.iterdir()) and not force:
                    raise ConfigError(
                        f"{out} was prepared from other inputs or settings; use force or another folder"
                    )
                free = _disk_free(out)
                if free < needed:
                    raise DataError(f"about {needed:,} bytes of disk are needed, {free:,} are free", path=out)
                reused = job.encode(workers, report)
                job.publish()
            return Prepared(out, plans, job.annotate(), codec.vocab_size, needed, _disk_free(out), reused)


def _workers(processes: int | None, text_bytes: int) -> Workers:
    if processes is None and text_bytes < ALONE_BYTES:
        return Workers(1, threads=True)
    return Workers(processes)


def _tokenizer(
    chosen: str | Path,
    plans: Sequence[DomainPlan],
    settings: Settings,
    finished: Sequence[Path],
    report: Progress,
) -> tuple[TextTokenizer, str | None]:
    """The tokenizer of the file `chosen`, or trained as "train:SIZE" says, with the key of its training.

    A trained one is kept in the first of the folders `finished` and found again in any of them; where there
    are none (a dry run), a tenth of the text trains it, which tells bytes per token well enough.
    """
    kind, _, size = str(chosen).partition(":")
    if kind != "train":
        return load_tokenizer(chosen, eos=settings.eos), None
    if not size.isdecimal():
        raise ConfigError(f"tokenizer is {str(chosen)!r}; expected a file or train:SIZE, such as train:2048")
    tokens = next((p for p in plans if p.holds_tokens), None)
    if tokens is not None:
        raise ConfigError(
            f"domain {tokens.name!r} holds tokens already; give the tokenizers file that made them, not {chosen}"
        )
    eos = "<|endoftext|>" if settings.eos is None else settings.eos
    limit = TRAINING_BYTES if finished else TRAINING_BYTES // 10
    texts, text_bytes = training_set(plans, limit)
    key = hashlib.sha256(f"{texts} {size} {eos}".encode()).hexdigest()
    for folder in finished:
        known = read_json(folder / "prepare.json")
        if isinstance(known, dict) and known.get("trained") == key and (folder / "tokenizer.json").is_file():
            return load_tokenizer(folder, eos=eos), key
    report("train", 0, text_bytes)
    codec = train_bpe(training_texts(plans, settings.reading, limit), int(size), eos=eos)
    report("train", text_bytes, text_bytes)
    for folder in finished[:1]:
        folder.mkdir(exist_ok=True)
        write_durably(folder / "tokenizer.json", codec.json.encode())
        write_durably(folder / "prepare.json", json_bytes({"trained": key}))
    return codec, key


@contextmanager
def _workplace(out: Path) -> Iterator[Path]:
    """The folder `OUT.partial`, locked against other runs; kept after an error, removed at the end."""
    work = out.with_name(out.name + ".partial")
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{work} cannot be made ({error.strerror}); choose another folder") from error
    with locked(work / "lock", wait=False) as held:
        if not held:
            raise ConfigError(f"another prepare is writing {out}; wait for it or choose another folder")
        try:
            yield work
        except BaseException:
            if (
                not (work / "parts").exists() and not (work / "trained").exists()
            ):  # nothing that a restart could use
                shutil.rmtree(work)
            raise
        shutil.rmtree(work)


def _refuse_foreign(out: Path) -> None:
    """Never touch a folder that `prepare` did not make."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file; expected a folder to make")
    if out.is_dir() and any(out.iterdir()) and not (out / "prepare.json").is_file():
        raise ConfigError(f"{out} holds other files and was not made by prepare; choose another folder")


def _disk_needed(plans: Sequence[DomainPlan], dtype: str) -> int:
    # Parts and shards side by side; zstd, and domains already finished, make it less.
    return sum(2 * np.dtype(dtype).itemsize * plan.tokens for plan in plans)


def _disk_free(out: Path) -> int:
    there = next(p for p in (out, *out.parents) if p.exists())
    return shutil.disk_usage(there).free
