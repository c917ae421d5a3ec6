"""Static and uniform weights: the baselines of every dynamic rule, behind the same interface as Velocitune.

Always report one of them beside a controller that moves. K is the number of domains.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

from velopath.domains import MixtureWeights, check_weights
from velopath.errors import ConfigError
from velopath.velocity import mean_losses


@dataclass(frozen=True)
class HeldState:
    """The state of a controller that holds its shares; tuples stand in the order of `names` (sorted).

    `shares` sum to 1; `initial` and `last` are losses in nats per token, kept for the record; `updates` counts
    updates; `id` is the id of the weights and does not grow, since nothing changes.
    """

    names: tuple[str, ...]
    shares: tuple[float, ...]
    initial: tuple[float, ...]
    last: tuple[float, ...]
    updates: int = 0
    id: int = 0
    controller: str = "static"

    @property
    def weights(self) -> MixtureWeights:
        """The shares, as a mapping name -> share with the state's id."""
        return MixtureWeights(self.names, self.shares, self.id)

    def record(self) -> dict[str, Any]:
        """The state by domain name, with the keys of `VelocityState.record`; there is no velocity and no target."""
        return {
            "weights": dict(zip(self.names, self.shares, strict=True)),
            "velocity": None,
            "initial": dict(zip(self.names, self.initial, strict=True)),
            "target": None,
            "last": dict(zip(self.names, self.last, strict=True)),
            "flagged": [],
            "clipped": [],
            "updates": self.updates,
        }

    def to_json(self) -> dict[str, Any]:
        """A JSON value from which `state_from_json` of the same controller makes an equal state."""
        value = {f.name: getattr(self, f.name) for f in fields(self)}
        return {"version": 1, **{k: list(v) if isinstance(v, tuple) else v for k, v in value.items()}}


@dataclass(frozen=True)
class Static:
    """Keeps the weights it starts with: w[i] = weights[i] / sum_j weights[j], for ever.

    Losses are checked and kept for the record and move nothing.
    """

    needs_targets: ClassVar[bool] = False
    name: ClassVar[str] = "static"

    def start(self, losses: Mapping[str, float], weights: Mapping[str, float]) -> HeldState:
        """The state that holds `weights`; `losses` (nats per token) must name the same domains."""
        check_weights(weights)
        names = tuple(sorted(weights))
        initial = mean_losses(losses, names)
        shares = self._shares({name: weights[name] for name in names})
        first_id = weights.id if isinstance(weights, MixtureWeights) else 0
        return HeldState(names, shares, initial, initial, id=first_id, controller=self.name)

    def observe(self, state: HeldState, losses: Mapping[str, float]) -> tuple[HeldState, MixtureWeights]:
        """The state with `losses` noted, and the same weights. Raises `NumericalError` on NaN or infinity."""
        last = mean_losses(losses, state.names)
        state = replace(state, last=last, updates=state.updates + 1)
        return state, state.weights

    def state_from_json(self, value: Mapping[str, Any]) -> HeldState:
        """The state that `HeldState.to_json` wrote. Raises `ConfigError` on another controller's state."""
        if value.get("controller") != self.name or value.get("version") != 1:
            raise ConfigError(
                f"state of controller {value.get('controller')!r} version {value.get('version')!r}; "
                f"expected {self.name!r} version 1"
            )
        known = [f.name for f in fields(HeldState)]
        if missing := [k for k in known if k not in value]:
            raise ConfigError(f"{self.name} state lacks {missing[0]!r}; the saved state is incomplete")
        data: dict[str, Any] = {k: tuple(value[k]) if isinstance(value[k], list) else value[k] for k in known}
        return HeldState(**data)

    def _shares(self, weights: Mapping[str, float]) -> tuple[float, ...]:
        total = math.fsum(weights.values())
        return tuple(weight / total for weight in weights.values())


@dataclass(frozen=True)
class Uniform(Static):
    """Gives every domain the same share w[i] = 1/K, whatever weights it starts with."""

    name: ClassVar[str] = "uniform"

    def _shares(self, weights: Mapping[str, float]) -> tuple[float, ...]:
        return tuple(1 / len(weights) for _ in weights)
