"""Is the main path fit to branch from, does a decay pay, is a version better: pure rules over a run's numbers.

The summary of LR path switching warns that a main checkpoint which is not general enough hurts its branches and that
rate schedules must be monitored; which numbers to look at and where they alarm is our choice, each a setting.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Level = Literal["ok", "warn", "stop"]
LEVELS: tuple[Level, ...] = ("ok", "warn", "stop")
Curve = Sequence[tuple[int, float]]
"""(step, value) pairs by step; losses in nats per token."""


@dataclass(frozen=True)
class Finding:
    """One rule's outcome: `level`, `rule`, the domain it is about ("" for all), its `value` and the limit it met."""

    level: Level
    rule: str
    domain: str
    value: float
    limit: float
    text: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Limits:
    """Where the rules alarm, as (warn, stop); nats per token unless said otherwise. Our choices.

    `rise`: a domain's loss now over that `window` evaluations before. `from_best`: over its best so far. `spike`: a
    training loss over the median of the 50 before it. `gradient`: the norm over that median, a factor. `diversity`: the
    effective number of domains read over their number, exp(entropy of the shares) / K, alarming below. `epochs`: passes
    over a domain's data. `regression`: a version's loss over its main checkpoint's, and over the previous version's.
    `payback`: the gain of a running decay as a share of what is expected of it by now, alarming below.
    """

    window: int = 5
    rise: tuple[float, float] = (0.05, 0.2)
    from_best: tuple[float, float] = (0.1, 0.4)
    spike: tuple[float, float] = (0.5, 2.0)
    gradient: tuple[float, float] = (5.0, 50.0)
    diversity: tuple[float, float] = (0.3, 0.1)
    epochs: tuple[float, float] = (4.0, 40.0)
    regression: tuple[float, float] = (0.02, 0.2)
    payback: tuple[float, float] = (0.5, 0.0)


def verdict(findings: Sequence[Finding]) -> Level:
    """The worst level of the findings; "ok" without any."""
    return max((f.level for f in findings), key=LEVELS.index, default="ok")


def before(
    losses: Mapping[str, Curve],
    training: Curve,
    norms: Curve,
    exposure: Mapping[str, Mapping[str, float]],
    limits: Limits,
) -> list[Finding]:
    """Whether a main checkpoint is good enough to branch from: one finding per rule that looked.

    `losses` are the main path's held-out losses by domain, `training` its training loss, `norms` its gradient norms,
    `exposure` domain -> {"tokens", "epochs"} read since the path began.
    """
    found = []
    for name, curve in sorted(losses.items()):
        values = [loss for _, loss in curve]
        if len(values) > limits.window:
            rise = values[-1] - values[-1 - limits.window]
            text = f"{name}: loss {rise:+.3f} nats over the last {limits.window} evaluations"
            found.append(_above("rise", name, rise, limits.rise, text))
        best = min(curve, key=lambda point: point[1])
        away = values[-1] - best[1]
        text = f"{name}: {away:.3f} nats above its best, {best[1]:.3f} at step {best[0]:,}"
        found.append(_above("from_best", name, away, limits.from_best, text))
    found += _jump("spike", training, limits.spike, "training loss", ratio=False)
    found += _jump("gradient", norms, limits.gradient, "gradient norm", ratio=True)
    found += _exposed(exposure, limits)
    return found


def during(
    gain: float, expected: float, step: int, end: int, limits: Limits, *, final_rate: float, peak: float
) -> list[Finding]:
    """Whether a decay pays and is complete: `gain` (mean over domains, nats) so far, beside what is `expected` by now.

    `step` of `end`; `final_rate` is the rate after the end. Where less than 0.01 nats are expected, the gain is not
    judged.
    """
    found = []
    if expected >= 0.01:
        share = gain / expected
        text = f"the decay has gained {gain:.3f} nats of {expected:.3f} expected at step {step:,}"
        found.append(_below("payback", "", share, limits.payback, text))
    left = final_rate / peak
    text = f"the branch is at step {step:,} of {end:,} and ends at {left:.1%} of the peak"
    found.append(_above("complete", "", left, (0.1, 1.0), text))
    return found


def after(
    own: Mapping[str, float],
    parent: Mapping[str, float],
    previous: Mapping[str, float],
    limits: Limits,
    *,
    previous_name: str = "",
) -> list[Finding]:
    """What a version gained: per domain its loss beside its main checkpoint's and the previous version's."""
    found = []
    for name, loss in sorted(own.items()):
        if name in parent:
            worse = loss - parent[name]
            text = f"{name}: {loss:.3f} nats, {worse:+.3f} from the main checkpoint"
            found.append(_above("gain", name, worse, limits.regression, text))
        if name in previous:
            worse = loss - previous[name]
            text = f"{name}: {loss:.3f} nats, {worse:+.3f} from {previous_name}"
            found.append(_above("regression", name, worse, limits.regression, text))
    return found


def _exposed(exposure: Mapping[str, Mapping[str, float]], limits: Limits) -> list[Finding]:
    total = math.fsum(read["tokens"] for read in exposure.values())
    if not total:
        return []
    shares = [read["tokens"] / total for read in exposure.values()]
    effective = math.exp(-math.fsum(s * math.log(s) for s in shares if s > 0))
    text = f"{effective:.1f} effective of {len(shares)} domains were read"
    found = [_below("diversity", "", effective / len(shares), limits.diversity, text)]
    for name, read in sorted(exposure.items()):
        text = f"{name}: read {read['epochs']:.2f} times over"
        found.append(_above("epochs", name, read["epochs"], limits.epochs, text))
    return found


def _jump(rule: str, curve: Curve, limits: tuple[float, float], what: str, *, ratio: bool) -> list[Finding]:
    """The largest jump of the last 200 points over the median of the up to 50 before each."""
    values = [value for _, value in curve]
    worst: tuple[float, int] | None = None
    for at in range(max(10, len(values) - 200), len(values)):
        middle = statistics.median(values[max(0, at - 50) : at])
        size = values[at] / middle if ratio and middle > 0 else values[at] - middle
        if worst is None or size > worst[0]:
            worst = size, curve[at][0]
    if worst is None:
        return []
    unit = " times" if ratio else " nats above"
    text = f"largest {what} of late: {worst[0]:.3g}{unit} the median before it, at step {worst[1]:,}"
    return [_above(rule, "", worst[0], limits, text)]


def _above(rule: str, domain: str, value: float, limits: tuple[float, float], text: str) -> Finding:
    warn, stop = limits
    level: Level = "stop" if value > stop else "warn" if value > warn else "ok"
    return Finding(level, rule, domain, value, stop if level == "stop" else warn, text)


def _below(rule: str, domain: str, value: float, limits: tuple[float, float], text: str) -> Finding:
    warn, stop = limits
    level: Level = "stop" if value < stop else "warn" if value < warn else "ok"
    return Finding(level, rule, domain, value, stop if level == "stop" else warn, text)
