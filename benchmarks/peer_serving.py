"""A peer in a process of its own: measured when it is asked to, asleep while others are. Imports no velopath.

`serve` reads `NAME SECONDS` lines from stdin and answers each with `{"tokens":..,"seconds":..,"cpu_seconds":..}`; a
name that cannot be set up answers `{"error":..}`. A batch is int64 of `rows` x `row_tokens` (+ 1).
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

Makers = Mapping[str, Callable[[], Iterator[Any]]]

WARM_BATCHES = 8


def endless(make: Callable[[], Any]) -> Iterator[Any]:
    """The items of `make()`, again and again."""
    while True:
        yield from make()


def check(batch: Any, rows: int, row_tokens: int) -> None:
    """Raise `AssertionError` unless the batch has the shape and type that all contenders hand out."""
    assert tuple(batch.shape) in ((rows, row_tokens), (rows, row_tokens + 1)), batch.shape
    assert str(batch.dtype) in ("int64", "torch.int64"), batch.dtype


def cpu_seconds() -> float:
    """CPU time of this process and its living children, to 10 ms for the latter."""
    tick, total, waiting = os.sysconf("SC_CLK_TCK"), time.process_time(), _children(os.getpid())
    while waiting:
        pid = waiting.pop()
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        total += (int(fields[11]) + int(fields[12])) / tick
        waiting += _children(pid)
    return total


def serve(makers: Makers, rows: int, row_tokens: int) -> None:
    """Answer the lines on stdin; what `makers` make is kept running between them."""
    answers = os.fdopen(os.dup(1), "w")  # nothing that the peer prints gets in between
    os.dup2(2, 1)
    running: dict[str, Iterator[Any]] = {}
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        name, seconds = line.split()
        try:
            if name not in running:
                running[name] = makers[name]()
                for _ in range(WARM_BATCHES):
                    check(next(running[name]), rows, row_tokens)
            answer: dict[str, Any] = _measure(running[name], float(seconds), rows * row_tokens)
        except Exception as error:  # of somebody else's code: named, and the others go on
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


def _measure(batches: Iterator[Any], seconds: float, batch_tokens: int) -> dict[str, float]:
    count, start, cpu = 0, time.perf_counter(), cpu_seconds()
    while time.perf_counter() - start < seconds:
        next(batches)
        count += 1
    spent = time.perf_counter() - start
    return {"tokens": count * batch_tokens, "seconds": spent, "cpu_seconds": cpu_seconds() - cpu}


def _children(pid: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += map(int, task.read_text().split())
        except OSError:
            continue
    return found
