"""TokenBatch: what a sampler hands out."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class TokenBatch(NamedTuple):
    """One optimiser step of this rank.

    `tokens` int32 (rows, T + 1): inputs are `tokens[:, :-1]`, labels `tokens[:, 1:]`. `domains` int32 (rows,):
    each row's domain, as index into `Sampler.names`. `row_ids` int64 (rows,) name what was read: epoch * rows of
    an epoch + number of the row in its epoch's stream. The memory of `tokens` is used again once the array and
    every view of it are gone; copy what must outlive them (and wait for asynchronous copies to a device).

    With `packing="best_fit"`, `counts` int32 (rows,) are the tokens of each row that are no padding, else None.

    With `boundaries=True`, else None: `documents` int32 (rows, T + 1) number the documents of a row from 0, padding
    is -1; `positions` int32 (rows, T + 1) count from 0 in each document, or part of one, that a row holds;
    `cu_seqlens` int32 are the bounds of those parts in the inputs of the whole batch, `tokens[:, :-1].reshape(-1)`,
    from 0 to rows * T; padding is a part of its own. An end-of-text token belongs to the document that it ends.
    """

    tokens: NDArray[np.int32]
    domains: NDArray[np.int32]
    step: int
    weights_id: int
    row_ids: NDArray[np.int64]
    counts: NDArray[np.int32] | None = None
    documents: NDArray[np.int32] | None = None
    positions: NDArray[np.int32] | None = None
    cu_seqlens: NDArray[np.int32] | None = None

    def targets(self, ignore_index: int = -100) -> NDArray[np.int32]:
        """The labels, int32 (rows, T): `tokens[:, 1:]`, with `ignore_index` where that is padding."""
        labels = self.tokens[:, 1:]
        if self.counts is None:
            return labels
        return np.where(
            np.arange(1, labels.shape[1] + 1) < self.counts[:, None], labels, np.int32(ignore_index)
        )
