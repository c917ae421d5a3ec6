"""Durable files: written beside, fsynced and renamed, so that a killed process never leaves a half file under
its final name; and a lock between processes that its owner's death releases.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from velopath.errors import DataError

try:
    import fcntl
except ImportError:  # not on Windows: there renames alone keep files whole, and work may be done twice
    fcntl = None  # type: ignore[assignment]

TEMPORARY = ".tmp"
"""Suffix of a file that is being written; a leftover one is harmless and may be deleted."""


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable (a rename is only on disk once its folder is)."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def durable(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path`; when the block ends well it is fsynced and renamed to `path`.

    When the block raises, the temporary file is removed and `path` is untouched. Raises `DataError` when the
    disk is full.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DataError(
                f"the disk is full ({error.strerror}); free some space or write elsewhere", path=path
            ) from error
        raise


def write_durably(path: Path, content: bytes) -> None:
    """Write `content` to `path` so that after a crash either the old file or the new one is there, whole."""
    with durable(path) as file:
        file.write(content)


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold the lock file `path` (created, never deleted) against other processes; yields whether it is held.

    With `wait=False` yields False at once where another process holds it. The kernel releases the lock of a
    process that dies, so no lock is ever stale.
    """
    with open(path, "ab") as file:
        held = True
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                held = False
        yield held
