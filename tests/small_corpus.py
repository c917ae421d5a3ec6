"""A small corpus, and comparing folders, for the tests of prepare and inspect."""

from __future__ import annotations

import filecmp
import json
from pathlib import Path

import numpy as np

from velopath.tokenizer import train_bpe

WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "sat",
    "ran",
    "on",
    "under",
    "mat",
    "log",
    "and",
    "never",
    "often",
    "red",
    "of",
]


def texts(count: int, seed: int) -> list[str]:
    rng = np.random.default_rng(seed)
    return [
        " ".join(rng.choice(WORDS, int(n))) + f" {seed}.{i}\n"
        for i, n in enumerate(rng.integers(5, 60, count))
    ]


def write_jsonl(path: Path, documents: list[str], field: str = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"id": i, field: d}) + "\n" for i, d in enumerate(documents)))
    return path


def make_codec(folder: Path) -> Path:
    """A tokenizers file of 400 entries."""
    path = folder / "tokenizer.json"
    path.write_text(train_bpe(texts(200, 0), 400).json)
    return path


def make_corpus(root: Path) -> dict[str, Path]:
    """Domain a of 300 documents in one .jsonl file, domain b of 150 .txt files."""
    (root / "b").mkdir()
    for i, text in enumerate(texts(150, 2)):
        (root / "b" / f"{i:03d}.txt").write_text(text)
    return {"a": write_jsonl(root / "a.jsonl", texts(300, 1)), "b": root / "b"}


def same_tree(left: Path, right: Path) -> bool:
    def differs(found: filecmp.dircmp[str]) -> bool:
        unequal = filecmp.cmpfiles(found.left, found.right, found.common_files, shallow=False)
        return bool(found.left_only or found.right_only or unequal[1] or unequal[2]) or any(
            differs(below) for below in found.subdirs.values()
        )

    return not differs(filecmp.dircmp(left, right))
