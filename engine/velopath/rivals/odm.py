"""Online data mixing (ODM, arXiv 2312.02406): Exp3 over domains, with the loss as reward."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, Literal

from velopath.domains import DomainLoss, MixtureWeights
from velopath.errors import ConfigError
from velopath.rule_state import Explanation, RuleState
from velopath.shares import check_range, mean_losses


@dataclass(frozen=True)
class Odm:
    """Exp3 as in ODM's published code. At the t-th update (t = 1, 2, ...), for every domain i that was read::

        R[i] <- R[i] + (l[i] / 10) / w[i]
        eps_t = min(1/K, sqrt(ln K / (K t))),   eps_0 = 1/K
        w[i] = (1 - K eps_t) * exp(eps_{t-1} R[i]) / sum_j exp(eps_{t-1} R[j]) + eps_t

    l[i] is the loss of the domain's training batches in nats per token, R its cumulative reward; the 10 is the code's
    `scale`. `control.signal: training` is its signal; a domain without a loss was not read and earns nothing. In the
    code a turn is one batch of one domain, so that dividing by w undoes its being drawn seldom. Here a turn is a whole
    update interval, in which every domain is read about in proportion to w. `reward` "drawn" keeps the division as in
    the code; "mean" leaves it out, R[i] <- R[i] + l[i]/10, which is its expectation for a domain read at a rate w[i]
    (our choice, so that a rare domain is not paid twice for being rare).
    """

    _: KW_ONLY
    scale: float = 10.0
    reward: Literal["drawn", "mean"] = "drawn"

    needs_targets: ClassVar[bool] = False
    name: ClassVar[str] = "odm"

    def __post_init__(self) -> None:
        check_range("scale", self.scale, 0.0, math.inf, "above 0", self.scale > 0)
        if self.reward not in ("drawn", "mean"):
            raise ConfigError(f"reward is {self.reward!r}; expected 'drawn' or 'mean'")

    def start(self, losses: Mapping[str, float], weights: Mapping[str, float]) -> RuleState:
        """The state before the first update: no reward yet, the first weights in force.

        Raises `ConfigError` where a first weight is 0, which the rule divides by.
        """
        state = RuleState.first(self.name, losses, weights, memory={"reward": (0.0,) * len(weights)})
        if min(state.shares) <= 0:
            idle = state.names[state.shares.index(min(state.shares))]
            raise ConfigError(f"domain {idle!r} has a first weight of 0; odm needs every domain above 0")
        return state

    def observe(self, state: RuleState, losses: Mapping[str, float]) -> tuple[RuleState, MixtureWeights]:
        """The state after one update and its weights. Raises `NumericalError` on NaN or infinity."""
        last = mean_losses(losses, state.names, state.last)
        gains = [
            loss / self.scale / (share if self.reward == "drawn" else 1.0) if _read(losses, name) else 0.0
            for name, loss, share in zip(state.names, last, state.shares, strict=True)
        ]
        reward = tuple(r + g for r, g in zip(state.memory["reward"], gains, strict=True))
        count, turn = len(reward), state.updates + 1
        before, now = _explore(count, turn - 1), _explore(count, turn)
        top = max(reward)
        powers = [math.exp(before * (r - top)) for r in reward]
        total = math.fsum(powers)
        state = state.moved(
            [(1 - count * now) * p / total + now for p in powers], last, memory={"reward": reward}
        )
        return state, state.weights

    def explain(self, state: RuleState, losses: Mapping[str, float]) -> Explanation:
        """The update that `observe` makes of the same arguments, with its numbers."""
        after = self.observe(state, losses)[0]
        count, turn = len(state.names), state.updates + 1
        before, now = _explore(count, turn - 1), _explore(count, turn)
        terms, worked = {}, {}
        for k, name in enumerate(state.names):
            old, new = state.memory["reward"][k], after.memory["reward"][k]
            terms[name] = {"gain": new - old, "reward": new, "eps": now}
            worked[name] = (
                f"R = {old:.4f} + {new - old:.4f} = {new:.4f}; w = (1 - {count} * {now:.4f}) * exp({before:.4f} * "
                f"{new:.4f}) / sum + {now:.4f} = {after.shares[k]:.4f}"
            )
        formula = "w = (1 - K eps_t) exp(eps_{t-1} R) / sum(exp(eps_{t-1} R)) + eps_t, R += (l / 10) / w"
        return Explanation(formula, terms, worked, dict.fromkeys(state.names, ()))

    def state_from_json(self, value: Mapping[str, Any]) -> RuleState:
        """The state that `RuleState.to_json` wrote. Raises `ConfigError` on another controller's state."""
        return RuleState.from_json(value, self.name)


def _explore(count: int, turn: int) -> float:
    """eps_t for K = `count`; 1/K at turn 0."""
    if turn < 1 or count < 2:
        return 1 / count
    return min(1 / count, math.sqrt(math.log(count) / (count * turn)))


def _read(losses: Mapping[str, float], name: str) -> bool:
    """Whether the domain was measured: a `DomainLoss` lacks the domains without tokens."""
    return name in losses if isinstance(losses, DomainLoss) else losses.get(name) is not None
