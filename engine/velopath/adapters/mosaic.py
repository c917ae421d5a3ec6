"""mosaicml-streaming's definitions of token streams, read by velopath's sampler: a change of one import.

    from velopath.adapters.mosaic import StreamingDataset   # was: from streaming import StreamingDataset

The package itself is not needed; its `Stream` objects, or any with the same attributes, are read. What differs: samples
are rows of a stream's joined documents, all of `row_tokens` tokens; shares count tokens, not samples; the order is
always shuffled; the mix can be pushed while it runs; threads read ahead, so `num_workers` of a DataLoader is 0.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import IterableDataset, get_worker_info

from velopath.domains import MixtureWeights, check_weights
from velopath.errors import ConfigError
from velopath.mds import load_index, read_documents, token_column
from velopath.remote import DEFAULT_POLICY, FetchPolicy
from velopath.stream import TokenBatch, open_sampler
from velopath.urls import below, is_url, last_name

Sample = dict[str, NDArray[np.integer[Any]] | bytes]
_LOOKED_AT = 64  # documents of a stream whose lengths must agree where row_tokens is not given
_WITHOUT_EFFECT = ("predownload", "partition_algo", "num_canonical_nodes", "shuffle_algo", "keep_zip",
                   "shuffle_block_size", "sampling_method", "sampling_granularity", "batching_method",
                   "replication")  # fmt: skip  # how the package fetches and shuffles


class StreamingDataset(IterableDataset[Sample]):
    """Rows of tokens as `{column: array}`, column name and type as stored (`bytes` where the column is `bytes`).

    `streams` have `local`, `remote` (a path or URL), `split` and one of `proportion`, `repeat`, `choose`; or give one
    stream by keywords. A stream is named by its folder (and its number where two agree). Of a URL, shards are fetched
    into the folder that holds all `local` ones (or `cache`), up to `cache_limit`; an attempt ends where no byte comes
    for `download_timeout` s. `row_tokens` None: as long as the stored documents, where they are of one length. Rank and
    world come from the environment, as the package's do. Iterating hands out the next `len(self)` rows of this rank;
    other keywords go to `open_sampler`. Raises `ConfigError` on settings that cannot be kept.
    """

    def __init__(
        self, *, streams: Sequence[Any] | None = None, remote: str | None = None, local: str | None = None,
        split: str | None = None, batch_size: int = 1, epoch_size: int | None = None, shuffle: bool = True,
        shuffle_seed: int = 9176, row_tokens: int | None = None, bytes_dtype: str = "int64", **options: Any,
    ) -> None:  # fmt: skip
        if not shuffle:
            raise ConfigError("shuffle is False; the sampler draws rows in shuffled order: give shuffle=True")
        if (not streams) == (remote is None and local is None):
            raise ConfigError("give either streams, or one stream by local or remote")
        places = [(s.local, s.remote, s.split or split) for s in streams or ()] or [(local, remote, split)]
        names = [last_name(there or here or "") for here, there, _ in places]
        names = [name if names.count(name) == 1 else f"{name}-{k}" for k, name in enumerate(names)]
        folders = {name: _folder(*place) for name, place in zip(names, places, strict=True)}
        columns = [token_column(load_index(f).columns, bytes_dtype=bytes_dtype) for f in folders.values()]
        self.column, self._plain = columns[0].name, columns[0].plain
        if {(c.name, c.plain) for c in columns} != {(self.column, self._plain)}:
            stored = sorted({f"{c.name} as {c.encoding}" for c in columns})
            raise ConfigError(
                f"the streams store tokens as {', '.join(stored)}; expected one column and kind"
            )
        first = [d for f in folders.values() for d in _first_documents(f, bytes_dtype)]
        dtype = np.result_type(*(d.dtype for d in first)) if first else np.dtype(bytes_dtype)
        self.dtype = dtype if dtype.kind in "iu" else np.dtype("int64")  # uint64 beside int64
        lengths = {len(d) for d in first}
        if row_tokens is None and len(lengths) != 1:
            raise ConfigError(
                f"documents have {len(lengths)} different lengths; give row_tokens, the tokens of a row"
            )
        world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
        settings: dict[str, Any] = {"row_tokens": row_tokens or lengths.pop(), "bytes_dtype": bytes_dtype}
        settings["verify"] = bool(
            options.pop("validate_hash", None)
        )  # inflated shards are checked in any case
        retries, stall = options.pop("download_retry", None), options.pop("download_timeout", None)
        attempts = DEFAULT_POLICY.attempts if retries is None else int(retries) + 1
        seconds = DEFAULT_POLICY.stall_seconds if stall is None else float(stall)
        settings["fetch"] = FetchPolicy(attempts=attempts, stall_seconds=seconds)
        caches = [
            here
            for (here, _, _), folder in zip(places, folders.values(), strict=True)
            if here and is_url(folder)
        ]
        settings["cache"] = os.path.commonpath(map(os.path.abspath, caches)) if caches else None
        settings |= {"seed": shuffle_seed, "rows": batch_size, "rank": rank, "world": world}
        settings |= {key: value for key, value in options.items() if key not in _WITHOUT_EFFECT}
        with open_sampler(folders, **(settings | {"threads": 0, "audit": None})) as whole:
            tokens = dict(zip(whole.names, whole.table.tokens, strict=True))
        weights = _weights(dict(zip(names, streams or [None], strict=True)), folders, tokens)
        self.sampler = open_sampler(folders, weights=weights, **settings)
        self._length = -(-(epoch_size or round(sum(weights.values())) // settings["row_tokens"]) // world)
        self._batch: TokenBatch | None = None  # of which the rows before _row were handed out
        self._row = 0

    def __len__(self) -> int:
        """Rows of an epoch on this rank."""
        return self._length

    def __iter__(self) -> Iterator[Sample]:
        if get_worker_info() is not None:
            raise ConfigError(
                "num_workers is not 0; give 0: the sampler's threads read ahead in this process"
            )
        for _ in range(self._length):
            if self._batch is None or self._row == len(self._batch.tokens):
                self._batch, self._row = next(self.sampler, None), 0
                if self._batch is None:
                    return
            row = self._batch.tokens[self._row, :-1].astype(self.dtype)
            self._row += 1
            yield {self.column: row.tobytes() if self._plain else row}

    def push(self, weights: Mapping[str, float], reason: str = "") -> MixtureWeights:
        """Draw by `weights` (stream name -> share) from the next batch on; see `Sampler.push`."""
        return self.sampler.push(weights, reason=reason)

    def state_dict(self) -> dict[str, Any]:
        """Where this dataset stands, to the row; JSON-able."""
        after = None if self._batch is None else self._batch.step - 1
        return {"sampler": self.sampler.state_dict(after=after), "row": self._row}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue behind the last row that the dataset of `state` handed out."""
        self.sampler.load_state_dict(state["sampler"])
        self._row = int(state["row"])
        self._batch = self.sampler.next() if self._row else None


def _first_documents(folder: str | Path, bytes_dtype: str) -> list[NDArray[np.integer[Any]]]:
    return list(islice(read_documents(folder, bytes_dtype=bytes_dtype), _LOOKED_AT))


def _folder(local: str | None, remote: str | None, split: str | None) -> str | Path:
    """The stream's folder: below `local` where it is there already, else below `remote`."""
    places = [Path(place, split or "") for place in (local, remote) if place and not is_url(place)]
    for place in places:
        if (place / "index.json").is_file():
            return place
    if is_url(remote):
        return below(str(remote), *([split] if split else []))
    raise ConfigError(f"no index.json in {' or '.join(map(str, places))}; check local and remote")


def _weights(
    streams: Mapping[str, Any], folders: Mapping[str, str | Path], tokens: Mapping[str, int]
) -> dict[str, float]:
    """Tokens of each stream in an epoch: all, times `repeat`; `proportion` shares the sum out."""
    proportions = {n: s.proportion for n, s in streams.items() if getattr(s, "proportion", None) is not None}
    if proportions:
        check_weights(proportions, tuple(streams))
        unit = sum(tokens.values()) / sum(proportions.values())
        return {name: unit * share for name, share in proportions.items()}
    drawn = {}
    for name, stream in streams.items():
        repeat, choose = getattr(stream, "repeat", None), getattr(stream, "choose", None)
        repeat = choose / load_index(folders[name]).samples if choose is not None else repeat
        drawn[name] = tokens[name] * (1.0 if repeat is None else repeat)
    return drawn
