"""One way to time, shared by all suites: contenders take turns in rotated order, warm; medians and quartiles.

A machine's speed drifts, and what ran before leaves its caches behind. So nothing is measured to the end before
the next thing starts: every round takes one sample of each contender, in another order than the last, and ratios
are taken within a round before the median is (`paired_ratio`).
"""

from __future__ import annotations

import ctypes
import gc
import math
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch

T = TypeVar("T")
Work = Callable[[], object]

HEAD_START_CYCLES = 4_000_000
"""About 2 ms in which the GPU waits before a sample, so that the host is ahead and launches are not timed."""


def take_turns(
    contenders: Mapping[str, Callable[[], T]], rounds: int, *, seconds: float = math.inf, least: int = 3
) -> dict[str, list[T]]:
    """`rounds` samples of each contender, every second round backwards, every two rounds beginning with the next.

    Backwards, because rotation alone would always put the same contender before another. No further round is
    begun after `seconds`, but `least` are finished. Warming up is the caller's.
    """
    names = list(contenders)
    samples: dict[str, list[T]] = {name: [] for name in names}
    start = time.perf_counter()
    for turn in range(rounds):
        if turn >= least and time.perf_counter() - start > seconds:
            break
        first = turn // 2 % len(names)
        order = names[first:] + names[:first]
        for name in reversed(order) if turn % 2 else order:
            samples[name].append(contenders[name]())
    return samples


def summary(samples: Sequence[float]) -> dict[str, Any]:
    """{"median", "low", "high", "samples"}; low and high are the quartiles."""
    if len(samples) < 2:
        low = high = samples[0]
    else:
        low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return {"median": statistics.median(samples), "low": low, "high": high, "samples": list(samples)}


def paired_ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Median over the rounds of above / below, both from the same round: drift cancels."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def timed(device: torch.device, *works: Work) -> list[float]:
    """Seconds of each work, run one after the other; on a GPU its own time, between events in its stream."""
    if device.type != "cuda":
        marks = [time.perf_counter()]
        for work in works:
            work()
            marks.append(time.perf_counter())
        return [b - a for a, b in pairwise(marks)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(len(works) + 1)]
    torch.cuda._sleep(HEAD_START_CYCLES)
    events[0].record()
    for work, event in zip(works, events[1:], strict=True):
        work()
        event.record()
    events[-1].synchronize()
    return [a.elapsed_time(b) / 1e3 for a, b in pairwise(events)]


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `TimeoutError` in this block after `seconds`; without effect outside a main thread or on Windows.

    For code of others that may compile or tune for minutes. Python runs the handler when a native call returns.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"not ready after {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def wait_for(device: torch.device) -> None:
    """Return when everything queued on `device` is done; the host's clock is then the device's."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def extra_mib(device: torch.device, work: Work) -> float:
    """Peak memory during `work` above what is held before it, in MiB; NaN where the system does not tell.

    On a GPU what torch's allocator handed out, on a CPU resident memory (Linux).
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not reset.exists():
        return math.nan

    def kib(name: str) -> int:
        return int(next(line.split()[1] for line in status.read_text().splitlines() if line.startswith(name)))

    ctypes.CDLL(None).malloc_trim(0)  # what others freed would hide what this one takes
    reset.write_text("5")  # the peak starts again from here
    before_kib = kib("VmRSS")
    work()
    return (kib("VmHWM") - before_kib) / 1024
