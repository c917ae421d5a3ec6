"""When to cut: the losses of a version that were cut now, predicted from the main path's curve and measured gains.

The law, per domain, all our choice: with M(s) the main path's held-out loss after s steps, a branch of r steps from s
ends at

    L(s, r) = M(s + r) - g (r / R)^p,

M(s) = a - b ln(s - o), fitted by least squares to the evaluations of the current slice, which begins at step o: its
data is learnt, and what it lacks forgotten, fast at first; g the decay's gain over the undecayed path at the reference
length R (the slice's steps), p how it grows with length. Every version that was cut gives one g per domain; p is fitted
where versions of different lengths exist, else 0.25, which a small study of ours shows (0.21, 0.25, 0.28 nats at shares
0.2, 0.4, 0.6).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import stdtrit

from velopath.errors import ConfigError

POWER = 0.25
Curve = Sequence[tuple[int, float]]


@dataclass(frozen=True)
class Cut:
    """A version that was cut: where it left, its steps, the losses before and after, and the main path's `curves` from
    its slice's first step `origin` up to its branch point, all by domain in nats per token; before and after on one
    sample."""

    name: str
    step: int
    steps: int
    before: Mapping[str, float]
    after: Mapping[str, float]
    curves: Mapping[str, Curve]
    origin: int = 0


@dataclass(frozen=True)
class Prediction:
    """The loss of one domain at the end of a branch, with the central 90 % interval, in nats per token."""

    loss: float
    low: float
    high: float


@dataclass(frozen=True)
class Slope:
    """M(s) = a - b ln(s - origin) of one domain, with the standard deviation of its residuals; nats."""

    a: float
    b: float
    noise: float
    origin: int = 0

    def drop(self, start: int, steps: int) -> float:
        """M(start) - M(start + steps)."""
        done = start - self.origin
        return self.b * math.log((done + steps) / done)


@dataclass(frozen=True)
class Forecast:
    """The fitted law of a run at `step`: slopes and gains per domain, the exponent, and how it did on earlier versions.

    `now` are the losses at `step`; `errors` version -> domain -> predicted minus real, each version predicted without
    itself and by what was known when it was cut.
    """

    step: int
    reference: int
    power: float
    now: Mapping[str, float]
    slopes: Mapping[str, Slope]
    gains: Mapping[str, tuple[float, ...]]
    errors: Mapping[str, Mapping[str, float]]

    def predict(self, steps: int) -> dict[str, Prediction]:
        """The loss of each domain after a branch of `steps` from now."""
        found = {}
        for name, slope in self.slopes.items():
            known = np.array(self.gains[name])
            scale = (steps / self.reference) ** self.power
            loss = self.now[name] - slope.drop(self.step, steps) - float(known.mean()) * scale
            n = len(known)
            # One gain tells nothing of its spread: half of it then stands for the standard deviation. Our choice.
            spread = float(known.std(ddof=1)) if n > 1 else abs(float(known[0])) / 2
            sigma = math.hypot(spread * scale * math.sqrt(1 + 1 / n), slope.noise)
            reach = float(stdtrit(max(n - 1, 3), 0.95)) * sigma
            found[name] = Prediction(loss, loss - reach, loss + reach)
        return found

    def mean(self, steps: int) -> Prediction:
        """The plain mean over domains; its interval adds the domains' as if they erred together."""
        rows = list(self.predict(steps).values())
        return Prediction(
            *(math.fsum(getattr(r, k) for r in rows) / len(rows) for k in ("loss", "low", "high"))
        )

    def to_json(self) -> dict[str, Any]:
        """The law and its errors as a JSON value."""
        slopes = {n: {"a": s.a, "b": s.b, "noise": s.noise} for n, s in self.slopes.items()}
        gains = {n: list(g) for n, g in self.gains.items()}
        return {
            "step": self.step,
            "reference_steps": self.reference,
            "power": self.power,
            "now": dict(self.now),
            "slopes": slopes,
            "gains": gains,
            "errors": {version: dict(errors) for version, errors in self.errors.items()},
        }


def fit_forecast(
    step: int,
    reference: int,
    curves: Mapping[str, Curve],
    cuts: Sequence[Cut],
    now: Mapping[str, float],
    origin: int = 0,
) -> Forecast:
    """The law at `step` of the main path from its `curves` (current slice, from `origin`) and the versions cut so far.

    `now` are the losses to start from. Raises `ConfigError` without a version, and without two evaluations of a domain.
    """
    if not cuts:
        raise ConfigError("no version was cut yet, so no decay gain is known; cut one first")
    fitted = _fit(step, reference, curves, cuts, now, origin)
    errors: dict[str, dict[str, float]] = {}
    for at, cut in enumerate(cuts):
        if at == 0:
            continue  # nothing was known before it
        then = _fit(cut.step, reference, cut.curves, cuts[:at], cut.before, cut.origin)
        errors[cut.name] = {
            n: p.loss - cut.after[n] for n, p in then.predict(cut.steps).items() if n in cut.after
        }
    return Forecast(step, reference, fitted.power, fitted.now, fitted.slopes, fitted.gains, errors)


def expected_gain(cuts: Sequence[tuple[int, float]], steps: int) -> float:
    """What a branch of `steps` may be expected to gain, in nats: the mean over the versions cut so far, given as (r_i,
    gain), of gain (r / r_i)^p with p = 0.25; 0 without any. Our choice: a shorter branch is not held to a longer one's
    gain."""
    gains = [gain * (steps / length) ** POWER for length, gain in cuts]
    return math.fsum(gains) / len(gains) if gains else 0.0


def _fit(
    step: int,
    reference: int,
    curves: Mapping[str, Curve],
    cuts: Sequence[Cut],
    now: Mapping[str, float],
    origin: int,
) -> Forecast:
    slopes = {name: _slope(name, curve, origin) for name, curve in curves.items() if name in now}
    measured = [(cut, _measured(cut)) for cut in cuts]
    power = _power(measured)
    gains = {}
    for name in slopes:
        found = [g[name] / (cut.steps / reference) ** power for cut, g in measured if name in g]
        overall = [sum(g.values()) / len(g) / (cut.steps / reference) ** power for cut, g in measured if g]
        gains[name] = tuple(found or overall)  # a new domain takes the mean of the others
    return Forecast(step, reference, power, {n: now[n] for n in slopes}, slopes, gains, {})


def _slope(name: str, curve: Curve, origin: int) -> Slope:
    """Least squares of the losses on ln(s - origin)."""
    points = [(math.log(step - origin), loss) for step, loss in curve if step > origin]
    if len(points) < 2:
        raise ConfigError(f"domain {name!r} has {len(points)} evaluations in this slice; a slope needs two")
    x, y = np.array(points).T
    centred = x - x.mean()
    b = float(-(centred * y).sum() / (centred**2).sum())
    a = float(y.mean() + b * x.mean())
    free = max(len(points) - 2, 1)
    return Slope(a, b, math.sqrt(float(((y - (a - b * x)) ** 2).sum()) / free), origin)


def _measured(cut: Cut) -> dict[str, float]:
    """Per domain, how far a version ended below where the undecayed path would have been."""
    found = {}
    for name, before in cut.before.items():
        if name in cut.after and name in cut.curves:
            found[name] = (
                before
                - _slope(name, cut.curves[name], cut.origin).drop(cut.step, cut.steps)
                - cut.after[name]
            )
    return found


def _power(measured: Sequence[tuple[Cut, Mapping[str, float]]]) -> float:
    """p from versions of different lengths: the slope of ln mean gain on ln steps, kept within [0, 1]."""
    points = [(math.log(cut.steps), sum(g.values()) / len(g)) for cut, g in measured if g]
    points = [(x, math.log(gain)) for x, gain in points if gain > 0]
    x, y = np.array(points or [(0.0, 0.0)]).T
    spread = float(((x - x.mean()) ** 2).sum())
    if spread < 1e-3:
        return POWER
    return min(max(float(((x - x.mean()) * y).sum() / spread), 0.0), 1.0)
