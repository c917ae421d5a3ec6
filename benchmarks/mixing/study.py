"""The mixing study: what rules for domain weights gain at one budget, beside the best that static weights can do.

`python -m benchmarks mixing` goes on where an interrupted study was. Metrics, arms, seeds and budgets are fixed here
and in `arms` and `headroom`, before the runs; seed 0 serves the search and every choice, the others the results.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.mixing.arms import ARMS, Arm, Study
from benchmarks.mixing.corpus import made_up_data, study_data
from benchmarks.mixing.headroom import METRICS, Surface, random_mixtures
from benchmarks.mixing.sensitivity import SENSITIVITY
from benchmarks.mixing.targets import LAWS, decayed_errors, target_errors
from benchmarks.mixing.trainer import Bench, Results, Scale

SEARCH_SEED = 0
LEAST_MIXTURES = 4
TARGET_SAMPLE = 4
"""On the search seed the study of targets evaluates this many times the held-out tokens that rules see."""


@dataclass(frozen=True)
class Form:
    """How much of the study: seeds of the results, random mixtures of the search, sizes, metrics whose best static
    mixture is run."""

    name: str
    seeds: tuple[int, ...]
    mixtures: int
    scale: Scale
    arms: tuple[str, ...] = tuple(ARMS)
    metrics: tuple[str, ...] = METRICS
    laws: tuple[str, ...] = LAWS
    target_seeds: tuple[int, ...] = (SEARCH_SEED,)
    sensitivity: tuple[int, ...] = ()
    """Seeds of the study of sensitivity."""


_SMALL_ARMS = (
    "static natural",
    "static uniform",
    "Velocitune, faithful",
    "marginal gain, worst",
    "marginal gain, given",
)
FORMS = {
    "smoke": Form(
        "smoke",
        (1,),
        2,
        Scale(rows=2, steps=40, base_steps=4, warmup=2, test_tokens=512, heldout_tokens=256),
        ("static natural", "Velocitune, faithful", "marginal gain, worst"),
        ("worst",),
        ("auto",),
        (),
        sensitivity=(1,),
    ),
    "small": Form("small", (1, 2), 12, Scale(steps=400), _SMALL_ARMS),
    "full": Form("full", (1, 2, 3, 4, 5), 20, Scale(), sensitivity=(1, 2, 3)),
    "gpu": Form(
        "gpu",
        (1, 2, 3, 4, 5),
        32,
        Scale(preset="small", device="cuda", rows=64, steps=1500, base_steps=1000, warmup=60, peak=1e-3),
        sensitivity=(1, 2, 3),
    ),
}
"""smoke: that the code runs. small: half an hour on two cores. full: hours, resumable. gpu: the same, 7M parameters."""


class OutOfTimeError(Exception):
    """The time is up; what is finished is kept and reported."""


def open_study(form: str, folder: Path) -> Study:
    """The study's data, base models and finished runs in `folder`."""
    data = made_up_data(folder / "data") if form == "smoke" else study_data(folder / "data")
    return Study(Bench(data, folder), Results(folder / "runs.jsonl"), FORMS[form].scale)


def run(form: str, *, folder: Path, minutes: float | None = None) -> dict[str, Any]:
    """Run (or go on with) the study; returns all that is finished: headroom, arms, target errors.

    `folder` keeps data, base models and finished runs; no run is begun after `minutes` (0: report what there is).
    """
    chosen = FORMS[form]
    study = open_study(form, folder)
    start = time.perf_counter()

    def check() -> None:
        if minutes is not None and time.perf_counter() - start >= 60 * minutes:
            raise OutOfTimeError

    study.before_run = check
    found: dict[str, Any] = {
        "form": chosen.name,
        "scale": asdict(chosen.scale),
        "natural": study.natural,
        "seeds": list(chosen.seeds),
        "search_seed": SEARCH_SEED,
        "headroom": None,
        "arms": {},
        "targets": {},
        "sensitivity": {},
    }
    complete = True
    for step in _steps(study, chosen, found):
        try:
            step()
        except OutOfTimeError:
            complete = False  # what is finished further on is reported all the same
            if found["headroom"] is None:
                break
    return found | {"complete": complete}


def _steps(study: Study, form: Form, found: dict[str, Any]) -> Iterator[Callable[[], None]]:
    """The study's parts in their order, each of which adds to `found`."""
    yield lambda: _search(study, form, found)
    for m in form.metrics:
        yield lambda m=m: _verify(study, found, m)  # type: ignore[misc]
    for seed in form.seeds:
        for name in form.arms:
            yield lambda name=name, seed=seed: _arm(study, found, name, ARMS[name](study, seed), seed)  # type: ignore[misc]
        for m in form.metrics:
            yield lambda m=m, seed=seed: _arm(  # type: ignore[misc]
                study,
                found,
                f"best static for {m}",
                study.settings(seed, found["headroom"][m]["best"]),
                seed,
            )
    for seed in form.seeds if form.name != "small" else ():
        for name in ("natural", "uniform"):
            yield lambda seed=seed, name=name: found["targets"].update(decayed_errors(study, seed, name))  # type: ignore[misc]
    for seed in (*form.target_seeds, *form.seeds):
        tokens = TARGET_SAMPLE * study.scale.heldout_tokens if seed == SEARCH_SEED else None
        for name in ("natural", "uniform"):
            yield lambda seed=seed, name=name, tokens=tokens: found["targets"].update(  # type: ignore[misc]
                target_errors(study, seed, name, tokens, form.laws)
            )

    for seed in form.sensitivity:
        for what, values in islice(SENSITIVITY.items(), 1 if form.name == "smoke" else None):
            for value, arm in islice(values.items(), 1 if form.name == "smoke" else None):
                yield lambda what=what, value=value, arm=arm, seed=seed: _vary(  # type: ignore[misc]
                    study, found["sensitivity"].setdefault(what, {}).setdefault(str(value), {}), arm, seed
                )


def _vary(study: Study, found: dict[str, Any], arm: Arm, seed: int) -> None:
    result = study.run(arm(study, seed))
    found[str(seed)] = study.metrics.all(result["test"]) | {"steps": result["steps"]}


def _search(study: Study, form: Form, found: dict[str, Any]) -> None:
    """Fit the mixtures that are finished, and keep the best found once: `FOLDER/best.json`."""
    mixtures = [study.natural, study.uniform, *random_mixtures(study.natural, form.mixtures)]
    done, tests = [], []
    for mixture in mixtures:
        settings = study.settings(SEARCH_SEED, mixture)
        try:
            tests.append(study.run(settings)["test"])
            done.append(mixture)
        except OutOfTimeError:
            continue  # later ones may be finished
    if len(tests) < LEAST_MIXTURES:
        raise OutOfTimeError
    mixtures = done
    kept = study.bench.folder / f"best-{form.name}.json"
    surface = Surface.fit(mixtures, tests)
    metrics = study.metrics
    if not kept.is_file():
        kept.write_text(json.dumps({m: surface.best(m, metrics) for m in METRICS}))
    best = json.loads(kept.read_text())
    found["mixtures"] = [
        {"shares": shares, "test": test, **metrics.all(test)}
        for shares, test in zip(mixtures, tests, strict=True)
    ]
    found["regression"] = {
        name: {"slope": float(theta[1]), "known": float(k), "error": float(error)}
        for name, theta, k, error in zip(surface.names, surface.theta, surface.k, surface.error, strict=True)
    }
    found["headroom"] = {
        m: {
            "natural": metrics.of(m, tests[0]),
            "uniform": metrics.of(m, tests[1]),
            "best of the random ones": min(metrics.of(m, test) for test in tests),
            "best": best[m],
            "predicted": metrics.of(m, surface.predict_named(best[m])),
        }
        for m in METRICS
    }


def _verify(study: Study, found: dict[str, Any], m: str) -> None:
    """Run the predicted best on the search's own seed: what the regression's optimum really gives."""
    settings = study.settings(SEARCH_SEED, found["headroom"][m]["best"])
    found["headroom"][m]["verified"] = study.metrics.of(m, study.run(settings)["test"])


def _arm(study: Study, found: dict[str, Any], name: str, settings: Any, seed: int) -> None:
    result = study.run(settings)
    found["arms"].setdefault(name, {})[str(seed)] = {
        **study.metrics.all(result["test"]),
        "test": result["test"],
        "stderr": result["stderr"],
        "shares": result["shares"],
        "epochs": result["epochs"],
        "steps": result["steps"],
        "evaluation_tokens": result["evaluation_tokens"],
        "other_tokens": result["settings"]["other_tokens"],
        "weights": result["weights"],
        "settings": _brief(result["settings"]),
    }


def _brief(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in settings.items() if k != "scale"}
