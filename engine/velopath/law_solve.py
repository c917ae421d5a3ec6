"""The numbers behind `velopath.law`: least squares, robust fits and replicates of L(D) = E + B / D^beta.

Letters: n points (D_j, L_j), x = ln D centred, y = ln L, R replicates, G betas of a grid.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

BETA_BOUNDS = (0.01, 1.5)
HUBER_DELTA = 1e-3
LEAST_E = 1e-6
"""Of the smallest loss: E this small is no E at all."""
PRIOR_BETA, PRIOR_SPREAD, PRIOR_MISFIT = 0.07, 0.027, 0.0225
"""What the law "prior" believes of beta before it sees a point (mean, standard deviation), and how far a point's ln L
may lie from any law; set on twelve runs of our mixing study (`python -m benchmarks mixing --belief`: 0.16M parameters,
six seeds that serve nothing else, natural and uniform shares)."""

Floats = NDArray[np.float64]
_GRID = np.geomspace(*BETA_BOUNDS, 48)
_POLISHED = 5


def solve(points: tuple[Floats, Floats], law: str, delta: float) -> tuple[float, float, float, float]:
    """(E, B, beta, sum of Huber) of the best fit."""
    counts, losses = points
    if law == "prior":
        level, slope, middle = drawn_to_belief(np.log(losses)[None, :], counts, np.array([PRIOR_BETA]))
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
    least = math.log(LEAST_E * losses.min())
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


def drawn_to_belief(
    y: Floats, counts: Floats, belief: Floats, k: float = (PRIOR_MISFIT / PRIOR_SPREAD) ** 2
) -> tuple[Floats, Floats, float]:
    """(level, beta), each (R,), and the mean of ln D, of the law "prior" for y = ln L (R, n) and beliefs b (R,).

    beta = (slope Sxx + b k) / (Sxx + k), as in `velopath.law.fit_target`.
    """
    w = counts / counts.mean()
    x = np.log(counts)
    middle = float((w * x).sum() / w.sum())
    spread = w * (x - middle)
    sxx, level = float((spread * (x - middle)).sum()), (y * w).sum(1) / w.sum()
    beta = (-(y * spread).sum(1) + belief * k) / (sxx + k)
    return level, np.clip(beta, *BETA_BOUNDS), middle


def _cost_and_gradient(theta: Floats, x: Floats, y: Floats, delta: float) -> tuple[float, Floats]:
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


def quick_fits(y: Floats, x: Floats, law: str, delta: float) -> tuple[Floats, Floats, Floats]:
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


def _on_grid(y: Floats, x: Floats, betas: Floats, law: str, delta: float) -> tuple[Floats, Floats, Floats]:
    """(E, B, cost), each (R, G): the fit of y (R, n), in ln nats, at fixed betas (R or 1, G), x centred (n,).

    At fixed beta the law is linear in E and B: least squares on relative residuals, reweighted eight times
    towards the Huber loss. `cost` is in units of delta^2.
    """
    u = np.exp(-betas[..., None] * x)  # (R or 1, G, n)
    losses = np.exp(y)[:, None, :]  # (R, 1, n)
    weight = np.broadcast_to(1 / losses**2, (y.shape[0], betas.shape[1], x.size))
    least = LEAST_E * losses.min(axis=2)
    most = losses.min(axis=2)
    robust: Floats = np.ones_like(weight)
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
