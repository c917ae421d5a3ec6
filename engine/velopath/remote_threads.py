"""Threads that fetch. Leaving Python does not wait for one that hangs, as it does for those of an executor."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, as_completed
from functools import partial
from queue import SimpleQueue
from typing import Any, TypeVar

LEAVE_SECONDS = 3.0
"""For threads to end; a stopped fetch takes a tenth of one."""
_S = TypeVar("_S")
_T = TypeVar("_T")


class FetchThreads:
    """A few daemon threads that run what is submitted, in its order; `close` them."""

    def __init__(self, count: int, name: str = "velopath-fetch") -> None:
        self._tasks: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._dropped = False
        self._threads = [
            threading.Thread(target=self._work, daemon=True, name=f"{name}-{i}") for i in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, task: Callable[[], _T]) -> Future[_T]:
        """What `task` returns or raises, once a thread has run it; cancelled where `close` comes first."""
        future: Future[_T] = Future()
        self._tasks.put((future, task))
        return future

    def close(self, seconds: float) -> bool:
        """Drop what has not begun and wait up to `seconds` for the rest; whether every thread has ended."""
        self._dropped = True
        for _ in self._threads:
            self._tasks.put(None)
        end = time.monotonic() + seconds
        others = [thread for thread in self._threads if thread is not threading.current_thread()]
        for thread in others:
            thread.join(max(0.0, end - time.monotonic()))
        return not any(thread.is_alive() for thread in others)

    def _work(self) -> None:
        while (item := self._tasks.get()) is not None:
            future, task = item
            if self._dropped:
                future.cancel()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(task())
            except BaseException as error:
                future.set_exception(error)
            del future, task, item  # what was fetched is not kept until the next one comes


def as_done(
    run: Callable[[_S], _T], items: Sequence[_S], *, threads: int, stop: threading.Event
) -> Generator[tuple[int, _T], None, None]:
    """Number and result of each item as it is done, `threads` side by side. Close it.

    Where one fails, or the caller goes away or is interrupted, `stop` is set, which is to end what is under way.
    """
    pool = FetchThreads(min(threads, len(items)))
    try:
        numbers = {pool.submit(partial(run, item)): number for number, item in enumerate(items)}
        for future in as_completed(numbers):
            yield numbers[future], future.result()
    except BaseException:
        stop.set()
        raise
    finally:
        pool.close(LEAVE_SECONDS)
