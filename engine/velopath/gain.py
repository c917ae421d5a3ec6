"""MarginalGain: shares at which a further token of any domain is worth the same to the metric. Our choice.

Letters: K domains i; l[i] loss now in nats per token; n[i] tokens of the domain read so far, N[i] by the end, R tokens
left to read; a[i] what the metric counts the domain for; s[i] slope, the fall of its loss per unit of ln n.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, Literal

from velopath.domains import DomainLoss, MixtureWeights, Progress, check_weights
from velopath.errors import ConfigError
from velopath.rule_state import Explanation, RuleState
from velopath.shares import check_range, mean_losses

STEEPEST = 4.0
"""No slope leaves the range from the pooled slope over this to the pooled slope times this."""


@dataclass(frozen=True)
class MarginalGain:
    """The metric's own shares; for `worst`, shares that bring the domains to one predicted level. All of it is ours.

    In its own tokens a domain's loss falls about as l(n) = c - s ln n. A token is then worth a s / n, and the mean that
    counts domain i for a[i] is lowest where these meet: at N[i] ~ a[i] s[i]. Over mixtures the slopes s of our study
    were alike (0.2 to 0.5 nats), while those seen along a run were not and misled (they mistake what a model knows
    for what it cannot learn). So all s are taken to be equal: for `mean` the shares are 1/K, for a `metric` that gives
    weights by domain they are those weights, and nothing moves.

    For `worst` the largest loss at the end counts. From 1/K, at every update::

        l[i](n) = c[i] - s[i] ln n     least squares over the losses since the share `shock` of the run; s[i] is the
                                       pooled slope s, or drawn to it as far as its standard error and `trust` say
        M[i]  = n[i] + w[i] R          tokens by the end if the shares stay
        N[i]  = M[i] exp((l[i](M[i]) - level) / s), at least n[i] + floor R / K; the level such that sum N = sum M
        w*[i] = (N[i] - n[i]) / R
        w[i] <- w[i] exp(min(max(ln w*[i] / w[i], -pace), pace)),  normalised

    Shares move between the shares `learn` and `settle` of the run only: what is read at the end is the final mixture.
    `trust` is the standard deviation of slopes around the pooled one that is believed in, as a share of it; slopes of
    their own (0.15, 0.5) did worse in our study.

    Losses may be training losses, which cost nothing, or held-out losses. `worst` needs `progress` with `end`, the
    planned last step, and `tokens`.
    """

    _: KW_ONLY
    metric: Literal["mean", "worst"] | Mapping[str, float] = "mean"
    shock: float = 0.05
    learn: float = 0.1
    settle: float = 0.7
    floor: float = 0.3
    pace: float = 0.4
    trust: float = 0.0

    needs_targets: ClassVar[bool] = False
    name: ClassVar[str] = "marginal_gain"

    def __post_init__(self) -> None:
        if isinstance(self.metric, str):
            if self.metric not in ("mean", "worst"):
                raise ConfigError(
                    f"metric is {self.metric!r}; expected 'mean', 'worst' or a weight for each domain"
                )
        else:
            check_weights(self.metric)
        for option in ("shock", "learn", "settle", "floor"):
            check_range(option, getattr(self, option), 0.0, 1.0, "in [0, 1]")
        check_range("pace", self.pace, 0.0, math.inf, "above 0", self.pace > 0)
        check_range("trust", self.trust, 0.0, math.inf, "0 or more")

    def start(self, losses: Mapping[str, float], weights: Mapping[str, float]) -> RuleState:
        """The state before the first update. Its shares are the metric's, not `weights`, which name the domains.

        Raises `ConfigError` where the metric names other domains.
        """
        check_weights(weights)
        if isinstance(self.metric, str):
            first: Mapping[str, float] = dict.fromkeys(weights, 1.0)
        else:
            check_weights(self.metric, tuple(weights))
            first = self.metric
        return RuleState.first(self.name, losses, first)

    def observe(
        self, state: RuleState, losses: Mapping[str, float], progress: Progress | None = None
    ) -> tuple[RuleState, MixtureWeights]:
        """The state after one update and its weights. Raises `ConfigError` without `progress` and its `end`."""
        update = self._update(state, losses, progress)
        return update.state, update.state.weights

    def explain(
        self, state: RuleState, losses: Mapping[str, float], progress: Progress | None = None
    ) -> Explanation:
        """The update that `observe` makes of the same arguments, with its numbers."""
        update = self._update(state, losses, progress)
        after = update.state
        terms: dict[str, dict[str, float]] = {}
        worked: dict[str, str] = {}
        guards: dict[str, tuple[str, ...]] = dict.fromkeys(state.names, ())
        for k, name in enumerate(state.names):
            if update.wanted is None:
                terms[name], worked[name] = {}, f"{update.why}: {after.shares[k]:.4f} holds"
                continue
            level, goal, before = update.levels[k], update.wanted[k], state.shares[k]
            terms[name] = {"loss at the end": level, "wanted": goal}
            worked[name] = (
                f"{level:.4f} nats at the end as it is; wanted {goal:.4f}, was {before:.4f}, moved to "
                f"{after.shares[k]:.4f}"
            )
            if abs(math.log(goal / before)) > self.pace:
                guards[name] = ("pace",)
        formula = "w <- w exp(min(max(ln w*/w, -pace), pace)), w* = (N - n) / R, N for one level at the end"
        return Explanation(formula, terms, worked, guards)

    def state_from_json(self, value: Mapping[str, Any]) -> RuleState:
        """The state that `RuleState.to_json` wrote. Raises `ConfigError` on another controller's state."""
        return RuleState.from_json(value, self.name)

    def _update(self, state: RuleState, losses: Mapping[str, float], progress: Progress | None) -> _Update:
        last = mean_losses(losses, state.names, state.last)
        if self.metric != "worst":
            return _Update(state.held(last), "the metric's own shares")
        if progress is None or progress.end is None or progress.end <= progress.first:
            raise ConfigError(
                f"{self.name} plans up to the end of a run; call observe with progress=Progress(step, end=last step, "
                "tokens=...)"
            )
        done = (progress.step - progress.first) / (progress.end - progress.first)
        tokens = tuple(float(progress.tokens.get(name, 0)) for name in state.names)
        memory = dict(state.memory)
        if done >= self.shock:
            for name, n, loss in zip(state.names, tokens, last, strict=True):
                if n > 0 and name in losses:
                    weight = _tokens_of(losses, name)
                    memory[f"points of {name}"] = (*memory.get(f"points of {name}", ()), n, loss, weight)
        held = state.held(last, memory)
        if done >= self.settle:
            return _Update(held, f"settled since {self.settle:.0%} of the run")
        if done < self.learn or done <= 0:
            return _Update(held, f"learning until {self.learn:.0%} of the run")
        lines = pooled_lines([memory.get(f"points of {name}", ()) for name in state.names], self.trust)
        if lines is None:
            return _Update(held, "no law yet")
        left = math.fsum(tokens) * (1 - done) / done
        ends = [n + w * left for n, w in zip(tokens, state.shares, strict=True)]
        levels = tuple(c - s * math.log(end) for (c, s, _), end in zip(lines, ends, strict=True))
        wanted = level_shares(levels, ends, tokens, lines[0][2], self.floor / len(ends))
        moved = [
            w * math.exp(min(max(math.log(goal / w), -self.pace), self.pace))
            for w, goal in zip(state.shares, wanted, strict=True)
        ]
        total = math.fsum(moved)
        after = state.moved([m / total for m in moved], last, memory)
        return _Update(after, "moved", levels, wanted)


def level_shares(
    losses: Sequence[float],
    ends: Sequence[float],
    tokens: Sequence[float],
    slope: float,
    floor: float,
) -> tuple[float, ...]:
    """Shares of the tokens left, sum `ends` - sum `tokens`, that bring the largest of `losses` lowest.

    `losses` are expected after `ends` tokens of each domain, and l(N) = losses - slope ln(N / ends) after N; `tokens`
    are read already; no share is under `floor`.
    """
    left = math.fsum(ends) - math.fsum(tokens)

    def more(level: float) -> list[float]:
        goals = (
            end * math.exp(min((loss - level) / slope, 50.0)) for loss, end in zip(losses, ends, strict=True)
        )
        return [max(goal - n, floor * left) for goal, n in zip(goals, tokens, strict=True)]

    low, high = min(losses) - 60 * slope, max(losses) + 60 * slope
    for _ in range(200):  # the sum falls with the level: halve
        middle = (low + high) / 2
        low, high = (middle, high) if math.fsum(more(middle)) > left else (low, middle)
    found = more(high)
    total = math.fsum(found)
    return tuple(f / total for f in found)


@dataclass(frozen=True)
class _Update:
    """An update: the new state, in a word why, and where shares moved the losses at the end and w*."""

    state: RuleState
    why: str
    levels: tuple[float, ...] = ()
    wanted: tuple[float, ...] | None = None


def pooled_lines(
    points: Sequence[Sequence[float]], trust: float
) -> tuple[tuple[float, float, float], ...] | None:
    """(c, s, m) of l = c - s ln n by domain, from flat rows (n, loss, weight, n, loss, weight, ...).

    Weighted least squares; a slope is then drawn to the pooled one m (the mean by precision) by how well it is known:
    with its standard error e[i] (one variance of residuals for all domains) and the spread t = `trust` * m,
    s = (s / e^2 + m / t^2) / (1 / e^2 + 1 / t^2), within a factor `STEEPEST` of m. The line goes on through the
    points' centre. None while a domain has under 3 points or m is not positive.
    """
    fits, squares, free = [], 0.0, 0
    for row in points:
        x, y, w = [math.log(n) for n in row[::3]], row[1::3], row[2::3]
        if len(x) < 3 or max(x) - min(x) < 1e-9:
            return None
        total = math.fsum(w)
        mx = math.fsum(map(_product, w, x)) / total
        my = math.fsum(map(_product, w, y)) / total
        sxx = math.fsum(c * (a - mx) ** 2 for a, c in zip(x, w, strict=True))
        slope = -math.fsum(c * (a - mx) * (b - my) for a, b, c in zip(x, y, w, strict=True)) / sxx
        squares += math.fsum(c * (b - my + slope * (a - mx)) ** 2 for a, b, c in zip(x, y, w, strict=True))
        free += len(x) - 2
        fits.append((slope, sxx, mx, my))
    variance = max(squares / free, 1e-12)
    precision = [sxx / variance for _, sxx, _, _ in fits]
    mean = math.fsum(p * fit[0] for p, fit in zip(precision, fits, strict=True)) / math.fsum(precision)
    if mean <= 0:
        return None
    lines = []
    for p, (own, _, mx, my) in zip(precision, fits, strict=True):
        belief = 1 / (trust * mean) ** 2 if trust else math.inf
        slope = mean if math.isinf(belief) else (p * own + belief * mean) / (p + belief)
        slope = min(max(slope, mean / STEEPEST), mean * STEEPEST)
        lines.append((my + slope * mx, slope, mean))
    return tuple(lines)


def _product(a: float, b: float) -> float:
    return a * b


def _tokens_of(losses: Mapping[str, float], name: str) -> float:
    return float(losses.tokens[losses.names.index(name)]) if isinstance(losses, DomainLoss) else 1.0
