"""Target errors: what a law fitted to a run's first steps predicts for its end, beside what the run came to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.mixing.arms import LATER, TARGET_POINTS, Study
from benchmarks.mixing.trainer import FORWARD_COST
from velopath.law import fit_target

LAWS = ("auto", "three")  # auto takes the prior's law at such a reach
REACH = 0.15
"""How far the points reach, as a share of the run."""


def target_errors(
    study: Study, seed: int, name: str, tokens: int | None, laws: Sequence[str] = LAWS
) -> dict[str, Any]:
    """By law: predicted minus true loss per domain, in nats, and its mean size, at the shares `name`.

    `name` is "natural" or "uniform". `tokens` are held-out tokens per domain of the sample that both see; None: what
    rules see. Truth is the control loss at the end of the same run, which stayed at those shares and at the peak rate.
    """
    found: dict[str, Any] = {}
    shares = {"natural": study.natural, "uniform": study.uniform}[name]
    run = study.truth(seed, shares, tokens, (*TARGET_POINTS, *LATER)) if tokens else study.truth(seed, shares)
    true = study.oracle(run)
    curves = study.curves(run, REACH)
    points = len(next(iter(curves.values())))
    for law in laws:
        errors = _errors(curves, true, study.scale.budget, law)
        found[f"{name}, {law}, seed {seed}"] = {
            "shares": name,
            "law": law,
            "seed": seed,
            "points": points,
            "cost": proxy_cost(study, tokens or study.scale.heldout_tokens, points),
            "errors": errors,
            "mean_absolute": sum(map(abs, errors.values())) / len(errors),
        }
    return found


def proxy_cost(study: Study, tokens: int, points: int) -> dict[str, float]:
    """Shares of a run's budget: a trunk of its own, or the main path's own first steps (evaluations only)."""
    evaluations = FORWARD_COST * points * tokens * len(study.natural) / study.scale.budget
    return {"own trunk": REACH + evaluations, "main path": evaluations}


def _errors(
    curves: Mapping[str, list[tuple[float, float]]], true: Mapping[str, float], tokens: float, law: Any
) -> dict[str, float]:
    errors = {}
    for name, points in curves.items():
        fitted = fit_target([p[0] for p in points], [p[1] for p in points], law=law, extrapolation=1 / REACH)
        errors[name] = min(fitted.predict(tokens), points[-1][1]) - true[name]
    return errors
