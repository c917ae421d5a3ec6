"""The streaming sampler: token rows of several domains, drawn by weights that can be pushed while it runs.

A step is a pure function of (seed, weights log, cursor): every rank computes the whole plan of a step and reads
its own slice, so world size, threads and prefetching never change what is read. Letters: N tokens of a domain,
T = `row_tokens`, K domains. The rules stand in `csrc/planner.h` (order, epochs), `csrc/draw.h` (shares) and
`csrc/sampler.cpp` (threads); this file checks arguments, keeps names and writes the audit log.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from velopath import _core, stream_quarantine
from velopath.audit import AuditLog
from velopath.cache import Cache, parse_size
from velopath.domains import DomainTable, MixtureWeights, check_weights, integer_shares
from velopath.errors import ConfigError, DataError, PushRejectedError
from velopath.pack import bins_of, window_parts
from velopath.remote import DEFAULT_POLICY, FetchPolicy
from velopath.stream_batch import TokenBatch as TokenBatch
from velopath.stream_data import domain_folders as domain_folders
from velopath.stream_data import end_of_text, open_domains
from velopath.stream_feed import Feed, FeedReport, feed_of
from velopath.stream_options import check_choice, check_number, choose_rows
from velopath.stream_order import POLICIES, domain_key
from velopath.stream_quarantine import BadShard
from velopath.stream_state import Identity, read_state, write_state
from velopath.urls import is_url, redact


def open_sampler(
    root: str | Path | Mapping[str, str | Path],
    rows: int = 8,
    row_tokens: int = 2048,
    seed: int = 0,
    rank: int = 0,
    world: int = 1,
    weights: Mapping[str, float] | None = None,
    eos: int | None = None,
    exhaustion: str = "repeat",
    cache: str | Path | None = None,
    audit: str | Path | None = None,
    *,
    audit_parent: str | Path | None = None,
    start_step: int = 0,
    threads: int = 1,
    prefetch: int = 8,
    allocate: Callable[[tuple[int, int]], NDArray[np.int32]] | None = None,
    domain_key_salt: str = "",
    bytes_dtype: str = "int64",
    stall_seconds: float = 5.0,
    verify: bool = False,
    packing: str = "concat",
    boundaries: bool = False,
    order: str | None = None,
    window: int = 8,
    bin_shards: int | None = None,
    on_bad_shard: str = "fail",
    cache_limit: str | int | None = None,
    fetch: FetchPolicy = DEFAULT_POLICY,
) -> Sampler:
    """Open a sampler on MDS folders, one per domain.

    `root` is a folder with one sub-folder per domain, a folder written by `velopath prepare`, or a mapping
    domain -> folder; a folder may be a URL (s3://, gs://, az://, http(s)://, others by fsspec).
    `rows` of T = `row_tokens` (+ 1) tokens are handed out per step and rank; a step is rows * world rows. `weights`
    None are the token shares. `eos` is the token that ends every document; None: as the `domains.json` beside the
    folders says, else documents join without separator.

    `exhaustion` of a domain after floor(N / T) rows: "repeat" reads it again in a new order, "renormalise" goes
    on without it, "stop" ends the stream before the first step that cannot be filled. zstd shards are inflated
    once into `cache`. Rank 0 writes the audit log to `audit`, for a stream that goes on from the one of the log
    `audit_parent` beside it (load its state then) as a fork of that. `start_step` is the number of the first step.
    `threads` assemble up to `prefetch` steps ahead (0: `next` assembles). `allocate(shape)` gives an int32 array
    to write into, for pinned memory (three a step with `boundaries`). `domain_key_salt` (the name of a data slice)
    keys the order of rows. A `bytes` column holds `bytes_dtype` values. A step that no thread finishes for
    `stall_seconds` is an error; without threads the caller reads, and waits, itself. Hashes are checked when a shard
    is inflated; `verify` reads and checks those of all raw files first.

    `packing`: "concat" rows are parts of the joined documents; "best_fit" rows hold whole documents, none cut but
    those of more than T + 1 tokens, and padding (`velopath.pack`; bins are computed once and stored beside the
    shards, or in the cache where those are remote). `boundaries` asks for documents, positions and `cu_seqlens` in
    each batch. `order`: "full" shuffles an epoch's rows over the whole domain; "windowed" shuffles the shards, then
    the rows inside each `window` shards of that order, so that only these and the ones right behind them (a row may
    end there) are read at a time. None is "windowed" where a folder is remote, else "full". The documents of a bin
    come from `bin_shards` neighbouring shards; None: from all, or from one where the order is windowed, so that the
    bins of a window touch its own shards alone.

    Shards of remote folders are fetched into `cache` as the plan comes to need them, patiently as `fetch` says, and
    evicted where the shards there pass `cache_limit` (bytes, or a size such as "50GB"); see `velopath.cache`. Where
    they do not come, `next` raises what the fetch raised. `Sampler.feed_report` says what was fetched and waited for.

    `on_bad_shard` "fail" refuses data with a bad shard as soon as it is met; "quarantine" reads everything once when
    it opens (a remote shard that has a hash and passed once is believed), leaves bad shards out, says so in a
    `QuarantineWarning`, `Sampler.quarantined` and the audit log, and draws from the rest. A state remembers what was
    left out and loads only where the same is. See `velopath.stream_quarantine`.

    Raises `ConfigError` on a wrong argument, `DataError` naming shard and sample on damaged data or a domain
    of fewer than T tokens. Fork before opening, not after.
    """
    for name, value, least in (
        ("rows", rows, 1), ("row_tokens", row_tokens, 1), ("seed", seed, 0), ("world", world, 1), ("rank", rank, 0),
        ("start_step", start_step, 0), ("threads", threads, 0), ("prefetch", prefetch, 1),
    ):  # fmt: skip
        check_number(name, value, least)
    if rank >= world:
        raise ConfigError(f"rank is {rank}; expected less than world, {world}")
    check_choice("exhaustion", exhaustion, POLICIES)
    check_choice("on_bad_shard", on_bad_shard, stream_quarantine.POLICIES)
    folders = domain_folders(root)
    far = [name for name, folder in folders.items() if is_url(folder)]
    choice = choose_rows(packing, order, window, bin_shards, remote=bool(far))
    if weights is not None:
        check_weights(weights, tuple(folders))
    eos = end_of_text(folders, eos)
    shards = Cache(cache, None if cache_limit is None else parse_size(cache_limit), fetch)
    data = open_domains(
        folders, eos, cache=shards, bytes_dtype=bytes_dtype, verify=verify, on_bad_shard=on_bad_shard
    )
    for name, domain in data.items():
        if domain.stream.tokens < (1 if packing == "best_fit" else row_tokens):
            raise DataError(
                f"domain {name!r} has {domain.stream.tokens} tokens, fewer than one row of {row_tokens}; "
                "add text or make row_tokens smaller",
                path=redact(str(domain.folder)),
            )
    streams = [domain.stream for domain in data.values()]
    bad = tuple(one for domain in data.values() for one in domain.bad)
    bins = bins_of(data, choice, row_tokens, eos, shards)
    identity = Identity(
        seed=seed,
        start_step=start_step,
        rows=rows,
        world=world,
        row_tokens=row_tokens,
        eos=eos,
        exhaustion=exhaustion,
        domain_key_salt=domain_key_salt,
        table=DomainTable(tuple(data), tuple(s.tokens for s in streams)),
        documents=tuple(s.documents for s in streams),
        fingerprints=tuple(domain.fingerprint for domain in data.values()),
        choice=choice,
        bins=tuple(b.rows for b in bins),
        parts=window_parts(choice, streams, bins),
        quarantined=stream_quarantine.names_of(bad),
    )
    mix = _mixture(identity.table.names, weights or identity.table.prior)
    core = _core.Sampler(
        streams,
        [b.packing for b in bins] or [None] * len(streams),
        keys=[domain_key(domain_key_salt, name) for name in data],
        shares=integer_shares(mix.shares),
        seed=seed,
        rank=rank,
        world=world,
        rows=rows,
        row_tokens=row_tokens,
        exhaustion=exhaustion,
        start_step=start_step,
        threads=threads,
        prefetch=prefetch,
        stall_seconds=stall_seconds,
        window=choice.window_parts,
        boundaries=boundaries,
        padding=eos or 0,
        staged=bool(far),
        allocate=allocate or _allocate,
    )
    log = AuditLog(audit, audit_parent) if audit is not None and rank == 0 else None
    first = MixtureWeights(mix.names, mix.shares, 0, start_step)
    feed = feed_of(core, list(data.values()), shards, global_rows=rows * world, window=choice.window)
    return Sampler(core, identity, rank, first, log, bad, shards, feed)


class Sampler:
    """Hands out steps in order; made by `open_sampler`. An iterator and a context manager.

    `next` may run in one thread while another pushes weights or asks for state.
    """

    def __init__(
        self,
        core: _core.Sampler,
        identity: Identity,
        rank: int,
        weights: MixtureWeights,
        audit: AuditLog | None,
        quarantined: tuple[BadShard, ...] = (),
        cache: Cache | None = None,
        feed: Feed | None = None,
    ) -> None:
        self._core, self._identity, self._audit = core, identity, audit
        self._mixes = {weights.id: weights}
        self._lock = threading.Lock()  # one push, load or state at a time
        self.table = identity.table
        self.names = identity.table.names
        self.rank, self.world, self.rows = rank, identity.world, identity.rows
        self.row_tokens, self.global_rows, self.eos = identity.row_tokens, identity.global_rows, identity.eos
        self.order = identity.order
        self.quarantined = quarantined
        """Shards that were left out, see `on_bad_shard` of `open_sampler`."""
        self._first: MixtureWeights | None = None if audit is None else weights
        self._cache, self._feed = cache, feed  # marks of the shards in use last as long as the sampler
        self._end_feed = weakref.finalize(self, feed.close) if feed is not None else None

    @property
    def step(self) -> int:
        """The next step, counted from `start_step`."""
        return self._core.step

    @property
    def weights(self) -> MixtureWeights:
        """Shares in force for the next step."""
        return self._mixes[self._core.mixes_at(self._core.step)[0][0]]

    def next(self) -> TokenBatch:
        """The next step's rows of this rank.

        Raises `StopIteration` where the exhaustion policy ends the stream, `DataError` naming shard and sample on
        a bad token, `VelopathError` when the reader threads stall or in a forked child.
        """
        if self._first is not None:
            with self._lock:
                self._begin_log()
        handed = self._core.next() if self._feed is None else self._fed_next(self._feed)
        if handed is None:
            raise StopIteration
        return TokenBatch(*handed)

    def _fed_next(self, feed: Feed) -> Any:
        """The core's next step; what it waits for the feed is told to it."""
        waits, begin = self._core.waits, time.perf_counter()
        if waits:
            feed.wake()
        handed = self._core.next()
        if waits:
            feed.waited(self._core.step - 1, time.perf_counter() - begin)
        feed.handed(self._core.step)
        return handed

    def __next__(self) -> TokenBatch:
        return self.next()

    def __iter__(self) -> Sampler:
        return self

    def push(
        self, weights: Mapping[str, float], at_step: int | None = None, reason: str = "", digest: str = ""
    ) -> MixtureWeights:
        """Draw by `weights` from `at_step` on, default the next step not handed out; returns them normalised.

        Every domain needs a weight of 0 or more; they are divided by their sum. Steps prefetched from there on
        are planned anew. With an audit log the push is on disk, with `reason` and the `digest` of the
        controller's state, before it has an effect. Raises `PushRejectedError`, and nothing changes, on weights
        that are not finite, negative, all 0, of an unknown or without a known domain, and on a step that is
        late, pushed for already, or before that of an earlier push.
        """
        try:
            check_weights(weights, self.names)
            mix = _mixture(self.names, weights)
        except ConfigError as error:
            raise PushRejectedError(str(error)) from error
        if at_step is not None and (isinstance(at_step, bool) or not isinstance(at_step, int) or at_step < 0):
            raise PushRejectedError(f"at_step is {at_step!r}; expected a step, a whole number of 0 or more")
        shares = integer_shares(mix.shares)
        with self._lock:
            self._begin_log()
            step, id = self._core.begin_push(at_step)
            try:
                pushed = MixtureWeights(mix.names, mix.shares, id, step)
                if self._audit is not None:
                    old = self._mixes[id - 1]
                    self._audit.append(
                        "push", step=step, old=old, new=pushed, reason=reason, digest=digest, details={"weights_id": id}
                    )  # fmt: skip
            except BaseException:
                self._core.abort_push()
                raise
            self._mixes[id] = pushed
            self._core.commit_push(shares)
            oldest = self._core.oldest_mix()
            self._mixes = {i: m for i, m in self._mixes.items() if i >= oldest}
        return pushed

    def exposure(self) -> dict[str, dict[str, float]]:
        """What all ranks together were handed so far, by domain.

        `rows`; `tokens` = rows * T, of best_fit those that are labels; `epochs` = rows / rows of an epoch;
        `unique_tokens` = the `tokens` of the first epoch, which leaves out the fewer than T tokens that only a second
        epoch of concat reaches.
        """
        return {
            name: {"rows": rows, "tokens": tokens, "epochs": rows / epoch, "unique_tokens": unique}
            for name, (rows, tokens, epoch, unique) in zip(self.names, self._core.exposure(), strict=True)
        }

    def ids(self, step: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Domains and row ids of all ranks together at `step`, (rows * world,): the next one, or one of the last 64."""
        return self._core.ids(step)

    def plan(self, steps: int) -> NDArray[np.int64]:
        """Rows of each domain (all ranks) in the coming `steps` steps, (steps, K); fewer where the stream ends.

        The cursor stays where it is.
        """
        return self._core.count(steps)

    def state_dict(self, after: int | None = None) -> dict[str, Any]:
        """The state as a JSON-able dict, the same on all ranks: that before the next step, or after step `after`.

        `after` is one of the last 64 steps handed out; an older or a later one is a `ConfigError`.
        """
        with self._lock:
            step = self._core.step if after is None else after + 1
            if step < 0:
                raise ConfigError(f"after is {after!r}; expected a step handed out")
            drawn, error = self._core.cursor_at(step)
            mixes = [self._mixes[id] for id, _, _ in self._core.mixes_at(step)]
        return write_state(self._identity, step, drawn, error, mixes)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`: the same steps as the sampler that it was taken from, bit by bit.

        `rows` and `world` may differ as long as their product is the same. Raises `ConfigError` naming both values,
        and changes nothing, where seed, shapes, policy or data differ or the state is damaged.
        """
        step, drawn, error, mixes = read_state(self._identity, state)
        with self._lock:
            if self._audit is not None:
                self._begin_log()
                self._audit.rewind(step=step, weights_id=mixes[-1].id, weights=mixes[0])
            self._core.load(
                step, drawn, error, [(m.id, m.from_step, integer_shares(m.shares)) for m in mixes]
            )
            self._mixes = {m.id: m for m in mixes}

    def _begin_log(self) -> None:
        """Record the opening before the first step, push or state: a state that is refused leaves the log as it was."""
        if self._first is not None and self._audit is not None:
            self._audit.begin(self.order, self._first, [bad._asdict() for bad in self.quarantined])
            self._first = None

    @property
    def feed_report(self) -> FeedReport:
        """What was fetched of remote shards so far, and how long steps waited for them; zeros of local ones."""
        return self._feed.report if self._feed is not None else FeedReport(0, 0, 0, 0.0)

    def close(self) -> None:
        """End the threads and close the audit log. Batches handed out stay valid."""
        if self._end_feed is not None:
            self._end_feed()
        self._core.close()
        if self._cache is not None:
            self._cache.close()
        if self._audit is not None:
            self._audit.close()

    def __enter__(self) -> Sampler:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _allocate(shape: tuple[int, int]) -> NDArray[np.int32]:
    return np.empty(shape, np.int32)


def _mixture(names: tuple[str, ...], weights: Mapping[str, float]) -> MixtureWeights:
    """The weights normalised, in the order of `names`."""
    try:
        return MixtureWeights.of({name: float(weights[name]) for name in names})
    except OverflowError as error:
        raise ConfigError(f"the weights {dict(weights)} are too large to be summed") from error
