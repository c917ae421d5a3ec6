"""Cache of raw shards: fetched where they are remote, inflated where they are zstd, checked, and kept to be mapped.

Processes of a node share one folder. A lock per shard lets one of them fill it; whoever uses a shard holds a mark,
which the kernel takes back when its process dies, and no shard with a mark is evicted. What is unfinished never has a
shard's name. Shards are evicted where a limit asks for it, the least recently used first.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

import xxhash

from velopath import remote
from velopath.cache_marks import CAN_MARK, Marks, unused
from velopath.durable import TEMPORARY, durable, locked, make_folder, write_durably
from velopath.errors import ConfigError, DataError, WriteError
from velopath.mds.format import ShardEntry, check_hashes, compare_hash, hasher
from velopath.mds.inflate import inflate, inflate_bytes
from velopath.remote import DEFAULT_POLICY, FetchError, FetchPolicy
from velopath.urls import is_url, last_name, redact

logger = logging.getLogger("velopath.cache")
_BLOCK_BYTES = 1 << 20
_POLL_SECONDS = 0.02
_AGAIN_SECONDS = 60.0
_UNITS = {"": 1, "B": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_OURS = re.compile(
    r"[0-9a-f]{32}\.mds(\..*" + re.escape(TEMPORARY) + ")?"
)  # other files of the folder are not touched
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?)(I?)B?\s*\Z", re.I)


def default_cache() -> Path:
    """`$VELOPATH_CACHE`, else `~/.cache/velopath` (under `$XDG_CACHE_HOME` where that is set)."""
    chosen = os.environ.get("VELOPATH_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "velopath"


def parse_size(text: str | int) -> int:
    """Bytes of "50GB", "1.5 TB", "512MiB" or a plain number. Raises `ConfigError`."""
    match = _SIZE.match(str(text))
    size = 0
    if match is not None:
        unit = 1024 ** " KMGT".index(match[2].upper()) if match[3] and match[2] else _UNITS[match[2].upper()]
        size = int(float(match[1]) * unit)
    if match is None or size < 1:
        raise ConfigError(f"cache_limit is {text!r}; expected a size such as 50GB or 512MiB")
    return size


class Cache:
    """One process's view of a cache folder; threads may share it. Made when it is first filled.

    `limit` in bytes bounds all shards in the folder, those of other processes too; None: no bound. `fetched` and
    `fetched_bytes` count what this object fetched from remote places. `stop`, once set, ends fetches early.
    """

    def __init__(
        self, folder: str | Path | None = None, limit: int | None = None, policy: FetchPolicy = DEFAULT_POLICY
    ) -> None:
        if limit is not None and not CAN_MARK:
            raise ConfigError("a cache limit needs Linux, where processes can see what others use")
        self.folder = Path(folder) if folder is not None else default_cache()
        self.limit, self.policy = limit, policy
        self.fetched = self.fetched_bytes = 0
        self.stop = threading.Event()
        self._marks = Marks(self.folder)
        self._lock = threading.Lock()  # of the counts
        self._tell = 0.0  # when to tell again of a limit that is passed

    def hold(self, entry: ShardEntry, *, verify: bool = False) -> Path:
        """Path of the shard's raw file, which is not evicted before `release`; `release` it as often as held.

        A raw shard of a local folder is its own file and needs no mark. Else the shard is fetched or inflated by the
        first process that asks, and checked on the way: size and hashes of both the zstd file and the raw bytes.
        A raw file, and one found in the cache, is checked for its size only; `verify=True` hashes it too. A file of the
        cache that does not pass is made again, a remote shard with a wrong hash fetched once more. Raises `DataError`
        naming the file or URL when it is missing, does not fit its index or is damaged, `WriteError` when the cache
        cannot be written; nothing stays in the cache then.
        """
        if entry.url is None:
            if entry.path.is_file():
                _check_size(entry.path, entry.raw_bytes)
                if verify:
                    check_file(entry.path, entry.raw_hashes)
                return entry.path
            if entry.zip_path is None or not entry.zip_path.is_file():
                raise DataError(
                    "the shard is missing; fetch it or remove it from index.json",
                    path=entry.zip_path or entry.path,
                )
        for last in (False, False, True):
            try:
                return self._hold(self._target(entry), entry, verify)
            except (WriteError, OSError) as error:
                if last or not _emptied(error):
                    raise
                time.sleep(0.05)
        raise AssertionError

    def _hold(self, target: Path, entry: ShardEntry, verify: bool) -> Path:
        self._make()
        self._marks.add(target.stem)
        try:
            self._fill(target, entry, verify)
            with suppress(OSError):
                os.utime(target, ns=(time.time_ns(), target.stat().st_mtime_ns))  # when it was last used
        except BaseException:
            self._marks.remove(target.stem)
            raise
        return target

    def release(self, entry: ShardEntry) -> None:
        """Give back a shard that was held: it may be evicted from now on."""
        if entry.url is not None or not entry.path.is_file():
            self._marks.remove(self._target(entry).stem)

    @contextmanager
    def held(self, entry: ShardEntry, *, verify: bool = False) -> Iterator[Path]:
        """The shard's raw file while the block runs."""
        path = self.hold(entry, verify=verify)
        try:
            yield path
        finally:
            self.release(entry)

    def has_room(self, size: int) -> bool:
        """Whether `size` bytes more fit the limit, once what nobody uses is evicted; evicts it.

        False, too, while another process evicts: this never waits for one.
        """
        if self.limit is None:
            return True
        self._make()
        try:
            with locked(self.folder / "evict.lock", wait=False) as free:
                return free and self._evict(size)
        except (WriteError, OSError) as error:
            if not _emptied(error):
                raise
            return False  # asked again soon, of the folder made anew

    def close(self) -> None:
        """Give back every mark."""
        self._marks.clear()

    def __enter__(self) -> Cache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- filling

    def _make(self) -> None:
        try:
            make_folder(self.folder)
        except WriteError as error:
            raise ConfigError(
                f"the cache {self.folder} cannot be made ({error.problem.split(';')[0]}); choose one by VELOPATH_CACHE"
            ) from error

    def _target(self, entry: ShardEntry) -> Path:
        return self.folder / f"{shard_key(entry)}.mds"

    def _fill(self, target: Path, entry: ShardEntry, verify: bool) -> None:
        """Put the shard into the cache, unless it is there, whole."""
        if _is_whole(target, entry, verify):
            return
        with self._alone(target, entry):
            if _is_whole(target, entry, verify):  # another process may have filled it while this one waited
                return
            for leftover in self.folder.glob(f"{target.name}.*{TEMPORARY}"):
                leftover.unlink(missing_ok=True)
            try:
                self._write(target, entry)
            except DataError as error:
                if entry.url is None or isinstance(error, FetchError) or error.path != entry.place:
                    raise
                logger.warning("%s; fetching it once more", error)
                self._write(target, entry)

    @contextmanager
    def _alone(self, target: Path, entry: ShardEntry) -> Iterator[None]:
        """Hold the shard's lock. Who waits for another process's fetch, which may hang, can be stopped."""
        lock = target.with_suffix(".lock")
        while entry.url is not None:
            with locked(lock, wait=False) as free:
                if free:
                    yield
                    return
            if self.stop.wait(_POLL_SECONDS):
                raise FetchError("the fetch was stopped", path=entry.place)
        with locked(lock):
            yield

    def _write(self, target: Path, entry: ShardEntry) -> None:
        with durable(target) as file:
            if self.limit is not None:
                with locked(self.folder / "evict.lock"):  # what is being written counts from here on
                    if not self._evict(entry.raw_bytes) and time.monotonic() >= self._tell:
                        self._tell = time.monotonic() + _AGAIN_SECONDS
                        logger.warning(
                            "the cache %s passes its limit of %d bytes: all else in it is in use",
                            self.folder, self.limit,
                        )  # fmt: skip
                    file.truncate(entry.raw_bytes)
            for block in self._blocks(entry):
                file.write(block)

    def _blocks(self, entry: ShardEntry) -> Iterable[bytes]:
        if entry.url is None:
            return inflate(entry)
        size = entry.raw_bytes if entry.zip_path is None else entry.zip_bytes
        content = remote.read(entry.url, size=size, policy=self.policy, stop=self.stop)
        with self._lock:
            self.fetched += 1
            self.fetched_bytes += len(content)
        if entry.zip_path is not None:
            return inflate_bytes(content, entry)
        check_hashes(content, entry.raw_hashes, entry.place)
        return (content,)

    # -- eviction

    def _evict(self, size: int) -> bool:
        """Remove unused shards until `size` bytes more fit the limit; whether they do. Holds evict.lock."""
        assert self.limit is not None
        found: dict[str, os.stat_result] = {}
        for listed in os.listdir(self.folder):
            # One that is being written may be renamed meanwhile: it counts by its other name then, once.
            for name in dict.fromkeys((listed, f"{listed.split('.mds', 1)[0]}.mds")):
                with suppress(FileNotFoundError):
                    if _OURS.fullmatch(listed):
                        found[name] = os.stat(self.folder / name)
                        break
        total = sum(info.st_size for info in found.values())
        if total + size <= self.limit:
            return True
        with self._marks.looking() as marks:
            for _, bytes_, name in sorted((f.st_atime_ns, f.st_size, name) for name, f in found.items()):
                if total + size <= self.limit:
                    break
                removed = self._drop_leftover(name) if name.endswith(TEMPORARY) else self._drop(name, marks)
                total -= bytes_ * removed
        return total + size <= self.limit

    def _drop(self, name: str, marks: int) -> bool:
        with unused(marks, name.removesuffix(".mds")) as free:
            if free:
                (self.folder / name).unlink(missing_ok=True)
        return free

    def _drop_leftover(self, name: str) -> bool:
        """Remove what a killed process was writing; its lock is free."""
        lock = (self.folder / name.split(".mds", 1)[0]).with_suffix(".lock")
        with locked(lock, wait=False) as free:
            if free:
                (self.folder / name).unlink(missing_ok=True)
        return free


def raw_path(entry: ShardEntry, cache_dir: str | Path | None = None, *, verify: bool = False) -> Path:
    """Path of the shard's raw file, as `Cache.hold` finds it, without a mark: for a cache that nobody evicts from."""
    with Cache(cache_dir) as cache:
        return cache.hold(entry, verify=verify)


def _emptied(error: BaseException) -> bool:
    """Whether somebody takes the cache folder away at this very moment: it is gone, or none, between two calls."""
    system = error if isinstance(error, OSError) else error.__cause__
    return getattr(system, "errno", None) in (errno.ENOENT, errno.ENOTDIR)


def check_file(path: Path, expected: Mapping[str, str]) -> None:
    """Hash the file in blocks; raise `DataError` unless it has every hash of `expected` (algorithm -> hex)."""
    running = {name: make() for name in expected if (make := hasher(name)) is not None}
    if not running:
        return
    with open(path, "rb") as file:
        while block := file.read(_BLOCK_BYTES):
            for hash_ in running.values():
                hash_.update(block)
    for name, hash_ in running.items():
        compare_hash(name, hash_.hexdigest(), expected[name], path)


def _check_size(path: Path, expected: int) -> None:
    found = path.stat().st_size
    if found != expected:
        raise DataError(
            f"the file has {found} bytes, its index says {expected}", path=path, field="raw_data.bytes"
        )


def _is_whole(target: Path, entry: ShardEntry, verify: bool) -> bool:
    if not target.is_file() or target.stat().st_size != entry.raw_bytes:
        return False
    try:
        check_file(target, entry.raw_hashes if verify else {})
    except DataError:
        return False
    return True


def shard_key(entry: ShardEntry) -> str:
    """Name of the shard in the cache: other content under the same path gets another name.

    Of a remote shard without any hash, only sizes and the number of samples can tell other content.
    """
    place = entry.place if entry.url is not None else str((entry.zip_path or entry.path).resolve())
    parts = [place, str(entry.raw_bytes), str(entry.zip_bytes)]
    parts += [
        f"{k}={v}" for hashes in (entry.raw_hashes, entry.zip_hashes) for k, v in sorted(hashes.items())
    ]
    if not entry.raw_hashes and not entry.zip_hashes:
        here = entry.url is None and entry.zip_path is not None
        parts.append(str(entry.zip_path.stat().st_mtime_ns if here and entry.zip_path else entry.samples))
    return xxhash.xxh3_128_hexdigest("\0".join(parts).encode())


def local_copy(place: str | Path, cache: str | Path | None = None) -> Path | None:
    """The small file at a path or URL as a local one, fetched anew into the cache folder; None where it is missing."""
    if not isinstance(place, str) or not is_url(place):
        return Path(place) if Path(place).is_file() else None
    content = remote.read_if_there(place)
    if content is None:
        return None
    folder = Path(cache) if cache is not None else default_cache()
    make_folder(folder)
    path = folder / f"{xxhash.xxh3_64_hexdigest(redact(place).encode())}.{last_name(place)}"
    write_durably(path, content)
    return path
