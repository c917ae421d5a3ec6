"""The alarms of a run at work: after each control of the main path, logged, and where asked stop or command."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Mapping
from typing import Any

from velopath.alarms import new_alarms
from velopath.config_watch import AlarmsConfig
from velopath.runfolder import RunFolder

COMMAND_SECONDS = 60
"""A command of `on_alarm` that takes longer is ended: training waits for it."""


class AlarmWatch:
    """A watcher of a run's records: looks at each `control` of the main path, after it is in the run folder; on rank 0.

    `log` gets the `alarm` records; `note` a segment and a line where a command fails; `stop` is called with a sentence
    where `on_alarm` is "stop". What was said before a resume is not said again: the history is read from the folder.
    """

    def __init__(
        self,
        limits: AlarmsConfig,
        folder: RunFolder,
        log: Callable[[dict[str, Any]], None],
        note: Callable[[str, str], None],
        stop: Callable[[str], None],
    ) -> None:
        self.limits, self.folder = limits, folder
        self._log, self._note, self._stop = log, note, stop
        self._history: list[dict[str, Any]] | None = None

    def __call__(self, record: dict[str, Any]) -> None:
        if record["segment"] != "main":
            return
        if record["kind"] == "begin":  # earlier records may be void
            self._history = None
        elif record["kind"] == "control":
            self._look(record)

    def _look(self, record: dict[str, Any]) -> None:
        if self._history is None:
            self._history = self.folder.metrics("control", record["segment"])
        else:
            self._history.append(record)
        starts = [i for i, r in enumerate(self._history) if r.get("reason") == "start"]
        self._history = self._history[starts[-1] if starts else 0 :]
        alarms = new_alarms(self._history, self.limits)
        if not alarms:
            return
        said = {"kind": "alarm", **{k: record.get(k) for k in ("segment", "step", "slice")}}
        said["alarms"] = [a._asdict() for a in alarms]
        self._log(said)
        if self.limits.on_alarm == "stop":
            self._stop("; ".join(a.text for a in alarms))
        elif self.limits.on_alarm != "log":
            self._run(self.limits.on_alarm, said | {"run": str(self.folder.path)})

    def _run(self, command: str, value: dict[str, Any]) -> None:
        problem = run_command(command, value)
        if problem is not None:
            self._note(value["segment"], f"alarms.on_alarm: {problem}")


def run_command(command: str, value: Mapping[str, Any]) -> str | None:
    """Run a shell command of the user's with `value` as JSON on its input; what went wrong, or None."""
    try:
        done = subprocess.run(
            command, shell=True, input=json.dumps(value), text=True, timeout=COMMAND_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return f"the command {command!r} took more than {COMMAND_SECONDS} s and was ended"
    return f"the command {command!r} ended with exit code {done.returncode}" if done.returncode else None
