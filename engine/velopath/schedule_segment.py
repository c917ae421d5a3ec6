"""One piece of a learning-rate path: a warm-up, a top rate and a decay, in closed form."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from velopath.errors import ConfigError

SHAPES = ("cosine", "linear", "sqrt", "knee", "multistep", "exponential")
MULTISTEP = ((0.8, 0.316), (0.9, 0.316))
"""Factors 0.316 at 80 % and at 90 % of the decay: one published setting; together a factor of 0.1."""


@dataclass(frozen=True)
class RateSegment:
    """One piece of a path, from update `start` on; `steps` long (None: for ever).

    Let S be the steps after the warm-up, x = (s - start - warmup_steps) / S, p = `peak`, f = `floor`:

    - warm-up: the rate rises evenly from `warm_from`, which it leaves with its first update, to p
    - constant: p
    - cosine: f + (p - f) / 2 * (1 + cos(pi x))
    - linear: f + (p - f) * (1 - x)
    - sqrt: f + (p - f) * (1 - sqrt(x))  (Haegele et al. 2024)
    - knee: p while x < `hold`, then linear to f over the rest
    - multistep: max(f, p * the product of the factors whose fraction is <= x), for `factors` (fraction, factor)
    - exponential: max(f, p * 2^(-x S / half_life))  (WSD)

    After its last update the rate is f. Rates in the optimiser's unit, lengths in steps, or in tokens on a token axis
    (see `velopath.schedule_tokens`), where an update is `width` tokens wide.
    """

    start: int
    steps: int | None
    peak: float
    floor: float = 0.0
    shape: str = "constant"
    warmup_steps: int = 0
    warm_from: float = 0.0
    hold: float = 0.5
    factors: tuple[tuple[float, float], ...] = MULTISTEP
    half_life: float | None = None

    def __post_init__(self) -> None:
        known = ("constant", *SHAPES)
        if self.shape not in known:
            raise ConfigError(f"shape is {self.shape!r}; expected one of {', '.join(known)}")
        check_rate("peak", self.peak, above=0.0)
        check_rate("floor", self.floor)
        if self.floor > self.peak:
            raise ConfigError(
                f"floor {self.floor} is above the peak {self.peak}; both are rates: expected 0 <= floor <= peak"
            )
        check_steps("start", self.start, 0)
        check_steps("warmup_steps", self.warmup_steps, 0)
        if self.steps is None:
            if self.shape != "constant":
                raise ConfigError(f"a {self.shape} decay needs a number of steps")
        else:
            check_steps("steps", self.steps, 1)
            if self.warmup_steps >= self.steps and self.shape != "constant":
                raise ConfigError(
                    f"a warm-up of {self.warmup_steps} steps leaves nothing of {self.steps} steps; "
                    "shorten the warm-up"
                )
        if not 0 <= self.hold < 1:
            raise ConfigError(f"hold is {self.hold}; expected a share of the decay in [0, 1)")
        if self.half_life is not None and not (math.isfinite(self.half_life) and self.half_life > 0):
            raise ConfigError(f"half_life is {self.half_life}; expected a positive number of steps")
        for fraction, factor in self.factors:
            if not (0 <= fraction <= 1 and 0 < factor <= 1):
                raise ConfigError(
                    f"multi-step factor {factor} at fraction {fraction}; expected a fraction in [0, 1] and a "
                    "factor in (0, 1]"
                )

    @property
    def end(self) -> int | None:
        """The first update after the segment; None when it never ends."""
        return None if self.steps is None else self.start + self.steps

    @property
    def decay_from(self) -> int | None:
        """The first update of the decay; None when there is none."""
        return None if self.shape == "constant" else self.start + self.warmup_steps

    def rate(self, step: int, width: int = 1) -> float:
        """The rate of the update from `step` >= start to `step + width`; it warms up to where it ends."""
        done = step - self.start
        if done < self.warmup_steps:
            risen = min(done + width, self.warmup_steps) / self.warmup_steps
            return self.warm_from + (self.peak - self.warm_from) * risen
        if self.steps is None:
            return self.peak
        if done >= self.steps:
            return self.peak if self.shape == "constant" else self.floor
        return self._decayed(done - self.warmup_steps, self.steps - self.warmup_steps)

    def _decayed(self, done: int, steps: int) -> float:
        x, drop = done / steps if steps else 0.0, self.peak - self.floor
        match self.shape:
            case "cosine":
                return self.floor + drop / 2 * (1 + math.cos(math.pi * x))
            case "linear":
                return self.floor + drop * (1 - x)
            case "sqrt":
                return self.floor + drop * (1 - math.sqrt(x))
            case "knee":
                return self.peak if x < self.hold else self.floor + drop * ((1 - x) / (1 - self.hold))
            case "multistep":
                factor = math.prod(factor for fraction, factor in self.factors if fraction <= x)
                return max(self.floor, self.peak * factor)
            case "exponential":
                # Eight half-lives by default: 0.4 % of the peak is left at the end. Our choice.
                half_life = self.half_life if self.half_life is not None else steps / 8
                return max(self.floor, self.peak * math.exp2(-done / half_life))
        return self.peak


def decay_segment(
    start: int,
    steps: int,
    peak: float,
    floor: float,
    shape: str,
    warmup_steps: int,
    warm_from: float,
    options: Mapping[str, Any],
) -> RateSegment:
    known = {"knee": ("hold",), "multistep": ("factors",), "exponential": ("half_life",)}.get(shape, ())
    if shape in SHAPES and (unknown := [o for o in options if o not in known]):
        raise ConfigError(
            f"shape {shape!r} has no option {unknown[0]!r}; its options are {', '.join(known) or 'none'}"
        )
    if shape == "constant":
        raise ConfigError(f"shape is 'constant', which does not decay; expected one of {', '.join(SHAPES)}")
    values = dict(options)
    if "factors" in values:
        values["factors"] = tuple((float(a), float(b)) for a, b in values["factors"])
    return RateSegment(start, steps, peak, floor, shape, warmup_steps, warm_from, **values)


def check_rate(option: str, value: float, above: float | None = None) -> None:
    number = not isinstance(value, bool) and isinstance(value, (int, float)) and math.isfinite(value)
    if not number or value < 0 or (above is not None and value <= above):
        expected = "a positive learning rate" if above is not None else "a learning rate of 0 or more"
        raise ConfigError(f"{option} is {value!r}; expected {expected}")


def check_steps(option: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{option} is {value!r}; expected a whole number of steps, {least} or more")
