"""Adaptive data optimisation (ADO, arXiv 2410.11820): sample where a fitted law still promises the most."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, Literal

from velopath.domains import MixtureWeights, Progress
from velopath.errors import ConfigError, NumericalError
from velopath.rule_state import Explanation, RuleState
from velopath.shares import check_range, mean_losses

POINTS = 4
"""Losses of a domain that a law with three parameters needs at the least."""


@dataclass(frozen=True)
class Ado:
    """ADO. A law L[i](n) = eps[i] + A[i] / n^alpha[i] is fitted online to each domain's losses; then per update::

        slope[i] = min(max(alpha[i], 0.05), 0.8) * (L[i](n[i]) - eps[i]) / n[i]            (= -dL/dn between the bounds)
        score[i] ~ prior[i] * credit[i] * slope[i],  normalised, raised to 0.01, normalised
        w = 0.9 * average + 0.1 * score
        average <- average + (score - average) / (t + 1)

    From its published code: prior (the first weights here; there the natural shares), the bound 0.05, the 0.01, the
    0.9 and 0.1, the average over updates t that starts at the prior. credit[i] = h^0.5 in the paper (`credit`
    "paper"), (h (1 - h))^0.5 in the code that was read ("code"); h[i] is an exponential mean of the shares of tokens
    really read, h <- 0.9 h + 0.1 * share. n[i] counts all tokens alike in the code's default (`count` "all": a law in
    the run's own tokens), or the domain's own ("own"). The code updates w at every step and refits every 1000; here
    both happen per update: t counts updates, h moves once per update, the laws are refitted every `refit` updates
    (our choices). Until each domain has 4 losses with n > 0, the first weights hold. The fit is
    `velopath.law.fit_target` with three parameters; the bound 0.8 stands for a penalty in the code's fit. A fit that
    fails keeps the law before.

    Losses may be held-out or training losses. Needs `progress` (tokens read per domain).
    """

    _: KW_ONLY
    refit: int = 1
    credit: Literal["paper", "code"] = "paper"
    count: Literal["all", "own"] = "all"
    floor: float = 0.01

    needs_targets: ClassVar[bool] = False
    name: ClassVar[str] = "ado"

    def __post_init__(self) -> None:
        if isinstance(self.refit, bool) or not isinstance(self.refit, int) or self.refit < 1:
            raise ConfigError(f"refit is {self.refit!r}; expected a number of updates, 1 or more")
        if self.credit not in ("paper", "code"):
            raise ConfigError(f"credit is {self.credit!r}; expected 'paper' or 'code'")
        if self.count not in ("all", "own"):
            raise ConfigError(f"count is {self.count!r}; expected 'all' or 'own'")
        check_range("floor", self.floor, 0.0, 1.0, "in [0, 1]")

    def start(self, losses: Mapping[str, float], weights: Mapping[str, float]) -> RuleState:
        """The state before the first update: the first weights, which are also the prior."""
        state = RuleState.first(self.name, losses, weights)
        zero = (0.0,) * len(state.names)
        memory = {"prior": state.shares, "average": state.shares, "credit": state.shares, "tokens": zero}
        return state.with_memory(memory)

    def observe(
        self, state: RuleState, losses: Mapping[str, float], progress: Progress | None = None
    ) -> tuple[RuleState, MixtureWeights]:
        """The state after one update and its weights. Raises `ConfigError` without `progress`."""
        if progress is None:
            raise ConfigError("ado needs the tokens read; call observe with progress=Progress(tokens=...)")
        last = mean_losses(losses, state.names, state.last)
        memory = self._noted(state, losses, last, progress)
        if state.updates % self.refit == 0:
            memory |= self._laws(state.names, memory)
        score = self._score(memory)
        if score is None:
            state = state.held(last, memory)
            return state, state.weights
        average = memory["average"]
        shares = [0.9 * a + 0.1 * s for a, s in zip(average, score, strict=True)]
        part = 1 / (state.updates + 2)
        memory["average"] = tuple(a + part * (s - a) for a, s in zip(average, score, strict=True))
        total = math.fsum(shares)
        state = state.moved([s / total for s in shares], last, memory)
        return state, state.weights

    def explain(
        self, state: RuleState, losses: Mapping[str, float], progress: Progress | None = None
    ) -> Explanation:
        """The update that `observe` makes of the same arguments, with its numbers."""
        after = self.observe(state, losses, progress)[0]
        formula = "w = 0.9 average + 0.1 score, score ~ prior * credit * alpha (L(n) - eps) / n"
        score = self._score(after.memory)
        terms: dict[str, dict[str, float]] = {name: {} for name in state.names}
        worked = dict.fromkeys(state.names, "no law yet: fewer than 4 losses; the weights hold")
        for k, name in enumerate(state.names if score is not None else ()):
            eps, amount, alpha = (after.memory[key][k] for key in ("eps", "A", "alpha"))
            n, before = after.memory["n"][k], state.memory["average"][k]
            assert score is not None
            terms[name] = {"eps": eps, "A": amount, "alpha": alpha, "n": n, "score": score[k]}
            worked[name] = (
                f"slope = {_bounded(alpha):.3f} * {amount / n**alpha:.4f} / {n:,.0f}; score = {score[k]:.4f}; "
                f"w = 0.9 * {before:.4f} + 0.1 * {score[k]:.4f} = {after.shares[k]:.4f}"
            )
        return Explanation(formula, terms, worked, dict.fromkeys(state.names, ()))

    def state_from_json(self, value: Mapping[str, Any]) -> RuleState:
        """The state that `RuleState.to_json` wrote. Raises `ConfigError` on another controller's state."""
        return RuleState.from_json(value, self.name)

    def _noted(
        self, state: RuleState, losses: Mapping[str, float], last: tuple[float, ...], progress: Progress
    ) -> dict[str, tuple[float, ...]]:
        """The memory with the tokens read, their shares, and each domain's new point of its law."""
        memory = dict(state.memory)
        tokens = tuple(float(progress.tokens.get(name, 0)) for name in state.names)
        read = [now - before for now, before in zip(tokens, memory["tokens"], strict=True)]
        total = math.fsum(read)
        part = [r / total for r in read] if total > 0 else state.shares
        memory["credit"] = tuple(0.9 * h + 0.1 * p for h, p in zip(memory["credit"], part, strict=True))
        memory["tokens"] = tokens
        every = math.fsum(tokens)
        memory["n"] = tuple(every if self.count == "all" else own for own in tokens)
        for name, n, loss in zip(state.names, memory["n"], last, strict=True):
            if n > 0 and name in losses:
                memory[f"points of {name}"] = (*memory.get(f"points of {name}", ()), n, loss)
        return memory

    def _laws(
        self, names: tuple[str, ...], memory: Mapping[str, tuple[float, ...]]
    ) -> dict[str, tuple[float, ...]]:
        """The fitted eps, A and alpha of all domains; empty while one of them lacks points or a first fit fails."""
        from velopath.law import fit_target

        rows = []
        for k, name in enumerate(names):
            points = memory.get(f"points of {name}", ())
            at = dict(
                zip(points[::2], points[1::2], strict=True)
            )  # a domain that read nothing since: the newer loss
            try:
                law = fit_target(list(at), list(at.values()), law="three") if len(at) >= POINTS else None
            except NumericalError:
                law = None
            if law is not None:
                rows.append((law.E, law.B, law.beta))
            elif "alpha" in memory:
                rows.append((memory["eps"][k], memory["A"][k], memory["alpha"][k]))
            else:
                return {}
        eps, amount, alpha = zip(*rows, strict=True)
        return {"eps": eps, "A": amount, "alpha": alpha}

    def _score(self, memory: Mapping[str, tuple[float, ...]]) -> tuple[float, ...] | None:
        """The normalised score, none below the floor (before the last normalisation); None without laws."""
        if "alpha" not in memory:
            return None
        rows = zip(*(memory[k] for k in ("prior", "credit", "A", "alpha", "n")), strict=True)
        raw = []
        for prior, h, amount, alpha, n in rows:
            credit = h if self.credit == "paper" else h * (1 - h)
            raw.append(prior * math.sqrt(credit) * _bounded(alpha) * amount * max(n, 1.0) ** (-alpha - 1))
        total = math.fsum(raw)
        if not total > 0:
            return None
        raised = [max(r / total, self.floor) for r in raw]
        again = math.fsum(raised)
        return tuple(r / again for r in raised)


def _bounded(alpha: float) -> float:
    return min(max(alpha, 0.05), 0.8)
