"""Worker processes: run a function over tasks, in order, in this process or in others."""

from __future__ import annotations

import multiprocessing
import multiprocessing.process
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import Any, TypeVar

from velopath.errors import ConfigError, VelopathError

Task = TypeVar("Task")
Result = TypeVar("Result")


def usable_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Workers:
    """Runs functions of modules over tasks; a context manager. With 1 process it works in this one.

    Processes are spawned (a fork would copy the threads of numerical libraries), so a script that uses more
    than one must be guarded by `if __name__ == "__main__":`. Workers end with their parent, even when it is killed.
    """

    def __init__(self, processes: int | None = None, *, threads: bool = False) -> None:
        """`processes` None is one per core. `threads` says that functions may use threads of their own as well."""
        if processes is not None and processes < 1:
            raise ConfigError(f"processes is {processes}; expected 1 or more")
        self.processes = processes or usable_cores()
        self.threads = threads
        self._pool: ProcessPoolExecutor | None = None

    def run(self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[tuple[int, Result]]:
        """Yield (number of the task, its result) as tasks finish, with few of them in flight at a time."""
        if self.processes == 1:
            for number, task in enumerate(tasks):
                yield number, function(task)
            return
        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self.processes, mp_context=context, initializer=_start_worker)
        flying: dict[Future[Any], int] = {}
        waiting = enumerate(tasks)
        try:
            while True:
                while len(flying) < 3 * self.processes and (following := next(waiting, None)) is not None:
                    flying[self._pool.submit(function, following[1])] = following[0]
                if not flying:
                    return
                done, _ = wait(flying, return_when=FIRST_COMPLETED)
                for future in done:
                    yield flying.pop(future), future.result()
        except BrokenProcessPool as error:
            raise VelopathError(
                "a worker process died, for want of memory perhaps, or because the calling script lacks "
                'its `if __name__ == "__main__":`; use fewer processes'
            ) from error

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)


def _start_worker() -> None:
    """Prepare a worker: one thread of tokenizers, Ctrl-C left to the parent, and an end when the parent ends."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: multiprocessing.process.BaseProcess) -> None:
    parent.join()
    os._exit(1)
