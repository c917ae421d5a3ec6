"""The streaming sampler: token rows of several domains, drawn by weights that can be pushed while it runs.

A step is a pure function of (seed, weights log, cursor): every rank computes the whole plan of a step and reads
its own slice, so world size, threads and prefetching never change what is read. Letters: N tokens of a domain,
T = `row_tokens`, K domains. The rules stand in `csrc/planner.h` (order, epochs), `csrc/draw.h` (shares) and
`csrc/sampler.cpp` (threads); this file checks arguments, keeps names and writes the audit log.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from velopath import _core
from velopath.audit import AuditLog
from velopath.cache import raw_path
from velopath.domains import DomainTable, MixtureWeights, check_weights, integer_shares
from velopath.errors import ConfigError, DataError, PushRejectedError
from velopath.mds import MdsFolder, ShardEntry, load_index, shard_token_column
from velopath.stream_order import POLICIES, domain_key
from velopath.stream_state import Identity, read_state, write_state

_TYPE_CODES = {"uint8": 8, "uint16": 16, "int16": 17, "uint32": 32, "int32": 33, "uint64": 64, "int64": 65}
_INFLATERS = 8


class TokenBatch(NamedTuple):
    """One optimiser step of this rank.

    `tokens` int32 (rows, T + 1): inputs are `tokens[:, :-1]`, labels `tokens[:, 1:]`. `domains` int32 (rows,):
    each row's domain, as index into `Sampler.names`. `row_ids` int64 (rows,) name what was read: epoch * rows of
    an epoch + number of the row in its epoch's stream. The memory of `tokens` is used again once the array and
    every view of it are gone; copy what must outlive them (and wait for asynchronous copies to a device).
    """

    tokens: NDArray[np.int32]
    domains: NDArray[np.int32]
    step: int
    weights_id: int
    row_ids: NDArray[np.int64]


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
) -> Sampler:
    """Open a sampler on MDS folders, one per domain.

    `root` is a folder with one sub-folder per domain, a folder written by `velopath prepare`, or a mapping
    domain -> folder. `rows` of T = `row_tokens` (+ 1) tokens are handed out per step and rank; a step is
    rows * world rows. `weights` None are the token shares. `eos` is the token that ends every document; None:
    as the `domains.json` beside the folders says, else documents join without separator.

    `exhaustion` of a domain after floor(N / T) rows: "repeat" reads it again in a new order, "renormalise" goes
    on without it, "stop" ends the stream before the first step that cannot be filled. zstd shards are inflated
    once into `cache`. Rank 0 writes the audit log to `audit`, for a stream that goes on from the one of the log
    `audit_parent` beside it (load its state then) as a fork of that. `start_step` is the number of the first step.
    `threads` assemble up to `prefetch` steps ahead (0: `next` assembles). `allocate(shape)` gives an int32 array
    to write into, for pinned memory. `domain_key_salt` (the name of a data slice) keys the order of rows. A
    `bytes` column holds `bytes_dtype` values. A step that no thread finishes for `stall_seconds` is an error.
    Hashes are checked when a shard is inflated; `verify` reads and checks those of all raw files first.

    Raises `ConfigError` on a wrong argument, `DataError` naming shard and sample on damaged data or a domain
    of fewer than T tokens. Fork before opening, not after.
    """
    for name, value, least in (
        ("rows", rows, 1), ("row_tokens", row_tokens, 1), ("seed", seed, 0), ("world", world, 1), ("rank", rank, 0),
        ("start_step", start_step, 0), ("threads", threads, 0), ("prefetch", prefetch, 1),
    ):  # fmt: skip
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 1 << 63:
            raise ConfigError(f"{name} is {value!r}; expected a whole number, {least} or more")
    if rank >= world:
        raise ConfigError(f"rank is {rank}; expected less than world, {world}")
    if exhaustion not in POLICIES:
        raise ConfigError(f"exhaustion is {exhaustion!r}; expected one of {', '.join(POLICIES)}")
    folders = domain_folders(root)
    if weights is not None:
        check_weights(weights, tuple(folders))
    eos = _end_of_text(folders, eos)
    indexes = {name: load_index(folder) for name, folder in folders.items()}
    streams = {
        name: _core.TokenStream(shards, eos)
        for name, shards in _shards(indexes, cache, bytes_dtype, verify).items()
    }
    for name, stream in streams.items():
        if stream.tokens < row_tokens:
            raise DataError(
                f"domain {name!r} has {stream.tokens} tokens, fewer than one row of {row_tokens}; "
                "add text or make row_tokens smaller",
                path=folders[name],
            )
    identity = Identity(
        seed=seed,
        start_step=start_step,
        rows=rows,
        world=world,
        row_tokens=row_tokens,
        eos=eos,
        exhaustion=exhaustion,
        domain_key_salt=domain_key_salt,
        table=DomainTable(tuple(streams), tuple(s.tokens for s in streams.values())),
        documents=tuple(s.documents for s in streams.values()),
        fingerprints=tuple(_fingerprint(index) for index in indexes.values()),
    )
    mix = _mixture(identity.table.names, weights or identity.table.prior)
    core = _core.Sampler(
        list(streams.values()),
        keys=[domain_key(domain_key_salt, name) for name in streams],
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
        allocate=allocate or _allocate,
    )
    log = AuditLog(audit, audit_parent) if audit is not None and rank == 0 else None
    return Sampler(core, identity, rank, MixtureWeights(mix.names, mix.shares, 0, start_step), log)


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
    ) -> None:
        self._core, self._identity, self._audit = core, identity, audit
        self._mixes = {weights.id: weights}
        self._lock = threading.Lock()  # one push, load or state at a time
        self.table = identity.table
        self.names = identity.table.names
        self.rank, self.world, self.rows = rank, identity.world, identity.rows
        self.row_tokens, self.global_rows, self.eos = identity.row_tokens, identity.global_rows, identity.eos
        self.order = identity.order
        if audit is not None:
            audit.begin(self.order, weights)

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
        handed = self._core.next()
        if handed is None:
            raise StopIteration
        return TokenBatch(*handed)

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

        `rows`; `tokens` = rows * T; `epochs` = rows / floor(N / T); `unique_tokens` = T * min(rows, floor(N / T)),
        which leaves out the fewer than T tokens that only a second epoch reaches.
        """
        drawn, _ = self._core.cursor_at(self._core.step)
        result = {}
        for name, rows, tokens in zip(self.names, drawn, self.table.tokens, strict=True):
            epoch = tokens // self.row_tokens
            unique = min(rows, epoch) * self.row_tokens
            result[name] = {
                "rows": rows,
                "tokens": rows * self.row_tokens,
                "epochs": rows / epoch,
                "unique_tokens": unique,
            }
        return result

    def ids(self, step: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Domains and row ids of all ranks together at `step`, (rows * world,): the next one, or one of the last 64."""
        shares = self._core.mixes_at(step)[0][2]
        domains, row_ids, _, _ = self.order.draw(step, 1, shares, *self._core.cursor_at(step))
        return domains.reshape(-1), row_ids.reshape(-1)

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
                self._audit.rewind(step=step, weights_id=mixes[-1].id, weights=mixes[0])
            self._core.load(
                step, drawn, error, [(m.id, m.from_step, integer_shares(m.shares)) for m in mixes]
            )
            self._mixes = {m.id: m for m in mixes}

    def close(self) -> None:
        """End the threads and close the audit log. Batches handed out stay valid."""
        self._core.close()
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


def domain_folders(root: str | Path | Mapping[str, str | Path]) -> dict[str, Path]:
    """Domain -> MDS folder, sorted by name; `root` as in `open_sampler`."""
    if isinstance(root, Mapping):
        if not root:
            raise ConfigError("no domains: the mapping domain -> folder is empty")
        return {name: Path(root[name]) for name in sorted(root)}
    root = Path(root)
    for place in (root, root / "train"):
        found = {
            p.parent.name: p.parent for p in place.glob("*/index.json") if not p.parent.name.startswith(".")
        }
        if found:
            return {name: found[name] for name in sorted(found)}
    if (root / "index.json").is_file():
        raise DataError(
            "this is one MDS folder; give the folder above it, or a mapping domain -> folder", path=root
        )
    raise DataError("no domains: expected sub-folders that each hold an index.json", path=root)


def _end_of_text(folders: Mapping[str, Path], eos: int | None) -> int | None:
    """`eos` as given, or as the domains.json above each folder agree."""
    if eos is None:
        beside = {p / "domains.json" for f in folders.values() for p in list(f.resolve().parents)[:2]}
        found: dict[int | None, Path] = {}
        for path in sorted(p for p in beside if p.is_file()):
            try:
                found[json.loads(path.read_bytes())["eos"]] = path
            except (ValueError, TypeError, KeyError) as error:
                raise DataError(f"not a table of domains with an eos: {error!r}", path=path) from error
        if len(found) > 1:
            raise ConfigError(f"the domains end their documents differently: {found}; give eos")
        eos = next(iter(found), None)
    if eos is not None and (isinstance(eos, bool) or not isinstance(eos, int) or not 0 <= eos < 1 << 31):
        raise ConfigError(f"eos is {eos!r}; expected a token id from 0 to 2147483647, or None")
    return eos


def _shards(
    indexes: Mapping[str, MdsFolder], cache: str | Path | None, bytes_dtype: str, verify: bool
) -> dict[str, list[_core._Shard]]:
    """Shards of each domain as the core takes them; zstd ones are inflated side by side."""

    def describe(entry: ShardEntry) -> _core._Shard:
        column = shard_token_column(entry, bytes_dtype=bytes_dtype)
        # No sample can be larger than its shard, so a larger fixed size is as good as any too large one.
        sizes = [-1 if s is None else min(s, 1 << 32) for s in entry.columns.sizes]
        code = 0 if column.dtype is None else _TYPE_CODES[column.dtype]
        length = None if column.length is None else min(column.length, 1 << 32)
        path = str(raw_path(entry, cache, verify=verify))
        names = entry.columns.names
        return (path, entry.samples, entry.raw_bytes, names, sizes, column.index, column.plain, code, length)

    with ThreadPoolExecutor(_INFLATERS) as pool:
        waiting = {
            name: [pool.submit(describe, entry) for entry in index.shards] for name, index in indexes.items()
        }
        return {name: [f.result() for f in shards] for name, shards in waiting.items()}


def _fingerprint(index: MdsFolder) -> str:
    """Hash of what the index says about the raw shards; how they are compressed does not matter."""
    shards = [
        [s.samples, s.raw_bytes, sorted(s.raw_hashes.items()), s.columns.names, s.columns.encodings]
        for s in index.shards
    ]
    return hashlib.sha256(json.dumps(shards).encode()).hexdigest()[:32]
