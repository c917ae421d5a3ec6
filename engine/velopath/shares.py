"""Arithmetic on the losses and shares of K domains that all controllers have in common: pure, plain floats."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from velopath.errors import ConfigError, NumericalError

_TINY = 1e-200  # stands for a share of 0 while shares are scaled, so that the scale stays finite


def mean_losses(
    losses: Mapping[str, float],
    names: Sequence[str],
    last: Sequence[float] | None = None,
) -> tuple[float, ...]:
    """Mean losses in nats per token, in the order of `names`.

    `losses` is a mapping or a `DomainLoss`. A domain that it lacks (no tokens were counted) takes its value from
    `last` where that is given. Raises `ConfigError` on a missing or unknown domain and `NumericalError` on NaN
    or infinity, naming the domain.
    """
    unknown = [n for n in losses if n not in names]
    if unknown:
        raise ConfigError(f"loss for unknown domain {unknown[0]!r}; the domains are {', '.join(names)}")
    means = []
    for k, name in enumerate(names):
        if name in losses:
            loss = losses[name]
        elif last is not None:
            loss = last[k]
        else:
            raise ConfigError(
                f"no loss for domain {name!r} (no tokens of it were evaluated); every one of "
                f"{', '.join(names)} needs one: evaluate more tokens or set missing='last'"
            )
        if not math.isfinite(loss):
            raise NumericalError(
                f"loss of domain {name!r} is {loss}; expected a finite number: the weights were left as they were"
            )
        means.append(float(loss))
    return tuple(means)


def bounded_shares(shares: Sequence[float], floor: float, cap: float) -> tuple[float, ...]:
    """Shares scaled by one common factor and cut to [floor, cap] so that they sum to 1 (to rounding).

    Solves sum_i min(max(x * w[i], floor), cap) = 1 for x: shares strictly between the bounds keep their
    proportions. Shares inside the bounds come back unchanged. Raises `ConfigError` where K domains cannot
    satisfy the bounds. Our choice.
    """
    count = len(shares)
    if floor * count > 1 or cap * count < 1:
        raise ConfigError(
            f"floor {floor} and cap {cap} cannot hold for {count} domains: their shares sum to 1, so the floor "
            f"can be at most {1 / count:.4g} and the cap at least {1 / count:.4g}"
        )
    if all(floor <= share <= cap for share in shares):
        return tuple(shares)
    raised = [max(share, _TINY) for share in shares]

    def cut(scale: float) -> list[float]:
        return [min(max(scale * share, floor), cap) for share in raised]

    # The sum of the cut shares grows with the scale: halve down to neighbouring floats. Geometric steps first,
    # because the scale may span hundreds of decades.
    low, high = _TINY, cap / min(raised)
    while low < (middle := _between(low, high)) < high:
        if math.fsum(cut(middle)) < 1:
            low = middle
        else:
            high = middle
    result = cut(high)
    return tuple(r if s > 0 or r > math.sqrt(_TINY) else floor for r, s in zip(result, shares, strict=True))


def check_range(
    option: str, value: float, low: float, high: float, expected: str, holds: bool = True
) -> None:
    """Raise `ConfigError` unless `value` is a finite number in [low, high] for which the further condition holds."""
    number = not isinstance(value, bool) and isinstance(value, (int, float)) and math.isfinite(value)
    if not (number and low <= value <= high and holds):
        raise ConfigError(f"{option} is {value!r}; expected a number {expected}")


def _between(low: float, high: float) -> float:
    return (low + high) / 2 if high < 2 * low else math.sqrt(low) * math.sqrt(high)


def logs_of(shares: Sequence[float]) -> tuple[float, ...]:
    """Natural logarithms of shares; -inf of a share of 0."""
    return tuple(math.log(share) if share > 0 else -math.inf for share in shares)


def normalised_logs(logs: Sequence[float]) -> tuple[float, ...]:
    """Logarithms shifted so that their exponentials sum to 1, also where those are no floats."""
    top = max(logs)
    norm = top + math.log(math.fsum(math.exp(x - top) for x in logs))
    return tuple(x - norm for x in logs)


def shares_of(logs: Sequence[float]) -> tuple[float, ...]:
    """The shares of normalised logarithms, summing to 1."""
    shares = [math.exp(x) for x in logs]
    total = math.fsum(shares)
    return tuple(share / total for share in shares)


def smoothed(
    shares: Sequence[float], amount: float, toward: Sequence[float] | None = None
) -> tuple[float, ...]:
    """(1 - c) * w[i] + c * q[i] with c = `amount`; q is `toward`, or 1/K where that is None."""
    if toward is None:
        even = amount / len(shares)
        return tuple((1 - amount) * share + even for share in shares)
    return tuple((1 - amount) * share + amount * goal for share, goal in zip(shares, toward, strict=True))
