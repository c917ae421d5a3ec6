"""Near-duplicates: documents of a domain whose sets of word runs overlap by a threshold or more (Jaccard).

Each document has a MinHash (datasketch) of its runs of 5 words, kept as b band keys for locality-sensitive
hashing and a sketch of one byte per permutation. Documents that share a band are compared by their sketches.
Sources: MinHash, Broder 1997; banding, Indyk and Motwani 1998; one byte each, Li and Koenig 2010.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from velopath.errors import ConfigError

PERMUTATIONS = 128
RUN_WORDS = 5
_MISSES_WEIGH = (0.1, 0.9)
"""How wrong candidates and missed ones weigh when bands are chosen: sketches weed out the former."""
_WORD = re.compile(r"\w+|[^\w\s]")
_MULTIPLIER = 0x9E3779B97F4A7C15  # odd, so that its powers are bijections modulo 2^64
_POWERS = np.array([pow(_MULTIPLIER, i, 1 << 64) for i in range(RUN_WORDS)], dtype=np.uint64)


class Sketcher:
    """Makes the band keys and the sketch of texts for one `threshold` of Jaccard similarity, 0.1 to 1."""

    def __init__(self, threshold: float) -> None:
        """Raises `ConfigError` on a wrong threshold, and when datasketch is not installed."""
        if not 0.1 <= threshold <= 1:
            raise ConfigError(f"near_duplicates is {threshold}; expected a similarity of 0.1 to 1")
        try:
            from datasketch import MinHash, MinHashLSH
        except ImportError as error:
            raise ConfigError(
                "finding near-duplicates needs datasketch: pip install 'velopath[corpora]'"
            ) from error
        bands = MinHashLSH(threshold=threshold, num_perm=PERMUTATIONS, weights=_MISSES_WEIGH)
        self.bands, self.rows = int(bands.b), int(bands.r)
        self._empty: Any = MinHash(num_perm=PERMUTATIONS, seed=1, hashfunc=int, scheme="affine32")

    def sketch(self, text: str) -> tuple[NDArray[np.uint64], NDArray[np.uint8]]:
        """Keys of the bands (b,) and the sketch (PERMUTATIONS,) of a text."""
        made = self._empty.copy()
        made.update_batch(_runs(text).tolist())
        values = np.ascontiguousarray(made.hashvalues, dtype="<u4")
        used = values[: self.bands * self.rows].tobytes()
        width = 4 * self.rows
        keys = [xxhash.xxh3_64_intdigest(used[k * width : (k + 1) * width]) for k in range(self.bands)]
        return np.array(keys, dtype=np.uint64), (values & 0xFF).astype(np.uint8)


@lru_cache(maxsize=4)
def sketcher(threshold: float) -> Sketcher:
    """The `Sketcher` of a threshold, made once per process."""
    return Sketcher(threshold)


@lru_cache(maxsize=1 << 17)
def _word_hash(word: str) -> int:
    return xxhash.xxh3_64_intdigest(word.encode())


def _runs(text: str) -> NDArray[np.uint32]:
    """Distinct 32-bit hashes of all runs of 5 words, case and white space ignored; one run where there are fewer."""
    words = _WORD.findall(text.lower()) or [""]
    hashes = np.fromiter(map(_word_hash, words), dtype=np.uint64, count=len(words))
    width = min(RUN_WORDS, len(words))
    runs = np.zeros(len(words) - width + 1, dtype=np.uint64)
    for i in range(width):
        runs += hashes[i : i + len(runs)] * _POWERS[i]
    return np.unique((runs >> np.uint64(32)).astype(np.uint32))


def near_copies(
    keys: NDArray[np.uint64], sketches: Callable[[list[int]], NDArray[np.uint8]], threshold: float
) -> NDArray[np.bool_]:
    """Which documents are near-duplicates of an earlier one that stays; documents are in order of preference.

    `keys` (n, b) as of `Sketcher`; `sketches` gives the sketches (m, PERMUTATIONS) of m documents. Beyond the keys,
    memory is that of the documents which share a band with another one.
    """
    shared = np.zeros(len(keys), dtype=bool)
    columns = []
    for column in keys.T:
        _, inverse, counts = np.unique(column, return_inverse=True, return_counts=True)
        several = counts[inverse] > 1
        shared |= several
        columns.append(several)
    dropped = np.zeros(len(keys), dtype=bool)
    kept: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
    for k in np.flatnonzero(shared):
        own = [(b, int(keys[k, b])) for b in range(keys.shape[1]) if columns[b][k]]
        before = sorted({j for band in own for j in kept[band]})
        if before:
            equal = (sketches(before) == sketches([int(k)])).mean(axis=1)
            # Of two different values one in 256 has the same last byte.
            if ((equal - 1 / 256) / (1 - 1 / 256)).max() >= threshold:
                dropped[k] = True
                continue
        for band in own:
            kept[band].append(int(k))
    return dropped
