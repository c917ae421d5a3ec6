"""Sensitivity: what update interval, step size and normalisation of the velocity change, all else as in the arms."""

from __future__ import annotations

from functools import partial

from benchmarks.mixing.arms import Arm, marginal_gain, velocitune_guarded

INTERVALS = (3, 6, 12, 24, 48)
"""Updates in a whole run."""

GUARDED, WORST = "Velocitune, our guards", "marginal gain, worst"
SENSITIVITY: dict[str, dict[float | str, Arm]] = {
    f"{GUARDED}: updates in a run": {n: partial(velocitune_guarded, updates=n) for n in INTERVALS},
    f"{WORST}: updates in a run": {n: marginal_gain("worst", n) for n in INTERVALS},
    f"{GUARDED}: distance divided by": {
        kind: partial(velocitune_guarded, normalise=kind) for kind in ("gap", "target", "none")
    },
    f"{GUARDED}: step size": {
        eta: partial(velocitune_guarded, step_size=eta) for eta in (0.25, 0.5, 1.0, 2.0)
    },
}
"""What is varied -> value -> arm. The arms' own values are among them: 12 updates and 24, "gap", 0.5."""
