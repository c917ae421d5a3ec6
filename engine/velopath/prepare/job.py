"""The job of one preparation: parts are encoded, domains written, and the result put in its place.

`work/data` becomes `out`; `parts`, `shards` and `done` in `work` are what a restart after a kill finds.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from velopath.durable import sync_folder, write_durably
from velopath.prepare.plan import DomainPlan, Progress, Settings
from velopath.prepare.shards import ShardFormat, SplitShards, join_shards, plan_shards, write_shard
from velopath.prepare.tasks import PartTask, encode_part
from velopath.tokenizer import TextTokenizer
from velopath.workers import Workers

PART_BYTES = 1 << 20
"""Text bytes of one part: about a second of encoding."""


@dataclass(frozen=True)
class _Part:
    """Documents `first` to `last` (left out) of a split of domain `domain`."""

    domain: int
    split: str
    path: Path
    first: int
    last: int
    bytes: int


class Job:
    """One preparation of `plans` below `work`, to become `out`.

    `trained` is the key of the tokenizer's training or None; `notes` are licences and sources by domain.
    """

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
        left_out = {p.name: dict(p.dropped) for p in self.plans}
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
            read_json(self.out / "prepare.json") == self.manifest() and (self.out / "domains.json").is_file()
        )

    def encode(self, workers: Workers, progress: Progress) -> tuple[str, ...]:
        """Encode and write the domains that are not finished; returns the names of those that were."""
        self._drop_stale()
        finished = [k for k in range(len(self.plans)) if self._is_finished(k)]
        write_durably(self.work / "codec.json", self.codec.json.encode())
        parts = [p for k in range(len(self.plans)) if k not in finished for p in self._parts(k)]
        done, total = 0, sum(part.bytes for part in parts)
        for number, _ in workers.run(encode_part, (self._task(part, workers) for part in parts)):
            done += parts[number].bytes
            progress("encode", done, total)
        self._write(parts, workers, progress)
        return tuple(self.plans[k].name for k in finished)

    def publish(self) -> None:
        """Write tokenizer.json, prepare.json and domains.json, in this order, and put `data/` in the place of `out`."""
        data = self.work / "data"
        write_durably(data / "tokenizer.json", self.codec.json.encode())
        write_durably(data / "prepare.json", json_bytes(self.manifest()))
        entries = {}
        for k, plan in enumerate(self.plans):
            entry = read_json(self._done(k))
            assert isinstance(entry, dict)
            entries[plan.name] = entry | {"dropped": dict(plan.dropped)}
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
        write_durably(data / "domains.json", json_bytes(table))
        if self.out.exists():
            os.replace(self.out, self.work / "replaced")
        os.replace(data, self.out)
        sync_folder(self.out.parent)

    def annotate(self) -> dict[str, Any]:
        """domains.json of `out` with the licences and sources of this call, written where they changed."""
        path = self.out / "domains.json"
        table = read_json(path)
        assert isinstance(table, dict)
        before = json_bytes(table)
        for name, entry in table["domains"].items():
            for note, by_domain in self.notes.items():
                entry[note] = by_domain.get(name, entry.get(note))
        if json_bytes(table) != before:
            write_durably(path, json_bytes(table))
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
        for folder in (self.work / "parts", self.work / "shards", self.work / "done"):
            folder.mkdir(exist_ok=True)
            for path in folder.iterdir():
                if path.name.removesuffix(".json") not in keys:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        finished = {p.name for k, p in enumerate(self.plans) if self._is_finished(k)}
        for path in (self.work / "data").glob("*/*"):
            if path.name not in finished:
                shutil.rmtree(path)
        (self.work / "data").mkdir(exist_ok=True)

    def _parts(self, k: int) -> Iterator[_Part]:
        """Cut both splits of domain k into runs of about `PART_BYTES` of text."""
        folder = self.work / "parts" / self._key(k)
        folder.mkdir(exist_ok=True)
        for split, documents in self.plans[k].splits.items():
            ends = np.cumsum(documents["bytes"])
            reached = np.searchsorted(ends, np.arange(PART_BYTES, ends[-1] + 1, PART_BYTES))
            cuts = [0, *(k for k in np.unique(reached).tolist() if k), len(documents)]
            for number, (a, b) in enumerate(zip(cuts[:-1], cuts[1:], strict=True)):
                size = int(ends[b - 1] - (ends[a - 1] if a else 0))
                yield _Part(k, split, folder / f"{split}.{number:06d}", a, b, size)

    def _task(self, part: _Part, workers: Workers) -> PartTask:
        plan = self.plans[part.domain]
        documents = plan.splits[part.split][part.first : part.last]
        files, renumbered = np.unique(documents["file"], return_inverse=True)
        taken = documents.copy()
        taken["file"] = renumbered
        return PartTask(
            domain=part.domain,
            path=part.path,
            sources=tuple(plan.sources[f] for f in files),
            documents=taken,
            reading=self.settings.reading,
            tokenizer=self.work / "codec.json",
            eos=self.codec.eos,
            dtype=self.dtype,
            threads=workers.threads,
        )

    def _write(self, parts: Sequence[_Part], workers: Workers, progress: Progress) -> None:
        """Write the shards of the domains that have `parts`, and finish each domain whose shards are all there."""
        form = ShardFormat(self.dtype, self.settings.compression, self.settings.shard_bytes)
        planned: dict[tuple[int, str], SplitShards] = {}
        for part in parts:
            if (part.domain, part.split) not in planned:
                paths = [p.path for p in parts if (p.domain, p.split) == (part.domain, part.split)]
                folder = self.work / "shards" / self._key(part.domain) / part.split
                planned[part.domain, part.split] = plan_shards(part.domain, paths, folder, form)
        tasks = [task for split in planned.values() for task in split.tasks]
        left = Counter(task.domain for task in tasks)
        done, total = 0, sum(task.bytes for task in tasks)
        for k in {domain for domain, _ in planned} - set(left):
            self._finish(k, planned)
        for number, _ in workers.run(write_shard, tasks):
            k = tasks[number].domain
            left[k] -= 1
            if not left[k]:
                self._finish(k, planned)
            done += tasks[number].bytes
            progress("write", done, total)

    def _finish(self, k: int, planned: Mapping[tuple[int, str], SplitShards]) -> None:
        """Put domain k together from its shards, mark it done and drop its parts."""
        plan = self.plans[k]
        splits = {split: planned[k, split] for split in plan.splits}
        for split, shards in splits.items():
            join_shards(shards.tasks, self.work / "data" / split / plan.name)
        empty = SplitShards((), 0, 0)
        train, heldout = splits["train"], splits.get("heldout", empty)
        ends = self.codec.eos is not None
        entry = {
            "tokens": train.tokens + ends * train.documents,
            "documents": train.documents,
            "bytes": 0 if plan.holds_tokens else plan.bytes,
            "heldout_tokens": heldout.tokens + ends * heldout.documents,
            "heldout_documents": heldout.documents,
            "licence": None,
            "source": None,
            "hash": self.digests[k],
        }
        write_durably(self._done(k), json_bytes(entry))
        for folder in ("shards", "parts"):
            shutil.rmtree(self.work / folder / self._key(k), ignore_errors=True)


def json_bytes(value: object) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def read_json(path: Path) -> object:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
