"""Prepare: text per domain -> token shards per domain and split, with their counts in domains.json.

Everything is made in `OUT.partial` and renamed at the end, so a folder `OUT` is complete. A killed run leaves
`OUT.partial`; the next one takes its finished domains and parts where inputs and settings are the same.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from velopath.durable import locked, sync_folder, write_durably
from velopath.errors import ConfigError, DataError
from velopath.prepare.documents import Reading
from velopath.prepare.plan import (
    DomainPlan,
    Inputs,
    Progress,
    Settings,
    check_names,
    estimate_tokens,
    plan_domains,
    training_set,
    training_texts,
)
from velopath.prepare.tasks import PartTask, encode_part, write_domain
from velopath.tokenizer import TextTokenizer, load_tokenizer, train_bpe
from velopath.workers import Workers

PART_BYTES = 1 << 20
"""Text bytes of one part: about a second of encoding."""
TRAINING_BYTES = 16 << 20
"""Text bytes that a tokenizer is trained on, shared evenly by the domains."""


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
    licences: Mapping[str, str] | None = None,
    sources: Mapping[str, str] | None = None,
    dry_run: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> Prepared:
    """Tokenise the text of each domain into `out/train/<domain>` and `out/heldout/<domain>`.

    `inputs` maps a domain to files, folders or glob patterns of .txt and .jsonl (.gz, .zst). `tokenizer` is a
    tokenizers file, or "train:SIZE" for a byte-level BPE of SIZE entries trained on the train split. `separator`
    cuts .txt files into documents. `heldout_percent` of the documents are held out (0: none). `eos` names the
    end-of-text token (None: looked for, "": none), `dtype` the stored type (None: uint16 where all ids fit).
    `shard_size` is in raw bytes. `dry_run` reads the inputs and writes nothing; `force` replaces an `out` that
    `prepare` made. The result does not depend on `processes` (None: all cores).

    Raises `ConfigError` on wrong settings and an `out` with other content, `DataError` (file and line) on text
    that cannot be read, a domain with no document in a split, and a disk that is too full.
    """
    settings = Settings(Reading(field, separator), heldout_percent, eos, dtype, shard_size, compression)
    notes = {"licence": licences or {}, "source": sources or {}}
    check_names(inputs, notes)
    report: Progress = progress or (lambda stage, done, total: None)
    out = Path(out).absolute()
    _refuse_foreign(out)
    with Workers(processes) as workers:
        if dry_run:
            plans = plan_domains(inputs, settings, None, workers, report)
            codec, _ = _tokenizer(tokenizer, plans, settings, [], report)
            plans = estimate_tokens(plans, codec, settings.reading)
            needed = _disk_needed(plans, dtype or codec.dtype)
            return Prepared(out, plans, None, codec.vocab_size, needed, _disk_free(out))
        with _workplace(out) as work:
            plans = plan_domains(inputs, settings, work / "plain", workers, report)
            codec, trained = _tokenizer(tokenizer, plans, settings, [work / "trained", out], report)
            plans = estimate_tokens(plans, codec, settings.reading)
            job = _Job(out, work, plans, codec, settings, trained=trained, notes=notes)
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


class _Job:
    """One preparation below `work`: `data/` becomes `out`; `parts/` and `done/` are what a restart finds."""

    def __init__(
        self,
        out: Path,
        work: Path,
        plans: tuple[DomainPlan, ...],
        codec: TextTokenizer,
        settings: Settings,
        *,
        trained: str | None,
        notes: Mapping[str, Mapping[str, str]],
    ) -> None:
        self.out, self.work, self.plans, self.codec = out, work, plans, codec
        self.settings, self.trained, self.notes = settings, trained, notes
        self.dtype = settings.dtype or codec.dtype
        codec.check_dtype(self.dtype)
        self.digests = [plan.digest(codec, self.dtype, settings) for plan in plans]

    def manifest(self) -> dict[str, Any]:
        """What `out/prepare.json` says: enough to know the same job again."""
        left_out = {p.name: {"duplicates": p.duplicates, "empty": p.empty} for p in self.plans}
        digests = {p.name: d for p, d in zip(self.plans, self.digests, strict=True)}
        return {
            "version": 1,
            "tokenizer": self.codec.sha256,
            "trained": self.trained,
            "domains": digests,
            "left_out": left_out,
        }

    def is_done(self) -> bool:
        """Whether `out` holds the result of this very job."""
        return (
            _read_json(self.out / "prepare.json") == self.manifest() and (self.out / "domains.json").is_file()
        )

    def encode(self, workers: Workers, progress: Progress) -> tuple[str, ...]:
        """Encode and write the domains that are not finished; returns the names of those that were."""
        self._drop_stale()
        finished = [k for k in range(len(self.plans)) if self._is_finished(k)]
        write_durably(self.work / "codec.json", self.codec.json.encode())
        tasks = [task for k in range(len(self.plans)) if k not in finished for task in self._part_tasks(k)]
        left = Counter(task.domain for task in tasks)
        done, total = 0, sum(int(task.documents["bytes"].sum()) for task in tasks)
        for number, _ in workers.run(encode_part, tasks):
            task = tasks[number]
            left[task.domain] -= 1
            if not left[task.domain]:  # written here while the workers go on with the next domains
                self._write(task.domain, [t.path for t in tasks if t.domain == task.domain])
            done += int(task.documents["bytes"].sum())
            progress("encode", done, total)
        return tuple(self.plans[k].name for k in finished)

    def publish(self) -> None:
        """Write tokenizer.json, prepare.json and domains.json, in this order, and put `data/` in the place of `out`."""
        data = self.work / "data"
        write_durably(data / "tokenizer.json", self.codec.json.encode())
        write_durably(data / "prepare.json", _json_bytes(self.manifest()))
        entries = {p.name: _read_json(self._done(k)) for k, p in enumerate(self.plans)}
        table = {
            "version": 1,
            "tokenizer": {
                "file": "tokenizer.json",
                "sha256": self.codec.sha256,
                "vocab_size": self.codec.vocab_size,
            },
            "eos": self.codec.eos,
            "dtype": self.dtype,
            "domains": entries,
        }
        write_durably(data / "domains.json", _json_bytes(table))
        if self.out.exists():
            os.replace(self.out, self.work / "replaced")
        os.replace(data, self.out)
        sync_folder(self.out.parent)

    def annotate(self) -> dict[str, Any]:
        """domains.json of `out` with the licences and sources of this call, written where they changed."""
        path = self.out / "domains.json"
        table = _read_json(path)
        assert isinstance(table, dict)
        before = _json_bytes(table)
        for name, entry in table["domains"].items():
            for note, by_domain in self.notes.items():
                entry[note] = by_domain.get(name, entry.get(note))
        if _json_bytes(table) != before:
            write_durably(path, _json_bytes(table))
        return table

    def _key(self, k: int) -> str:
        return f"{self.plans[k].name}-{self.digests[k]}"

    def _done(self, k: int) -> Path:
        return self.work / "done" / f"{self._key(k)}.json"

    def _is_finished(self, k: int) -> bool:
        data = self.work / "data"
        return self._done(k).is_file() and all(
            (data / s / self.plans[k].name).is_dir() for s in self.plans[k].splits
        )

    def _drop_stale(self) -> None:
        """Remove what a killed run of another job left, and domains that it did not finish."""
        keys = {self._key(k) for k in range(len(self.plans))}
        for folder in (self.work / "parts", self.work / "done"):
            folder.mkdir(exist_ok=True)
            for path in folder.iterdir():
                if path.name.removesuffix(".json") not in keys:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        finished = {p.name for k, p in enumerate(self.plans) if self._is_finished(k)}
        for path in (self.work / "data").glob("*/*"):
            if path.name not in finished:
                shutil.rmtree(path)
        (self.work / "data").mkdir(exist_ok=True)

    def _part_tasks(self, k: int) -> Iterator[PartTask]:
        """Cut both splits of domain k into runs of about `PART_BYTES` of text."""
        plan, folder = self.plans[k], self.work / "parts" / self._key(k)
        folder.mkdir(exist_ok=True)
        for split, documents in plan.splits.items():
            run = np.cumsum(documents["bytes"]) // PART_BYTES
            for number, documents_of_run in enumerate(np.split(documents, np.flatnonzero(np.diff(run)) + 1)):
                files, renumbered = np.unique(documents_of_run["file"], return_inverse=True)
                taken = documents_of_run.copy()
                taken["file"] = renumbered
                yield PartTask(
                    domain=k,
                    path=folder / f"{split}.{number:06d}",
                    sources=tuple(plan.sources[f] for f in files),
                    documents=taken,
                    reading=self.settings.reading,
                    tokenizer=self.work / "codec.json",
                    dtype=self.dtype,
                )

    def _write(self, k: int, parts: Sequence[Path]) -> None:
        """Write domain k from its parts, mark it done and drop the parts."""
        plan = self.plans[k]
        counts = write_domain(
            {s: [p for p in parts if p.name.split(".")[0] == s] for s in plan.splits},
            plan.name,
            data=self.work / "data",
            scratch=self.work / "writing",
            dtype=self.dtype,
            compression=self.settings.compression,
            shard_bytes=self.settings.shard_bytes,
        )
        ends = {s: documents if self.codec.eos is not None else 0 for s, (documents, _) in counts.items()}
        documents, tokens = counts["train"]
        heldout_documents, heldout_tokens = counts.get("heldout", (0, 0))
        entry = {
            "tokens": tokens + ends["train"],
            "documents": documents,
            "bytes": plan.bytes,
            "heldout_tokens": heldout_tokens + ends.get("heldout", 0),
            "heldout_documents": heldout_documents,
            "licence": None,
            "source": None,
            "hash": self.digests[k],
        }
        write_durably(self._done(k), _json_bytes(entry))
        shutil.rmtree(self.work / "parts" / self._key(k))


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
    eos = "<|endoftext|>" if settings.eos is None else settings.eos
    limit = TRAINING_BYTES if finished else TRAINING_BYTES // 10
    texts, text_bytes = training_set(plans, limit)
    key = hashlib.sha256(f"{texts} {size} {eos}".encode()).hexdigest()
    for folder in finished:
        known = _read_json(folder / "prepare.json")
        if isinstance(known, dict) and known.get("trained") == key and (folder / "tokenizer.json").is_file():
            return load_tokenizer(folder, eos=eos), key
    report("train", 0, text_bytes)
    codec = train_bpe(training_texts(plans, settings.reading, limit), int(size), eos=eos)
    report("train", text_bytes, text_bytes)
    for folder in finished[:1]:
        folder.mkdir(exist_ok=True)
        write_durably(folder / "tokenizer.json", codec.json.encode())
        write_durably(folder / "prepare.json", _json_bytes({"trained": key}))
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


def _json_bytes(value: object) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _read_json(path: Path) -> object:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
