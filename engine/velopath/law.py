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
from scipy.special import ndtri, stdtrit

from velopath.errors import ConfigError, NumericalError
from velopath.law_solve import (
    BETA_BOUNDS,
    HUBER_DELTA,
    LEAST_E,
    PRIOR_BETA,
    PRIOR_SPREAD,
    Floats,
    drawn_to_belief,
    quick_fits,
    solve,
)

MIN_POINTS = 4
FEW_POINTS = 6

LONG_REACH = 3.0
"""A law read beyond this many times its last tokens is the prior's: `fit_target`."""

LawName = Literal["three", "two", "prior", "sized"]
_REPLICATES = 200


@dataclass(frozen=True)
class TargetLaw:
    """A fitted law L(D) = E + B / D^beta with its evidence.

    `E` in nats, `B` in nats * tokens^beta; `law` is "three", or "two" or "prior" (then E = 0), or "sized" (see
    `velopath.law_sized`). `points` are the
    (tokens, nats) pairs of the fit, by tokens. `huber` is the minimum reached, sum_j Huber(ln L_j - ln L(D_j)) with
    `delta`. `leave_last_out` is |prediction - loss| in nats at the last point, of the same law fitted to the others:
    the honest size of an error made by extrapolating. `warnings` are sentences for people.
    """

    E: float
    B: float
    beta: float
    law: LawName
    points: tuple[tuple[float, float], ...]
    leave_last_out: float
    huber: float
    delta: float = HUBER_DELTA
    warnings: tuple[str, ...] = ()

    @overload
    def predict(self, tokens: float) -> float: ...
    @overload
    def predict(self, tokens: Sequence[float] | Floats) -> Floats: ...
    def predict(self, tokens: float | Sequence[float] | Floats) -> float | Floats:
        """L(tokens) in nats per token: a number for a number, an array for many. `ConfigError` unless tokens > 0."""
        found = self.curve(np.atleast_1d(np.asarray(tokens, dtype=np.float64)))
        return found if np.ndim(tokens) else float(found[0])

    def curve(self, tokens: Sequence[float] | Floats) -> Floats:
        """L at many token counts, shape (len(tokens),), in nats."""
        counts = np.asarray(tokens, dtype=np.float64)
        if not (np.isfinite(counts).all() and (counts > 0).all()):
            raise ConfigError(f"tokens are {tokens}; a law is read at a positive number of tokens")
        return np.asarray(self.E + np.exp(math.log(self.B) - self.beta * np.log(counts)))

    @overload
    def interval(self, tokens: float, level: float = 0.9, seed: int = 0) -> tuple[float, float]: ...
    @overload
    def interval(
        self, tokens: Sequence[float] | Floats, level: float = 0.9, seed: int = 0
    ) -> tuple[Floats, Floats]: ...
    def interval(
        self, tokens: float | Sequence[float] | Floats, level: float = 0.9, seed: int = 0
    ) -> tuple[float, float] | tuple[Floats, Floats]:
        """(low, high) in nats: the central `level` of the law's predictions at `tokens` over a residual bootstrap.

        Numbers for a number, arrays for many; see `band`. It is the uncertainty of a fit of this form and not of the
        form itself.
        """
        low, high = self.band(np.atleast_1d(np.asarray(tokens, dtype=np.float64)), level, seed)
        return (low, high) if np.ndim(tokens) else (float(low[0]), float(high[0]))

    def band(
        self, tokens: Sequence[float] | Floats, level: float = 0.9, seed: int = 0
    ) -> tuple[Floats, Floats]:
        """(low, high), each of shape (len(tokens),): `interval` at many token counts.

        The residuals in ln L, centred and widened by sqrt(n / (n - p)) for p fitted parameters, are drawn with
        replacement 200 times and the law is fitted again, on ever finer grids over beta; the quantiles' distance
        from the law is stretched by Student's t with n - p degrees of freedom over the normal quantile. The same
        `seed` gives the same band. For the law "prior" the belief about beta is drawn too, from its own spread.
        Raises `ConfigError` unless 0 < level < 1. Our choice.
        """
        if not 0 < level < 1:
            raise ConfigError(f"level is {level}; expected a share in (0, 1), such as 0.9")
        residuals, fitted = self.evidence()
        free = len(residuals) - fitted
        residuals = (residuals - residuals.mean()) * math.sqrt(len(residuals) / free)
        drawn = np.random.default_rng(seed).integers(len(residuals), size=(_REPLICATES, len(residuals)))
        curves = self.replicates(residuals[drawn], np.asarray(tokens, dtype=np.float64), seed)
        low, high = np.quantile(curves, [(1 - level) / 2, (1 + level) / 2], axis=0)
        own = self.curve(tokens)  # inside its own band, also where the replicates lean to one side
        low, high = np.minimum(low, own), np.maximum(high, own)
        stretch = float(stdtrit(free, (1 + level) / 2) / ndtri((1 + level) / 2))
        return own - stretch * (own - low), own + stretch * (high - own)

    def evidence(self) -> tuple[Floats, int]:
        """The residuals in ln L of the points behind the fit, (n,), and how many parameters were fitted."""
        counts, losses = (np.array(column) for column in zip(*self.points, strict=True))
        return np.log(losses) - np.log(self.curve(counts)), 3 if self.law == "three" else 2

    def replicates(self, residuals: Floats, tokens: Floats, seed: int) -> Floats:
        """(R, len(tokens)): L at `tokens` of fits to the law with residuals (R, n) in ln L added."""
        counts = np.array([count for count, _ in self.points])
        drawn = np.log(self.curve(counts)) + residuals
        centre = float(np.log(counts).mean())
        at = np.log(tokens) - centre
        if self.law == "prior":
            belief = np.random.default_rng(seed + 1).normal(PRIOR_BETA, PRIOR_SPREAD, len(drawn))
            level_R, beta_R, middle = drawn_to_belief(drawn, counts, belief)
            return np.asarray(np.exp(level_R[:, None] - beta_R[:, None] * (at + centre - middle)))
        e, b, beta = quick_fits(drawn, np.log(counts) - centre, self.law, self.delta)
        return np.asarray(e[:, None] + b[:, None] * np.exp(-beta[:, None] * at))

    @property
    def formula(self) -> str:
        """The law with its numbers, for people."""
        return f"{f'{self.E:.2f} + ' if self.E else ''}{self.B:.3g} / D^{self.beta:.2f}"

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
    points = check_points(tokens, losses)
    if law not in ("auto", "three", "two", "prior"):
        raise ConfigError(f"law is {law!r}; expected 'auto', 'three', 'two' or 'prior'")
    chosen: Literal["three", "two", "prior"] = law if law != "auto" else _choose(points, delta, extrapolation)
    e, b, beta, cost = solve(points, chosen, delta)
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


def check_points(
    tokens: Iterable[float], losses: Iterable[float], least: int = MIN_POINTS
) -> tuple[Floats, Floats]:
    """(D, L), each (n,), by D. Raises `ConfigError` on fewer than `least` points or counts that are not positive and
    different, `NumericalError` on losses that are not positive."""
    counts, values = np.array(list(tokens), dtype=np.float64), np.array(list(losses), dtype=np.float64)
    if counts.shape != values.shape or counts.ndim != 1:
        raise ConfigError(f"{counts.size} token counts for {values.size} losses; expected one loss per count")
    if counts.size < least:
        raise ConfigError(
            f"{counts.size} points; a law needs at least {least}, {FEW_POINTS} or more are better: evaluate the proxy "
            "more often"
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


def _fit_warnings(points: tuple[Floats, Floats], beta: float) -> list[str]:
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
    points: tuple[Floats, Floats], delta: float, extrapolation: float
) -> Literal["three", "two", "prior"]:
    e, _, beta, cost = solve(points, "three", delta)
    if cost < 1e-6 * solve(points, "two", delta)[3]:  # E is there beyond doubt, also where the curve is flat
        return "three"
    if extrapolation > LONG_REACH and cost > points[0].size * 0.5 * delta**2:
        return "prior"
    # Predict the last point without it and, where enough points stay, without the last two.
    depths = (1, 2) if points[0].size >= FEW_POINTS else (1,)
    missed = {law: sum(_left_out(points, law, delta, k) for k in depths) for law in ("three", "two")}
    # One or two errors are a noisy witness, and a missing E costs more than a superfluous one: over 160 synthetic
    # laws (30 % with E = 0, noise 0.2-0.6 %) the mean error at 3x was 0.031 nats so, 0.033 without the factor 2.
    if (
        e <= 10 * LEAST_E * points[1].min()
        or beta <= BETA_BOUNDS[0] * 1.001
        or 2 * missed["two"] < missed["three"]
    ):
        return "two"
    return "three"


def _left_out(points: tuple[Floats, Floats], law: str, delta: float, count: int) -> float:
    """|prediction - loss| at the last point, fitted without the last `count` points; nats."""
    counts, losses = points
    e, b, beta, _ = solve((counts[:-count], losses[:-count]), law, delta)
    return abs(e + math.exp(math.log(b) - beta * math.log(counts[-1])) - float(losses[-1]))
