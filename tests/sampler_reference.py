"""The sampler in slow plain Python and fractions, from the words of its design; the C++ core must give the same rows.

Also small helpers that write MDS folders for the tests of the sampler.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from fractions import Fraction
from math import isqrt
from pathlib import Path

import numpy as np

from velopath.domains import MixtureWeights, integer_shares
from velopath.mds import MdsWriter, read_documents

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15
ORDER, OFFSET, SHUFFLE, WINDOW = 1, 2, 3, 4


def mix(x: int) -> int:
    x = (x + GOLDEN) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def make_key(use: int, seed: int, a: int, b: int = 0) -> int:
    return mix(mix(mix(mix(use) ^ seed) ^ a) ^ b)


def bits(key: int, i: int) -> int:
    return mix((key + i * GOLDEN) & MASK)


def below(random: int, n: int) -> int:
    return (random * n) >> 64


def permute(x: int, n: int, key: int) -> int:
    left = isqrt(n - 1) + 1
    right = -(-n // left)
    while True:
        high, low = divmod(x, right)
        for i in range(0, 8, 2):
            high = (high + below(mix(bits(key, i) ^ low), left)) % left
            low = (low + below(mix(bits(key, i + 1) ^ high), right)) % right
        x = high * right + low
        if x < n:
            return x


def windowed_epoch(parts: Sequence[Sequence[int]], window: int, key: int) -> list[int]:
    """An epoch's rows in their order, of parts (shards, groups of bins) that hold these rows: parts are shuffled, then
    the rows inside each `window` of them."""
    shuffled = [parts[permute(i, len(parts), bits(key, 0))] for i in range(len(parts))]
    order = []
    for number, begin in enumerate(range(0, len(parts), window)):
        rows = [row for part in shuffled[begin : begin + window] for row in part]
        order += [rows[permute(i, len(rows), bits(key, number + 1))] for i in range(len(rows))]
    return order


def give_row(shares: Sequence[Fraction], error: list[Fraction]) -> int:
    """Tijdeman's chairman assignment; `error` is asked - given in rows."""
    domains = range(len(shares))
    for k in domains:
        error[k] += shares[k]
    least = Fraction(1, max(2 * len(shares) - 2, 1))
    drawable = [k for k in domains if shares[k] > 0]
    due = [k for k in drawable if error[k] >= least]
    if due:
        chosen = min(due, key=lambda k: (1 - least - error[k]) / shares[k])
    else:
        chosen = max(drawable, key=lambda k: error[k])
    error[chosen] -= 1
    return chosen


def integer_fractions(weights: Mapping[str, float], names: Sequence[str]) -> list[Fraction]:
    normalised = MixtureWeights.of({n: weights[n] for n in names})
    return [Fraction(s, 1 << 32) for s in integer_shares(normalised.shares)]


class Reference:
    """Global steps: `step()` gives tokens (G, T + 1), domains (G,) and row ids (G,)."""

    def __init__(
        self, streams: Mapping[str, np.ndarray], weights: Mapping[str, float], *, global_rows: int, row_tokens: int,
        seed: int = 0, salt: str = "", start_step: int = 0,
    ) -> None:  # fmt: skip
        self.names = sorted(streams)
        self.streams = [streams[n] for n in self.names]
        self.keys = [
            int.from_bytes(hashlib.blake2b(json.dumps([salt, n]).encode(), digest_size=8).digest(), "little")
            for n in self.names
        ]
        self.global_rows, self.row_tokens, self.seed, self.at = global_rows, row_tokens, seed, start_step
        self.drawn, self.error = [0] * len(self.names), [Fraction(0)] * len(self.names)
        self.push(weights)

    def push(self, weights: Mapping[str, float]) -> None:
        self.shares = integer_fractions(weights, self.names)

    def row(self, k: int, number: int) -> tuple[np.ndarray, int]:
        stream, t = self.streams[k], self.row_tokens
        rows = len(stream) // t
        epoch, within = divmod(number, rows)
        place = permute(within, rows, make_key(ORDER, self.seed, self.keys[k], epoch))
        offset = below(make_key(OFFSET, self.seed, self.keys[k], epoch), len(stream))
        where = (offset + place * t + np.arange(t + 1)) % len(stream)
        return stream[where], epoch * rows + place

    def step(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        plan = []
        for _ in range(self.global_rows):
            k = give_row(self.shares, self.error)
            plan.append((k, self.drawn[k]))
            self.drawn[k] += 1
        key = make_key(SHUFFLE, self.seed, self.at)
        for i in range(len(plan), 1, -1):
            j = below(bits(key, i), i)
            plan[i - 1], plan[j] = plan[j], plan[i - 1]
        self.at += 1
        rows = [self.row(k, number) for k, number in plan]
        return np.stack([r for r, _ in rows]), np.array([k for k, _ in plan]), np.array([i for _, i in rows])


def write_domain(
    folder: Path, lengths: Sequence[int], *, seed: int = 0, dtype: str = "uint16", compression: str | None = None,
    size_limit: int = 1 << 26,
) -> None:  # fmt: skip
    rng = np.random.default_rng(seed)
    with MdsWriter(folder, dtype=dtype, compression=compression, size_limit=size_limit) as writer:
        for length in lengths:
            writer.write(rng.integers(0, 60000, length).astype(dtype))


def joined(folder: Path, eos: int | None) -> np.ndarray:
    """The domain's stream: documents in index order, each followed by eos where there is one."""
    end = [] if eos is None else [eos]
    return np.concatenate([np.concatenate([d, end]) for d in read_documents(folder)]).astype(np.int32)
