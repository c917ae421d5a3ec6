"""Remote files: objects at s3://, gs://, az:// and http(s):// URLs through obstore, other schemes through fsspec.

A fetch notices a stall (no byte for some seconds) and a body that is cut short, and is tried again with exponential
backoff and jitter; it can be stopped at any moment (`velopath.remote_loop`). Credentials may stand in the environment
(`AWS_*`, `GOOGLE_*`, `AZURE_*`) or in a URL; what is shown in errors and logs holds none (`velopath.urls`).
"""

from __future__ import annotations

import logging
import os
import queue
import random
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

from velopath.durable import durable, write_error
from velopath.errors import ConfigError, DataError, WriteError
from velopath.remote_loop import StoppedReadError, wait_for
from velopath.urls import OBSTORE, redact, redact_text

logger = logging.getLogger("velopath.remote")

_WEB = ("http", "https")
_SETTINGS = ("AWS_", "GOOGLE_", "AZURE_")
_CHUNK_BYTES = 1 << 18
_MOST_BYTES = 1 << 30  # of a file whose size nothing tells: an index, a tokenizer
_POLL_SECONDS = 0.1
_T = TypeVar("_T")


class FetchError(DataError):
    """A remote file could not be fetched, after every attempt; the message names its URL without credentials."""


class MissingError(FetchError):
    """There is no such remote file, or none that may be seen: S3 denies what is not there to who may not list."""


class DeniedError(MissingError):
    """The store does not say whether there is such a file."""


class SizeError(DataError):
    """A remote file has another size than it is said to have, and came whole: no fault of the network."""


@dataclass(frozen=True)
class FetchPolicy:
    """How patient a fetch is.

    It is given up after `attempts` attempts; an attempt ends where `stall_seconds` pass without a byte. Between two
    attempts it waits `backoff_seconds` * 2^n, at most `longest_seconds`, times a random factor of 0.5 to 1.
    """

    attempts: int = 5
    stall_seconds: float = 10.0
    backoff_seconds: float = 0.25
    longest_seconds: float = 10.0

    def __post_init__(self) -> None:
        if self.attempts < 1 or not self.stall_seconds > 0 or not self.backoff_seconds >= 0:
            raise ConfigError(
                f"{self}: expected 1 attempt or more, a stall of more than 0 s and a backoff of 0 s or more"
            )

    def delay(self, attempt: int) -> float:
        """Seconds to wait behind attempt number `attempt`, counted from 0."""
        return min(self.longest_seconds, self.backoff_seconds * 2.0**attempt) * random.uniform(0.5, 1)


DEFAULT_POLICY = FetchPolicy()


def read(
    url: str,
    *,
    size: int | None = None,
    policy: FetchPolicy = DEFAULT_POLICY,
    stop: threading.Event | None = None,
) -> bytes:
    """The content of the object at `url`, which has `size` bytes where that is known, else 1 GiB at most.

    `stop` ends it early. Raises `FetchError` where it is not there, not allowed, or every attempt fails; `SizeError`;
    `ConfigError` where the package for its scheme is missing.
    """
    stop = stop or threading.Event()
    return _patiently(url, policy, stop, lambda: _read_once(url, size, policy.stall_seconds, stop))


def copy(
    url: str,
    path: Path,
    *,
    most: int,
    policy: FetchPolicy = DEFAULT_POLICY,
    stop: threading.Event | None = None,
) -> None:
    """Write the content of the object at `url` to the file `path`, durably; not much more of it than `most` bytes.

    Raises as `read` does, and `WriteError` where the file cannot be written.
    """
    stop = stop or threading.Event()

    def attempt() -> None:
        file.seek(0)
        file.truncate()
        with suppress(_EnoughError):
            _receive_once(url, take, policy.stall_seconds, stop)

    def take(chunk: Any) -> None:
        try:
            file.write(memoryview(chunk))
        except OSError as error:
            raise write_error(error, path) from error
        if file.tell() > most:
            raise _EnoughError

    with durable(path) as file:
        _patiently(url, policy, stop, attempt)


class _EnoughError(Exception):
    """More bytes came than are wanted."""


def _patiently(url: str, policy: FetchPolicy, stop: threading.Event, attempt_once: Callable[[], _T]) -> _T:
    """What `attempt_once` returns, tried as often as the policy says."""
    shown, problem = redact(url), ""
    for attempt in range(policy.attempts):
        if attempt:
            delay = policy.delay(attempt - 1)
            logger.warning(
                "fetch of %s: %s; attempt %d of %d in %.1f s", shown, problem, attempt + 1, policy.attempts, delay
            )  # fmt: skip
            stop.wait(delay)
        if stop.is_set():
            raise FetchError("the fetch was stopped", path=shown)
        try:
            return attempt_once()
        except (ConfigError, SizeError, WriteError):
            raise
        except StoppedReadError:
            raise FetchError("the fetch was stopped", path=shown) from None
        except (FileNotFoundError, PermissionError) as error:
            if isinstance(error, FileNotFoundError):
                raise MissingError(f"no such file; {_advice(url)}", path=shown) from None
            raise DeniedError(f"access is denied; {_advice(url)}", path=shown) from None
        except Exception as error:
            if type(error).__name__ in ("PermissionDeniedError", "UnauthenticatedError"):
                raise DeniedError(f"access is denied; {_advice(url)}", path=shown) from None
            problem = _first_line(error, url)
    raise FetchError(
        f"cannot be fetched, {policy.attempts} attempts failed, the last one by: {problem}", path=shown
    )


def read_if_there(url: str, policy: FetchPolicy = DEFAULT_POLICY) -> bytes | None:
    """`read`, None where there is no such file."""
    try:
        return read(url, policy=policy)
    except MissingError:
        return None


def has(url: str, policy: FetchPolicy = DEFAULT_POLICY) -> bool:
    """Whether there is a file, which is read to find out."""
    return read_if_there(url, policy) is not None


def folders(url: str, policy: FetchPolicy = DEFAULT_POLICY) -> list[str]:
    """Names of the folders right below `url`, sorted. Raises `ConfigError` where its store cannot list (http)."""
    if _scheme(url) in _WEB:
        raise ConfigError(
            f"{redact(url)}: a web server lists no folders; give a mapping domain -> URL, or a folder of prepare, "
            "which has a domains.json"
        )
    stop = threading.Event()
    try:
        listed = _patiently(url, policy, stop, lambda: _list_once(url, policy.stall_seconds, stop))
    except MissingError as error:
        raise FetchError(f"cannot be listed: {error.problem}", path=error.path) from None
    return sorted(name.rstrip("/").rsplit("/", 1)[-1] for name in listed)


def _list_once(url: str, stall_seconds: float, stop: threading.Event) -> list[str]:
    if _scheme(url) in OBSTORE:
        return wait_for(_list_store(url, stall_seconds), stop)
    system, path = _fsspec().core.url_to_fs(url)
    return [e["name"] for e in system.ls(path) if e["type"] == "directory"]


async def _list_store(url: str, stall_seconds: float) -> list[str]:
    store, path = _store(url, stall_seconds)
    found = await _obstore().list_with_delimiter_async(store, path or None)
    return list(found["common_prefixes"])


def _scheme(url: str) -> str:
    return url.partition("://")[0].lower()


def _advice(url: str) -> str:
    hint = {"s3": "AWS_*", "gs": "GOOGLE_*", "az": "AZURE_*"}.get(_scheme(url))
    where = f"environment ({hint})" if hint else "URL"
    if "***" in url:
        where += "; this URL was recorded without its credentials, give it again whole"
    return f"check the name, and the credentials in the {where}"


def _first_line(error: BaseException, url: str) -> str:
    text = str(error).strip().splitlines()
    return redact_text(f"{type(error).__name__}: {text[0] if text else ''}", url)[:400]


def _read_once(url: str, size: int | None, stall_seconds: float, stop: threading.Event) -> bytes:
    content = bytearray()
    most = _MOST_BYTES if size is None else size

    def take(chunk: Any) -> None:
        content.extend(memoryview(chunk))
        if len(content) > most:
            raise OSError(
                f"the body has more than {most} bytes" + ("" if size is None else f", expected {size}")
            )

    _receive_once(url, take, stall_seconds, stop, size)
    if size is not None and len(content) != size:
        raise OSError(f"the body has {len(content)} bytes, expected {size}")
    return bytes(content)


def _receive_once(
    url: str,
    take: Callable[[Any], None],
    stall_seconds: float,
    stop: threading.Event,
    size: int | None = None,
) -> None:
    if _scheme(url) in OBSTORE:
        wait_for(_receive(url, stall_seconds, take, size), stop)
    else:
        for block in _watched(_fsspec().open(url, "rb").open, stall_seconds, stop):
            take(block)


async def _receive(url: str, stall_seconds: float, take: Callable[[Any], None], size: int | None) -> None:
    """Hand the pieces of an object to `take` as they come; raises where none comes for `stall_seconds`."""
    store, path = _store(url, stall_seconds)
    found = await _obstore().get_async(store, path)
    expected, given = found.meta["size"], 0
    if size is not None and expected != size:
        raise SizeError(
            f"the file has {expected} bytes, its index says {size}", path=redact(url), field="bytes"
        )
    async for chunk in found.stream(min_chunk_size=_CHUNK_BYTES):
        given += len(chunk)
        take(chunk)
    if given != expected:
        raise OSError(f"the body ended after {given} of {expected} bytes")


def _watched(opened: Any, stall_seconds: float, stop: threading.Event) -> Iterator[bytes]:
    """Blocks of a file whose reads cannot be interrupted: read in a thread, which a stall or a stop leaves behind."""
    blocks: queue.Queue[bytes | BaseException] = queue.Queue(maxsize=8)
    left = threading.Event()

    def fill() -> None:
        try:
            with opened() as file:
                while not left.is_set():
                    block = file.read(_CHUNK_BYTES)
                    blocks.put(block)
                    if not block:
                        return
        except BaseException as error:
            blocks.put(error)

    threading.Thread(target=fill, daemon=True, name="velopath-fetch").start()
    try:
        while True:
            block = _next_block(blocks, stall_seconds, stop)
            if isinstance(block, BaseException):
                raise block
            if not block:
                return
            yield block
    finally:
        left.set()
        with suppress(queue.Empty):
            while True:
                blocks.get_nowait()  # the thread may wait for room


def _next_block(
    blocks: queue.Queue[bytes | BaseException], stall_seconds: float, stop: threading.Event
) -> bytes | BaseException:
    end = time.monotonic() + stall_seconds
    while (left := end - time.monotonic()) > 0:
        if stop.is_set():
            raise StoppedReadError
        with suppress(queue.Empty):
            return blocks.get(timeout=min(left, _POLL_SECONDS))
    raise TimeoutError(f"no byte came for {stall_seconds:g} s")


def _obstore() -> Any:
    try:
        import obstore
        import obstore.store
    except ImportError:
        raise ConfigError(
            "s3://, gs://, az:// and http(s):// need the package obstore: pip install 'velopath[remote]'"
        ) from None
    return obstore


def _fsspec() -> Any:
    try:
        import fsspec
    except ImportError:
        raise ConfigError(
            "URLs of this scheme need the package fsspec: pip install 'velopath[remote]'"
        ) from None
    return fsspec


def _store(url: str, stall_seconds: float) -> tuple[Any, str]:
    """The store of a URL and the path in it. A # is a letter like others: no store has fragments."""
    parts = urlsplit(url.replace("#", "%23"))
    path = unquote(parts.path).strip("/")
    query = f"?{parts.query}" if parts.query and parts.scheme in _WEB else ""
    settings = tuple(sorted((k, v) for k, v in os.environ.items() if k.startswith(_SETTINGS)))
    user, _, host = parts.netloc.rpartition("@") if parts.scheme in _WEB else ("", "", parts.netloc)
    root = f"{parts.scheme}://{host}{query}"
    return _open_store(root, stall_seconds, unquote(user), (os.getpid(), settings)), path


@lru_cache(maxsize=64)
def _open_store(root: str, stall_seconds: float, user: str, _of: object) -> Any:
    """A store, kept for its connections. Its own retries are off: ours count attempts and notice short bodies."""
    endpoints = [
        os.environ.get(name, "") for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT")
    ]
    plain = root.startswith("http://") or any(e.startswith("http://") for e in endpoints)
    seconds = timedelta(seconds=stall_seconds)
    options: dict[str, Any] = {
        "connect_timeout": seconds,
        "read_timeout": seconds,
        "timeout": timedelta(days=1),
    }
    if plain or any(os.environ.get(f"{of}ALLOW_HTTP", "").lower() == "true" for of in _SETTINGS):
        options["allow_http"] = True
    if user:
        options["default_headers"] = {"authorization": f"Basic {b64encode(user.encode()).decode()}"}
    return _obstore().store.from_url(root, client_options=options, retry_config={"max_retries": 0})
