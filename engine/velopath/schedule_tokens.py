"""Learning-rate paths measured in tokens: the rate follows what was read, also while the batch grows.

For trainers of one's own (torch's LambdaLR, `PathLR`, Hugging Face's Trainer). A run of velopath's and a `Session` keep
their batch: the order of rows, the log of weights, replay, resume on other ranks, exposure and the cost of versions
all count steps of equally many rows. Their lengths may be given in tokens all the same (`data.slices.NAME.tokens`).
"""

from __future__ import annotations

import bisect
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from velopath.errors import ConfigError
from velopath.schedule import LrPath


@dataclass(frozen=True)
class BatchRamp:
    """Tokens of each update: `stages` are (first step, tokens per update), the first at step 0.

    A batch of constant size is one stage. Raises `ConfigError` on steps that do not rise from 0 or on no tokens.
    """

    stages: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        starts = [start for start, _ in self.stages]
        if not starts or starts[0] != 0 or sorted(set(starts)) != starts:
            raise ConfigError(f"stages of the batch begin at steps {starts}; expected rising steps from 0")
        for start, tokens in self.stages:
            if tokens < 1:
                raise ConfigError(f"{tokens} tokens an update from step {start} on; expected 1 or more")

    @classmethod
    def constant(cls, tokens: int) -> BatchRamp:
        """The same `tokens` in every update."""
        return cls(((0, operator.index(tokens)),))

    @classmethod
    def linear(cls, first: int, last: int, steps: int, stages: int) -> BatchRamp:
        """From `first` to `last` tokens an update in `stages` equal rises spread evenly over `steps` updates."""
        if stages < 1 or steps < stages:
            raise ConfigError(
                f"a ramp of {stages} rises over {steps} steps; expected at least one step per rise"
            )
        rises = [(k * steps // stages, first + (last - first) * k // stages) for k in range(stages + 1)]
        return cls(tuple(rises))

    def tokens_of(self, step: int) -> int:
        """Tokens of update `step`."""
        return self.stages[self._stage(step)][1]

    def tokens_before(self, step: int) -> int:
        """Tokens read before update `step`: an exact integer."""
        at = self._stage(step)
        ends = [start for start, _ in self.stages[1 : at + 1]] + [step]
        pieces = zip(self.stages[: at + 1], ends, strict=True)
        return sum((end - start) * tokens for (start, tokens), end in pieces)

    def step_at(self, tokens: int) -> int:
        """The first update before which at least `tokens` have been read."""
        read = 0
        for at, (start, width) in enumerate(self.stages):
            end = self.stages[at + 1][0] if at + 1 < len(self.stages) else None
            if end is None or read + (end - start) * width >= tokens:
                return start + max(0, -(-(tokens - read) // width))
            read += (end - start) * width
        raise AssertionError("the last stage has no end")

    def _stage(self, step: int) -> int:
        if step < 0:
            raise ConfigError(f"step is {step}; updates are counted from 0")
        return bisect.bisect_right([start for start, _ in self.stages], step) - 1


@dataclass(frozen=True)
class TokenPath:
    """A path whose lengths are tokens, on a batch that may grow; asked by update like an `LrPath`.

    `path` is an `LrPath` whose starts, lengths, warm-up and half-life are counted in tokens. With a batch of constant
    size B it gives, to rounding, the rates of the path whose lengths are divided by B. Our choice.
    """

    path: LrPath
    ramp: BatchRamp

    @property
    def peak(self) -> float:
        """The largest top rate of the path."""
        return self.path.peak

    @property
    def end_step(self) -> int | None:
        """The number of updates in all: the first that begins at or behind the path's last token; None without end."""
        return None if self.path.end_step is None else self.ramp.step_at(self.path.end_step)

    def rate(self, step: int) -> float:
        """The learning rate of update `step`: that of the tokens read before it, in closed form."""
        number = operator.index(step)
        return self.path.rate_between(self.ramp.tokens_before(number), self.ramp.tokens_of(number))

    def rates(self, steps: Iterable[int]) -> NDArray[np.float64]:
        """The rates of many updates: shape (len(steps),)."""
        return np.array([self.rate(step) for step in steps], dtype=np.float64)

    def multiplier(self, step: int) -> float:
        """rate(step) / peak, for torch's LambdaLR."""
        return self.rate(step) / self.peak

    def branch(
        self, at_step: int, tokens: int, shape: str = "cosine", floor: float = 0.0, **options: Any
    ) -> TokenPath:
        """This path up to update `at_step`, then a decay over `tokens` tokens; as `LrPath.branch`."""
        start = self.ramp.tokens_before(operator.index(at_step))
        return TokenPath(self.path.branch(start, tokens, shape, floor, **options), self.ramp)

    def to_json(self) -> dict[str, Any]:
        """A JSON value from which `from_json` makes an equal path."""
        return {"version": 1, "unit": "tokens", "path": self.path.to_json(), "batch": self.ramp.stages}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> TokenPath:
        """The path that `to_json` wrote. Raises `ConfigError` when it is malformed."""
        if value.get("version") != 1 or value.get("unit") != "tokens":
            raise ConfigError("not a path on a token axis; expected what TokenPath.to_json writes")
        try:
            stages: Sequence[Any] = value["batch"]
            return cls(LrPath.from_json(value["path"]), BatchRamp(tuple((int(s), int(n)) for s, n in stages)))
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"malformed token path: {error}; expected what TokenPath.to_json writes"
            ) from error
