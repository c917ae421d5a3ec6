"""A profile of a few steps: a Chrome trace and a table of the operators that took longest, in the run folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

WARM_UP = 3
"""Steps before the profile begins: compilation, first allocations."""
OPERATORS = 30


class Profile:
    """Profiles `steps` steps after the first `WARM_UP` that it sees; `step` is called after each one.

    Writes `folder`/trace.json (chrome://tracing, Perfetto) and `folder`/operators.txt, then calls `done` with a line
    for people. `close` writes what there is, where training ended before.
    """

    def __init__(self, folder: Path, steps: int, done: Callable[[str], None]) -> None:
        self._folder, self._steps, self._done = folder, steps, done
        self._seen = 0
        self._profile: profile | None = None

    def step(self) -> None:
        """A step has been launched."""
        self._seen += 1
        if self._seen == WARM_UP:
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            self._profile = profile(activities=activities, record_shapes=True)
            self._profile.start()
        elif self._seen == WARM_UP + self._steps:
            self.close()

    def close(self) -> None:
        """End the profile and write its files; nothing where none is running."""
        if self._profile is None:
            return
        running, self._profile = self._profile, None
        running.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        running.export_chrome_trace(str(self._folder / "trace.json"))
        by = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = running.key_averages().table(sort_by=by, row_limit=OPERATORS)
        (self._folder / "operators.txt").write_text(table + "\n", encoding="utf-8")
        steps = min(self._seen, WARM_UP + self._steps) - WARM_UP
        self._done(
            f"profile of {steps} steps: {self._folder / 'trace.json'}, {self._folder / 'operators.txt'}"
        )
