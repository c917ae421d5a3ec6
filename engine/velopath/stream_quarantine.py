"""Shards that turn out bad when a sampler opens: an error (`fail`), or left out on record (`quarantine`).

A plan is a pure function of the data, so bad shards are found before the first step or not at all: with `quarantine`
every shard is read once in full, its hashes compared and every document decoded, and those that do not pass are left
out of their domain as if the index did not list them. Local shards are read at every start; a remote one that has a
hash and passed is believed from then on (`velopath.shard_journal`). What goes bad later, under a running sampler, is an
error with either policy: to leave rows out then would change the steps that are still to come (our choice).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from velopath.cache import Cache
from velopath.errors import DataError, WriteError
from velopath.mds import MdsFolder, ShardEntry, shard_token_column
from velopath.stream_shards import decode, shard_of
from velopath.urls import redact

POLICIES = ("fail", "quarantine")
_READERS = 8


class QuarantineWarning(UserWarning):
    """Shards were left out of a sampler's data."""


class BadShard(NamedTuple):
    """A shard that was left out: its domain, its file's name in the folder, and the error that it gave."""

    domain: str
    shard: str
    reason: str


def faults_of(index: MdsFolder, cache: Cache, bytes_dtype: str) -> list[str | None]:
    """What is wrong with each shard of a local folder, None where nothing is; `RemoteShards.faults` is of a remote one.

    Reads everything, on 8 threads: as long as hashing the files and decoding them takes. Raises what is no fault of a
    shard: `WriteError` of a cache that cannot be filled, errors of memory.
    """

    def fault(entry: ShardEntry) -> str | None:
        try:
            shard_token_column(entry, bytes_dtype=bytes_dtype)  # refused before anything is inflated
            path = cache.hold(entry, verify=True)
            decode(shard_of(entry, bytes_dtype, path))
        except WriteError:
            raise
        except (DataError, OSError) as error:
            return str(error)
        return None

    with ThreadPoolExecutor(_READERS) as pool:
        return list(pool.map(fault, index.shards))


def leave_out(
    indexes: Mapping[str, MdsFolder], faults: Mapping[str, Sequence[str | None]]
) -> tuple[dict[str, MdsFolder], dict[str, tuple[BadShard, ...]]]:
    """The indexes without the shards that have a fault, and those by domain; a `QuarantineWarning` names them.

    Raises `DataError` where no shard of a domain is left.
    """
    bad: dict[str, tuple[BadShard, ...]] = {}
    kept: dict[str, MdsFolder] = {}
    for name, index in indexes.items():
        folder = Path(redact(str(index.folder)))
        pairs = list(zip(index.shards, faults[name], strict=True))
        bad[name] = tuple(
            BadShard(name, _name(entry, folder), why) for entry, why in pairs if why is not None
        )
        kept[name] = MdsFolder(index.folder, tuple(entry for entry, why in pairs if why is None))
        if index.shards and not kept[name].shards:
            raise DataError(
                f"all {len(index.shards)} shards of domain {name!r} are bad; the first: {faults[name][0]}",
                path=redact(str(index.folder)),
            )
    if any(bad.values()):
        unhashed = sum(not s.raw_hashes and not s.zip_hashes for i in indexes.values() for s in i.shards)
        _warn([one for ones in bad.values() for one in ones], unhashed)
    return kept, bad


def _warn(bad: Sequence[BadShard], unhashed: int) -> None:
    text = f"{len(bad)} shards are left out: " + "; ".join(
        f"{b.domain}/{b.shard} ({b.reason})" for b in bad[:5]
    )
    if len(bad) > 5:
        text += f"; and {len(bad) - 5} more"
    if unhashed:
        text += f". {unhashed} shards have no hash; of those only the structure was checked"
    warnings.warn(text, QuarantineWarning, stacklevel=5)


def names_of(bad: Iterable[BadShard]) -> dict[str, list[str]]:
    """Domain -> names of the shards left out, sorted: what a sampler's state remembers of them."""
    found: dict[str, list[str]] = {}
    for one in sorted(bad):
        found.setdefault(one.domain, []).append(one.shard)
    return found


def _name(entry: ShardEntry, folder: Path) -> str:
    return (entry.zip_path or entry.path).relative_to(folder).as_posix()
