"""Learning-rate paths: the rate of every update as a pure function of its number (arXiv 2410.04103).

A path is a row of segments, each with a warm-up, a top rate and a decay. The main path is one segment that never
decays; a branch is the main path's segments with a decay put after them. rate(s) is the rate of update s, counted
from 0 over the whole path (a branch keeps the main path's count).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

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

    After its last update the rate is f. Rates in the optimiser's unit, lengths in steps.
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
        _check_rate("peak", self.peak, above=0.0)
        _check_rate("floor", self.floor)
        if self.floor > self.peak:
            raise ConfigError(
                f"floor {self.floor} is above the peak {self.peak}; both are rates: expected 0 <= floor <= peak"
            )
        _check_steps("start", self.start, 0)
        _check_steps("warmup_steps", self.warmup_steps, 0)
        if self.steps is None:
            if self.shape != "constant":
                raise ConfigError(f"a {self.shape} decay needs a number of steps")
        else:
            _check_steps("steps", self.steps, 1)
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

    def rate(self, step: int) -> float:
        """The rate of update `step` >= start."""
        done = step - self.start
        if done < self.warmup_steps:
            return self.warm_from + (self.peak - self.warm_from) * ((done + 1) / self.warmup_steps)
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


@dataclass(frozen=True)
class LrPath:
    """A learning-rate path: segments in order, each of which rules from its start to the next one's.

    Made by `main`, `branch`, `ptfs` and `cpt`. A frozen value that knows no optimiser: set
    ``group["lr"] = path.rate(step)`` before update `step`. After its end a path stays at its last floor.
    """

    kind: Literal["main", "branch", "ptfs", "cpt"]
    segments: tuple[RateSegment, ...]

    def __post_init__(self) -> None:
        if self.kind not in ("main", "branch", "ptfs", "cpt"):
            raise ConfigError(f"kind of path is {self.kind!r}; expected main, branch, ptfs or cpt")
        starts = [segment.start for segment in self.segments]
        if not starts or starts[0] != 0 or sorted(set(starts)) != starts:
            raise ConfigError(f"segments start at {starts}; expected rising steps from 0")

    @classmethod
    def main(cls, peak: float, warmup_steps: int = 0) -> LrPath:
        """The main path: (s + 1) / W of `peak` while s < W = `warmup_steps`, then `peak` for ever.

        LR path switching: the stage that makes a starting checkpoint needs a large rate, so it never decays.
        """
        return cls("main", (RateSegment(0, None, peak, warmup_steps=warmup_steps),))

    @classmethod
    def ptfs(
        cls,
        peak: float,
        warmup_steps: int,
        steps: int,
        shape: str = "cosine",
        floor: float = 0.0,
        **options: Any,
    ) -> LrPath:
        """Training from scratch in one go: `steps` updates in all, warm-up in the first `warmup_steps`, then one
        decay over all the others. `options` as in `branch`."""
        return cls("ptfs", (_segment(0, steps, peak, floor, shape, warmup_steps, 0.0, options),))

    @classmethod
    def cpt(
        cls,
        peak: float,
        steps: Sequence[int],
        warmup_steps: int = 0,
        *,
        mode: Literal["rewarm", "end_rate", "one_decay"] = "rewarm",
        rewarm_steps: int | None = None,
        shape: str = "cosine",
        floor: float = 0.0,
        **options: Any,
    ) -> LrPath:
        """Continued training of one model through slices of `steps` updates each; versions are cut at their ends.

        - "rewarm": each slice warms up from the floor over `rewarm_steps` (default: `warmup_steps`) and decays
          fully
        - "end_rate": the first slice decays, the others stay at `floor`, which must be positive
        - "one_decay": one long decay over all slices, cut at the version ends

        The baselines of LR path switching; `options` as in `branch`.
        """
        lengths = [operator.index(n) for n in steps]
        if not lengths:
            raise ConfigError("no slices: expected the steps of at least one")
        if mode == "one_decay":
            return cls("cpt", (_segment(0, sum(lengths), peak, floor, shape, warmup_steps, 0.0, options),))
        first = _segment(0, lengths[0], peak, floor, shape, warmup_steps, 0.0, options)
        starts = np.cumsum([0, *lengths]).tolist()
        if mode == "rewarm":
            again = warmup_steps if rewarm_steps is None else rewarm_steps
            rest = [
                _segment(start, length, peak, floor, shape, again, floor, options)
                for start, length in zip(starts[1:-1], lengths[1:], strict=True)
            ]
        elif mode == "end_rate":
            if floor <= 0:
                raise ConfigError(
                    f"floor is {floor}; staying at the end rate needs a positive one to learn at all"
                )
            rest = [
                RateSegment(start, length, floor, floor)
                for start, length in zip(starts[1:-1], lengths[1:], strict=True)
            ]
        else:
            raise ConfigError(f"mode is {mode!r}; expected 'rewarm', 'end_rate' or 'one_decay'")
        return cls("cpt", (first, *rest))

    def branch(
        self, at_step: int, steps: int, shape: str = "cosine", floor: float = 0.0, **options: Any
    ) -> LrPath:
        """This path up to update `at_step`, then a decay to `floor` over `steps` updates.

        Update `at_step` is the first of the branch and still has the rate this path would have had there; update
        `at_step + steps` would have `floor`. LR path switching, branching path. `shape` is one of `SHAPES`; its
        options: `hold` (knee, share held at the top), `factors` (multistep, (fraction, factor) pairs) and
        `half_life` (exponential, steps); formulas in `RateSegment`. Raises `ConfigError` inside the warm-up,
        where the rate is not yet the peak, and at or after the end of this path.
        """
        _check_steps("at_step", at_step, 0)
        _check_steps("steps", steps, 1)
        if self.end_step is not None and at_step >= self.end_step:
            raise ConfigError(f"branch at step {at_step}, but the path ends at step {self.end_step}")
        if at_step < self.warmup_steps - 1:
            raise ConfigError(
                f"branch at step {at_step} lies inside the warm-up of {self.warmup_steps} steps, where the rate is "
                f"{self.rate(at_step):.3g} of {self.peak:.3g}; branch later or shorten the warm-up"
            )
        tail = _segment(at_step, steps, self.rate(at_step), floor, shape, 0, 0.0, options)
        return LrPath("branch", (*(s for s in self.segments if s.start < at_step), tail))

    @property
    def is_branch(self) -> bool:
        """Whether the path was made by `branch`."""
        return self.kind == "branch"

    @property
    def peak(self) -> float:
        """The largest top rate of the path."""
        return max(segment.peak for segment in self.segments)

    @property
    def floor(self) -> float:
        """The rate after the end; of a main path, which has no end, 0."""
        return self.segments[-1].floor

    @property
    def shape(self) -> str:
        """The shape of the last decay; "constant" on a main path."""
        return self.segments[-1].shape

    @property
    def warmup_steps(self) -> int:
        """The steps of the first warm-up."""
        return self.segments[0].warmup_steps

    @property
    def decay_from(self) -> int | None:
        """The first update of the last decay (for a branch: the branch step); None on a main path."""
        return self.segments[-1].decay_from

    @property
    def end_step(self) -> int | None:
        """The number of updates in all, which is the step after the last; None on a main path."""
        return self.segments[-1].end

    def rate(self, step: int) -> float:
        """The learning rate of update `step`, counted from 0, in closed form: no state, the same on any resume.

        Raises `ConfigError` on a negative step.
        """
        number = operator.index(step)
        if number < 0:
            raise ConfigError(f"step is {step}; updates are counted from 0")
        ruling = self.segments[0]
        for segment in self.segments[1:]:
            if segment.start <= number:
                ruling = segment
        return ruling.rate(number)

    def rates(self, steps: Iterable[int]) -> NDArray[np.float64]:
        """The rates of many updates: shape (len(steps),), bit for bit those of `rate`."""
        # numpy's cosine differs from math's in the last bit, and with the place in the array: so not vectorised.
        return np.array([self.rate(step) for step in steps], dtype=np.float64)

    def describe(self) -> str:
        """The path in words: one phrase per segment."""
        phrases = []
        for s in self.segments:
            if s.warmup_steps:
                phrases.append(f"warm-up from step {s.start} to {s.peak:.3g} over {s.warmup_steps} steps")
            if s.shape == "constant":
                phrases.append(
                    f"constant {s.peak:.3g}" + (f" until step {s.end}" if s.end is not None else "")
                )
            else:
                phrases.append(
                    f"{s.shape} decay from {s.peak:.3g} at step {s.decay_from} to {s.floor:.3g} at step {s.end}"
                )
        return "; ".join(phrases)

    def to_json(self) -> dict[str, Any]:
        """A JSON value from which `from_json` makes an equal path."""
        segments = []
        for segment in self.segments:
            value = asdict(segment)
            value["factors"] = [list(pair) for pair in segment.factors]
            segments.append(value)
        return {"version": 1, "kind": self.kind, "segments": segments}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> LrPath:
        """The path that `to_json` wrote. Raises `ConfigError` when it is malformed."""
        if value.get("version") != 1:
            raise ConfigError(f"path has version {value.get('version')!r}; expected 1")
        try:
            segments = tuple(
                RateSegment(**{**s, "factors": tuple((float(a), float(b)) for a, b in s["factors"])})
                for s in value["segments"]
            )
            return cls(value["kind"], segments)
        except (KeyError, TypeError) as error:
            raise ConfigError(
                f"malformed learning-rate path: {error}; expected what LrPath.to_json writes"
            ) from error


def _segment(
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


def _check_rate(option: str, value: float, above: float | None = None) -> None:
    number = not isinstance(value, bool) and isinstance(value, (int, float)) and math.isfinite(value)
    if not number or value < 0 or (above is not None and value <= above):
        expected = "a positive learning rate" if above is not None else "a learning rate of 0 or more"
        raise ConfigError(f"{option} is {value!r}; expected {expected}")


def _check_steps(option: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{option} is {value!r}; expected a whole number of steps, {least} or more")
