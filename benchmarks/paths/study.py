"""The arms of the paths study, fixed before anything was measured, and the runs behind them.

N = 4 versions, one per slice of T updates. A job trains what shares a beginning (the main path and all its
branches are one job); a seed fixes initial weights and the rows of every slice, so arms of a seed are paired.
Metric: mean over domains of the held-out loss of a version, nats per token; with drifting slices over the domains
that have arrived by then.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.paths.corpus import NAMES, SLICES, SlicedText
from benchmarks.paths.trainer import Learner, Scale
from velopath.schedule import LrPath

VERSION = 1
"""Raise it when a change moves results: finished jobs of another version are not taken again."""
ALPHA = 0.6
ALPHAS = (0.2, 0.4, 0.6)
SHAPES = ("knee", "multistep")
"""Beside the cosine, at ALPHA."""
WSD_SHARE = 0.2
FLOOR_SHARE = 0.1
"""End rate of "CPT, stays at the end rate" over the peak: at 0 it would not learn at all."""

REGIMES = ("iid", "drift")
"""Slices alike, or slices that bring new domains."""
NEW = (("cpp", "docs", "python"), ("verse",), ("tables",), ("translations",))
"""Drifting slices: the domains that arrive with each. Half of a slice is new, half replays what was there."""


def weights_of(regime: str, number: int) -> dict[str, float]:
    """Shares of slice `number`: equal in "iid", else half for the domains of `NEW` and half for earlier ones."""
    if regime == "iid":
        return dict.fromkeys(NAMES, 1 / len(NAMES))
    old = [name for names in NEW[:number] for name in names]
    part = 0.5 if old else 1.0
    shares = dict.fromkeys(NAMES, 0.0)
    shares |= dict.fromkeys(NEW[number], part / len(NEW[number]))
    return shares | dict.fromkeys(old, 0.5 / len(old) if old else 0.0)


def arrived(regime: str, number: int) -> tuple[str, ...]:
    """The domains that slices 0 ... number have brought."""
    if regime == "iid":
        return NAMES
    return tuple(sorted(name for names in NEW[: number + 1] for name in names))


@dataclass(frozen=True)
class Job:
    """What a result is kept under: arms of one kind, one seed, one regime ("iid" or "drift")."""

    kind: str
    regime: str
    seed: int
    scale: Scale
    version: int = VERSION

    @property
    def key(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]


class Trial:
    """A job at work: fresh models, slices by number, and what every arm has cost and reached."""

    def __init__(self, job: Job, text: SlicedText, cache: Path) -> None:
        self.job, self.scale = job, job.scale
        self._fresh = lambda: Learner(job.scale, text, cache, job.seed)
        self.versions: dict[str, list[dict[str, Any]]] = {}

    def fresh(self) -> Learner:
        return self._fresh()

    def read(
        self, learner: Learner, path: LrPath, number: int, start: int = 0, steps: int | None = None
    ) -> None:
        """Train on slice `number` from its step `start`, to its end where `steps` is None."""
        steps = self.scale.steps - start if steps is None else steps
        learner.train(path, number, start, steps, weights_of(self.job.regime, number))

    def cut(self, arm: str, learner: Learner, cost: int) -> None:
        """Record a version of `arm`; `cost` is the updates spent by the arm so far, this version's among them."""
        self.versions.setdefault(arm, []).append({"loss": learner.losses(), "cost": cost})


def switching(trial: Trial) -> None:
    """The main path and, at each slice's end, branches of every alpha and shape; also the main path itself."""
    steps, scale = trial.scale.steps, trial.scale
    path = LrPath.main(scale.peak, scale.warmup)
    main = trial.fresh()
    kinds = [(alpha, "cosine") for alpha in ALPHAS] + [(ALPHA, shape) for shape in SHAPES]
    for number in range(SLICES):
        at = 0
        for alpha in sorted({alpha for alpha, _ in kinds}, reverse=True):
            length = round(alpha * steps)
            trial.read(main, path, number, at, steps - length - at)
            at = steps - length
            for shape in (shape for a, shape in kinds if a == alpha):
                branch = main.copy()
                branch_path = path.branch(main.step, length, shape)
                trial.read(branch, branch_path, number, at)
                # The main path up to this branch point, and every branch so far, this one included.
                cost = number * steps + at + (number + 1) * length
                trial.cut(f"switching {alpha:g}, {shape}", branch, cost)
        trial.read(main, path, number, at)
        trial.cut("main path, undecayed", main, (number + 1) * steps)


def ptfs(trial: Trial) -> None:
    """Every version from scratch on all slices so far, in the same order, one cosine over all."""
    cost = 0
    for count in range(1, SLICES + 1):
        steps = count * trial.scale.steps
        path = LrPath.ptfs(trial.scale.peak, trial.scale.warmup, steps)
        learner = trial.fresh()
        for number in range(count):
            trial.read(learner, path, number)
        cost += steps
        trial.cut("PTFS", learner, cost)


def continued(
    arm: str, path_of: Callable[[Scale, list[int]], LrPath], passes: float = 1.0
) -> Callable[[Trial], None]:
    """One model through the slices on `path_of(scale, steps by slice)`; `passes` > 1 reads each slice's rows again."""

    def run(trial: Trial) -> None:
        once, again = trial.scale.steps, round((passes - 1) * trial.scale.steps)
        path = path_of(trial.scale, [once + again] * SLICES)
        learner = trial.fresh()
        for number in range(SLICES):
            trial.read(learner, path, number)
            if again:
                trial.read(learner, path, number, 0, again)
            trial.cut(arm, learner, (number + 1) * (once + again))

    return run


def _rewarm(scale: Scale, steps: list[int]) -> LrPath:
    return LrPath.cpt(scale.peak, steps, scale.warmup, mode="rewarm")


def _end_rate(scale: Scale, steps: list[int]) -> LrPath:
    return LrPath.cpt(scale.peak, steps, scale.warmup, mode="end_rate", floor=FLOOR_SHARE * scale.peak)


def _wsd_s(scale: Scale, steps: list[int]) -> LrPath:
    return LrPath.wsd_s(scale.peak, steps, scale.warmup, decay_share=WSD_SHARE)


KINDS: dict[str, Callable[[Trial], None]] = {
    "switching": switching,
    "ptfs": ptfs,
    "cpt": continued("CPT, re-warmed", _rewarm),
    "cpt-equal-cost": continued("CPT, re-warmed, 1.45 passes", _rewarm, passes=1.45),
    "wsd-s": continued(f"WSD-S, decay {WSD_SHARE:g}", _wsd_s),
    "cpt-end-rate": continued("CPT, stays at the end rate", _end_rate),
}
"""In the order in which they run: a study that is stopped has the pairs that matter most."""


def jobs(scale: Scale, seeds: int, regimes: tuple[str, ...]) -> list[Job]:
    """All jobs, seed by seed, so that what is finished at any time is as balanced as can be."""
    return [Job(kind, regime, seed, scale) for seed in range(seeds) for regime in regimes for kind in KINDS]


def run(job: Job, text: SlicedText, cache: Path) -> dict[str, Any]:
    """The job's result, a JSON value: {"key", "job", "arms": {arm: [{"loss": {domain: nats}, "cost"}]}, "seconds"}."""
    start = time.perf_counter()
    trial = Trial(job, text, cache)
    KINDS[job.kind](trial)
    return {
        "key": job.key,
        "job": asdict(job),
        "arms": trial.versions,
        "seconds": round(time.perf_counter() - start, 1),
    }


class Results:
    """Finished jobs in a file, one JSON a line: a study that was cut off goes on where it was."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.found: dict[str, dict[str, Any]] = {}
        for line in file.read_text().splitlines() if file.is_file() else ():
            try:
                result = json.loads(line)
            except json.JSONDecodeError:
                continue  # the line that a kill tore: its job runs again
            self.found[result["key"]] = result

    def keep(self, result: Mapping[str, Any]) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a") as out:
            out.write(json.dumps(result) + "\n")
        self.found[result["key"]] = dict(result)
