"""Made-up text in place of the corpus, so that the study's code runs in seconds and without a download."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.paths.corpus import NAMES, SLICES, SlicedText
from velopath.prepare import prepare

DOCUMENTS, WORDS = 40, 120


def made_up_text(folder: Path, vocabulary: int) -> SlicedText:
    """Words drawn from lists that differ by domain, prepared as `sliced_text` does; its tokens mean nothing."""
    text = SlicedText(folder)
    tokenizer: str | Path = f"train:{vocabulary}"
    for number in range(SLICES):
        inputs = {}
        for k, name in enumerate(NAMES):
            rng = np.random.default_rng([number, k])
            words = [f"{name[:3]}{i}" for i in range(30)]
            file = folder / "text" / f"{number}" / f"{name}.txt"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("\n\n".join(" ".join(rng.choice(words, WORDS)) for _ in range(DOCUMENTS)))
            inputs[name] = file
        prepare(inputs, text.slice(number), tokenizer=tokenizer, separator="\n\n", heldout_percent=15)
        tokenizer = text.slice(0) / "tokenizer.json"
    return text
