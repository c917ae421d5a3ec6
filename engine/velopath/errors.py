"""Errors of velopath: each says what was wrong, the value, what was expected and what to do.

Every error carries the exit code of the command that ends with it:

| code | class | meaning |
| --- | --- | --- |
| 0 | | done |
| 1 | `VelopathError` | anything else |
| 2 | `ConfigError` | the configuration or an argument is wrong; nothing was run |
| 3 | `DataError` | a data file is missing, malformed or does not fit, or a file cannot be written (`WriteError`) |
| 4 | `StoppedError` | stopped on request, a checkpoint was saved |
| 5 | `NumericalError` | NaN, infinity or a diverged loss |
| 6 | `AlarmError` | stopped by an alarm, a checkpoint was saved |
"""

from __future__ import annotations

from pathlib import Path


class VelopathError(Exception):
    """Base of every error that velopath raises on purpose."""

    exit_code = 1


class ConfigError(VelopathError, ValueError):
    """A setting or argument is wrong; raised before anything runs."""

    exit_code = 2


class PushRejectedError(ConfigError):
    """A weight push was refused (late, duplicate, not finite, unknown domain ...) and changed nothing."""


class DataError(VelopathError):
    """A data file is missing, malformed or does not fit.

    `path`, `line`, `sample` and `field` name the place as far as it is known; `line` counts from 1,
    `sample` from 0. They are part of the message.
    """

    exit_code = 3

    def __init__(
        self,
        problem: str,
        *,
        path: str | Path | None = None,
        line: int | None = None,
        sample: int | None = None,
        field: str | None = None,
    ) -> None:
        self.problem, self.path, self.line, self.sample, self.field = problem, path, line, sample, field
        place = str(path) if path is not None else ""
        if line is not None:
            place += f":{line}"
        if sample is not None:
            place += f" sample {sample}"
        if field is not None:
            place += f" field {field!r}"
        super().__init__(f"{place.strip()}: {problem}" if place else problem)


class WriteError(DataError):
    """A file or folder cannot be written: full or read-only disk, quota, I/O error. What was there before is whole."""


class StoppedError(VelopathError):
    """The run was asked to stop; its state is saved and `velopath train` resumes it."""

    exit_code = 4


class AlarmError(StoppedError):
    """An alarm stopped the run as `alarms.on_alarm: stop` asks; its state is saved and `velopath train` resumes it."""

    exit_code = 6


class NumericalError(VelopathError, ArithmeticError):
    """NaN, infinity or a diverged loss; optimiser and controller were left untouched."""

    exit_code = 5
