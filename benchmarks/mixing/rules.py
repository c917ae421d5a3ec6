"""Rules that were tried in the study and are no part of the product; each registers as a third party's would."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

from velopath.controllers import register
from velopath.domains import MixtureWeights, Progress
from velopath.rule_state import RuleState
from velopath.shares import bounded_shares, mean_losses, smoothed


@register("predicted_curve")
@dataclass(frozen=True)
class PredictedCurve:
    """Velocity against the law's predicted curve instead of its end point, with a leak. Ours; it did not win.

    With the law L_i(D) = E + B / D^beta of the first steps at the first shares, and D tokens read in all::

        V[i] = (l[i] - L_i(end)) / (L_i(D) - L_i(end)),   1 on the curve, above 1 behind it
        w[i] <- (1 - leak) w[i] exp(eta V[i]) / sum + leak * first share

    so that equal progress is no aim: a domain that the law expects to learn fast is not starved for doing so.
    `curves` maps each domain to (E, B, beta), `end` is where the run ends, in tokens.
    """

    curves: Mapping[str, tuple[float, float, float]]
    end: float
    _: KW_ONLY
    step_size: float = 0.5
    leak: float = 0.2
    floor: float = 0.05
    cap: float = 0.5

    needs_targets: ClassVar[bool] = False

    def start(self, losses: Mapping[str, float], weights: Mapping[str, float]) -> RuleState:
        """The first state: its shares are kept as those that the leak draws to."""
        state = RuleState.first("predicted_curve", losses, weights)
        return state.with_memory({"first": state.shares})

    def observe(
        self, state: RuleState, losses: Mapping[str, float], progress: Progress
    ) -> tuple[RuleState, MixtureWeights]:
        """The next state and its weights."""
        last = mean_losses(losses, state.names, state.last)
        read = float(sum(progress.tokens.values()))
        raw = []
        for name, loss, share in zip(state.names, last, state.shares, strict=True):
            end, now = self._at(name, self.end), self._at(name, read)
            v = (loss - end) / (now - end) if now - end > 0.05 else 1.0
            raw.append(share * math.exp(self.step_size * min(max(v, 0.0), 2.0)))
        shares = smoothed([r / math.fsum(raw) for r in raw], self.leak, state.memory["first"])
        after = state.moved(bounded_shares(shares, self.floor, self.cap), last)
        return after, after.weights

    def state_from_json(self, value: Mapping[str, Any]) -> RuleState:
        """The state that `to_json` wrote."""
        return RuleState.from_json(value, "predicted_curve")

    def _at(self, name: str, tokens: float) -> float:
        e, b, beta = self.curves[name]
        return e + b / tokens**beta
