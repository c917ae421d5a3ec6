"""The paths study's text: the demo's corpus in four slices, each with training text and a hold-out of its own.

Documents go to slices by hash, so slices are alike; what arrives when is said by weights (see `study.REGIMES`).
Results are read off the hold-outs of all slices together, which no model has trained on.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from velopath.corpus import build_corpus
from velopath.evaluate import HeldOut
from velopath.prepare import prepare

VOCABULARY = 1024
ROW_TOKENS = 256
SLICES = 4
NAMES = ("cpp", "docs", "python", "tables", "translations", "verse")


@dataclass(frozen=True)
class SlicedText:
    """`slice(i)` is the prepared folder of slice i, from 0."""

    folder: Path

    def slice(self, number: int) -> Path:
        return self.folder / f"prepared-{number + 1}"

    @cached_property
    def heldout(self) -> HeldOut:
        """The hold-outs of all slices, joined by domain."""
        parts = [HeldOut.open(self.slice(i), row_tokens=ROW_TOKENS, names=NAMES) for i in range(SLICES)]
        streams = tuple(np.concatenate([part.streams[k] for part in parts]) for k in range(len(NAMES)))
        return HeldOut(NAMES, streams, ROW_TOKENS)


def sliced_text(folder: Path) -> SlicedText:
    """The study's text in `folder`, built there at the first call (about a minute, and a download)."""
    text = SlicedText(folder)
    if (text.slice(SLICES - 1) / "domains.json").is_file():
        return text
    corpus = build_corpus(folder / "corpus", slices=SLICES)
    tokenizer: str | Path = f"train:{VOCABULARY}"
    for number in range(SLICES):
        inputs = {name: corpus.file(f"slice-{number + 1}", name) for name in NAMES}
        # Without `force` a folder that is complete is an error, with it a build that was cut off starts again.
        prepare(inputs, text.slice(number), tokenizer=tokenizer, heldout_percent=8, force=True)
        tokenizer = text.slice(0) / "tokenizer.json"
    return text
