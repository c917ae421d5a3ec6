"""Learning-rate paths: the rate of every update as a pure function of its number (arXiv 2410.04103).

A path is a row of segments, each with a warm-up, a top rate and a decay. The main path is one segment that never
decays; a branch is the main path's segments with a decay put after them. rate(s) is the rate of update s, counted
from 0 over the whole path (a branch keeps the main path's count).
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from velopath.errors import ConfigError
from velopath.plan import branch_steps
from velopath.schedule_segment import MULTISTEP as MULTISTEP
from velopath.schedule_segment import SHAPES as SHAPES
from velopath.schedule_segment import RateSegment, check_rate, check_steps, decay_segment

Kind = Literal["main", "branch", "ptfs", "cpt", "wsd", "wsd_s", "infinite"]


@dataclass(frozen=True)
class LrPath:
    """A learning-rate path: segments in order, each of which rules from its start to the next one's.

    Made by `main`, `branch`, `ptfs`, `cpt`, `wsd`, `wsd_s` and `infinite`. A frozen value that knows no optimiser: set
    ``group["lr"] = path.rate(step)`` before update `step`, or give `multiplier` to torch's LambdaLR. After its end a
    path stays at its last floor.
    """

    kind: Kind
    segments: tuple[RateSegment, ...]

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ConfigError(f"kind of path is {self.kind!r}; expected one of {', '.join(get_args(Kind))}")
        starts = [segment.start for segment in self.segments]
        if not starts or starts[0] != 0 or sorted(set(starts)) != starts:
            raise ConfigError(f"segments start at {starts}; expected rising steps from 0")

    @classmethod
    def main(cls, peak: float, warmup_steps: int = 0, changes: Mapping[int, float] | None = None) -> LrPath:
        """The main path: (s + 1) / W of `peak` while s < W = `warmup_steps`, then `peak` for ever.

        LR path switching: the stage that makes a starting checkpoint needs a large rate, so it never decays. `changes`
        are later peaks by the step from which on they hold: what somebody overrode while the path ran.
        """
        segments = [RateSegment(0, None, peak, warmup_steps=warmup_steps)]
        for step, rate in sorted((changes or {}).items()):
            if step < warmup_steps or step < 1:
                raise ConfigError(
                    f"the peak changes at step {step}, within the warm-up of {warmup_steps} steps; change it later"
                )
            segments.append(RateSegment(step, None, rate))
        return cls("main", tuple(segments))

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
        return cls("ptfs", (decay_segment(0, steps, peak, floor, shape, warmup_steps, 0.0, options),))

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
        lengths = _lengths(steps)
        if mode == "one_decay":
            return cls(
                "cpt", (decay_segment(0, sum(lengths), peak, floor, shape, warmup_steps, 0.0, options),)
            )
        first = decay_segment(0, lengths[0], peak, floor, shape, warmup_steps, 0.0, options)
        starts = np.cumsum([0, *lengths]).tolist()
        if mode == "rewarm":
            again = warmup_steps if rewarm_steps is None else rewarm_steps
            rest = [
                decay_segment(start, length, peak, floor, shape, again, floor, options)
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

    @classmethod
    def wsd(
        cls,
        peak: float,
        warmup_steps: int,
        steps: int,
        decay_share: float = 0.1,
        shape: str = "sqrt",
        floor: float = 0.0,
        **options: Any,
    ) -> LrPath:
        """Warm-up, stable, decay: `steps` updates in all, the last round(decay_share * steps) of them one decay.

        The decay of 10 to 20 % of the steps is the published habit (WSD, from memory); `options` as in `branch`.
        """
        decay = branch_steps(steps, decay_share)
        path = cls.main(peak, warmup_steps).branch(steps - decay, decay, shape, floor, **options)
        return cls("wsd", path.segments)

    @classmethod
    def wsd_s(
        cls,
        peak: float,
        steps: Sequence[int],
        warmup_steps: int = 0,
        *,
        decay_share: float = 0.1,
        rewarm_steps: int = 0,
        shape: str = "sqrt",
        floor: float = 0.0,
        **options: Any,
    ) -> LrPath:
        """One model through slices of `steps` updates: each slice's last round(decay_share * T) updates decay, and the
        next goes on from the *decayed* checkpoint at the peak, at once or over `rewarm_steps`.

        WSD-S: as cheap as CPT, no second copy of the model. `options` as in `branch`.
        """
        lengths = _lengths(steps)
        segments, start = [], 0
        for number, length in enumerate(lengths):
            decay = branch_steps(length, decay_share)
            again = rewarm_steps if number else warmup_steps
            check_steps("rewarm_steps", again, 0)
            if length - decay < again:
                raise ConfigError(
                    f"slice {number + 1} has {length} steps: a warm-up of {again} and a decay of {decay} do not fit"
                )
            if decay < length:
                segments.append(
                    RateSegment(start, None, peak, warmup_steps=again, warm_from=floor if number else 0.0)
                )
            segments.append(decay_segment(start + length - decay, decay, peak, floor, shape, 0, 0.0, options))
            start += length
        return cls("wsd_s", tuple(segments))

    @classmethod
    def infinite(
        cls,
        peak: float,
        constant: float,
        warmup_steps: int,
        cooldown_steps: int,
        shape: str = "cosine",
        **options: Any,
    ) -> LrPath:
        """The infinite rate: warm-up to `peak`, cool-down over `cooldown_steps` to `constant`, which it keeps for ever.

        Anneal on demand by `branch`. The name and the phases are published (from memory); `options` as in `branch`.
        """
        check_steps("warmup_steps", warmup_steps, 0)
        check_steps("cooldown_steps", cooldown_steps, 1)
        check_rate("constant", constant, above=0.0)
        end = warmup_steps + cooldown_steps
        first = decay_segment(0, end, peak, constant, shape, warmup_steps, 0.0, options)
        return cls("infinite", (first, RateSegment(end, None, constant)))

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
        check_steps("at_step", at_step, 0)
        check_steps("steps", steps, 1)
        if self.end_step is not None and at_step >= self.end_step:
            raise ConfigError(f"branch at step {at_step}, but the path ends at step {self.end_step}")
        if at_step < self.warmup_steps - 1:
            raise ConfigError(
                f"branch at step {at_step} lies inside the warm-up of {self.warmup_steps} steps, where the rate is "
                f"{self.rate(at_step):.3g} of {self.peak:.3g}; branch later or shorten the warm-up"
            )
        tail = decay_segment(at_step, steps, self.rate(at_step), floor, shape, 0, 0.0, options)
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
        return self.rate_between(operator.index(step), 1)

    def rate_between(self, start: int, width: int) -> float:
        """The rate of an update that begins `start` units into the path and is `width` units wide.

        The unit of a path in steps is the update, so width is 1; of a path on a token axis it is the token.
        """
        if start < 0:
            raise ConfigError(f"step is {start}; updates are counted from 0")
        ruling = self.segments[0]
        for segment in self.segments[1:]:
            if segment.start <= start:
                ruling = segment
        return ruling.rate(start, width)

    def multiplier(self, step: int) -> float:
        """rate(step) / peak: what torch's LambdaLR multiplies a group's own rate by.

        ``LambdaLR(optimizer, path.multiplier)`` with groups made at ``lr=path.peak`` carries the path's rate.
        """
        return self.rate(step) / self.peak

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
        except ConfigError:
            raise
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ConfigError(
                f"malformed learning-rate path: {error}; expected what LrPath.to_json writes"
            ) from error


def _lengths(steps: Sequence[int]) -> list[int]:
    lengths = [operator.index(n) for n in steps]
    if not lengths:
        raise ConfigError("no slices: expected the steps of at least one")
    for number in lengths:
        check_steps("steps", number, 1)
    return lengths
