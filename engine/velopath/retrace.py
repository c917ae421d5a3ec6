"""What a run's controller saw, read back from its control records, and made again under the same or another controller.

Controllers are pure, so the logged losses, progress and first weights give every update again, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from velopath import controllers
from velopath.config import ControlConfig, RunConfig
from velopath.configured import configured, fitted_losses, with_decay_gain
from velopath.configured_plan import slice_steps
from velopath.controllers import Controller
from velopath.domains import DomainLoss, Progress
from velopath.errors import ConfigError
from velopath.runconfig import recorded_config, recorded_rows
from velopath.runfolder import Record, RunFolder
from velopath.targets import Targets


@dataclass(frozen=True)
class Seen:
    """One control: the losses (nats per token, with standard errors where known) and the progress it was given."""

    step: int
    losses: DomainLoss
    progress: Progress
    record: Record

    @property
    def result(self) -> dict[str, float]:
        """The weights that the controller answered: proposed in shadow mode, else in force from here."""
        return dict(self.record.get("proposed") or self.record["weights"])


@dataclass(frozen=True)
class Course:
    """The controls of one slice, from the start of its controller on; `targets` (name -> nats) are those it had."""

    slice: str
    controls: tuple[Seen, ...]
    targets: Mapping[str, float] | None

    @property
    def domains(self) -> tuple[str, ...]:
        return tuple(sorted(self.controls[0].record["weights"]))


class Update(NamedTuple):
    """One update made again: its control, and the controller's states before and after (None before the start)."""

    seen: Seen
    before: Any
    after: Any


def read_courses(folder: RunFolder, segment: str = "main") -> list[Course]:
    """The controls of a segment, slice by slice. Raises `ConfigError` where there are none."""
    config = recorded_config(folder)
    found: list[list[Record]] = []
    for record in folder.metrics("control", segment):
        if record["reason"] == "start" or not found:
            found.append([])
        found[-1].append(record)
    if not found:
        raise ConfigError(f"segment {segment!r} of {folder.path} has no control record; it had no controller")
    return [_course(config, records) for records in found]


def controller_of(folder: RunFolder, course: Course, control: ControlConfig | None = None) -> Controller:
    """The controller of `control` (None: the recorded one) for a course.

    Its targets are those the course had, else those of targets.json, read at the slice's end; over both go those that
    `control` gives.
    """
    config = recorded_config(folder)
    choice = control if control is not None else config.control

    def targets() -> Mapping[str, float]:
        known = course.targets
        if known is None:
            known = with_decay_gain(_fitted(folder, config, course.slice), choice.decay_gain, course.domains)
        changed = isinstance(choice.targets, dict) and choice.targets != config.control.targets
        found = dict(known) | (choice.targets if changed and isinstance(choice.targets, dict) else {})
        if missing := sorted(set(course.domains) - set(found)):
            raise ConfigError(
                f"controller {choice.controller!r} needs a target for domain {missing[0]!r} and the run recorded none: "
                f"give it as targets.{missing[0]}=NATS"
            )
        return {name: found[name] for name in course.domains}

    return configured(choice, targets=targets, tokens=lambda: course.controls[0].progress.epoch or None)


def retrace(
    controller: Controller, course: Course, weights: Mapping[str, float] | None = None
) -> list[Update]:
    """All updates of a course under `controller`, from `weights` (None: those in force at its start)."""
    first, *rest = course.controls
    given = first.record["weights"] if weights is None else weights
    state = controllers.start(controller, first.losses, given, first.progress)
    made = [Update(first, None, state)]
    for seen in rest:
        after, _ = controllers.observe(controller, state, seen.losses, seen.progress)
        made.append(Update(seen, state, after))
        state = after
    return made


def first_weights(folder: RunFolder, course: Course) -> dict[str, float]:
    """The weights a controller of this slice starts from: as configured, else the natural shares, else as recorded."""
    given = recorded_config(folder).data.slices[course.slice].weights
    return dict(given or course.controls[0].progress.epoch or course.controls[0].record["weights"])


def _course(config: RunConfig, records: Sequence[Record]) -> Course:
    first = records[0]
    slice = first.get("slice") or _slice_at(config, first["step"])
    return Course(slice, tuple(_seen(r, first["step"]) for r in records), first.get("target"))


def _seen(record: Record, start: int) -> Seen:
    """A control as recorded; records from before there were `losses` and `progress` have the losses as `last`."""
    losses = record.get("losses") or record["last"]
    names = tuple(sorted(record["weights"]))
    errors = record.get("stderr")
    told = record.get("progress")
    return Seen(
        record["step"],
        DomainLoss(
            names,
            tuple(float(losses.get(n, 0.0)) for n in names),
            tuple(int(n in losses) for n in names),
            None if errors is None else tuple(float(errors.get(n, 0.0)) for n in names),
        ),
        Progress(record["step"], start) if told is None else Progress.from_json(told),
        record,
    )


def _slice_at(config: RunConfig, step: int) -> str:
    last = 0
    for name, steps in slice_steps(config).items():
        last += steps
        if step < last:
            return name
    return name


def _fitted(folder: RunFolder, config: RunConfig, slice: str) -> dict[str, float]:
    """Targets of targets.json at the tokens of the slice's end; empty where the run has none."""
    value = folder.read_json("targets.json")
    if value is None:
        return {}
    steps = 0
    for name, count in slice_steps(config).items():
        steps += count
        if name == slice:
            break
    recorded = recorded_rows(folder)
    rows = config.train.rows if recorded is None else recorded[0]
    fitted = Targets.from_json(value).at(steps * rows * config.train.row_tokens, above_last="last")
    return fitted_losses(config.control, fitted)
