"""Marks on the shards of a cache: who uses one holds a lock on a byte of one file, which the kernel takes back when its
process dies. Only Linux has locks that belong to an open file; elsewhere nothing shows what others use.
"""

from __future__ import annotations

import errno
import os
import struct
import threading
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import xxhash

from velopath.durable import write_error

try:
    import fcntl

    _SET, _WAIT = fcntl.F_OFD_SETLK, fcntl.F_OFD_SETLKW
except (
    ImportError,
    AttributeError,
):  # not on Linux: nothing shows what others use, so nothing may be evicted
    fcntl = None  # type: ignore[assignment]
CAN_MARK = fcntl is not None


class Marks:
    """The marks of one object on shards of the cache in `folder`; threads may share it."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "marks.lock"
        self._held: Counter[str] = Counter()
        self._file: int | None = None
        self._closed: weakref.finalize[[int], Marks] | None = None
        self._lock = threading.Lock()

    def add(self, key: str) -> None:
        """Mark the shard `key`, as often as it is asked for."""
        if not CAN_MARK:
            return
        with self._lock:
            if self._file is not None and not os.fstat(self._file).st_nlink:
                self._forget()  # somebody emptied the folder: nobody would see a mark in the removed file
            if self._file is None:
                self._file = self._open()
                self._closed = weakref.finalize(self, os.close, self._file)
            if not self._held[key]:
                _lock_byte(self._file, fcntl.F_RDLCK, key, _WAIT)
            self._held[key] += 1

    def remove(self, key: str) -> None:
        """Take one mark of the shard back."""
        with self._lock:
            if self._file is None or not self._held[key]:
                return
            self._held[key] -= 1
            if not self._held[key]:
                del self._held[key]
                _lock_byte(self._file, fcntl.F_UNLCK, key, _SET)

    def clear(self) -> None:
        """Take every mark back."""
        with self._lock:
            self._forget()

    @contextmanager
    def looking(self) -> Iterator[int]:
        """An open file by which `unused` asks for the marks of everybody, this object's among them."""
        file = self._open()
        try:
            yield file
        finally:
            os.close(file)

    def _forget(self) -> None:
        self._held.clear()
        if self._closed is not None:
            self._closed()
            self._file = self._closed = None

    def _open(self) -> int:
        try:
            return os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise write_error(error, self._path) from error


@contextmanager
def unused(file: int, key: str) -> Iterator[bool]:
    """Whether nobody marks the shard `key`; while the block runs nobody can, if so."""
    try:
        _lock_byte(file, fcntl.F_WRLCK, key, _SET)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise
        yield False
        return
    yield True
    _lock_byte(file, fcntl.F_UNLCK, key, _SET)


def _lock_byte(file: int, kind: int, key: str, command: int) -> None:
    """Lock or free the one byte of the file that stands for the shard `key`, for this open file alone."""
    at = xxhash.xxh3_64_intdigest(key.encode()) >> 2
    fcntl.fcntl(file, command, struct.pack("hhqqi4x", kind, os.SEEK_SET, at, 1, 0))
