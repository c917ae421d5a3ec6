"""A remote domain: shards that are fetched when they are needed, of which no more is known than a plan needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from velopath import _core
from velopath.cache import Cache
from velopath.errors import DataError, WriteError
from velopath.mds import MdsFolder, ShardEntry
from velopath.remote import DeniedError, FetchError, MissingError
from velopath.shard_journal import Lengths, forget, measure
from velopath.stream_shards import decode, shard_of
from velopath.token_counts import load_counts


@dataclass(frozen=True)
class RemoteShards:
    """The shards of one remote folder, as a sampler with this end-of-text token reads them through the cache."""

    index: MdsFolder
    eos: int | None
    cache: Cache
    bytes_dtype: str

    def without(self, faults: Sequence[str | None]) -> RemoteShards:
        """Those that have no fault."""
        kept = tuple(entry for entry, fault in zip(self.index.shards, faults, strict=True) if fault is None)
        return replace(self, index=MdsFolder(self.index.folder, kept))

    def faults(self) -> list[str | None]:
        """What is wrong with each shard, None where nothing is: each is fetched and every document decoded.

        A shard that has a hash and passed before, in this cache, is not fetched again. One that is not there is wrong;
        one that may not be seen, or cannot be fetched, is an error: `FetchError`. So is a cache that cannot be written.
        """

        def look(entry: ShardEntry) -> Lengths | str:
            try:
                shard_of(entry, self.bytes_dtype, entry.place)  # refused before it is fetched
                with self.cache.held(entry, verify=True) as path:
                    return decode(shard_of(entry, self.bytes_dtype, path))
            except DataError as error:
                missing = isinstance(error, MissingError) and not isinstance(error, DeniedError)
                if isinstance(error, (FetchError, WriteError)) and not missing:
                    raise  # of the network, the store or the cache
                return str(error)

        found = measure(
            self.index,
            look,
            bytes_dtype=self.bytes_dtype,
            cache=self.cache,
            why="to check them",
            decoded=True,
        )
        return [fault if isinstance(fault, str) else None for fault in found]

    def doubt(self, number: int) -> None:
        """Have `faults` look at a shard again, whatever was found before."""
        forget(self.index.folder, self.index.shards[number], bytes_dtype=self.bytes_dtype, cache=self.cache)

    def counts(self, measured: bool) -> list[int]:
        """Tokens of each shard, without end-of-text tokens; of `measured` documents where those were looked at."""
        if measured:
            return [int(lengths.sum(dtype=np.int64)) for lengths in self._measured()]
        return load_counts(self.index, self._measured, bytes_dtype=self.bytes_dtype, cache=self.cache)

    def stream(self, counts: Sequence[int]) -> _core.TokenStream:
        """The documents, of which none can be read before its shard is attached."""
        shards = [shard_of(entry, self.bytes_dtype, entry.place) for entry in self.index.shards]
        return _core.TokenStream(shards, self.eos, counts)

    def lengths(self, counts: Sequence[int]) -> Lengths:
        """Tokens of each document, its end-of-text token included. Raises `DataError` unless they sum to the counts."""
        found = self._measured()
        for entry, counted, own in zip(self.index.shards, counts, found, strict=True):
            if (tokens := int(own.sum(dtype=np.int64))) != counted:
                raise DataError(
                    f"the shard holds {tokens} tokens, {counted} were counted; remove the counts, or write the "
                    "folder again",
                    path=entry.place,
                )
        return np.concatenate(found) + np.uint32(self.eos is not None)

    def _measured(self) -> list[Lengths]:
        def look(entry: ShardEntry) -> Lengths:
            shard_of(entry, self.bytes_dtype, entry.place)  # refused before it is fetched
            with self.cache.held(entry) as path:
                return _core.TokenStream([shard_of(entry, self.bytes_dtype, path)], None).lengths

        found = measure(
            self.index, look, bytes_dtype=self.bytes_dtype, cache=self.cache, why="to count their tokens"
        )
        return [lengths for lengths in found if not isinstance(lengths, str)]
