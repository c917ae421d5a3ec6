"""What a run folder says about the health of its main path, a branch under way or a version; and about when to cut."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from velopath import health
from velopath.config import RunConfig
from velopath.config_watch import HealthConfig
from velopath.configured_plan import branch_share, slice_steps
from velopath.errors import ConfigError, DataError
from velopath.forecast import Curve, Cut, Forecast, expected_gain, fit_forecast
from velopath.health import Finding, Limits
from velopath.lineage import Lineage, Version
from velopath.runconfig import recorded_config
from velopath.runfolder import Record, RunFolder
from velopath.runlineage import read_lineage
from velopath.schedule import LrPath

MAIN = "main"


@dataclass(frozen=True)
class Health:
    """The health of `name` at `stage`, with every rule's finding."""

    name: str
    stage: Literal["before", "during", "after"]
    step: int
    findings: tuple[Finding, ...]

    @property
    def verdict(self) -> health.Level:
        return health.verdict(self.findings)

    def to_json(self) -> dict[str, Any]:
        """A JSON value: name, stage, step, verdict, findings, worst first."""
        worst = sorted(self.findings, key=lambda f: -health.LEVELS.index(f.level))
        facts = {"name": self.name, "stage": self.stage, "step": self.step, "verdict": self.verdict}
        return {**facts, "findings": [f.to_json() for f in worst]}


def run_health(folder: RunFolder, name: str | None = None) -> Health:
    """The health of a version (after), of a branch that was begun (during), or of the main path (before; no name).

    Raises `ConfigError` on a name that neither lineage nor metrics know, and where nothing was evaluated yet.
    """
    lineage, config = read_lineage(folder), recorded_config(folder)
    limits = limits_of(config.health)
    if name is None:
        return _before(folder, limits)
    version = next((v for v in lineage.versions if v.name == name), None)
    if version is not None:
        return _after(lineage, version, limits)
    if not folder.metrics("version", name):
        known = ", ".join(v.name for v in lineage.versions) or "none"
        raise ConfigError(
            f"no version or branch {name!r} in this run; versions are {known}; leave the name out for main"
        )
    return _during(folder, config, lineage, name, limits)


def limits_of(settings: HealthConfig) -> Limits:
    """The limits that a configuration sets."""
    return Limits(**settings.model_dump(exclude={"command", "halt"}))


def run_forecast(folder: RunFolder) -> Forecast:
    """The forecast of the main path's present step, from its evaluations and the versions that were cut."""
    config, lineage = recorded_config(folder), read_lineage(folder)
    evals = folder.metrics("eval", MAIN)
    if not evals:
        raise ConfigError("the main path was not evaluated yet: nothing to forecast from")
    last, lengths = evals[-1], slice_steps(config)
    cuts = [
        Cut(
            version.name,
            version.branch_step,
            version.steps,
            version.notes["before"],
            version.heldout_loss,
            _curves(evals, version.slice, version.branch_step),
            _first_step(evals, version.slice),
        )
        for version in sorted(lineage.versions, key=lambda v: v.branch_step)
        if "before" in version.notes
        and _long_enough(
            _curves(evals, version.slice, version.branch_step), _first_step(evals, version.slice)
        )
    ]
    return fit_forecast(
        last["step"],
        lengths[last["slice"]] if last["slice"] in lengths else last["step"],
        _curves(evals, last["slice"], last["step"]),
        cuts,
        last["loss"],
        _first_step(evals, last["slice"]),
    )


def present_share(folder: RunFolder) -> float:
    """The branch share of a version that were cut now: that of the slice which the main path reads."""
    config, evals = recorded_config(folder), folder.metrics("eval", MAIN)
    name = evals[-1]["slice"] if evals else None
    return branch_share(config, name) if name in config.data.slices else config.path.branch_share


def _first_step(evals: list[Record], slice: str) -> int:
    """The step at which the main path first looked at a slice: its controller starts there."""
    return min((r["step"] for r in evals if r.get("slice") == slice), default=0)


def _curves(evals: list[Record], slice: str, until: int) -> dict[str, Curve]:
    """domain -> (step, held-out loss) of the main path on one slice, up to a step."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for record in evals:
        if record.get("slice") == slice and record["step"] <= until:
            for name, loss in record["loss"].items():
                curves.setdefault(name, []).append((record["step"], loss))
    return {name: tuple(curve) for name, curve in curves.items()}


def _long_enough(curves: Mapping[str, Curve], origin: int) -> bool:
    return bool(curves) and all(sum(step > origin for step, _ in curve) >= 2 for curve in curves.values())


def _before(folder: RunFolder, limits: Limits) -> Health:
    evals, steps = folder.metrics("eval", MAIN), folder.metrics("step", MAIN)
    if not evals:
        raise ConfigError("the main path was not evaluated yet: nothing to judge it by")
    curves: dict[str, list[tuple[int, float]]] = {}
    for record in evals:
        for name, loss in record["loss"].items():
            curves.setdefault(name, []).append((record["step"], loss))
    read: dict[str, dict[str, float]] = {}
    for record in {r["slice"]: r for r in folder.metrics("exposure", MAIN)}.values():
        for name, facts in record["domains"].items():
            sums = read.setdefault(name, {"tokens": 0.0, "epochs": 0.0})
            sums["tokens"] += facts["tokens"]
            sums["epochs"] += facts["epochs"]
    # New data makes a jump that is no spike: only the present slice's steps are compared with each other.
    here = [r["step"] for r in evals if r.get("slice") == evals[-1].get("slice")]
    recent = [r for r in steps if r["step"] > here[0]]
    found = health.before(curves, _numbers(recent, "loss"), _numbers(recent, "grad_norm"), read, limits)
    return Health(MAIN, "before", max(r["step"] for r in [*evals, *steps]), tuple(found))


def _during(folder: RunFolder, config: RunConfig, lineage: Lineage, name: str, limits: Limits) -> Health:
    evals = folder.metrics("eval", name)
    start = folder.metrics("version", name)[0]
    saved = sorted((folder.path / "checkpoints" / name).glob("step-*/state.json"))
    if not saved:
        raise DataError(
            f"branch {name!r} has no checkpoint yet; look again later", path=folder.path / "checkpoints"
        )
    path = LrPath.from_json(RunFolder(saved[-1].parent).read_json("state.json")["path"])
    assert path.end_step is not None and path.decay_from is not None
    base = next((e["loss"] for e in folder.metrics("eval", MAIN) if e["step"] == start["step"]), None)
    points = [(e["step"], e["loss"]) for e in evals if e["step"] > start["step"]]
    found: list[Finding] = []
    step = points[-1][0] if points else start["step"]
    peak = path.rate(path.decay_from)
    if points:
        first = base or points[0][1]
        gain = _mean_gain(first, points[-1][1])
        expected = _expected(lineage, path.end_step - path.decay_from) * (1 - path.rate(step) / peak)
        found += health.during(
            gain, expected, step, path.end_step, limits, final_rate=path.rate(path.end_step), peak=peak
        )
    else:
        found += health.during(
            0, 0, step, path.end_step, limits, final_rate=path.rate(path.end_step), peak=peak
        )
    return Health(name, "during", step, tuple(found))


def _expected(lineage: Lineage, steps: int) -> float:
    """What a branch of `steps` should gain, by the versions cut so far; the decay is taken to pay it as its rate falls.
    Our choice."""
    cut = [v for v in lineage.versions if "before" in v.notes]
    return expected_gain([(v.steps, _mean_gain(v.notes["before"], v.heldout_loss)) for v in cut], steps)


def _after(lineage: Lineage, version: Version, limits: Limits) -> Health:
    earlier = [v for v in lineage.versions if v.step < version.step]
    previous = max(earlier, key=lambda v: v.step, default=None)
    found = health.after(
        version.heldout_loss,
        version.notes.get("before", {}),
        previous.heldout_loss if previous is not None else {},
        limits,
        previous_name=previous.name if previous is not None else "",
    )
    return Health(version.name, "after", version.step, tuple(found))


def _mean_gain(before: Mapping[str, float], after: Mapping[str, float]) -> float:
    both = sorted(set(before) & set(after))
    return sum(before[n] - after[n] for n in both) / len(both) if both else 0.0


def _numbers(records: list[Record], key: str) -> list[tuple[int, float]]:
    return [(r["step"], float(r[key])) for r in records if r.get(key) is not None]
