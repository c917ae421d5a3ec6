"""Near-duplicate removal: a document mostly made of passages that kept documents already have is dropped.

Our choice: the share of a document's word shingles already seen, not the Jaccard similarity of pairs.
Long texts are cut into documents before they come here, and two editions of a text are cut at different
borders; a pair of such documents overlaps only in part, while the share already seen stays near 1. It
costs one set look-up a shingle, with no comparison of pairs, and depends on the order of documents alone.
"""

from __future__ import annotations

import re
from functools import lru_cache

import numpy as np
import xxhash

SHINGLE_WORDS = 5
SAMPLE_ONE_IN = 4
"""Only shingles whose hash is 0 modulo this are kept: the same ones in every document that has them."""

_MULTIPLIER = 0x9E3779B97F4A7C15  # odd, so that every power is a bijection modulo 2^64
_POWERS = np.array([pow(_MULTIPLIER, i, 1 << 64) for i in range(SHINGLE_WORDS)], dtype=np.uint64)
_WORD = re.compile(r"\w+|[^\w\s]")


@lru_cache(maxsize=1 << 17)
def _word_hash(word: str) -> int:
    return xxhash.xxh3_64_intdigest(word.encode())


def shingles(text: str) -> set[int]:
    """A sample of the 64-bit hashes of all runs of 5 words, case and white space ignored.

    A word is a run of letters, digits and underscores, or one other character. Of a text shorter than 5
    words the whole text is the one shingle; an empty text has none.
    """
    words = _WORD.findall(text.lower())
    if not words:
        return set()
    hashes = np.fromiter(map(_word_hash, words), dtype=np.uint64, count=len(words))
    width = min(SHINGLE_WORDS, len(words))
    runs = np.zeros(len(words) - width + 1, dtype=np.uint64)
    for i in range(width):
        runs += hashes[i : i + len(runs)] * _POWERS[i]
    runs ^= runs >> np.uint64(29)  # the sum's low bits are those of the words' hashes; mix before sampling
    sample = runs[runs % np.uint64(SAMPLE_ONE_IN) == 0]
    return set((sample if len(sample) else runs[:1]).tolist())


class SeenPassages:
    """The passages of the documents kept so far."""

    def __init__(self, *, drop_share: float = 0.5) -> None:
        self.drop_share = drop_share
        self._seen: set[int] = set()

    def admit(self, text: str) -> bool:
        """Whether less than `drop_share` of the text's passages were seen before; its passages are then
        remembered. A rejected text leaves no trace."""
        own = shingles(text)
        if not own or len(own & self._seen) >= self.drop_share * len(own):
            return False
        self._seen |= own
        return True
