"""Tokens of each shard of an MDS folder, so that a sampler can plan without opening the shards.

`token_counts.json` beside `index.json` holds them: version, the index they belong to (its fingerprint), the type that
`bytes` columns were read as (null where tokens are an ndarray), and for each shard the tokens that are stored in it.
`velopath prepare` writes it. For a remote folder without one, every shard is fetched once and the counts are kept in
the cache (`velopath.shard_journal`).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import xxhash

from velopath.cache import Cache
from velopath.durable import make_folder, write_durably
from velopath.errors import DataError
from velopath.mds import MdsFolder, shard_token_column
from velopath.remote import read_if_there
from velopath.shard_journal import Lengths
from velopath.urls import below, redact

NAME = "token_counts.json"

logger = logging.getLogger("velopath.remote")


def write_counts(index: MdsFolder, tokens: list[int], *, bytes_dtype: str = "int64") -> None:
    """Write the counts of a local folder beside its index."""
    write_durably(Path(index.folder) / NAME, _content(index, tokens, bytes_dtype))


def load_counts(
    index: MdsFolder, measure: Callable[[], Sequence[Lengths]], *, bytes_dtype: str, cache: Cache
) -> list[int]:
    """Tokens of each shard of a remote folder, without end-of-text tokens.

    From the file beside its index, or from the cache, or the sums of what `measure` returns: the tokens of each
    document of every shard. Raises `DataError` where the file is there and malformed.
    """
    place = str(below(index.folder, NAME))
    content = read_if_there(place, cache.policy)
    if content is not None:
        found = _parsed(content, index, bytes_dtype)
        if found is not None:
            return found
        logger.warning("%s is of another index; counting anew", redact(place))
    make_folder(cache.folder)
    key = xxhash.xxh3_128_hexdigest(
        f"{redact(str(index.folder))}\0{index.fingerprint}\0{bytes_dtype}".encode()
    )
    kept = cache.folder / f"{key}.counts.json"
    with suppress(DataError):  # damaged: counted anew
        if kept.is_file() and (found := _parsed(kept.read_bytes(), index, bytes_dtype)) is not None:
            return found
    tokens = [int(lengths.sum(dtype=np.int64)) for lengths in measure()]
    write_durably(kept, _content(index, tokens, bytes_dtype))
    return tokens


def _content(index: MdsFolder, tokens: list[int], bytes_dtype: str) -> bytes:
    value = {
        "version": 1,
        "fingerprint": index.fingerprint,
        "bytes_dtype": bytes_dtype if _plain(index, bytes_dtype) else None,
        "tokens": tokens,
    }
    return json.dumps(value).encode()


def _plain(index: MdsFolder, bytes_dtype: str) -> bool:
    return any(shard_token_column(entry, bytes_dtype=bytes_dtype).plain for entry in index.shards)


def _parsed(content: bytes, index: MdsFolder, bytes_dtype: str) -> list[int] | None:
    """The counts in a file; None where they are of another index or type of token."""
    place = redact(str(below(index.folder, NAME)))
    try:
        value = json.loads(content)
        version, tokens = value["version"], value["tokens"]
        if (value["fingerprint"], version) != (index.fingerprint, 1):
            return None
        if value["bytes_dtype"] not in (None, bytes_dtype):
            return None
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise DataError(f"not counts of tokens: {error!r}; remove the file", path=place) from error
    sound = isinstance(tokens, list) and len(tokens) == len(index.shards)
    sound = sound and all(
        type(n) is int and 0 <= n <= entry.raw_bytes for n, entry in zip(tokens, index.shards, strict=True)
    )
    if not sound:
        raise DataError(
            f"tokens are not {len(index.shards)} counts that fit the shards; remove the file",
            path=place,
            field="tokens",
        )
    return list(tokens)
