"""What velopath reads from a folder, by its two readers, against the documents that were written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from velopath import open_sampler
from velopath.mds import read_documents


def documents_differ(folder: Path, documents: list[list[int]], **options: Any) -> str:
    """Empty where `read_documents` and the sampler give `documents`, else what differs."""
    found = [d.tolist() for d in read_documents(folder, **options)]
    if found != documents:
        return f"read_documents gives {len(found)} documents that differ from the {len(documents)} written"
    stream = np.array([t for d in documents for t in d], np.int64)
    if len(stream) and not is_run_of_circle(sampled_stream(folder, len(stream), **options), stream):
        return "the sampler gives other tokens"
    return ""


def sampled_stream(folder: Path, tokens: int, **options: Any) -> NDArray[np.int32]:
    """Tokens of one epoch in the order of the stream, from the epoch's offset on; whole rows only."""
    row_tokens = 1 if tokens < 2_000 else 512
    with open_sampler(
        {"a": folder}, rows=1, row_tokens=row_tokens, exhaustion="stop", threads=0, **options
    ) as sampler:
        rows = {int(batch.row_ids[0]): batch.tokens[0, :-1].copy() for batch in sampler}
    return np.concatenate([rows[number] for number in range(len(rows))])


def is_run_of_circle(found: NDArray[Any], stream: NDArray[Any]) -> bool:
    """Whether `found` is a run of the circular `stream` that is less than a row shorter."""
    starts = np.flatnonzero(stream == found[0])
    twice = np.concatenate([stream, stream])
    return len(stream) - len(found) < 512 and any(
        np.array_equal(twice[s : s + len(found)], found) for s in starts
    )
