"""Domains and the values that flow between parts: DomainTable, MixtureWeights, DomainLoss.

`DomainTable` is the one owner of domain order; every array "in domain order" means the order of its names.
K is the number of domains.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

from velopath.errors import ConfigError

SHARE_ONE = 1 << 32
"""Shares enter a plan as integers that sum to this, so that no rounding differs between machines."""


@dataclass(frozen=True)
class DomainTable:
    """Names, token counts and prior shares of the K domains, in the one order that arrays follow.

    `tokens[k]` counts the training tokens of domain k (end-of-text tokens included); `prior[k]` is its
    natural share, tokens over all tokens.
    """

    names: tuple[str, ...]
    tokens: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.names:
            raise ConfigError("no domains: at least one is needed")
        if len(set(self.names)) != len(self.names):
            raise ConfigError(f"domain names repeat: {list(self.names)}")
        if len(self.tokens) != len(self.names) or min(self.tokens) < 0:
            raise ConfigError(f"token counts {list(self.tokens)} do not fit domains {list(self.names)}")

    @property
    def prior(self) -> dict[str, float]:
        """Natural shares: name -> tokens over all tokens."""
        total = sum(self.tokens)
        return {n: t / total for n, t in zip(self.names, self.tokens, strict=True)}


@dataclass(frozen=True)
class MixtureWeights(Mapping[str, float]):
    """Sampling shares of the K domains: a mapping name -> share, none negative, summing to 1.

    `shares` stands in the order of `names`. `id` grows by one with every change; `from_step` is the first
    step that uses the shares.
    """

    names: tuple[str, ...]
    shares: tuple[float, ...]
    id: int = 0
    from_step: int = 0

    @classmethod
    def of(cls, weights: Mapping[str, float], *, id: int = 0, from_step: int = 0) -> MixtureWeights:
        """Normalise `weights` to sum 1; `ConfigError` on NaN, infinity, a negative or an all-zero mix."""
        check_weights(weights)
        return cls(tuple(weights), normalised(tuple(weights.values())), id, from_step)

    def __getitem__(self, name: str) -> float:
        for known, share in zip(self.names, self.shares, strict=True):
            if known == name:
                return share
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class DomainLoss(Mapping[str, float]):
    """Token loss per domain as sums: a mapping name -> mean nats per token, of domains that have tokens.

    `nats[k]` is the summed negative log-likelihood in nats and `tokens[k]` the tokens counted, in the order
    of `names`. Sums add over micro-batches and ranks and are divided only here. A domain with 0 tokens has no
    mean and is absent from the mapping. `stderr[k]`, where known, is the standard error of the mean in nats.
    """

    names: tuple[str, ...]
    nats: tuple[float, ...]
    tokens: tuple[int, ...]
    stderr: tuple[float, ...] | None = None

    def __getitem__(self, name: str) -> float:
        for known, nats, tokens in zip(self.names, self.nats, self.tokens, strict=True):
            if known == name and tokens:
                return nats / tokens
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return (n for n, t in zip(self.names, self.tokens, strict=True) if t)

    def __len__(self) -> int:
        return sum(t > 0 for t in self.tokens)

    def joined(self, other: DomainLoss) -> DomainLoss:
        """The losses of both, which have no domain in common."""
        known = self.stderr is not None and other.stderr is not None
        return DomainLoss(
            self.names + other.names,
            self.nats + other.nats,
            self.tokens + other.tokens,
            (self.stderr or ()) + (other.stderr or ()) if known else None,
        )

    def stderr_of(self, name: str) -> float:
        """Standard error of the domain's mean loss in nats; 0.0 where it is not known."""
        return self.stderr[self.names.index(name)] if self.stderr is not None else 0.0


def check_weights(weights: Mapping[str, float], names: Sequence[str] | None = None) -> None:
    """Raise `ConfigError` unless the weights are finite, not negative, not all zero and, where `names` is
    given, name exactly those domains."""
    if names is not None:
        unknown = [n for n in weights if n not in names]
        if unknown:
            raise ConfigError(f"unknown domain {unknown[0]!r}; the domains are {', '.join(names)}")
        missing = [n for n in names if n not in weights]
        if missing:
            raise ConfigError(f"no weight for domain {missing[0]!r}; each of {', '.join(names)} needs one")
    for name, weight in weights.items():
        given: object = weight  # numpy's numbers are Real, though no float to the type checker
        if isinstance(given, bool) or not isinstance(given, Real) or not math.isfinite(given):
            raise ConfigError(f"weight of {name!r} is {weight!r}; expected a finite number")
        if weight < 0:
            raise ConfigError(f"weight of {name!r} is {weight!r}; expected 0 or more")
    if not any(weights.values()):
        raise ConfigError("all weights are 0; at least one domain needs a positive weight")


def normalised(weights: Sequence[float]) -> tuple[float, ...]:
    """The weights divided by their sum; those that sum to 1 but for rounding come back bit for bit.

    So normalising twice is normalising once, and a share is the same number in the controller, the audit log and
    whatever is made again from them. Dividing rounds each share and the sum by a relative 2^-53; the bound leaves
    room for a smoothing and for bounds after that. Raises `OverflowError` where the sum is no float.
    """
    total = math.fsum(weights)
    if abs(total - 1) <= 2.0**-50:
        return tuple(map(float, weights))
    return tuple(w / total for w in weights)


def integer_shares(weights: Sequence[float]) -> list[int]:
    """Integers proportional to `weights` that sum to `SHARE_ONE` (2^32), by largest remainder.

    Exact arithmetic on the given floats, as whole numbers over their common denominator, ties to the lower
    index: the same floats give the same integers on every machine. A weight of 0 gets 0.
    """
    ratios = [w.as_integer_ratio() for w in weights]
    common = math.lcm(*(denominator for _, denominator in ratios))
    parts = [numerator * (common // denominator) for numerator, denominator in ratios]
    total = sum(parts)
    shares, remainders = [], []
    for part in parts:
        share, remainder = divmod(part * SHARE_ONE, total)
        shares.append(share)
        remainders.append(remainder)
    by_remainder = sorted(
        range(len(shares)), key=remainders.__getitem__, reverse=True
    )  # stable: ties in order
    for k in by_remainder[: SHARE_ONE - sum(shares)]:
        shares[k] += 1
    return shares


@dataclass(frozen=True)
class Progress:
    """Where a run stands when its controller is asked; a controller may ignore all of it.

    `step` counts the updates done on the main path. `first` is the step at which the controller started (that of its
    slice), `end` the one at which the slice ends (None: not known). `tokens` maps each domain to its training tokens
    that all ranks have read since `first`, `epoch` to the training tokens of one epoch of it.
    """

    step: int
    first: int = 0
    end: int | None = None
    tokens: Mapping[str, int] = field(default_factory=dict)
    epoch: Mapping[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """A JSON value from which `from_json` makes an equal one."""
        return {
            "step": self.step,
            "first": self.first,
            "end": self.end,
            "tokens": dict(self.tokens),
            "epoch": dict(self.epoch),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Progress:
        """What `to_json` wrote."""
        return cls(value["step"], value["first"], value["end"], dict(value["tokens"]), dict(value["epoch"]))
