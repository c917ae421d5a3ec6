"""What reading each shard of a remote folder once showed, kept in the cache: the tokens of each of its documents.

One file per folder: a first line that names the format, then a record per shard, appended as it is read, so that a
process that is killed loses no more than the shards it was reading. A record is the shard's key in the cache (16
bytes), flags (uint32: 1, every document was decoded; 2, what was found before is void), the number of documents
(uint32), their tokens (uint32 each, without end-of-text tokens) and a hash of all that (xxh3, 8 bytes), little-endian.
A record that does not fit its hash, and what follows it, is cut off.
"""

from __future__ import annotations

import logging
import os
import struct
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from velopath.cache import Cache, shard_key
from velopath.durable import locked, make_folder, write_error
from velopath.mds import MdsFolder, ShardEntry
from velopath.remote_threads import as_done
from velopath.urls import redact

Lengths = NDArray[np.uint32]
Look = Callable[[ShardEntry], Lengths | str]
"""Reads one shard: the tokens of its documents, or what is wrong with it, which is not kept."""

_FIRST = b"velopath.shards 1\n"
_HEAD = struct.Struct("<16sII")
_HASH = struct.Struct("<Q")
_DECODED, _VOID = 1, 2
_THREADS = 8

logger = logging.getLogger("velopath.remote")


def measure(
    index: MdsFolder, look: Look, *, bytes_dtype: str, cache: Cache, why: str, decoded: bool = False
) -> list[Lengths | str]:
    """What `look` finds of each shard, from the journal where it was found before; in index order.

    With `decoded`, `look` decodes every document: then the journal is believed only where it says so of a shard that
    has a hash, so that its bytes are known to be the same. Shards are read side by side, as many as the cache's limit
    has room for, with a progress bar on a terminal; processes that ask at once wait for the one that reads.
    """
    make_folder(cache.folder)
    path = _path(index.folder, bytes_dtype, cache)
    keys = [bytes.fromhex(shard_key(entry)) for entry in index.shards]

    def hashed(number: int) -> bool:
        return bool(index.shards[number].raw_hashes or index.shards[number].zip_hashes)

    def wanted(found: dict[bytes, tuple[int, Lengths]]) -> dict[int, Lengths]:
        known = {}
        for number, key in enumerate(keys):
            flags, lengths = found.get(key, (0, None))
            if lengths is None or len(lengths) != index.shards[number].samples:
                continue
            if not decoded or (flags & _DECODED and hashed(number)):
                known[number] = lengths
        return known

    known: dict[int, Lengths | str] = dict(wanted(_read(path)[0]))
    if len(known) < len(keys):
        with locked(path.with_suffix(".lock"), on_wait=partial(tell_wait, index.folder)):
            found, end = _read(path)  # another process may have read some while this one waited
            known = dict(wanted(found))
            missing = [n for n in range(len(keys)) if n not in known]
            if missing:
                looked = _looked(index, missing, look, cache, why)
                with _appending(path, end) as add, closing(looked):
                    for number, lengths in looked:
                        known[number] = lengths
                        record = keys[number], _DECODED * (decoded and hashed(number))
                        if not isinstance(lengths, str) and found.get(record[0], (None,))[0] != record[1]:
                            add(*record, lengths)
    return [known[number] for number in range(len(keys))]


def forget(folder: str | Path, entry: ShardEntry, *, bytes_dtype: str, cache: Cache) -> None:
    """Have the shard looked at again. Does nothing while another process writes to the journal."""
    path = _path(folder, bytes_dtype, cache)
    with locked(path.with_suffix(".lock"), wait=False) as free:
        if free:
            with _appending(path, _read(path)[1]) as add:
                add(bytes.fromhex(shard_key(entry)), _VOID, np.zeros(0, np.uint32))


def _path(folder: str | Path, bytes_dtype: str, cache: Cache) -> Path:
    name = f"{redact(str(folder))}\0{bytes_dtype}".encode()
    return cache.folder / f"{xxhash.xxh3_128_hexdigest(name)}.shards"


@contextmanager
def _appending(path: Path, end: int) -> Iterator[Callable[[bytes, int, Lengths], None]]:
    """A function that adds a record to the journal at `path`, whose sound ones end at byte `end`."""
    with ExitStack() as stack:
        with _writing(path):
            # Without a buffer: what a full disk refuses must not be tried again when the file is closed.
            file = stack.enter_context(open(path, "r+b" if path.is_file() else "x+b", buffering=0))
            file.truncate(end)
            file.seek(end)
            if end == 0:
                file.write(_FIRST)

        def add(key: bytes, flags: int, lengths: Lengths) -> None:
            body = _HEAD.pack(key, flags, len(lengths)) + lengths.astype("<u4").tobytes()
            left = memoryview(body + _HASH.pack(xxhash.xxh3_64_intdigest(body)))
            with _writing(path):
                while left:
                    left = left[file.write(left) :]

        yield add
        with _writing(path):
            os.fsync(file.fileno())


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise write_error(error, path) from error


def _looked(
    index: MdsFolder, missing: Sequence[int], look: Look, cache: Cache, why: str
) -> Generator[tuple[int, Lengths | str], None, None]:
    """What is found of the `missing` shards, as each is read."""
    from rich.console import Console
    from rich.progress import Progress

    shards = [index.shards[number] for number in missing]
    size = sum(s.raw_bytes if s.zip_bytes is None else s.zip_bytes for s in shards)
    logger.warning(
        "%s: fetching %d shards (%.1f MB) once %s", redact(str(index.folder)), len(shards), size / 1e6, why
    )
    largest = max(s.raw_bytes for s in shards)
    room = _THREADS if cache.limit is None else cache.limit // max(1, largest)
    bars = Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())
    done = as_done(look, shards, threads=max(1, min(_THREADS, room)), stop=cache.stop)
    with bars, closing(done):
        bar = bars.add_task("reading shards", total=len(shards))
        for at, found in done:
            yield missing[at], found
            bars.advance(bar)


def tell_wait(folder: str | Path) -> None:
    """Say that this process waits for one that reads the folder's shards."""
    logger.warning("%s: waiting for another process that reads its shards", redact(str(folder)))


def _read(path: Path) -> tuple[dict[bytes, tuple[int, Lengths]], int]:
    """The records of a journal by key, the last of each, and where the sound ones end; none of another kind of file."""
    content = memoryview(path.read_bytes() if path.is_file() else b"")
    if content[: len(_FIRST)] != _FIRST:
        return {}, 0
    found: dict[bytes, tuple[int, Lengths]] = {}
    at = len(_FIRST)
    while at + _HEAD.size <= len(content):
        key, flags, documents = _HEAD.unpack_from(content, at)
        end = at + _HEAD.size + 4 * documents
        if end + _HASH.size > len(content):
            break
        if _HASH.unpack_from(content, end)[0] != xxhash.xxh3_64_intdigest(content[at:end]):
            break
        found.pop(key, None)
        if not flags & _VOID:
            found[key] = flags, np.frombuffer(content[at + _HEAD.size : end], "<u4")
        at = end + _HASH.size
    return found, at
