"""Rules that no loss moves: static, uniform, temperature and a schedule written down by step.

Always report one of them beside a controller that moves. K is the number of domains, w[i] a domain's share.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, Literal

from velopath.domains import MixtureWeights, Progress, check_weights
from velopath.errors import ConfigError
from velopath.rule_state import RuleState
from velopath.shares import check_range, mean_losses


@dataclass(frozen=True)
class Static:
    """Keeps the weights it starts with: w[i] = weights[i] / sum_j weights[j], for ever.

    Losses are checked and kept for the record and move nothing.
    """

    needs_targets: ClassVar[bool] = False
    name: ClassVar[str] = "static"

    def start(self, losses: Mapping[str, float], weights: Mapping[str, float]) -> RuleState:
        """The state that holds `weights`; `losses` (nats per token) must name the same domains."""
        check_weights(weights)
        first = MixtureWeights(
            tuple(weights),
            tuple(self._shares(weights)),
            weights.id if isinstance(weights, MixtureWeights) else 0,
        )
        return RuleState.first(self.name, losses, first)

    def observe(self, state: RuleState, losses: Mapping[str, float]) -> tuple[RuleState, MixtureWeights]:
        """The state with `losses` noted, and the same weights. Raises `NumericalError` on NaN or infinity.

        A domain that was not measured keeps its last loss.
        """
        state = state.held(mean_losses(losses, state.names, state.last))
        return state, state.weights

    def state_from_json(self, value: Mapping[str, Any]) -> RuleState:
        """The state that `RuleState.to_json` wrote. Raises `ConfigError` on another controller's state."""
        return RuleState.from_json(value, self.name)

    def _shares(self, weights: Mapping[str, float]) -> Sequence[float]:
        return tuple(weights.values())


@dataclass(frozen=True)
class Uniform(Static):
    """Gives every domain the same share w[i] = 1/K, whatever weights it starts with."""

    name: ClassVar[str] = "uniform"

    def _shares(self, weights: Mapping[str, float]) -> Sequence[float]:
        return tuple(1 / len(weights) for _ in weights)


@dataclass(frozen=True)
class Temperature(Static):
    """Shares by size, flattened: w[i] = n[i]^(1/tau) / sum_j n[j]^(1/tau), for ever.

    n[i] are the domain's training tokens and `tau` the temperature: 1 is the natural mixture, large values approach
    the uniform one, values below 1 sharpen. The form is the one usual for multilingual data (multilingual BERT writes
    the exponent as S = 1/tau). `tokens` maps each domain to n[i]; None takes the first weights in its place, which
    is the same wherever those are the natural shares. Our choice.
    """

    tau: float = 1.0
    tokens: Mapping[str, float] | None = None

    name: ClassVar[str] = "temperature"

    def __post_init__(self) -> None:
        check_range("tau", self.tau, 0.0, math.inf, "above 0", self.tau > 0)
        if self.tokens is not None:
            check_weights(self.tokens)

    def _shares(self, weights: Mapping[str, float]) -> Sequence[float]:
        sizes = weights if self.tokens is None else self.tokens
        check_weights(sizes, tuple(weights))
        most = max(sizes.values())
        return tuple((sizes[name] / most) ** (1 / self.tau) for name in weights)


@dataclass(frozen=True)
class Schedule:
    """Weights written down by step: w(s) is read from `points`, a map from step s to weights by domain.

    `shape` "hold": from each written step on its weights hold until the next one. "linear": between two written
    steps s0 and s1 each normalised share goes straight, w(s) = w0 + (w1 - w0) * (s - s0) / (s1 - s0). Before the first
    written step the first weights of the run hold, after the last one the last. Steps count the updates of the main
    path from its start, not from the slice's; weights change only where the controller is asked (every m steps).
    Needs `progress`. Losses move nothing. Our choice.
    """

    points: Mapping[int | str, Mapping[str, float]]
    _: KW_ONLY
    shape: Literal["hold", "linear"] = "hold"

    needs_targets: ClassVar[bool] = False
    name: ClassVar[str] = "schedule"

    def __post_init__(self) -> None:
        if self.shape not in ("hold", "linear"):
            raise ConfigError(f"shape is {self.shape!r}; expected 'hold' or 'linear'")
        if not isinstance(self.points, Mapping) or not self.points:
            raise ConfigError(f"points is {self.points!r}; expected a map from step to weights by domain")
        read: dict[int, Mapping[str, float]] = {}
        for key, weights in self.points.items():
            if not str(key).isdigit() or not isinstance(weights, Mapping):
                raise ConfigError(
                    f"points has {key!r}: {weights!r}; expected a step, 0 or more, and weights by domain"
                )
            check_weights(weights)
            read[int(key)] = MixtureWeights.of(dict(sorted(weights.items())))
        object.__setattr__(self, "points", {step: read[step] for step in sorted(read)})

    def start(
        self, losses: Mapping[str, float], weights: Mapping[str, float], progress: Progress | None = None
    ) -> RuleState:
        """The state that holds what is written for the present step (without `progress`: step 0)."""
        for row in self.points.values():
            check_weights(row, tuple(weights))
        first = RuleState.first(self.name, losses, weights)
        memory = {"first": first.shares}
        shares = self._at(0 if progress is None else progress.step, first.names, first.shares)
        return RuleState(
            first.names, shares, first.initial, first.last, 0, first.id, self.name, memory=memory
        )

    def observe(
        self, state: RuleState, losses: Mapping[str, float], progress: Progress | None = None
    ) -> tuple[RuleState, MixtureWeights]:
        """The state with the weights of the present step. Raises `ConfigError` without `progress`."""
        if progress is None:
            raise ConfigError(
                "the schedule needs to know the step; call observe with progress=Progress(step=...)"
            )
        last = mean_losses(losses, state.names, state.last)
        shares = self._at(progress.step, state.names, state.memory["first"])
        state = state.held(last) if shares == state.shares else state.moved(shares, last)
        return state, state.weights

    def state_from_json(self, value: Mapping[str, Any]) -> RuleState:
        """The state that `RuleState.to_json` wrote. Raises `ConfigError` on another controller's state."""
        return RuleState.from_json(value, self.name)

    def _at(self, step: int, names: tuple[str, ...], first: tuple[float, ...]) -> tuple[float, ...]:
        steps = [int(s) for s in self.points]
        before = [s for s in steps if s <= step]
        if not before:
            return first
        low = tuple(self.points[before[-1]][n] for n in names)
        after = [s for s in steps if s > step]
        if self.shape == "hold" or not after:
            return low
        high = tuple(self.points[after[0]][n] for n in names)
        part = (step - before[-1]) / (after[0] - before[-1])
        return tuple(a + (b - a) * part for a, b in zip(low, high, strict=True))
