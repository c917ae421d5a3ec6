"""Durable files: written beside, fsynced and renamed, so that a killed process never leaves a half file under
its final name; and a lock between processes that its owner's death releases. What cannot be written is a `WriteError`
that names the path and says what to do.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from velopath.errors import WriteError

try:
    import fcntl
except ImportError:  # not on Windows: there renames alone keep files whole, and work may be done twice
    fcntl = None  # type: ignore[assignment]

TEMPORARY = ".tmp"
"""Suffix of a file that is being written; a leftover one is harmless and may be deleted."""


_REASONS = {
    errno.ENOSPC: "the disk is full; free some space or write elsewhere",
    errno.EDQUOT: "the disk quota is used up; free some space or write elsewhere",
    errno.EFBIG: "the file would be larger than the file system or `ulimit -f` allows; raise that or write elsewhere",
    errno.EROFS: "the file system is read-only; mount it writable or write elsewhere",
    errno.EACCES: "the permissions forbid to write; change them or write elsewhere",
    errno.EPERM: "the permissions forbid to write; change them or write elsewhere",
    errno.EIO: "the disk failed (input/output error); look at the system's log and write elsewhere",
    errno.ENOTDIR: "a part of the path is a file, not a folder; write elsewhere",
}


def write_error(error: OSError, path: str | Path) -> WriteError:
    """`error`, met while `path` was written, in words that say what to do."""
    number = error.errno or 0
    return WriteError(
        _REASONS.get(
            number, f"cannot be written ({error.strerror or error}); is the disk full? Write elsewhere"
        ),
        path=path,
    )


def make_folder(folder: Path) -> None:
    """Make `folder` and those above it where they are missing. Raises `WriteError`."""
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            if isinstance(error, FileExistsError) and not os.path.lexists(error.filename):
                continue  # somebody removed it between the two calls that mkdir makes
            raise write_error(error, folder) from error
        return


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

    When the block raises, the temporary file is removed and `path` is untouched. Raises `WriteError` where the file
    cannot be written; an `OSError` of the block that names another file (one that it reads) is passed on.
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
        if isinstance(error, OSError) and _of_writing(error, temporary):
            raise write_error(error, path) from error
        raise


def _of_writing(error: OSError, temporary: Path) -> bool:
    """Whether the error is one of the temporary file, and not of one that the block reads.

    write(2) names no file; errors of reading come as subclasses (`PermissionError`, `BadGzipFile`) or name theirs.
    """
    if error.filename is None:
        return type(error) is OSError
    return str(error.filename) in (str(temporary), str(temporary.parent))


def write_durably(path: Path, content: bytes) -> None:
    """Write `content` to `path` so that after a crash either the old file or the new one is there, whole."""
    with durable(path) as file:
        file.write(content)


@contextmanager
def locked(path: Path, *, wait: bool = True, on_wait: Callable[[], None] | None = None) -> Iterator[bool]:
    """Hold the lock file `path` (created, never deleted) against other processes; yields whether it is held.

    With `wait=False` yields False at once where another process holds it; else `on_wait` is called before it waits for
    that. The kernel releases the lock of a process that dies, so no lock is ever stale. Raises `WriteError` where the
    file cannot be made.
    """
    try:
        opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise write_error(error, path) from error
    with os.fdopen(opened, "ab") as file:
        held = True
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                held = wait
                if wait:
                    if on_wait is not None:
                        on_wait()
                    fcntl.flock(file, fcntl.LOCK_EX)
        yield held
