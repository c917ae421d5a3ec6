"""The study's text: the demo's corpus cut to skewed sizes, in three parts that share no document.

`train` is read by the models, `control` drives controllers and fits targets, `test` is looked at only for results.
Documents go to parts by a hash of their id. Built once per cache folder.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from velopath.corpus import build_corpus
from velopath.evaluate import HeldOut
from velopath.mds import read_documents
from velopath.prepare import prepare

VOCABULARY = 1024
ROW_TOKENS = 256
TRAIN_BYTES = {
    "python": 1_250_000,
    "docs": 1_100_000,
    "verse": 900_000,
    "cpp": 250_000,
    "tables": 120_000,
    "translations": 80_000,
}
"""UTF-8 bytes of training text by domain. Our choice of a corpus as continual pre-training meets it: mostly what the
base model knows already, and the new domains small; so natural shares are far from uniform ones."""
KNOWN = ("docs", "python", "verse")
"""Domains of the base model: it has never seen the others."""
PERCENT = {"control": 7, "test": 8}
"""Share of the documents of a domain in these parts, in percent."""


@dataclass(frozen=True)
class StudyData:
    """Where the parts lie; `natural` are the token shares of the training text by domain."""

    folder: Path
    natural: Mapping[str, float]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.natural)

    @property
    def known(self) -> tuple[str, ...]:
        """Domains of the base model."""
        return KNOWN

    @property
    def train(self) -> Path:
        return self.folder / "train"

    def heldout(self, part: str, seed: int = 0) -> HeldOut:
        """The hold-out `control` or `test`, in rows of the study's length."""
        eos = json.loads((self.folder / part / "domains.json").read_text())["eos"]
        streams = []
        for name in self.names:
            parts = [
                np.append(d, np.array([eos], d.dtype))
                for d in read_documents(self.folder / part / "train" / name)
            ]
            streams.append(np.concatenate(parts))
        return HeldOut(self.names, tuple(streams), ROW_TOKENS, seed)


def study_data(folder: Path) -> StudyData:
    """The study's data in `folder`, built there at the first call (about half a minute)."""
    done = folder / "domains.json"
    if not done.is_file():
        _build(folder)
    tokens = json.loads(done.read_text())
    total = sum(tokens.values())
    return StudyData(folder, {name: tokens[name] / total for name in sorted(tokens)})


def part_of(document_id: str) -> str:
    """The part of a document: "test", "control" or "train", by the SHA-256 of its id."""
    slot = int(hashlib.sha256(f"mixing study/{document_id}".encode()).hexdigest(), 16) % 100
    if slot < PERCENT["test"]:
        return "test"
    return "control" if slot < PERCENT["test"] + PERCENT["control"] else "train"


def made_up_data(folder: Path) -> StudyData:
    """Nonsense with the study's names, made in a second without any package: to see that the code runs."""
    if not (folder / "domains.json").is_file():
        random = np.random.default_rng(0)
        source = folder / "corpus"
        source.mkdir(parents=True, exist_ok=True)
        for number, name in enumerate(TRAIN_BYTES):
            words = ["".join(map(chr, random.integers(97 + number, 120, 4))) for _ in range(40 + 20 * number)]
            rows = (
                {"id": f"{name}/{k}", "text": " ".join(random.choice(words, 120))}
                for k in range(60 + TRAIN_BYTES[name] // 5000)
            )
            (source / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        _split(folder, {name: source / f"{name}.jsonl" for name in TRAIN_BYTES})
    return study_data(folder)


def _build(folder: Path) -> None:
    corpus = build_corpus(folder / "corpus", slices=1)
    _split(folder, {name: corpus.file("slice-1", name) for name in corpus.domains})


def _split(folder: Path, sources: Mapping[str, Path]) -> None:
    """Cut JSON Lines by domain into the three parts, and prepare them with one tokenizer, trained on `train`."""
    text = folder / "text"
    for name, source in sources.items():
        lines: dict[str, list[str]] = {"train": [], "control": [], "test": []}
        size = 0
        for line in source.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            part = part_of(row["id"])
            if part == "train":
                size += len(row["text"].encode())
                if size > TRAIN_BYTES[name]:
                    continue
            lines[part].append(line)
        for part, kept in lines.items():
            (text / part).mkdir(parents=True, exist_ok=True)
            (text / part / f"{name}.jsonl").write_text("\n".join(kept) + "\n", encoding="utf-8")
    tokenizer: str | Path = f"train:{VOCABULARY}"
    counts: dict[str, int] = {}
    for part in ("train", "control", "test"):
        inputs = {name: text / part / f"{name}.jsonl" for name in sources}
        made = folder / part
        shutil.rmtree(made, ignore_errors=True)
        prepare(inputs, made, tokenizer=tokenizer, heldout_percent=0)
        tokenizer = folder / "train" / "tokenizer.json"
        if part == "train":
            found = json.loads((made / "domains.json").read_text())["domains"]
            counts = {name: found[name]["tokens"] for name in found}
    (folder / "domains.json").write_text(json.dumps(counts))
