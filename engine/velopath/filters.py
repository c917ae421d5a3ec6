"""Filters of a loss over updates, each a pure rule on a few numbers, and a controller behind a filter.

A filter's memory is a tuple of floats, so that a state of K domains is K tuples and JSON. Our choice throughout: the
papers feed losses as measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

from velopath import controllers
from velopath.controllers import Controller
from velopath.domains import DomainLoss, MixtureWeights, Progress
from velopath.errors import ConfigError
from velopath.rule_state import Explanation
from velopath.shares import check_range, mean_losses

Memory = tuple[float, ...]


class Estimate(NamedTuple):
    """What a filter makes of the losses so far: nats per token, nats per update, with standard errors.

    A filter without a slope has none; 0 stands for an error that is not known.
    """

    loss: float
    stderr: float
    slope: float | None = None
    slope_stderr: float | None = None


class LossFilter(Protocol):
    """A filter: `start` and `observe` take a loss in nats and its standard error (0: not known) and give a memory."""

    def start(self, loss: float, stderr: float) -> Memory: ...
    def observe(self, memory: Memory, loss: float | None, stderr: float) -> Memory:
        """The memory one update later; `loss` None: nothing was measured."""
        ...

    def read(self, memory: Memory) -> Estimate: ...


@dataclass(frozen=True)
class Ema:
    """Exponential mean: e <- keep * e + (1 - keep) * l, var(e) <- keep^2 var(e) + (1 - keep)^2 var(l).

    It lags behind a loss that falls by s per update by s * keep / (1 - keep).
    """

    keep: float = 0.5

    def __post_init__(self) -> None:
        check_range("keep", self.keep, 0.0, 1.0, "at least 0 and below 1", self.keep < 1)

    def start(self, loss: float, stderr: float) -> Memory:
        return (loss, stderr**2)

    def observe(self, memory: Memory, loss: float | None, stderr: float) -> Memory:
        if loss is None:
            return memory
        fresh = 1 - self.keep
        return (
            self.keep * memory[0] + fresh * loss,
            self.keep**2 * memory[1] + fresh**2 * stderr**2,
        )

    def read(self, memory: Memory) -> Estimate:
        return Estimate(memory[0], math.sqrt(memory[1]))


@dataclass(frozen=True)
class Median:
    """The median of the last `last` losses: one wild measurement moves nothing. It lags by (last - 1) / 2 updates.

    Of an even number the mean of the middle two. Its standard error is that of the losses in the middle.
    """

    last: int = 3

    def __post_init__(self) -> None:
        if isinstance(self.last, bool) or not isinstance(self.last, int) or self.last < 1:
            raise ConfigError(f"last is {self.last!r}; expected a number of losses, 1 or more")

    def start(self, loss: float, stderr: float) -> Memory:
        return (loss, stderr)

    def observe(self, memory: Memory, loss: float | None, stderr: float) -> Memory:
        return memory if loss is None else (*memory, loss, stderr)[-2 * self.last :]

    def read(self, memory: Memory) -> Estimate:
        pairs = sorted(zip(memory[::2], memory[1::2], strict=True))
        middle = pairs[(len(pairs) - 1) // 2 : len(pairs) // 2 + 1]
        return Estimate(
            math.fsum(p[0] for p in middle) / len(middle), math.fsum(p[1] for p in middle) / len(middle)
        )


@dataclass(frozen=True)
class Trend:
    """Local linear trend: a Kalman filter on the state (loss x, slope b), one step of time per update::

        x <- x + b + N(0, level_sd^2),   b <- b + N(0, slope_sd^2),   l = x + N(0, se^2)

    se is the standard error of the measured loss, or `noise_sd` where that is not known. All are nats (per update).
    It starts at the first loss, with slope 0 and standard deviation `first_slope_sd`. Memory: x, b and their
    covariance P11, P12, P22.
    """

    level_sd: float = 0.01
    slope_sd: float = 0.01
    noise_sd: float = 0.02
    first_slope_sd: float = 0.1

    def __post_init__(self) -> None:
        for name in ("level_sd", "slope_sd", "first_slope_sd"):
            check_range(name, getattr(self, name), 0.0, math.inf, "0 nats or more")
        check_range("noise_sd", self.noise_sd, 0.0, math.inf, "above 0 nats", self.noise_sd > 0)

    def start(self, loss: float, stderr: float) -> Memory:
        return (loss, 0.0, (stderr or self.noise_sd) ** 2, 0.0, self.first_slope_sd**2)

    def observe(self, memory: Memory, loss: float | None, stderr: float) -> Memory:
        x, b, p11, p12, p22 = memory
        x, p11 = x + b, p11 + 2 * p12 + p22 + self.level_sd**2
        p12, p22 = p12 + p22, p22 + self.slope_sd**2
        if loss is None:
            return (x, b, p11, p12, p22)
        noise = (stderr or self.noise_sd) ** 2
        gain_x, gain_b = p11 / (p11 + noise), p12 / (p11 + noise)
        rest = noise / (p11 + noise)  # 1 - gain_x without its cancellation
        surprise = loss - x
        return (x + gain_x * surprise, b + gain_b * surprise, rest * p11, rest * p12, p22 - gain_b * p12)

    def read(self, memory: Memory) -> Estimate:
        return Estimate(memory[0], math.sqrt(memory[2]), memory[1], math.sqrt(max(memory[4], 0.0)))


KINDS: dict[str, type[Ema] | type[Median] | type[Trend]] = {"ema": Ema, "median": Median, "trend": Trend}


def make_filter(choice: str | Mapping[str, Any]) -> LossFilter:
    """The filter of a config value: its kind ("ema", "median", "trend"), or a map of `kind` and its options.

    Raises `ConfigError` on an unknown kind or option.
    """
    options = {"kind": choice} if isinstance(choice, str) else dict(choice)
    kind = options.pop("kind", None)
    if kind not in KINDS:
        raise ConfigError(f"filter kind is {kind!r}; expected one of {', '.join(KINDS)}")
    known = KINDS[kind].__dataclass_fields__
    if unknown := [name for name in options if name not in known]:
        raise ConfigError(f"filter {kind!r} has no option {unknown[0]!r}; its options are {', '.join(known)}")
    return KINDS[kind](**options)


@dataclass(frozen=True)
class FilteredState:
    """The inner controller's state, and a filter's memory for each domain in the order of `names` (sorted)."""

    inner: Any
    names: tuple[str, ...]
    memory: tuple[Memory, ...]
    estimates: tuple[Estimate, ...]

    @property
    def weights(self) -> MixtureWeights:
        """The shares in force."""
        weights: MixtureWeights = self.inner.weights
        return weights

    def record(self) -> dict[str, Any]:
        """The inner record, with `filtered`: {domain: {`loss`, `stderr`, `slope`, `slope_stderr`}}."""
        rows = {name: e._asdict() for name, e in zip(self.names, self.estimates, strict=True)}
        return {**self.inner.record(), "filtered": rows}

    def to_json(self) -> dict[str, Any]:
        """A JSON value from which `Filtered.state_from_json` makes an equal state."""
        memory = [list(row) for row in self.memory]
        return {
            "controller": "filtered",
            "version": 1,
            "inner": self.inner.to_json(),
            "names": list(self.names),
            "memory": memory,
        }


@dataclass(frozen=True)
class Filtered:
    """A controller that sees filtered losses: `controller` is any controller, `filter` one of this module.

    `start` hands the first losses on as they are. Where a domain was not measured, the filter's own value stands in.
    """

    controller: Controller
    filter: LossFilter

    needs_targets: ClassVar[bool] = False

    def start(
        self, losses: Mapping[str, float], weights: Mapping[str, float], progress: Progress | None = None
    ) -> FilteredState:
        """The state before the first update."""
        inner = controllers.start(self.controller, losses, weights, progress)
        names = tuple(sorted(weights))
        means = mean_losses(losses, names)
        return self._state(
            inner,
            names,
            tuple(self.filter.start(m, _stderr(losses, n)) for n, m in zip(names, means, strict=True)),
        )

    def observe(
        self, state: FilteredState, losses: Mapping[str, float], progress: Progress | None = None
    ) -> tuple[FilteredState, MixtureWeights]:
        """The state after one update and its weights. Raises as the inner controller does."""
        memory = self._memory(state, losses)
        seen = self._seen(state.names, memory)
        inner, weights = controllers.observe(self.controller, state.inner, seen, progress)
        return self._state(inner, state.names, memory), weights

    def explain(
        self, state: FilteredState, losses: Mapping[str, float], progress: Progress | None = None
    ) -> Explanation | None:
        """The inner update, with the filter's estimate as the first terms of each domain."""
        memory = self._memory(state, losses)
        inner = controllers.explain(self.controller, state.inner, self._seen(state.names, memory), progress)
        if inner is None:
            return None
        terms = {}
        for name, row in zip(state.names, memory, strict=True):
            numbers = self.filter.read(row)._asdict().items()
            terms[name] = {f"filtered_{k}": v for k, v in numbers if v is not None} | dict(inner.terms[name])
        return Explanation(f"l = {self.filter}; {inner.formula}", terms, inner.worked, inner.guards)

    def state_from_json(self, value: Mapping[str, Any]) -> FilteredState:
        """The state that `FilteredState.to_json` wrote. Raises `ConfigError` on another controller's state."""
        if value.get("controller") != "filtered" or value.get("version") != 1:
            raise ConfigError(
                f"state of controller {value.get('controller')!r}; expected one behind a filter: keep control.filter"
            )
        inner = self.controller.state_from_json(value["inner"])
        return self._state(inner, tuple(value["names"]), tuple(tuple(row) for row in value["memory"]))

    def _state(self, inner: Any, names: tuple[str, ...], memory: tuple[Memory, ...]) -> FilteredState:
        return FilteredState(inner, names, memory, tuple(self.filter.read(row) for row in memory))

    def _memory(self, state: FilteredState, losses: Mapping[str, float]) -> tuple[Memory, ...]:
        mean_losses(losses, state.names, (0.0,) * len(state.names))  # refuses NaN and unknown domains
        return tuple(
            self.filter.observe(row, losses.get(name), _stderr(losses, name))
            for name, row in zip(state.names, state.memory, strict=True)
        )

    def _seen(self, names: tuple[str, ...], memory: tuple[Memory, ...]) -> DomainLoss:
        rows = [self.filter.read(row) for row in memory]
        return DomainLoss(
            names, tuple(r.loss for r in rows), (1,) * len(names), tuple(r.stderr for r in rows)
        )


def _stderr(losses: Mapping[str, float], name: str) -> float:
    return losses.stderr_of(name) if isinstance(losses, DomainLoss) and name in losses else 0.0
