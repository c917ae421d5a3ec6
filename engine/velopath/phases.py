"""Where the time of a step goes: seconds per phase, by the device's own clock where the device does the work."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch

PHASES = ("data", "forward", "backward", "optimizer", "control", "evaluate", "save")
"""Waiting for rows; forward with loss, backward, clipping and update; controller, evaluations, checkpoints."""

Stamp = float | torch.cuda.Event
Taken = tuple[list[tuple[str | None, Stamp]], defaultdict[str, float]]


class Phases:
    """Seconds of each phase of `PHASES` since the last `take`.

    On a GPU the parts of a step are bounded by events in the stream: nothing waits, and a step queued ahead counts
    when it runs. The other phases, which wait for the device anyway, and all on a CPU are the host's time.
    """

    def __init__(self, device: torch.device) -> None:
        self._events = device.type == "cuda"
        self._free: list[torch.cuda.Event] = []
        self._marks: list[tuple[str | None, Stamp]] = []
        self._host: defaultdict[str, float] = defaultdict(float)

    def begin(self, phase: str | None) -> None:
        """End the running part of the step here and begin `phase`; None: begin nothing."""
        if not self._events:
            self._marks.append((phase, time.perf_counter()))
            return
        event = self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        self._marks.append((phase, event))

    @contextmanager
    def host(self, phase: str) -> Iterator[None]:
        """Count the host's time in this block."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._host[phase] += time.perf_counter() - start

    def take(self) -> Taken:
        """What was counted so far, for `seconds`; the next is counted from 0."""
        taken = self._marks, self._host
        self._marks, self._host = [], defaultdict(float)
        return taken

    def seconds(self, taken: Taken) -> dict[str, float]:
        """{phase: seconds} of what was taken; the device must have come past it."""
        marks, spent = taken
        for (phase, start), (_, end) in pairwise(marks):
            if phase is None:
                continue
            if isinstance(start, float) and isinstance(end, float):
                spent[phase] += end - start
            elif isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
                spent[phase] += start.elapsed_time(end) / 1e3
        self._free += [stamp for _, stamp in marks if not isinstance(stamp, float)]
        return {phase: spent[phase] for phase in PHASES if phase in spent}
