"""Rules that raise a domain by its distance from a reference loss: dynamic batch loading and DoReMi.

K domains i; l[i] loss now, l_ref[i] reference loss, nats per token; w[i] share; c smoothing; eta step size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, Literal

from velopath.domains import MixtureWeights
from velopath.errors import ConfigError
from velopath.rule_state import Explanation, RuleState
from velopath.shares import check_range, logs_of, mean_losses, normalised_logs, shares_of, smoothed


@dataclass(frozen=True)
class DynamicBatchLoading:
    """Dynamic batch loading of Sheared LLaMA (arXiv 2310.06694)::

        d[i] = l[i] - l_ref[i]                                     (code)    max(l[i] - l_ref[i], 0)      (paper)
        a[i] = w[i] * exp(eta * d[i]) / sum_j w[j] * exp(eta * d[j])
        w[i] <- (1 - c) * a[i] + c / K,   c = 1e-4                 (code)    w[i] <- a[i]                 (paper)

    `form` chooses between the published code ("code") and the algorithm as its paper states it ("paper"); eta is 1
    in both. The losses are held-out losses. `targets` are the references l_ref in nats per token: there, losses that a
    scaling law predicts for the model's size; here, the run's targets (our choice). `step_size` is eta. A domain that
    was not measured keeps its last loss (our choice).
    """

    targets: Mapping[str, float]
    _: KW_ONLY
    form: Literal["code", "paper"] = "code"
    step_size: float = 1.0

    needs_targets: ClassVar[bool] = True
    name: ClassVar[str] = "dynamic_batch_loading"

    def __post_init__(self) -> None:
        if self.form not in ("code", "paper"):
            raise ConfigError(f"form is {self.form!r}; expected 'code' or 'paper'")
        check_range("step_size", self.step_size, 0.0, math.inf, "above 0", self.step_size > 0)
        mean_losses(self.targets, tuple(self.targets))

    def start(self, losses: Mapping[str, float], weights: Mapping[str, float]) -> RuleState:
        """The state before the first update. `losses`, `weights` and the targets must name the same domains."""
        state = RuleState.first(self.name, losses, weights, target=self.targets)
        # The logarithms stand beside the shares, so that a share too small for a float can come back.
        return state.with_memory(self._memory(logs_of(state.shares), state))

    def observe(self, state: RuleState, losses: Mapping[str, float]) -> tuple[RuleState, MixtureWeights]:
        """The state after one update and its weights. Raises `NumericalError` on NaN or infinity."""
        last, distances = self._distances(state, losses)
        logs = [w + self.step_size * d for w, d in zip(state.memory["log_shares"], distances, strict=True)]
        kept = normalised_logs(logs)
        shares = shares_of(kept)
        if self._smoothing:
            shares = smoothed(shares, self._smoothing)
            kept = logs_of(shares)
        state = state.moved(shares, last)
        state = state.with_memory(self._memory(kept, state))
        return state, state.weights

    def explain(self, state: RuleState, losses: Mapping[str, float]) -> Explanation:
        """The update that `observe` makes of the same arguments, with its numbers."""
        last, distances = self._distances(state, losses)
        after = self.observe(state, losses)[0]
        scaled = [math.exp(self.step_size * d) for d in distances]
        goals = state.target or ()
        terms, worked, guards = {}, {}, {}
        for k, name in enumerate(state.names):
            raw = last[k] - goals[k]
            terms[name] = {"distance": raw, "used": distances[k], "factor": scaled[k]}
            worked[name] = (
                f"d = {last[k]:.4f} - {goals[k]:.4f} = {raw:.4f}; w: {state.shares[k]:.4f} * exp({self.step_size:g} * "
                f"{distances[k]:.4f}) / sum = {after.shares[k]:.4f}"
            )
            fired = (["clip"] if distances[k] != raw else []) + (["smoothing"] if self._smoothing else [])
            guards[name] = tuple(fired)
        return Explanation(
            "w <- w * exp(eta * d) / sum(w * exp(eta * d)), d = l - l_ref", terms, worked, guards
        )

    def state_from_json(self, value: Mapping[str, Any]) -> RuleState:
        """The state that `RuleState.to_json` wrote. Raises `ConfigError` on another controller's state."""
        return RuleState.from_json(value, self.name)

    @property
    def _smoothing(self) -> float:
        return 1e-4 if self.form == "code" else 0.0

    @property
    def _clips(self) -> bool:
        return self.form == "paper"

    def _memory(self, logs: tuple[float, ...], state: RuleState) -> dict[str, tuple[float, ...]]:
        return {"log_shares": logs}

    def _distances(
        self, state: RuleState, losses: Mapping[str, float]
    ) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """The losses in nats per token, and d."""
        last = mean_losses(losses, state.names, state.last)
        raw = (now - goal for now, goal in zip(last, state.target or (), strict=True))
        return last, tuple(max(d, 0.0) if self._clips else d for d in raw)


@dataclass(frozen=True)
class DoReMi(DynamicBatchLoading):
    """The group-DRO rule of DoReMi (arXiv 2305.10429, published code)::

        w[i] <- (1 - c) * a[i] + c / K,   a = softmax(ln w + eta * x),   c = `smoothing` (code: 1e-4)

    x[i] is the excess of the training loss over a reference model's. The code clips it at 0 token by token and takes
    the mean; here losses arrive as means, so the mean is clipped: x[i] = max(l[i] - l_ref[i], 0), a smaller number
    wherever a domain's tokens lie on both sides (our choice, forced). `targets` are the reference model's losses. What
    DoReMi hands on is the average of w over its whole run, to be used as static weights of another run: the state's
    `memory["average"]`. `control.signal: training` is its signal.
    """

    smoothing: float = 1e-4

    name: ClassVar[str] = "doremi"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("smoothing", self.smoothing, 0.0, 1.0, "in [0, 1]")

    @property
    def _smoothing(self) -> float:
        return self.smoothing

    @property
    def _clips(self) -> bool:
        return True

    def _memory(self, logs: tuple[float, ...], state: RuleState) -> dict[str, tuple[float, ...]]:
        before = state.memory.get("average", state.shares)
        count = max(state.updates, 1)
        average = tuple(a + (w - a) / count for a, w in zip(before, state.shares, strict=True))
        return {"log_shares": logs, "average": average}
