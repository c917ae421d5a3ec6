"""Progress of a run on the console: a live bar on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from velopath.run import Run

LINE_SECONDS = 10.0
"""Where there is no terminal, a line about a segment at most this often."""


@contextmanager
def console_log(job: Run) -> Iterator[None]:
    """Show what `job` does until the block ends; silent on ranks other than 0."""
    if job.dist.rank != 0:
        yield
        return
    view = _Bar() if Console().is_terminal else _Lines()
    job.watchers.append(view)
    try:
        with view:
            yield
    finally:
        job.watchers.remove(view)


def weights_text(weights: dict[str, float]) -> str:
    """Shares in percent, largest first: `verse 31 python 24 ...`."""
    ordered = sorted(weights.items(), key=lambda item: -item[1])
    return " ".join(f"{name} {100 * share:.0f}" for name, share in ordered)


def _numbers(record: dict[str, Any]) -> str:
    loss = "skipped" if record["loss"] is None else f"{record['loss']:.3f} nats"
    speed = f"{record['tokens_per_second'] / 1e3:.1f}k tokens/s {compute_text(record)}".rstrip()
    return f"{loss}  {speed}  rate {record['rate']:.2e}"


def compute_text(record: Mapping[str, Any]) -> str:
    """The share of the device's peak that a `step` record reached, else its GFLOP/s; empty where it has neither."""
    if record.get("mfu") is not None:
        return f"({record['mfu']:.1%} MFU)"
    flops = record.get("flops_per_second")
    return "" if flops is None else f"({flops / 1e9:.3g} GFLOP/s)"


class _Bar:
    """One bar per segment with loss, tokens/s, rate, ETA and the weights in percent."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description:>8}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}  [dim]{task.fields[weights]}[/dim]"),
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def __call__(self, record: dict[str, Any]) -> None:
        segment, kind = record["segment"], record["kind"]
        if kind == "begin":
            total = record["until"]
            if segment not in self._tasks:
                self._tasks[segment] = self._progress.add_task(segment, total=total, numbers="", weights="")
            self._progress.update(self._tasks[segment], total=total, completed=record["step"])
        elif segment in self._tasks and kind == "step":
            self._progress.update(self._tasks[segment], completed=record["step"], numbers=_numbers(record))
        elif segment in self._tasks and kind == "control":
            self._progress.update(self._tasks[segment], weights=weights_text(record["weights"]))
        elif kind == "alarm":
            for alarm in record["alarms"]:
                self._progress.console.print(
                    f"{segment:>8}  alarm: {alarm['text']}", style="yellow", highlight=False
                )
        elif kind == "note":
            self._progress.console.print(f"{segment:>8}  {record['text']}", highlight=False)


class _Lines:
    """Plain lines for logs and pipes."""

    def __init__(self) -> None:
        self._last = float("-inf")
        self._until: dict[str, int] = {}
        self._weights = ""

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __call__(self, record: dict[str, Any]) -> None:
        segment, kind = record["segment"], record["kind"]
        if kind == "begin":
            self._until[segment] = record["until"]
        elif kind == "control":
            self._weights = weights_text(record["weights"])
        elif kind == "alarm":
            for alarm in record["alarms"]:
                print(f"{segment:>8}  step {record['step']}  alarm: {alarm['text']}", flush=True)
        elif kind == "note":
            print(f"{segment:>8}  {record['text']}", flush=True)
        elif kind == "step":
            done, until = record["step"], self._until.get(segment, 0)
            if done == until or time.monotonic() - self._last > LINE_SECONDS:
                self._last = time.monotonic()
                print(f"{segment:>8}  {done}/{until}  {_numbers(record)}  {self._weights}", flush=True)
