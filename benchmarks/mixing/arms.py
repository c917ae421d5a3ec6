"""The arms of the study: every rule at the same budget, proxies and evaluations taken off its training steps."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

import benchmarks.mixing.rules  # noqa: F401 - registers them
from benchmarks.mixing.headroom import Metrics, given_weights
from benchmarks.mixing.trainer import FORWARD_COST, Bench, Results, RunSettings, Scale
from velopath.gain import MarginalGain
from velopath.targets import Targets

TRUNK_SHARE = 0.15
"""How far a proxy trunk reaches, as a share of a run's steps."""
POINTS = (0.06, 0.07, 0.08, 0.09, 0.1, 0.1134, 0.1267, 0.15)
"""Where a trunk is evaluated: 8 points, the first one after the warm-up."""
START_SHARE = 0.05
"""Where the warm-up ends: training losses of the first point are those since then."""
TARGET_POINTS = (START_SHARE, *POINTS)
"""The study of targets adds the end of the warm-up."""
LATER = (0.175, 0.2, 0.25, 0.3167, 0.4, 0.5, 0.6333, 0.8, 1.0)
"""Where a run that serves as truth is evaluated further."""
UPDATES = 12
"""Of rules that are driven by held-out losses, in a whole run. Rules on training losses make twice as many."""

Arm = Callable[["Study", int], RunSettings]


class Study:
    """Runs by settings, and what arms need of other runs: proxies' curves and the true losses at the end."""

    def __init__(self, bench: Bench, results: Results, scale: Scale) -> None:
        self.bench, self.results, self.scale = bench, results, scale
        self.begun = 0
        self.before_run: Callable[[], None] = lambda: None
        """Called before a run that is not finished yet; what it raises ends the study."""
        self.natural = dict(bench.data.natural)
        self.given = given_weights(tuple(self.natural), bench.data.known)
        self.metrics = Metrics(self.natural, self.given)
        self.uniform = {name: 1 / len(self.natural) for name in self.natural}

    def run(self, settings: RunSettings) -> dict[str, Any]:
        """The result of a run: the one kept, or a new one's."""
        if settings not in self.results:
            self.before_run()
            self.begun += 1
            what = f"{settings.controller}, seed {settings.seed}, {settings.train_steps(len(self.natural))} steps"
            print(f"mixing: run {self.begun} of this call: {what} ...", file=sys.stderr, flush=True)
        return self.results.of(self.bench, settings)

    def settings(self, seed: int, weights: Mapping[str, float] | None = None, **changes: Any) -> RunSettings:
        """A static run at these shares (default: natural), with changes."""
        every = max(round(self.scale.steps / UPDATES), 1)
        start = RunSettings(seed, dict(weights or self.natural), self.scale, every=every)
        return replace(start, **{"heldout_tokens": self.scale.heldout_tokens, **changes})

    def truth(
        self,
        seed: int,
        weights: Mapping[str, float],
        tokens: int | None = None,
        shares: tuple[float, ...] = (*POINTS, *LATER),
    ) -> dict[str, Any]:
        """A run at a constant rate up to the last of `shares`, with its control losses over time in `watched`."""
        watch = tuple(sorted({round(share * self.scale.steps) for share in shares}))
        stop = watch[-1] if watch[-1] < self.scale.steps else None
        return self.run(
            self.settings(
                seed,
                weights,
                constant=True,
                watch=watch,
                watch_tokens=tokens or self.scale.heldout_tokens,
                stop=stop,
            )
        )

    def curves(
        self, result: Mapping[str, Any], upto: float = TRUNK_SHARE
    ) -> dict[str, list[tuple[float, float]]]:
        """(tokens, nats) by domain: the points of a `truth` up to a share of its steps."""
        points = sorted((int(step), losses) for step, losses in result["watched"].items())
        points = [(step, losses) for step, losses in points if step <= upto * self.scale.steps + 0.5]
        return {
            name: [(step * self.scale.step_tokens, losses[name]) for step, losses in points]
            for name in self.natural
        }

    def free_curves(self, result: Mapping[str, Any]) -> dict[str, list[tuple[float, float]]]:
        """(tokens, nats) by domain of the training losses between the steps watched, in the middle of each stretch.

        A domain that no batch of a stretch held has no point there.
        """
        points = sorted((int(step), losses) for step, losses in result["trained"].items())
        curves: dict[str, list[tuple[float, float]]] = {name: [] for name in self.natural}
        for (before, _), (step, losses) in zip(points, points[1:], strict=False):
            for name, loss in losses.items():
                curves[name].append(((before + step) / 2 * self.scale.step_tokens, loss))
        return curves

    def fitted(self, result: Mapping[str, Any]) -> Targets:
        """The laws of a trunk's `curves`, read at the budget."""
        return Targets.fit(self.curves(result), self.scale.budget, above_last="last")

    def targets(self, result: Mapping[str, Any]) -> dict[str, float]:
        """Targets of Velocitune by domain."""
        return self.fitted(result).losses

    def oracle(self, result: Mapping[str, Any]) -> dict[str, float]:
        """The losses that a `truth` really ended with, undecayed."""
        return dict(result["watched"][str(self.scale.steps)])

    @property
    def proxy_tokens(self) -> int:
        """Training tokens' worth of a proxy trunk of its own with its evaluations."""
        return round(TRUNK_SHARE * self.scale.budget) + self.trunk_evaluations

    @property
    def trunk_evaluations(self) -> int:
        """Training tokens' worth of evaluating the trunk."""
        return round(FORWARD_COST * len(POINTS) * self.scale.heldout_tokens * len(self.natural))


def velocitune_faithful(study: Study, seed: int) -> RunSettings:
    """The rule as specified, from natural shares, targets from a proxy trunk of its own at natural shares.

    A domain that starts at or below its target leaves the rule undefined (`start` refuses it). So that the arm can run
    at all, such a domain takes the mean velocity of the others.
    """
    targets = study.targets(study.truth(seed, study.natural))
    return study.settings(
        seed,
        controller="velocitune",
        options={"targets": targets, "small_gap": "mean", "min_gap": 0.0},
        other_tokens=study.proxy_tokens,
    )


def velocitune_guarded(study: Study, seed: int, updates: int = UPDATES, **changes: Any) -> RunSettings:
    """Velocitune with our guards: small gaps take the mean, floor, cap, and a leak toward the prior; targets from the
    run's own first steps, at no cost but their evaluations; uniform start and targets for uniform shares."""
    targets = study.targets(study.truth(seed, study.uniform, shares=POINTS))
    every = max(round(study.scale.steps / updates), 1)
    return study.settings(
        seed,
        study.uniform,
        controller="velocitune",
        options={
            "targets": targets,
            "small_gap": "mean",
            "floor": 0.05,
            "cap": 0.5,
            "smoothing": 0.2,
            "smoothing_to": "prior",
            "step_size": 0.5,
            **changes,
        },
        other_tokens=study.trunk_evaluations,
        every=every,
        begin=-(-round(TRUNK_SHARE * study.scale.steps) // every) * every,
    )


def velocitune_free(study: Study, seed: int, updates: int = UPDATES, **changes: Any) -> RunSettings:
    """The guarded arm on training losses alone: they give the points of the laws and drive the rule, so that all it
    costs is one small evaluation of the starting model."""
    guarded = velocitune_guarded(study, seed, updates)
    start = study.truth(seed, study.uniform, shares=(START_SHARE, *POINTS))
    targets = Targets.fit(study.free_curves(start), study.scale.budget, above_last="last").losses
    return replace(
        guarded,
        options={**guarded.options, "targets": targets, "missing": "last", **changes},
        signal="training",
        heldout_tokens=512,
        other_tokens=0,
    )


def predicted_curve(study: Study, seed: int) -> RunSettings:
    """Velocity against the law's predicted curve, on top of the guarded arm's start, shares and points."""
    guarded = velocitune_guarded(study, seed)
    fitted = study.fitted(study.truth(seed, study.uniform, shares=POINTS))
    laws = {name: domain.law for name, domain in fitted.domains.items()}
    curves = {name: (law.E, law.B, law.beta) for name, law in laws.items() if law is not None}
    return replace(
        guarded, controller="predicted_curve", options={"curves": curves, "end": float(study.scale.budget)}
    )


def velocitune_faithful_oracle(study: Study, seed: int) -> RunSettings:
    """The rule as specified with the true undecayed losses at the end as targets, at no proxy cost."""
    default = velocitune_faithful(study, seed)
    options = {**default.options, "targets": study.oracle(study.truth(seed, study.natural))}
    return replace(default, options=options, other_tokens=0)


def dynamic_batch_loading(study: Study, seed: int) -> RunSettings:
    """Dynamic batch loading (published code) toward the same targets as the faithful rule."""
    return study.settings(
        seed,
        controller="dynamic_batch_loading",
        options={"targets": study.targets(study.truth(seed, study.natural))},
        other_tokens=study.proxy_tokens,
    )


def ado(study: Study, seed: int) -> RunSettings:
    """ADO from natural shares, on training losses (its own signal, free)."""
    return study.settings(seed, controller="ado", signal="training", every=max(study.scale.steps // 24, 1))


def odm(study: Study, seed: int) -> RunSettings:
    """ODM from natural shares, on training losses (its own signal, free)."""
    return study.settings(seed, controller="odm", signal="training", every=max(study.scale.steps // 24, 1))


def average_of(arm: Arm) -> Arm:
    """Static at the average shares that another arm's run read by: what is left of it is the ordering."""

    def settings(study: Study, seed: int) -> RunSettings:
        shares = study.run(arm(study, seed))["shares"]
        return study.settings(seed, {name: round(share, 4) for name, share in shares.items()})

    return settings


def marginal_gain(metric: str, updates: int = 24) -> Arm:
    """Our own rule for a metric, on training losses: no proxy, one small evaluation at the start.

    For the means it holds its first shares, so it runs as the static mixture that it is.
    """

    def settings(study: Study, seed: int) -> RunSettings:
        wanted: Any = {"natural": study.natural, "given": study.given}.get(metric, metric)
        if wanted != "worst":
            flat = dict.fromkeys(study.natural, 0.0)
            return study.settings(seed, MarginalGain(metric=wanted).start(flat, study.natural).weights)
        return study.settings(
            seed,
            study.uniform,
            controller="marginal_gain",
            options=asdict(MarginalGain(metric=wanted)),  # in full: the key follows its defaults
            signal="training",
            every=max(study.scale.steps // updates, 1),
            heldout_tokens=512,
        )

    return settings


ARMS: dict[str, Arm] = {
    "static natural": lambda study, seed: study.settings(seed),
    "static uniform": lambda study, seed: study.settings(seed, study.uniform),
    "Velocitune, faithful": velocitune_faithful,
    "static at faithful's average": average_of(velocitune_faithful),
    "Velocitune, faithful, oracle targets": velocitune_faithful_oracle,
    "Velocitune, our guards": velocitune_guarded,
    "Velocitune, our guards, free signal": velocitune_free,
    "static at its average": average_of(velocitune_free),
    "static at our guards' average": average_of(velocitune_guarded),
    "dynamic batch loading": dynamic_batch_loading,
    "marginal gain, mean": marginal_gain("mean"),
    "marginal gain, worst": marginal_gain("worst"),
    "marginal gain, natural": marginal_gain("natural"),
    "marginal gain, given": marginal_gain("given"),
    "velocity against the law's curve": predicted_curve,
    "ADO": ado,
    "ODM": odm,
}
