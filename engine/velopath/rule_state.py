"""RuleState: what a controller remembers between updates, and Explanation: one update with its numbers.

K is the number of domains; tuples of K numbers stand in the order of `names`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from velopath.domains import MixtureWeights, check_weights, normalised
from velopath.errors import ConfigError
from velopath.shares import mean_losses

Memory = Mapping[str, tuple[float, ...]]


@dataclass(frozen=True)
class RuleState:
    """The state of a rule that has no more to remember than a few rows of numbers.

    `names` are sorted; `shares` are in force and sum to 1; `initial` and `last` are losses in nats per token, `target`
    those that a rule compares with, where it does; `memory` holds whatever else the rule named `controller` needs,
    by name; `updates` counts updates; `id` is the id of the weights and grows with every change of them.
    """

    names: tuple[str, ...]
    shares: tuple[float, ...]
    initial: tuple[float, ...]
    last: tuple[float, ...]
    updates: int = 0
    id: int = 0
    controller: str = "static"
    target: tuple[float, ...] | None = None
    memory: Memory = field(default_factory=dict)

    @classmethod
    def first(
        cls,
        controller: str,
        losses: Mapping[str, float],
        weights: Mapping[str, float],
        *,
        target: Mapping[str, float] | None = None,
        memory: Memory | None = None,
    ) -> RuleState:
        """The state before the first update: `weights` normalised, `losses` (nats per token) noted.

        All three mappings must name the same domains. Raises `ConfigError` or `NumericalError` where they do not, or
        are not finite.
        """
        check_weights(weights)
        names = tuple(sorted(weights))
        initial = mean_losses(losses, names)
        shares = normalised([weights[name] for name in names])
        goal = None if target is None else mean_losses(target, names)
        first_id = weights.id if isinstance(weights, MixtureWeights) else 0
        return cls(names, shares, initial, initial, 0, first_id, controller, goal, memory or {})

    def moved(
        self, shares: Sequence[float], last: tuple[float, ...], memory: Memory | None = None
    ) -> RuleState:
        """The state one update later, with other `shares` (their id grows) and, where given, another `memory`."""
        kept = self.memory if memory is None else memory
        return replace(
            self, shares=tuple(shares), last=last, memory=kept, updates=self.updates + 1, id=self.id + 1
        )

    def held(self, last: tuple[float, ...], memory: Memory | None = None) -> RuleState:
        """The state one update later, with the same shares and the same id."""
        return replace(self.moved(self.shares, last, memory), id=self.id)

    def with_memory(self, memory: Memory) -> RuleState:
        """The same state with another `memory`."""
        return replace(self, memory=memory)

    @property
    def weights(self) -> MixtureWeights:
        """The shares, as a mapping name -> share with the state's id."""
        return MixtureWeights(self.names, self.shares, self.id)

    def named(self, values: Sequence[float] | None) -> dict[str, float] | None:
        """A row by domain name; None stays None."""
        return None if values is None else dict(zip(self.names, values, strict=True))

    def record(self) -> dict[str, Any]:
        """The state by domain name, with the keys of `VelocityState.record`; there is no velocity."""
        return {
            "weights": self.named(self.shares),
            "velocity": None,
            "initial": self.named(self.initial),
            "target": self.named(self.target),
            "last": self.named(self.last),
            "flagged": [],
            "clipped": [],
            "updates": self.updates,
        }

    def to_json(self) -> dict[str, Any]:
        """A JSON value from which `state_from_json` of the same controller makes an equal state."""
        value = {f.name: getattr(self, f.name) for f in fields(self)}
        value = {k: list(v) if isinstance(v, tuple) else v for k, v in value.items()}
        # JSON has no infinity: the logarithm of a share of 0 is null.
        value["memory"] = {
            k: [x if math.isfinite(x) else None for x in row] for k, row in self.memory.items()
        }
        return {"version": 1, **value}

    @classmethod
    def from_json(cls, value: Mapping[str, Any], controller: str) -> RuleState:
        """The state that `to_json` wrote. Raises `ConfigError` on the state of another controller."""
        if value.get("controller") != controller or value.get("version") != 1:
            raise ConfigError(
                f"state of controller {value.get('controller')!r} version {value.get('version')!r}; "
                f"expected {controller!r} version 1"
            )
        known = [f.name for f in fields(cls)]
        # `target` and `memory` are younger than some saved states.
        if missing := [k for k in known if k not in value and k not in ("target", "memory")]:
            raise ConfigError(f"{controller} state lacks {missing[0]!r}; the saved state is incomplete")
        data: dict[str, Any] = {
            k: tuple(value[k]) if isinstance(value[k], list) else value[k] for k in known if k in value
        }
        data["memory"] = {
            k: tuple(-math.inf if x is None else x for x in row) for k, row in value.get("memory", {}).items()
        }
        return cls(**data)


@dataclass(frozen=True)
class Explanation:
    """One update of a controller with its numbers put in.

    `formula` is the rule in letters; `terms` maps each domain to the rule's intermediate numbers, in the order they are
    computed; `worked` maps each domain to the rule with those numbers put in; `guards` names, by domain, the bounds
    that changed something: "clip", "small gap", "smoothing", "floor", "cap".
    """

    formula: str
    terms: Mapping[str, Mapping[str, float]]
    worked: Mapping[str, str]
    guards: Mapping[str, tuple[str, ...]]
