"""Headroom: the best static mixture for a metric, found by random mixtures and a regression (RegMix style).

Letters: w[i] share of domain i, L[i] its test loss at the end in nats per token, a[i] what the metric counts it for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

Array = NDArray[np.float64]
METRICS = ("mean", "worst", "natural", "given")
"""Fixed beforehand: the mean over domains, the largest loss of a domain, the means weighted by natural shares and by
`given_weights`."""
LEAST = 0.02
"""No mixture of the search gives a domain less."""


def given_weights(names: Sequence[str], known: Sequence[str]) -> dict[str, float]:
    """Weights as a user may give them: the new domains count twice as much as those the base model knows."""
    raw = {name: 1.0 if name in known else 2.0 for name in names}
    return {name: weight / sum(raw.values()) for name, weight in raw.items()}


@dataclass(frozen=True)
class Metrics:
    """The metrics of losses by domain, in nats per token."""

    natural: Mapping[str, float]
    given: Mapping[str, float]

    def of(self, name: str, losses: Mapping[str, float]) -> float:
        if name == "worst":
            return max(losses.values())
        if name == "mean":
            return sum(losses.values()) / len(losses)
        weights = self.natural if name == "natural" else self.given
        return sum(weights[n] * losses[n] for n in losses)

    def all(self, losses: Mapping[str, float]) -> dict[str, float]:
        return {name: self.of(name, losses) for name in METRICS}


def random_mixtures(natural: Mapping[str, float], count: int, seed: int = 0) -> list[dict[str, float]]:
    """Dirichlet mixtures, in turns around uniform (concentration 9) and around natural (12), each share >= `LEAST`."""
    random = np.random.default_rng(seed)
    names, centre = tuple(natural), np.array(list(natural.values()))
    found = []
    for k in range(count):
        alpha = np.full(len(names), 9 / len(names)) if k % 2 == 0 else 12 * centre
        shares = LEAST + (1 - LEAST * len(names)) * random.dirichlet(alpha)
        found.append({n: round(float(s), 4) for n, s in zip(names, shares, strict=True)})
    return found


@dataclass(frozen=True)
class Surface:
    """Fitted losses over mixtures: L[i] = c[i] - s[i] ln(w[i] + k[i]) + sum_j b[i, j] w[j], s[i] >= 0, b small (ridge).

    The logarithm is what own text brings, k what the base model and the other domains bring already, b the transfer.
    `error` is the root mean square error by domain in nats when the point itself is left out.
    """

    names: tuple[str, ...]
    k: Array
    theta: Array
    error: Array

    @classmethod
    def fit(cls, mixtures: Sequence[Mapping[str, float]], losses: Sequence[Mapping[str, float]]) -> Surface:
        names = tuple(mixtures[0])
        shares = np.array([[m[n] for n in names] for m in mixtures])
        found = [_fit_domain(shares, np.array([loss[n] for loss in losses]), i) for i, n in enumerate(names)]
        return cls(
            names,
            np.array([f[0] for f in found]),
            np.array([f[1] for f in found]),
            np.array([f[2] for f in found]),
        )

    def predict(self, shares: Array) -> Array:
        """L, shape (K,), at the shares (K,)."""
        theta = self.theta
        return np.asarray(theta[:, 0] - theta[:, 1] * np.log(shares + self.k) + theta[:, 2:] @ shares)

    def predict_named(self, shares: Mapping[str, float]) -> dict[str, float]:
        """Name -> predicted test loss in nats per token."""
        found = self.predict(np.array([shares[n] for n in self.names]))
        return dict(zip(self.names, found.tolist(), strict=True))

    def best(self, name: str, metrics: Metrics) -> dict[str, float]:
        """The mixture with the least predicted metric, every share at least `LEAST`."""

        def cost(logits: Array) -> float:
            losses = dict(zip(self.names, self.predict(_shares(logits)).tolist(), strict=True))
            return metrics.of(name, losses)

        random, count = np.random.default_rng(1), len(self.names)
        tries: list[Any] = []
        for _ in range(6):
            found = minimize(cost, random.normal(0, 0.7, count), method="Nelder-Mead",
                             options={"maxfev": 2000, "xatol": 1e-4, "fatol": 1e-7})  # fmt: skip
            tries.append((found.fun, found.x))
        best = _shares(min(tries, key=lambda pair: pair[0])[1])
        return {n: round(float(s), 4) for n, s in zip(self.names, best, strict=True)}


def _shares(logits: Array) -> Array:
    raw = np.exp(logits - logits.max())
    return np.asarray(LEAST + (1 - LEAST * len(raw)) * raw / raw.sum())


def _features(shares: Array, own: int, k: float) -> Array:
    return np.column_stack((np.ones(len(shares)), -np.log(shares[:, own] + k), shares))


def _fit_domain(shares: Array, losses: Array, own: int) -> tuple[float, Array, float]:
    ridge = np.diag([0.0, 1e-6, *[3e-2] * shares.shape[1]])
    tries = []
    for k in np.geomspace(0.005, 0.5, 13):
        x = _features(shares, own, k)
        inverse = np.linalg.inv(x.T @ x + ridge)
        theta = inverse @ x.T @ losses
        # Leave-one-out residuals of a ridge fit: r / (1 - h) with the leverage h.
        left_out = (losses - x @ theta) / (1 - np.einsum("nf,fg,ng->n", x, inverse, x))
        if theta[1] > 0:
            tries.append((float(np.sqrt(np.mean(left_out**2))), float(k), theta))
    error, k, theta = min(tries, key=lambda t: t[0])
    return k, theta, error
