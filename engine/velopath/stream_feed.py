"""The feed of a sampler on remote shards: it fetches ahead what the plan needs, attaches it, and releases the steps.

The plan of the coming steps is known exactly (`Sampler.scout` of the core), and so is the order in which their shards
are first needed. Threads fetch in that order; a step is released to the reader threads when all its shards are
attached. Where the cache has a limit, a shard is detached behind its last step in sight, and before that, those needed
last first, where the next step has no room else. A push changes the plan from its step on: the feed looks again. Where
the shards of the next step do not come, `next` waits, and raises what the fetch raised.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, TypedDict

from velopath import _core
from velopath.cache import Cache
from velopath.errors import DataError, WriteError
from velopath.mds import ShardEntry
from velopath.remote import FetchError
from velopath.remote_threads import LEAVE_SECONDS, FetchThreads
from velopath.stream_data import DomainData
from velopath.urls import redact_text

logger = logging.getLogger("velopath.remote")

_ROWS_AHEAD = 1 << 17  # of all ranks: as far as the plan is looked at
_STEPS_AHEAD = 1024
_CHUNK = 32  # steps looked at in one go
_MOST_ATTACHED = 8192  # maps of a process are limited
_POLL_SECONDS = 0.05
_LONG_SECONDS = 1.0
_AGAIN_SECONDS = 5.0  # after a fetch that failed, or a turn; and when a wait is told of

Shard = tuple[int, int]
"""Domain and number of a shard."""


class FeedReport(NamedTuple):
    """What a feed did so far: shards and bytes fetched by this sampler, steps that waited for one, and how long."""

    fetched: int
    fetched_bytes: int
    waits: int
    wait_seconds: float


class _Place(TypedDict, total=False):
    path: str
    sample: int
    field: str


@dataclass
class _Plan:
    """The shards of the coming steps from `first` on, and the cursor behind them."""

    id: int
    first: int
    steps: deque[list[Shard]]
    behind: tuple[int, Sequence[int], Sequence[int]]
    ended: bool = False


class Feed:
    """Feeds one sampler in threads of its own; `streams` are the attachable ones by domain, with their shards.

    `doubt` tells a domain, where it wants to know, the number of a shard that is damaged.
    """

    def __init__(
        self,
        core: _core.Sampler,
        streams: Mapping[int, tuple[_core.TokenStream, Sequence[ShardEntry]]],
        cache: Cache,
        *,
        global_rows: int,
        window: int,
        doubt: Mapping[int, Callable[[int], None]],
        threads: int = 4,
        ahead: int = 16,
    ) -> None:
        _check_room(streams, cache, window)
        self._core, self._streams, self._cache, self._doubt = core, streams, cache, doubt
        self._horizon = max(_CHUNK, min(_STEPS_AHEAD, _ROWS_AHEAD // global_rows))
        self._ahead = ahead
        self._attached: dict[Shard, None] = {}
        self._fetching: dict[Shard, Future[None]] = {}
        self._failed: dict[Shard, tuple[BaseException, float]] = {}  # and when to try again
        self._plan: _Plan | None = None
        self._wake = threading.Event()
        self._look_at = 0  # the step at which the plan is to be looked at again
        self._stop = False
        self._waited: tuple[int, float, float] = (
            -1,
            0.0,
            0.0,
        )  # for a step since, and when to tell of it again
        self._waits, self._wait_seconds = 0, 0.0
        self._pool = FetchThreads(threads)
        self._threads = threads
        self._director = threading.Thread(target=self._run, daemon=True, name="velopath-feed")
        self._director.start()

    @property
    def report(self) -> FeedReport:
        """What was fetched and waited for."""
        return FeedReport(self._cache.fetched, self._cache.fetched_bytes, self._waits, self._wait_seconds)

    def wake(self) -> None:
        """Look at the plan again: a step was handed out, or the plan changed."""
        self._wake.set()

    def handed(self, step: int) -> None:
        """Steps before `step` were handed out: look at the plan again where half of it is."""
        if step >= self._look_at:
            self._wake.set()

    def waited(self, step: int, seconds: float) -> None:
        """Record that `step` waited for its shards."""
        self._waits += 1
        self._wait_seconds += seconds
        if seconds > _LONG_SECONDS:
            logger.warning(
                "step %d waited %.1f s for its shards; fetches are slower than the steps", step, seconds
            )

    def close(self) -> None:
        """Stop what is under way, end the threads and give back every shard. Also done when Python is left."""
        self._stop = True
        self._cache.stop.set()
        self._wake.set()
        if threading.current_thread() is not self._director:  # which may be where garbage is collected
            self._director.join(LEAVE_SECONDS)
        if not self._pool.close(LEAVE_SECONDS):
            logger.warning("a fetch hangs and is left behind; the storage of the cache may hang")
        self._cache.close()

    # -- the director's thread

    def _run(self) -> None:
        while not self._stop:
            self._wake.clear()
            try:
                self._turn()
            except Exception as error:  # whatever it is, next() must not wait for a dead thread
                if not self._stop:
                    self._plan = None
                    self._core.fail(
                        f"the feed of remote shards: {_problem(error)}", **_place(error), plan=None
                    )
                    self._wake.wait(_AGAIN_SECONDS)
            self._wake.wait(_POLL_SECONDS)

    def _turn(self) -> None:
        self._collect()
        plan = self._look_ahead()
        needed = dict.fromkeys(shard for step in plan.steps for shard in step)
        self._look_at = plan.first + len(plan.steps) // 2 if self._cache.limit is None else plan.first + 1
        self._detach(needed)
        self._release(plan)
        self._fetch(needed, plan)

    def _collect(self) -> None:
        """Take in the fetches that ended."""
        for shard in [s for s, future in self._fetching.items() if future.done()]:
            error = self._fetching.pop(shard).exception()
            if error is None:
                self._attached[shard] = None
            else:
                self._failed[shard] = error, time.monotonic() + _AGAIN_SECONDS
                of_shard = isinstance(error, DataError) and not isinstance(error, (FetchError, WriteError))
                if of_shard and shard[0] in self._doubt:
                    self._doubt[shard[0]](shard[1])
                logger.warning("%s; tried again in %g s where the steps go on", error, _AGAIN_SECONDS)

    def _look_ahead(self) -> _Plan:
        """The plan without the steps handed out, looked at further where few shards are missing."""
        plan, step = self._plan, self._core.step
        if plan is not None:
            while plan.steps and plan.first < step:
                plan.steps.popleft()
                plan.first += 1
            if plan.first != step:  # a state was loaded
                plan = None
        if plan is None:
            id, first, _, at, drawn, error = self._core.scout(None, [], [], 0)
            plan = _Plan(id, first, deque(), (at, drawn, error))
            self._failed.clear()
        missing = {shard for step in plan.steps for shard in step} - set(self._attached)
        while not plan.ended and (
            (len(plan.steps) < self._horizon and len(missing) < self._ahead)
            or plan.first + len(plan.steps) < self._core.released  # what may be read stays in sight
        ):
            id, first, steps, at, drawn, error = self._core.scout(*plan.behind, _CHUNK)
            if id != plan.id:  # a push or a load: what was seen is void
                self._plan = None
                return self._look_ahead()
            plan.steps.extend(steps)
            plan.behind = (at, drawn, error)
            plan.ended = len(steps) < _CHUNK
            missing.update(shard for step in steps for shard in step if shard not in self._attached)
        self._plan = plan
        return plan

    def _detach(self, needed: Mapping[Shard, None]) -> None:
        """Let go of what the plan does not need in sight, where the limit asks for it."""
        if self._cache.limit is None and len(self._attached) < _MOST_ATTACHED:
            return
        for shard in [s for s in self._attached if s not in needed]:
            self._let_go(shard)

    def _let_go(self, shard: Shard) -> None:
        stream, entries = self._streams[shard[0]]
        stream.detach(shard[1])
        self._cache.release(entries[shard[1]])
        del self._attached[shard]

    def _make_room(self, size: int, steps: Sequence[Sequence[Shard]]) -> None:
        """Let go of attached shards until `size` bytes fit the limit, those needed last first.

        `steps` are those from the next one on, which is not released, so that no other shards are read now. Its own
        stay; where that is not enough, the limit is passed: a step needs what it needs.
        """
        needed_at: dict[Shard, int] = {}
        for number, step in enumerate(steps):
            for shard in step:
                needed_at.setdefault(shard, number)
        others = [s for s in self._attached if needed_at.get(s, 1)]
        for shard in sorted(others, key=lambda s: needed_at.get(s, len(steps)), reverse=True):
            self._let_go(shard)
            if self._cache.has_room(size):
                return

    def _release(self, plan: _Plan) -> None:
        """Release the steps before the first one that lacks a shard; tell why where its fetch failed."""
        ready = plan.first
        lacking: list[Shard] = []
        for step in plan.steps:
            lacking = [s for s in step if s not in self._attached]
            if lacking:
                break
            ready += 1
        else:
            ready += plan.ended  # the core finds out by itself that the stream ends
        if not self._core.release(ready, plan.id):  # a push or a load came in between
            self._plan = None
            self._wake.set()
            return
        failed = next((s for s in lacking if s in self._failed), None)
        if failed is not None:
            error = self._failed[failed][0]
            place = _place(error) or {"path": str(self._streams[failed[0]][1][failed[1]].place)}
            self._core.fail(_problem(error), **place, plan=plan.id)
        elif ready == plan.first and lacking:
            self._tell_wait(plan.first, lacking)

    def _tell_wait(self, step: int, lacking: Sequence[Shard]) -> None:
        """Say in the log what a step is waiting for, again and again, ever more seldom."""
        now = time.monotonic()
        awaited, since, tell = self._waited
        if awaited != step:
            self._waited = step, now, now + _AGAIN_SECONDS
        elif now >= tell:
            self._waited = step, since, now + 2 * (tell - since)
            places = [str(self._streams[k][1][s].place) for k, s in lacking]
            logger.warning(
                "step %d waits for %s (%d shards) since %.0f s; another process may be fetching it",
                step, places[0], len(places), now - since,
            )  # fmt: skip

    def _fetch(self, needed: Mapping[Shard, None], plan: _Plan) -> None:
        """Start fetches in the order of need, as long as there are threads and, but for the next step, room."""
        ready = next(
            (n for n, step in enumerate(plan.steps) if any(s not in self._attached for s in step)), 0
        )
        # Where next() waits, every step before the first that lacks a shard has been handed out.
        urgent = plan.steps[ready] if plan.steps and self._core.waits else []
        under_way = sum(self._streams[k][1][s].raw_bytes for k, s in self._fetching)
        for shard in needed:
            if len(self._fetching) >= self._threads:
                return
            if shard in self._attached or shard in self._fetching or not self._may_try(shard):
                continue
            size = self._streams[shard[0]][1][shard[1]].raw_bytes
            if not self._cache.has_room(size + under_way):
                if shard not in urgent:
                    return
                self._make_room(size + under_way, list(plan.steps)[ready:])
            under_way += size
            self._fetching[shard] = future = self._pool.submit(partial(self._bring, shard))
            future.add_done_callback(lambda _: self._wake.set())

    def _may_try(self, shard: Shard) -> bool:
        """Whether a shard did not fail, or long enough ago: a network that was down ends no run at a later step."""
        if shard in self._failed:
            if time.monotonic() < self._failed[shard][1]:
                return False
            del self._failed[shard]
        return True

    def _bring(self, shard: Shard) -> None:
        """Fetch one shard and attach it; once more where its file is gone before it is mapped."""
        stream, entries = self._streams[shard[0]]
        entry = entries[shard[1]]
        for last in (False, True):
            path = self._cache.hold(entry)
            try:
                stream.attach(shard[1], str(path))
                return
            except BaseException as error:
                self._cache.release(entry)
                if last or path.exists() or not isinstance(error, DataError):
                    raise


def feed_of(
    core: _core.Sampler, data: Sequence[DomainData], cache: Cache, *, global_rows: int, window: int
) -> Feed | None:
    """The feed of a sampler on these domains; None where none is remote."""
    far = {k: domain for k, domain in enumerate(data) if domain.remote}
    if not far:
        return None
    streams = {k: (domain.stream, domain.remote) for k, domain in far.items()}
    doubt = {k: domain.doubt for k, domain in far.items() if domain.doubt is not None}
    return Feed(core, streams, cache, global_rows=global_rows, window=window, doubt=doubt)


def _check_room(
    streams: Mapping[int, tuple[_core.TokenStream, Sequence[ShardEntry]]], cache: Cache, window: int
) -> None:
    """Warn where the shards that are read at a time, and the neighbours where their last rows end, pass the limit."""
    touched = 0
    for _, entries in streams.values():
        sizes = sorted((entry.raw_bytes for entry in entries), reverse=True)
        touched += sum(sizes[: window + 1 if window else None])
    if cache.limit is not None and touched > cache.limit:
        logger.warning(
            "cache_limit is %d bytes, and up to %d are read at a time (%s): shards will be fetched again and again; "
            "raise it, or read fewer at a time by a smaller window",
            cache.limit, touched, f"windows of {window} shards" if window else "an order over whole domains",
        )  # fmt: skip


def _problem(error: BaseException) -> str:
    return error.problem if isinstance(error, DataError) else redact_text(repr(error))


def _place(error: BaseException) -> _Place:
    """Where a problem is, as far as it is known."""
    if not isinstance(error, DataError) or error.path is None:
        return {}
    place: _Place = {"path": str(error.path)}
    if error.sample is not None:
        place["sample"] = error.sample
    if error.field is not None:
        place["field"] = error.field
    return place
