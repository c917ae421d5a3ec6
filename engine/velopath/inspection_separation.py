"""How separable domains are: how far their token distributions lie apart, and which documents they share.

A domain's velocity is read from its held-out loss. Where two domains have nearly the same text, their losses fall
together whichever of them is trained on, and the weights cannot tell them apart: so look here before a run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

ALIKE_BITS = 0.05
"""Divergence below which two domains count as one (our choice: halves of one domain lie well below it)."""
CLOSE_BITS = 0.15
SHARED_DOCUMENTS = 0.01
"""Share of the smaller domain's documents found in another from which a warning is given."""


@dataclass(frozen=True)
class TokenUse:
    """How often a domain uses the entries of the vocabulary.

    `entropy` is that of the distribution in bits a token, `used` the number of different ids. `commonest` are
    (id, share of the tokens), the most frequent first; `by_rank` the shares of the tokens that fall to the ids of
    frequency rank 1 to 10, 11 to 100, 101 to 1,000 and so on.
    """

    tokens: int
    used: int
    entropy: float
    commonest: tuple[tuple[int, float], ...]
    by_rank: tuple[float, ...]


@dataclass(frozen=True)
class Pair:
    """Two domains: `divergence` (Jensen-Shannon, bits: 0 the same, 1 no token in common), the part of it that
    counting so few tokens makes up (`noise`), and how many different documents they share, of the smaller one's."""

    first: str
    second: str
    divergence: float
    noise: float
    shared: int
    of: int


@dataclass(frozen=True)
class Separation:
    """All pairs of domains, and what they mean for velocities, in sentences."""

    pairs: tuple[Pair, ...]
    advice: tuple[str, ...]


def document_hashes(documents: Sequence[NDArray[np.integer[Any]]]) -> NDArray[np.uint64]:
    """xxh3-64 of the tokens of each document, whatever type they are stored in."""
    return np.array([xxhash.xxh3_64_intdigest(d.astype("<u4").tobytes()) for d in documents], dtype=np.uint64)


def token_use(counts: NDArray[np.int64], shown: int = 8) -> TokenUse:
    """`TokenUse` of the counts (V,) of the ids."""
    total = int(counts.sum())
    order = np.argsort(-counts, kind="stable")
    ranked = counts[order]
    used = int(np.count_nonzero(counts))
    shares = ranked[:used] / max(1, total)
    edges = [0, *(10**p for p in range(1, 12))]
    by_rank = tuple(
        float(shares[a:b].sum()) for a, b in zip(edges[:-1], edges[1:], strict=True) if a < max(1, used)
    )
    commonest = tuple((int(i), float(s)) for i, s in zip(order[:shown], shares[:shown], strict=False))
    return TokenUse(total, used, float(-(shares * np.log2(shares)).sum()), commonest, by_rank)


def divergence(first: NDArray[np.int64], second: NDArray[np.int64]) -> float:
    """Jensen-Shannon divergence in bits of two count vectors: H((p + q) / 2) - (H(p) + H(q)) / 2, 0 to 1."""
    p, q = first / max(1, first.sum()), second / max(1, second.sum())
    middle = (p + q) / 2
    total = 0.0
    for one in (p, q):
        there = one > 0
        total += float((one[there] * np.log2(one[there] / middle[there])).sum()) / 2
    return min(max(total, 0.0), 1.0)


def noise(first: NDArray[np.int64], second: NDArray[np.int64]) -> float:
    """Divergence in bits that two samples of one distribution show by chance: (V - 1) (1/n + 1/m) / (8 ln 2), with
    n and m tokens and V ids in use (chi-square expansion; an upper bound where many ids are rare); at most 1."""
    used = int(np.count_nonzero(first + second))
    sizes = 1 / max(1, int(first.sum())) + 1 / max(1, int(second.sum()))
    return min(1.0, max(0, used - 1) * sizes / (8 * math.log(2)))


def separate(counts: Mapping[str, NDArray[np.int64]], hashes: Mapping[str, NDArray[np.uint64]]) -> Separation:
    """`Separation` of domains from their token counts (V,) and the hashes of their documents."""
    names = sorted(counts)
    distinct = {name: np.unique(hashes[name]) for name in names}
    pairs = []
    for k, first in enumerate(names):
        for second in names[k + 1 :]:
            shared = len(np.intersect1d(distinct[first], distinct[second], assume_unique=True))
            pairs.append(
                Pair(
                    first,
                    second,
                    divergence(counts[first], counts[second]),
                    noise(counts[first], counts[second]),
                    shared,
                    min(len(distinct[first]), len(distinct[second])),
                )
            )
    return Separation(tuple(pairs), tuple(_advice(pairs)))


def _advice(pairs: list[Pair]) -> list[str]:
    said = []
    alike = [p for p in pairs if p.divergence - p.noise < ALIKE_BITS]
    for p in alike:
        said.append(
            f"{p.first} and {p.second} use nearly the same tokens ({p.divergence:.3f} bits apart): their losses will "
            "move together, so their velocities will not tell them apart. Merge them, unless you know better."
        )
    close = [p for p in pairs if p not in alike and p.divergence - p.noise < CLOSE_BITS]
    if close:
        listed = ", ".join(f"{p.first} and {p.second} ({p.divergence:.2f} bits)" for p in close)
        said.append(
            f"Close to each other: {listed}. Training on one will also lower the other's loss in part."
        )
    for p in pairs:
        if p.of and p.shared / p.of >= SHARED_DOCUMENTS:
            said.append(
                f"{p.first} and {p.second} share {p.shared:,} documents, {100 * p.shared / p.of:.0f} % of the smaller "
                "one: each is trained at both weights. Leave them out of one."
            )
    if not said and pairs:
        least = min(pairs, key=lambda p: p.divergence)
        said.append(
            f"Every two domains lie at least {least.divergence:.2f} bits apart ({least.first} and {least.second}) and "
            "share hardly a document: a velocity can belong to one domain."
        )
    return said
