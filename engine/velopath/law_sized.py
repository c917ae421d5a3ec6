"""A Chinchilla law over sizes: a smaller sibling's proxy points lend their curve to a model that has few of its own.

Letters: N parameters, D training tokens, L(N, D) the held-out loss of one domain in nats per token::

    L(N, D) = E + A / N^a + B / D^beta

The form is Chinchilla's (Hoffmann et al. 2022, arXiv 2203.15556), a = 0.34 the value reported there. That B and beta
are those of another size also when both models go on from trained weights is an assumption; the rest is our choice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from velopath.errors import ConfigError
from velopath.law import MIN_POINTS, TargetLaw, check_points
from velopath.law_solve import BETA_BOUNDS, HUBER_DELTA, Floats

SIZE_EXPONENT = 0.34
OWN_POINTS = 2
"""Least points of the model itself: one for its level, one that leaving out tells an error by."""

Points = Sequence[tuple[float, float]]
"""(tokens, nats) pairs."""


@dataclass(frozen=True)
class SizedLaw(TargetLaw):
    """L(N, D) of one domain, read at `size` = N: as a `TargetLaw` its E is `floor` + A / N^a.

    `siblings` are (parameters, (tokens, nats) pairs) of the smaller models behind the fit, `points` the model's own.
    """

    size: float = 0.0
    floor: float = 0.0
    A: float = 0.0
    a: float = SIZE_EXPONENT
    siblings: tuple[tuple[float, tuple[tuple[float, float], ...]], ...] = ()

    @property
    def formula(self) -> str:
        """The law with its numbers, for people."""
        return f"{self.floor:.2f} + {self.A:.3g} / N^{self.a:.2f} + {self.B:.3g} / D^{self.beta:.2f}"

    def evidence(self) -> tuple[Floats, int]:
        """Residuals in ln L of all points, the siblings' first, (n,), and the number of fitted parameters."""
        _, _, losses = _table(self.size, self.points, self.siblings)
        return np.log(losses / self._fitted()), 4

    def replicates(self, residuals: Floats, tokens: Floats, seed: int) -> Floats:
        """(R, len(tokens)): L at `tokens` and the model's own size, of fits to the law with residuals added."""
        sizes, counts, _ = _table(self.size, self.points, self.siblings)
        losses = self._fitted() * np.exp(residuals)
        floor, by_size, b, beta = _solve(sizes, counts, losses, self.a, self.delta, stages=4)
        level = floor + by_size / self.size**self.a
        return np.asarray(level[:, None] + b[:, None] * tokens ** -beta[:, None])

    def _fitted(self) -> Floats:
        sizes, counts, _ = _table(self.size, self.points, self.siblings)
        return np.asarray(self.floor + self.A / sizes**self.a + self.B / counts**self.beta)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> SizedLaw:
        """The law that `to_json` wrote. Raises `ConfigError` when it is malformed."""
        try:
            siblings = tuple(
                (float(n), tuple((float(d), float(x)) for d, x in points)) for n, points in value["siblings"]
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"malformed law: {error}; expected what SizedLaw.to_json writes") from error
        plain = super().from_json({**value, "siblings": siblings})
        assert isinstance(plain, SizedLaw)
        return plain


def law_from_json(value: Mapping[str, Any]) -> TargetLaw:
    """The law that `to_json` wrote, of either kind."""
    return (SizedLaw if value.get("law") == "sized" else TargetLaw).from_json(value)


def fit_sized(
    points: Points,
    size: float,
    siblings: Mapping[float, Points],
    *,
    exponent: float = SIZE_EXPONENT,
    delta: float = HUBER_DELTA,
) -> SizedLaw:
    """The law of a model of `size` parameters from its own `points` and those of `siblings` (parameters -> points).

    E, A and B are non-negative least squares at fixed beta on relative residuals, reweighted towards the Huber loss of
    ln L with `delta`; beta is the best in [0.01, 1.5]. Raises `ConfigError` where no sibling differs in size, a sibling
    has fewer than 4 points or the model itself fewer than 2, and as `fit_target` does on points that are no losses.
    """
    if not (math.isfinite(exponent) and exponent > 0):
        raise ConfigError(f"the exponent of the size is {exponent}; expected a positive number")
    for other, theirs in {size: points, **siblings}.items():
        if not (math.isfinite(other) and other > 0):
            raise ConfigError(f"a model of {other} parameters; expected a positive number")
        check_points(
            [p[0] for p in theirs], [p[1] for p in theirs], OWN_POINTS if other == size else MIN_POINTS
        )
    if not siblings or size in siblings:
        raise ConfigError(
            f"siblings have {', '.join(f'{n:,.0f}' for n in siblings) or 'no'} parameters and the model {size:,.0f}; "
            "a size term needs models of different sizes"
        )
    own = tuple(sorted((float(d), float(x)) for d, x in points))
    others = tuple(
        (float(n), tuple(sorted((float(d), float(x)) for d, x in siblings[n]))) for n in sorted(siblings)
    )
    sizes, counts, losses = _table(size, own, others)
    floor, by_size, b, beta = _best(sizes, counts, losses, exponent, delta)
    keep = ~((sizes == size) & (counts == own[-1][0]))
    e, a, c, gamma = _best(sizes[keep], counts[keep], losses[keep], exponent, delta)
    left = abs(e + a / size**exponent + c / own[-1][0] ** gamma - own[-1][1])
    warnings = []
    if beta <= BETA_BOUNDS[0] * 1.001 or beta >= BETA_BOUNDS[1] * 0.999:
        warnings.append(f"beta stands at its bound {beta:.3g}: the points do not look like a power law")
    if max(siblings) > size:
        warnings.append(
            f"a sibling of {max(siblings):,.0f} parameters is larger than the model's {size:,.0f}"
        )
    residuals = np.log(losses / (floor + by_size / sizes**exponent + b / counts**beta))
    return SizedLaw(
        floor + by_size / size**exponent,
        b,
        beta,
        "sized",
        own,
        left,
        float(_huber(residuals, delta)),
        delta,
        tuple(warnings),
        size,
        floor,
        by_size,
        exponent,
        others,
    )


def _table(
    size: float, own: Points, siblings: Sequence[tuple[float, Points]]
) -> tuple[Floats, Floats, Floats]:
    """(N, D, L) of all points, each (n,): the siblings' first."""
    rows = [(n, d, x) for n, points in (*siblings, (size, own)) for d, x in points]
    n, d, x = (np.array(column, dtype=np.float64) for column in zip(*rows, strict=True))
    return n, d, x


def _best(
    sizes: Floats, counts: Floats, losses: Floats, exponent: float, delta: float
) -> tuple[float, float, float, float]:
    """(E, A, B, beta) of the best fit to the points, each (n,)."""
    e, a, b, beta = (float(part[0]) for part in _solve(sizes, counts, losses[None], exponent, delta))
    return e, a, b, beta


def _solve(
    sizes: Floats, counts: Floats, losses: Floats, exponent: float, delta: float, stages: int = 12
) -> tuple[Floats, Floats, Floats, Floats]:
    """(E, A, B, beta), each (R,): the best fits to `losses` (R, n) at sizes and token counts (n,).

    By grids over beta, each around the best of the last, so many `stages` of them.
    """
    # Columns of about 1, so that no coefficient is drowned: sizes and tokens over their geometric means.
    n0, d0 = math.exp(np.log(sizes).mean()), math.exp(np.log(counts).mean())
    rows = np.arange(len(losses))
    by_size = np.broadcast_to((sizes / n0) ** -exponent, losses.shape)

    def at(betas: Floats) -> tuple[Floats, Floats]:
        x = np.stack((np.ones_like(losses), by_size, (counts / d0) ** -betas[:, None]), axis=-1)
        robust = np.ones_like(losses)
        for _ in range(8):
            weight = np.sqrt(robust) / losses
            theta = _non_negative(x * weight[..., None], losses * weight)
            r = np.abs(np.log(np.maximum((x @ theta[..., None])[..., 0], 1e-12) / losses)) / delta
            robust = 1 / np.maximum(r, 1)
        return _huber(r * delta, delta), theta

    betas = np.broadcast_to(np.geomspace(*BETA_BOUNDS, 16), (len(losses), 16))
    for stage in range(stages):
        costs = np.stack([at(column)[0] for column in betas.T], axis=1)
        best = costs.argmin(axis=1)
        low = betas[rows, np.maximum(best - 1, 0)]
        high = betas[rows, np.minimum(best + 1, betas.shape[1] - 1)]
        chosen = betas[rows, best]
        if stage + 1 < stages:
            betas = low[:, None] + (high - low)[:, None] * np.linspace(0, 1, 7)
    theta = at(chosen)[1]
    return theta[:, 0], theta[:, 1] * n0**exponent, theta[:, 2] * d0**chosen, chosen


def _non_negative(x: Floats, y: Floats) -> Floats:
    """Least squares theta >= 0 of x (R, n, 3) theta = y (R, n), shape (R, 3): the best of all sets of columns that is
    feasible, which is the optimum since the problem is convex."""
    best, least = np.zeros((len(x), 3)), (y**2).sum(-1)
    for columns in ([0], [1], [2], [0, 1], [0, 2], [1, 2], [0, 1, 2]):
        part = x[..., columns]
        gram = part.transpose(0, 2, 1) @ part
        gram += 1e-13 * np.trace(gram, axis1=1, axis2=2)[:, None, None] * np.eye(len(columns))
        found = np.linalg.solve(gram, (part.transpose(0, 2, 1) @ y[..., None]))[..., 0]
        cost = ((y - (part @ found[..., None])[..., 0]) ** 2).sum(-1)
        better = (found >= 0).all(-1) & (cost < least)
        least = np.where(better, cost, least)
        full = np.zeros_like(best)
        full[:, columns] = found
        best = np.where(better[:, None], full, best)
    return best


def _huber(r: Floats, delta: float) -> Floats:
    """Sums over the last axis."""
    size = np.abs(r) / delta
    return np.asarray(np.where(size <= 1, 0.5 * size**2, size - 0.5).sum(-1) * delta**2)
