"""The order of rows as a value: which (domain, row id) every step reads, with no data at hand, and its rolling hash.

The opening record of an audit log holds an `Order`; with the weights of that log it gives the stream of
(step, domain, row) ids again, see `velopath.replay`. The hash of a stream is a chain over its steps:

    h(first step) = SHA-256 of what numbers the rows: domains, rows of a step, tokens of a row
    h(s + 1)      = SHA-256(h(s), s as 8 bytes, domains of step s as int32, row ids of step s as int64), little-endian

Rows stand in the order of the global step, so neither ranks nor threads nor micro-batches change it (our choice).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from velopath import _core
from velopath.errors import DataError

POLICIES = ("repeat", "renormalise", "stop")


def domain_key(salt: str, name: str) -> int:
    """64 bits of (salt, name): a domain's order of rows does not depend on which other domains there are."""
    text = json.dumps([salt, name]).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


@dataclass(frozen=True)
class Order:
    """What decides which rows a step reads, beside the weights: K domains with their tokens, shapes, seed, policy.

    `tokens` are those of the domains' circular streams; `salt` is the `domain_key_salt` of `open_sampler`. `bins`
    are the rows of an epoch where rows are bins of best_fit. A windowed order has the shards of its `window`, and
    where each shard begins in the stream, `shards`; of bins, both count groups of shards, and where they begin in them.
    """

    tokens: Mapping[str, int]
    seed: int
    global_rows: int
    row_tokens: int
    exhaustion: str = "repeat"
    salt: str = ""
    start_step: int = 0
    bins: Mapping[str, int] | None = None
    window: int = 0
    shards: Mapping[str, Sequence[int]] | None = None

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The domains, sorted: the order of every array."""
        return tuple(sorted(self.tokens))

    @cached_property
    def _keys(self) -> list[int]:
        return [domain_key(self.salt, name) for name in self.names]

    def to_json(self) -> dict[str, Any]:
        """A JSON value from which `from_json` makes an equal order."""
        later = {"bins": None, "window": 0, "shards": None}  # absent where they say nothing
        value = asdict(self) | {"tokens": dict(self.tokens)}
        return {name: given for name, given in value.items() if name not in later or given != later[name]}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Order:
        """The order that `to_json` wrote; other keys are passed over. Raises `DataError` where it is malformed."""
        try:
            later = {name: value[name] for name in ("bins", "window", "shards") if name in value}
            if "shards" in later:
                later["shards"] = {name: tuple(at) for name, at in later["shards"].items()}
            first = [name for name in cls.__dataclass_fields__ if name not in ("bins", "window", "shards")]
            made = cls(**{name: value[name] for name in first}, **later)
            numbers = [made.seed, made.start_step, made.window, made.global_rows - 1, made.row_tokens - 1]
            numbers += [n - 1 for n in (made.bins or {}).values()]
            numbers += [n for at in (made.shards or {}).values() for n in at]
            sound = made.exhaustion in POLICIES and isinstance(made.salt, str)
            sound &= (made.window > 0) == (made.shards is not None)
            sound &= all(
                parts is None or set(parts) == set(made.tokens) for parts in (made.bins, made.shards)
            )
            whole = all(type(n) is int and 0 <= n < 1 << 63 for n in [*numbers, *made.tokens.values()])
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"not an order of rows: {error!r}") from error
        if not (sound and whole and made.tokens):
            raise DataError(f"not an order of rows: {dict(value)}")
        return made

    def first_hash(self) -> str:
        """Hash of the stream before its first step, in hex."""
        facts = {"domains": self.names, "global_rows": self.global_rows, "row_tokens": self.row_tokens}
        return hashlib.sha256(json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def draw(
        self, step: int, steps: int, shares: Sequence[int], drawn: Sequence[int], error: Sequence[int]
    ) -> tuple[NDArray[np.int32], NDArray[np.int64], list[int], list[int]]:
        """Domains and row ids, (steps, global_rows), of `steps` steps from `step` on, and the cursor behind them.

        `shares` (K integers that sum to 2^32, see `integer_shares`) hold for all of them. `drawn` and `error` are
        the cursor before `step`: rows drawn of each domain, and asked - given rows times 2^32; zeros at the start.
        Fewer steps where the stream ends.
        """
        return _core.plan_rows(
            self._keys,
            [self.tokens[name] for name in self.names],
            shares,
            seed=self.seed,
            global_rows=self.global_rows,
            row_tokens=self.row_tokens,
            exhaustion=self.exhaustion,
            step=step,
            drawn=drawn,
            error=error,
            steps=steps,
            bins=[] if self.bins is None else [self.bins[name] for name in self.names],
            window=self.window,
            shards=[] if self.shards is None else [self.shards[name] for name in self.names],
        )


def next_hash(before: str, step: int, domains: NDArray[np.int32], row_ids: NDArray[np.int64]) -> str:
    """Hash of the stream behind `step`, in hex: `before` is that in front of it, the arrays its global rows."""
    digest = hashlib.sha256(bytes.fromhex(before))
    digest.update(step.to_bytes(8, "little"))
    digest.update(domains.astype("<i4").tobytes())
    digest.update(row_ids.astype("<i8").tobytes())
    return digest.hexdigest()
