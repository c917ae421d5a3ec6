"""The event loop of remote reads, in a thread of its own: who waits for a read may stop waiting, and it ends.

A blocking read that hangs ends when its server says so, and keeps a thread, a half-written file and the interpreter's
exit waiting for that. A task of this loop is cancelled instead: its request is dropped and its connection closed.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
from collections.abc import Coroutine
from concurrent.futures import CancelledError, wait
from contextlib import suppress
from typing import Any, TypeVar

from velopath.errors import ConfigError

_POLL_SECONDS = 0.1
_LEAVE_SECONDS = 2.0
_T = TypeVar("_T")


class StoppedReadError(Exception):
    """The read was stopped before it ended."""


class _Loop:
    """A running event loop; ended when the interpreter exits."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.ended = False
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True, name="velopath-remote")
        self._thread.start()
        atexit.register(self.end)

    def end(self) -> None:
        """Cancel what is under way: no store may call into an interpreter that is gone."""
        self.ended = True
        if self._thread.is_alive():
            self.loop.call_soon_threadsafe(lambda: self.loop.create_task(self._finish()))
            self._thread.join(_LEAVE_SECONDS)

    async def _finish(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=_LEAVE_SECONDS / 2)
        self.loop.stop()


_lock = threading.Lock()
_running: _Loop | None = None
_forked_from: int | None = None


def wait_for(task: Coroutine[Any, Any, _T], stop: threading.Event) -> _T:
    """What the coroutine returns; it is cancelled, and `StoppedReadError` raised, where `stop` is set before it ends.

    An interrupt (Ctrl-C) of the caller cancels it, too. Raises `ConfigError` in the fork of a process that has read
    remote files: the threads of its store do not exist there, and the read would never end.
    """
    try:
        loop = _the_loop()
    except BaseException:
        task.close()
        raise
    future = asyncio.run_coroutine_threadsafe(task, loop)
    try:
        while not wait([future], _POLL_SECONDS).done:
            if stop.is_set():
                raise StoppedReadError
        return future.result()
    except CancelledError:
        raise StoppedReadError from None
    finally:
        with suppress(RuntimeError):  # the loop may have ended by now
            future.cancel()


def _the_loop() -> asyncio.AbstractEventLoop:
    global _running
    if _forked_from is not None:
        raise ConfigError(
            f"process {_forked_from} read remote files and then forked this process {os.getpid()}, which can read "
            "none: fork before the first one is read, or start processes by spawn"
        )
    with _lock:
        if _running is None:
            _running = _Loop()
        if _running.ended:
            raise StoppedReadError
        return _running.loop


def _after_fork() -> None:
    global _lock, _running, _forked_from
    if _running is not None:
        _forked_from = os.getppid()
        atexit.unregister(_running.end)
    _lock, _running = threading.Lock(), None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
