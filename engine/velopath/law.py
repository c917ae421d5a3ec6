"""A Chinchilla law of one domain's loss, fitted to a proxy run (Velocitune, target losses).

Letters: D training tokens of the run so far (all domains together, at the shares that the proxy used), L(D) the
held-out loss of one domain in nats per token, n points (D_j, L_j). The model's size is constant, so

    L(D) = E + B / D^beta            three parameters; E = 0 gives the two-parameter law.

The form is Velocitune's; the numbers of the fit and all refusals and warnings are our choice.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import ndtri, stdtrit

from velopath.errors import ConfigError, NumericalError

BETA_BOUNDS = (0.01, 1.5)
HUBER_DELTA = 1e-3
MIN_POINTS = 4
FEW_POINTS = 6

LONG_REACH = 3.0
"""A law read beyond this many times its last tokens is the prior's: `fit_target`."""
PRIOR_BETA, PRIOR_SPREAD, PRIOR_MISFIT = 0.065, 0.02, 0.03
"""What the law "prior" believes of beta before it sees a point (mean, standard deviation), and how far a point's ln L
may lie from any law; set on one run of our mixing study (0.16M parameters, seed 0, natural shares)."""

_FLOAT = NDArray[np.float64]
_GRID = np.geomspace(*BETA_BOUNDS, 48)
_LEAST_E = 1e-6  # of the smallest loss: E this small is no E at all
_POLISHED = 5
_REPLICATES = 200


@dataclass(frozen=True)
class TargetLaw:
    """A fitted law L(D) = E + B / D^beta with its evidence.

    `E` in nats, `B` in nats * tokens^beta; `law` is "three", or "two" or "prior" (then E = 0). `points` are the
    (tokens, nats) pairs of the fit, by tokens. `huber` is the minimum reached, sum_j Huber(ln L_j - ln L(D_j)) with
    `delta`. `leave_last_out` is |prediction - loss| in nats at the last point, of the same law fitted to the others:
    the honest size of an error made by extrapolating. `warnings` are sentences for people.
    """

    E: float
    B: float
    beta: float
    law: Literal["three", "two", "prior"]
    points: tuple[tuple[float, float], ...]
    leave_last_out: float
    huber: float
    delta: float = HUBER_DELTA
    warnings: tuple[str, ...] = ()

    @overload
    def predict(self, tokens: float) -> float: ...
    @overload
    def predict(self, tokens: Sequence[float] | _FLOAT) -> _FLOAT: ...
    def predict(self, tokens: float | Sequence[float] | _FLOAT) -> float | _FLOAT:
        """L(tokens) in nats per token: a number for a number, an array for many. `ConfigError` unless tokens > 0."""
        found = self.curve(np.atleast_1d(np.asarray(tokens, dtype=np.float64)))
        return found if np.ndim(tokens) else float(found[0])

    def curve(self, tokens: Sequence[float] | _FLOAT) -> _FLOAT:
        """L at many token counts, shape (len(tokens),), in nats."""
        counts = np.asarray(tokens, dtype=np.float64)
        if not (np.isfinite(counts).all() and (counts > 0).all()):
            raise ConfigError(f"tokens are {tokens}; a law is read at a positive number of tokens")
        return np.asarray(self.E + np.exp(math.log(self.B) - self.beta * np.log(counts)))

    @overload
    def interval(self, tokens: float, level: float = 0.9, seed: int = 0) -> tuple[float, float]: ...
    @overload
    def interval(
        self, tokens: Sequence[float] | _FLOAT, level: float = 0.9, seed: int = 0
    ) -> tuple[_FLOAT, _FLOAT]: ...
    def interval(
        self, tokens: float | Sequence[float] | _FLOAT, level: float = 0.9, seed: int = 0
    ) -> tuple[float, float] | tuple[_FLOAT, _FLOAT]:
        """(low, high) in nats: the central `level` of the law's predictions at `tokens` over a residual bootstrap.

        Numbers for a number, arrays for many; see `band`. It is the uncertainty of a fit of this form and not of the
        form itself.
        """
        low, high = self.band(np.atleast_1d(np.asarray(tokens, dtype=np.float64)), level, seed)
        return (low, high) if np.ndim(tokens) else (float(low[0]), float(high[0]))

    def band(
        self, tokens: Sequence[float] | _FLOAT, level: float = 0.9, seed: int = 0
    ) -> tuple[_FLOAT, _FLOAT]:
        """(low, high), each of shape (len(tokens),): `interval` at many token counts.

        The residuals in ln L, centred and widened by sqrt(n / (n - p)) for p fitted parameters, are drawn with
        replacement 200 times and the law is fitted again, on ever finer grids over beta; the quantiles' distance
        from the law is stretched by Student's t with n - p degrees of freedom over the normal quantile. The same
        `seed` gives the same band. For the law "prior" the belief about beta is drawn too, from its own spread.
        Raises `ConfigError` unless 0 < level < 1. Our choice.
        """
        if not 0 < level < 1:
            raise ConfigError(f"level is {level}; expected a share in (0, 1), such as 0.9")
        counts, losses = (np.array(column) for column in zip(*self.points, strict=True))
        fitted = np.log(self.curve(counts))
        residuals = np.log(losses) - fitted
        free = len(counts) - (3 if self.law == "three" else 2)
        residuals = (residuals - residuals.mean()) * math.sqrt(len(counts) / free)
        drawn = np.random.default_rng(seed).integers(len(counts), size=(_REPLICATES, len(counts)))
        centre = float(np.log(counts).mean())
        at = np.asarray(np.log(np.asarray(tokens, dtype=np.float64)) - centre)
        if self.law == "prior":
            belief = np.random.default_rng(seed + 1).normal(PRIOR_BETA, PRIOR_SPREAD, _REPLICATES)
            level_R, beta_R, middle = _drawn(fitted + residuals[drawn], counts, belief)
            curves = np.exp(level_R[:, None] - beta_R[:, None] * (at + centre - middle))
            return self._around(tokens, curves, level, free)
        e, b, beta = _quick_fits(fitted + residuals[drawn], np.log(counts) - centre, self.law, self.delta)
        curves = e[:, None] + b[:, None] * np.exp(-beta[:, None] * at)
        return self._around(tokens, curves, level, free)

    def _around(
        self, tokens: Sequence[float] | _FLOAT, curves: _FLOAT, level: float, free: int
    ) -> tuple[_FLOAT, _FLOAT]:
        """The band of replicates, (R, len(tokens)), around the law."""
        low, high = np.quantile(curves, [(1 - level) / 2, (1 + level) / 2], axis=0)
        own = self.curve(tokens)  # inside its own band, also where the replicates lean to one side
        low, high = np.minimum(low, own), np.maximum(high, own)
        stretch = float(stdtrit(free, (1 + level) / 2) / ndtri((1 + level) / 2))
        return own - stretch * (own - low), own + stretch * (high - own)

    def extrapolation(self, tokens: float) -> float:
        """How many times the last proxy's tokens `tokens` are."""
        return tokens / self.points[-1][0]

    def predict_target(self, tokens: float) -> float:
        """`predict`, refused with `NumericalError` where it lies above the last proxy loss: no target to move to."""
        target, (last_tokens, last) = self.predict(tokens), self.points[-1]
        if target > last:
            raise NumericalError(
                f"the target {target:.4f} nats at {tokens:.4g} tokens is above the last proxy loss {last:.4f} at "
                f"{last_tokens:.4g} tokens; use more or later proxy points, or give this domain a target by hand"
            )
        return target

    def to_json(self) -> dict[str, Any]:
        """A JSON value from which `from_json` makes an equal law."""
        return {**asdict(self), "points": [list(p) for p in self.points], "warnings": list(self.warnings)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> TargetLaw:
        """The law that `to_json` wrote. Raises `ConfigError` when it is malformed."""
        try:
            points = tuple((float(tokens), float(loss)) for tokens, loss in value["points"])
            return cls(**{**value, "points": points, "warnings": tuple(value["warnings"])})
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"malformed law: {error}; expected what TargetLaw.to_json writes") from error


def fit_target(
    tokens: Iterable[float],
    losses: Iterable[float],
    *,
    law: Literal["auto", "three", "two", "prior"] = "auto",
    delta: float = HUBER_DELTA,
    extrapolation: float = 1.0,
) -> TargetLaw:
    """The law fitted to held-out losses (nats per token) of one domain after `tokens` training tokens.

    Minimises sum_j Huber_delta(ln L_j - ln(exp(b - beta ln D_j) + exp(e))), E = e^e and B = e^b, with beta in
    [0.01, 1.5]: weighted least squares on a grid over beta gives the starts, the best few are polished by L-BFGS-B
    with the exact gradient. "prior" is the two-parameter law by least squares in ln L over ln D, points weighing as
    their tokens and beta drawn to a belief: beta = (slope Sxx + b k) / (Sxx + k) with the weighted slope and sum of
    squares Sxx, b = `PRIOR_BETA`, k = (`PRIOR_MISFIT` / `PRIOR_SPREAD`)^2; it serves where points reach so little that
    they say the level and hardly the slope, as the first steps of a run do.

    `law` "auto" takes three parameters unless they are not identifiable (E vanishes or beta stands at its lower bound)
    or the two-parameter law at least halves the error at the last point when the last one (and, from 6 points on, the
    last two) are left out. Where the law is to be read at `extrapolation` times the last tokens, more than
    `LONG_REACH`, leaving points out says little of that: then it takes the prior's, unless three parameters meet all
    points within `delta`. Raises `ConfigError` with fewer than 4 points and
    `NumericalError` on losses that are not positive.
    """
    points = _points(tokens, losses)
    if law not in ("auto", "three", "two", "prior"):
        raise ConfigError(f"law is {law!r}; expected 'auto', 'three', 'two' or 'prior'")
    chosen: Literal["three", "two", "prior"] = law if law != "auto" else _choose(points, delta, extrapolation)
    e, b, beta, cost = _solve(points, chosen, delta)
    counts, values = points
    left = _left_out(points, chosen, delta, 1)
    warnings = _fit_warnings(points, beta)
    if chosen == "prior":
        warnings.append(
            f"the points hardly say the slope: beta {beta:.3f} leans on a prior of {PRIOR_BETA} +- {PRIOR_SPREAD}"
        )
    if law == "auto" and chosen == "two":
        warnings.append("E is not identifiable from these points: fitted the two-parameter law B / D^beta")
    pairs = tuple(zip(counts.tolist(), values.tolist(), strict=True))
    return TargetLaw(e, b, beta, chosen, pairs, left, cost, delta, tuple(warnings))


def _points(tokens: Iterable[float], losses: Iterable[float]) -> tuple[_FLOAT, _FLOAT]:
    counts, values = np.array(list(tokens), dtype=np.float64), np.array(list(losses), dtype=np.float64)
    if counts.shape != values.shape or counts.ndim != 1:
        raise ConfigError(f"{counts.size} token counts for {values.size} losses; expected one loss per count")
    if counts.size < MIN_POINTS:
        raise ConfigError(
            f"{counts.size} points; a law needs at least {MIN_POINTS}, {FEW_POINTS} or more are better: evaluate the "
            "proxy more often"
        )
    if not (np.isfinite(counts).all() and (counts > 0).all()):
        raise ConfigError(
            f"token counts are {counts.tolist()}; expected positive numbers (leave the start out)"
        )
    if not (np.isfinite(values).all() and (values > 0).all()):
        bad = values[~(np.isfinite(values) & (values > 0))][0]
        raise NumericalError(f"a proxy loss is {bad}; expected positive finite nats")
    if np.unique(counts).size != counts.size:
        raise ConfigError(
            f"token counts {sorted(counts.tolist())} repeat; average losses at the same count first"
        )
    order = counts.argsort()
    return counts[order], values[order]


def _fit_warnings(points: tuple[_FLOAT, _FLOAT], beta: float) -> list[str]:
    counts, losses = points
    warnings = []
    if counts.size < FEW_POINTS:
        warnings.append(f"only {counts.size} points: E and beta are hardly identifiable below {FEW_POINTS}")
    rises = np.diff(losses)
    if rises.max() > 0:
        k = int(rises.argmax())
        warnings.append(
            f"the loss does not fall everywhere: it rises by {rises[k]:.4f} nats between {counts[k]:.4g} and "
            f"{counts[k + 1]:.4g} tokens"
        )
    if beta <= BETA_BOUNDS[0] * 1.001 or beta >= BETA_BOUNDS[1] * 0.999:
        warnings.append(f"beta stands at its bound {beta:.3g}: the points do not look like a power law")
    return warnings


def _choose(
    points: tuple[_FLOAT, _FLOAT], delta: float, extrapolation: float
) -> Literal["three", "two", "prior"]:
    e, _, beta, cost = _solve(points, "three", delta)
    if cost < 1e-6 * _solve(points, "two", delta)[3]:  # E is there beyond doubt, also where the curve is flat
        return "three"
    if extrapolation > LONG_REACH and cost > points[0].size * 0.5 * delta**2:
        return "prior"
    # Predict the last point without it and, where enough points stay, without the last two.
    depths = (1, 2) if points[0].size >= FEW_POINTS else (1,)
    missed = {law: sum(_left_out(points, law, delta, k) for k in depths) for law in ("three", "two")}
    # One or two errors are a noisy witness, and a missing E costs more than a superfluous one: over 160 synthetic
    # laws (30 % with E = 0, noise 0.2-0.6 %) the mean error at 3x was 0.031 nats so, 0.033 without the factor 2.
    if (
        e <= 10 * _LEAST_E * points[1].min()
        or beta <= BETA_BOUNDS[0] * 1.001
        or 2 * missed["two"] < missed["three"]
    ):
        return "two"
    return "three"


def _left_out(points: tuple[_FLOAT, _FLOAT], law: str, delta: float, count: int) -> float:
    """|prediction - loss| at the last point, fitted without the last `count` points; nats."""
    counts, losses = points
    e, b, beta, _ = _solve((counts[:-count], losses[:-count]), law, delta)
    return abs(e + math.exp(math.log(b) - beta * math.log(counts[-1])) - float(losses[-1]))


def _solve(points: tuple[_FLOAT, _FLOAT], law: str, delta: float) -> tuple[float, float, float, float]:
    """(E, B, beta, sum of Huber) of the best fit."""
    counts, losses = points
    if law == "prior":
        level, slope, middle = _drawn(np.log(losses)[None, :], counts, np.array([PRIOR_BETA]))
        power, beta = float(level[0] + slope[0] * middle), float(slope[0])
        fitted = power - beta * np.log(counts)
        size = np.abs(np.log(losses) - fitted) / delta
        return (
            0.0,
            math.exp(power),
            beta,
            float(np.where(size <= 1, 0.5 * size**2, size - 0.5).sum()) * delta**2,
        )
    # Centred ln D: b is then the level in the middle of the points and hardly moves with beta.
    centre = float(np.log(counts).mean())
    x, y = np.log(counts) - centre, np.log(losses)
    grid_e, grid_b, cost = (a[0] for a in _on_grid(y[None, :], x, _GRID[None, :], law, delta))
    least = math.log(_LEAST_E * losses.min())
    bounds = [(least, float(y.min())), (float(y.min()) - 30, float(y.max()) + 5), BETA_BOUNDS]
    if law == "two":
        bounds = bounds[1:]
    best: tuple[float, list[float]] | None = None
    for k in cost.argsort()[:_POLISHED]:
        start = [
            math.log(max(float(grid_e[k]), math.exp(least))),
            math.log(float(grid_b[k])),
            float(_GRID[k]),
        ]
        found = minimize(
            _cost_and_gradient,
            start[-len(bounds) :],
            args=(x, y, delta),
            jac=True,
            method="L-BFGS-B",
            bounds=bounds,
            options={"maxiter": 500, "maxfun": 1000, "ftol": 1e-15, "gtol": 1e-10, "maxcor": 20},
        )
        if best is None or found.fun < best[0]:
            best = (float(found.fun), [float(v) for v in found.x])
    assert best is not None
    *e, b, beta = best[1]
    value = math.exp(e[0]) if e and e[0] > least else 0.0
    return value, math.exp(b + beta * centre), beta, best[0] * delta**2


def _drawn(y: _FLOAT, counts: _FLOAT, belief: _FLOAT) -> tuple[_FLOAT, _FLOAT, float]:
    """(level, beta), each (R,), and the mean of ln D, of the law "prior" for y = ln L (R, n) and beliefs b (R,)."""
    w = counts / counts.mean()
    x = np.log(counts)
    middle = float((w * x).sum() / w.sum())
    spread = w * (x - middle)
    sxx, level = float((spread * (x - middle)).sum()), (y * w).sum(1) / w.sum()
    k = (PRIOR_MISFIT / PRIOR_SPREAD) ** 2
    beta = (-(y * spread).sum(1) + belief * k) / (sxx + k)
    return level, np.clip(beta, *BETA_BOUNDS), middle


def _cost_and_gradient(theta: _FLOAT, x: _FLOAT, y: _FLOAT, delta: float) -> tuple[float, _FLOAT]:
    """Sum of Huber(residual) / delta^2 and its gradient in (e, b, beta), or in (b, beta) for the law with E = 0.

    The sum and not the mean, in units of delta^2: L-BFGS-B takes small slopes for the end.
    """
    b, beta = theta[-2], theta[-1]
    power = b - beta * x
    fitted = np.logaddexp(power, theta[0]) if theta.size == 3 else power
    r = (y - fitted) / delta
    size = np.abs(r)
    cost = np.where(size <= 1, 0.5 * r * r, size - 0.5).sum()
    slope = -np.clip(r, -1, 1) / delta  # d cost / d fitted
    share = np.exp(power - fitted)  # d fitted / d power
    gradient = [(slope * share).sum(), -(slope * share * x).sum()]
    if theta.size == 3:
        gradient.insert(0, (slope * (1 - share)).sum())
    return float(cost), np.array(gradient)


def _quick_fits(y: _FLOAT, x: _FLOAT, law: str, delta: float) -> tuple[_FLOAT, _FLOAT, _FLOAT]:
    """(E, B, beta), each (R,): the fits of y (R, n) by four grids over beta, each around the best of the last."""
    rows = np.arange(y.shape[0])
    betas = np.broadcast_to(np.geomspace(*BETA_BOUNDS, 24), (rows.size, 24))
    for count in (9, 9, 9, 0):
        e, b, cost = _on_grid(y, x, betas, law, delta)
        best = cost.argmin(axis=1)
        chosen = e[rows, best], b[rows, best], betas[rows, best]
        if count:
            last = betas.shape[1] - 1
            low, high = betas[rows, np.maximum(best - 1, 0)], betas[rows, np.minimum(best + 1, last)]
            betas = low[:, None] + (high - low)[:, None] * np.linspace(0, 1, count)
    return chosen


def _on_grid(y: _FLOAT, x: _FLOAT, betas: _FLOAT, law: str, delta: float) -> tuple[_FLOAT, _FLOAT, _FLOAT]:
    """(E, B, cost), each (R, G): the fit of y (R, n), in ln nats, at fixed betas (R or 1, G), x centred (n,).

    At fixed beta the law is linear in E and B: least squares on relative residuals, reweighted eight times
    towards the Huber loss. `cost` is in units of delta^2.
    """
    u = np.exp(-betas[..., None] * x)  # (R or 1, G, n)
    losses = np.exp(y)[:, None, :]  # (R, 1, n)
    weight = np.broadcast_to(1 / losses**2, (y.shape[0], betas.shape[1], x.size))
    least = _LEAST_E * losses.min(axis=2)
    most = losses.min(axis=2)
    robust: _FLOAT = np.ones_like(weight)
    for _ in range(8):
        w = weight * robust
        s, su, suu = w.sum(2), (w * u).sum(2), (w * u * u).sum(2)
        sy, syu = (w * losses).sum(2), (w * u * losses).sum(2)
        if law == "two":
            e = np.zeros_like(s)
        else:
            spread = s * suu - su * su
            e = np.clip((suu * sy - su * syu) / np.where(spread > 0, spread, 1), least, most)
        b = np.maximum((syu - e * su) / suu, 1e-12)
        r = np.abs(y[:, None, :] - np.log(e[..., None] + b[..., None] * u)) / delta
        robust = 1 / np.maximum(r, 1)
    cost = np.where(r <= 1, 0.5 * r * r, r - 0.5).sum(2)
    return e, b, cost
