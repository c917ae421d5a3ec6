"""Target errors: what a law fitted to a run's first steps predicts for its end, beside what the run came to.

Also `belief`: how the law "prior" came to what it believes of beta, on seeds that serve nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.mixing.arms import LATER, POINTS, TARGET_POINTS, Study
from benchmarks.mixing.trainer import FORWARD_COST
from velopath.law import fit_target
from velopath.law_solve import PRIOR_BETA, PRIOR_MISFIT, PRIOR_SPREAD, drawn_to_belief
from velopath.proxy_points import decay_steps

LAWS = ("auto", "three")  # auto takes the prior's law at such a reach
REACH = 0.15
"""How far the points reach, as a share of the run."""
SHORT_DECAY = 0.1
"""Of the steps done: the decay from each point in the variant that reads decayed points."""
BELIEF_SEEDS = tuple(range(100, 106))
BELIEFS = ((0.06, 0.07, 0.08), (0.3, 0.5, 0.7, 1.0, 2.25))
"""Means of beta, and k = (misfit / spread)^2, that `belief` compares."""


def target_errors(
    study: Study, seed: int, name: str, tokens: int | None, laws: Sequence[str] = LAWS
) -> dict[str, Any]:
    """By law: predicted minus true loss per domain, in nats, and its mean size, at the shares `name`.

    `name` is "natural" or "uniform". `tokens` are held-out tokens per domain of the sample that both see; None: what
    rules see. Truth is the control loss at the end of the same run, which stayed at those shares and at the peak rate.
    """
    shares = _shares(study, name)
    run = study.truth(seed, shares, tokens, (*TARGET_POINTS, *LATER)) if tokens else study.truth(seed, shares)
    true = study.oracle(run)
    curves = study.curves(run, REACH)
    cost = proxy_cost(study, tokens or study.scale.heldout_tokens, len(next(iter(curves.values()))))
    return {f"{name}, {law}, seed {seed}": _row(name, law, seed, curves, true, study, cost) for law in laws}


def decayed_errors(study: Study, seed: int, name: str) -> dict[str, Any]:
    """The same with each point read after a short decay, against the end of a run that decays as the arms do."""
    shares, scale = _shares(study, name), study.scale
    watch = tuple(sorted({round(share * scale.steps) for share in POINTS}))
    common: dict[str, Any] = {"watch_tokens": scale.heldout_tokens}
    points = study.run(
        study.settings(
            seed, shares, constant=True, watch=watch, stop=watch[-1] + 1, decays=SHORT_DECAY, **common
        )
    )
    true = study.run(study.settings(seed, shares, watch=(scale.steps,), **common))["watched"][
        str(scale.steps)
    ]
    found = sorted((int(step), losses) for step, losses in points["decayed"].items())
    curves = {n: [(step * scale.step_tokens, losses[n]) for step, losses in found] for n in shares}
    cost = proxy_cost(study, scale.heldout_tokens, len(found))
    extra = sum(decay_steps(step, SHORT_DECAY) for step in watch) / scale.steps
    cost = {kind: share + extra for kind, share in cost.items()}
    return {f"{name}, short decays, seed {seed}": _row(name, "short decays", seed, curves, true, study, cost)}


def proxy_cost(study: Study, tokens: int, points: int) -> dict[str, float]:
    """Shares of a run's budget: a trunk of its own, or the main path's own first steps (evaluations only)."""
    evaluations = FORWARD_COST * points * tokens * len(study.natural) / study.scale.budget
    return {"own trunk": REACH + evaluations, "main path": evaluations}


def belief(study: Study) -> list[dict[str, Any]]:
    """Mean absolute target error of the law "prior" by belief and k, over `BELIEF_SEEDS` at natural and uniform shares;
    the row in use has "used" true."""
    runs = [
        study.truth(seed, _shares(study, name)) for seed in BELIEF_SEEDS for name in ("natural", "uniform")
    ]
    used = (PRIOR_BETA, round((PRIOR_MISFIT / PRIOR_SPREAD) ** 2, 1))
    rows = []
    for beta in BELIEFS[0]:
        for k in BELIEFS[1]:
            errors = [error for run in runs for error in _believed(study, run, beta, k)]
            row = {"beta": beta, "k": k, "mean_absolute": float(np.mean(np.abs(errors)))}
            rows.append(row | {"used": (beta, round(k, 1)) == used})
    return rows


def _believed(study: Study, run: Mapping[str, Any], beta: float, k: float) -> list[float]:
    true, errors = study.oracle(run), []
    for name, points in study.curves(run, REACH).items():
        counts, losses = (np.array(column) for column in zip(*points, strict=True))
        level, slope, middle = drawn_to_belief(np.log(losses)[None], counts, np.array([beta]), k)
        found = float(np.exp(level[0] - slope[0] * (np.log(study.scale.budget) - middle)))
        errors.append(min(found, points[-1][1]) - true[name])
    return errors


def _shares(study: Study, name: str) -> dict[str, float]:
    return {"natural": study.natural, "uniform": study.uniform}[name]


def _row(
    name: str,
    law: str,
    seed: int,
    curves: Mapping[str, list[tuple[float, float]]],
    true: Mapping[str, float],
    study: Study,
    cost: Mapping[str, float],
) -> dict[str, Any]:
    errors = _errors(curves, true, study.scale.budget, "auto" if law == "short decays" else law)
    return {
        "shares": name,
        "law": law,
        "seed": seed,
        "points": len(next(iter(curves.values()))),
        "cost": dict(cost),
        "errors": errors,
        "mean_absolute": sum(map(abs, errors.values())) / len(errors),
    }


def _errors(
    curves: Mapping[str, list[tuple[float, float]]], true: Mapping[str, float], tokens: float, law: Any
) -> dict[str, float]:
    errors = {}
    for name, points in curves.items():
        fitted = fit_target([p[0] for p in points], [p[1] for p in points], law=law, extrapolation=1 / REACH)
        errors[name] = min(fitted.predict(tokens), points[-1][1]) - true[name]
    return errors
