"""Best-fit decreasing: pieces of documents into bins of W tokens, in compiled loops.

"Fewer Truncations Improve Language Modeling" (arXiv 2404.10830) packs so; cutting long documents with one token of
overlap, so that no label is lost at a cut, is our choice. Time grows as n log W.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numba import njit
from numpy.typing import NDArray


def best_fit_bins(
    lengths: NDArray[np.uint32], width: int
) -> tuple[NDArray[np.uint64], NDArray[np.uint32], int]:
    """Bins of at most W = `width` >= 2 tokens for documents of `lengths` tokens.

    Returns `starts` (bins + 1,), `pieces` (P, 3) and how many documents were cut: bin b holds
    `pieces[starts[b] : starts[b + 1]]`, each (document, first token, tokens). A document of more than W tokens is
    cut into pieces of W, each beginning with the last token of the one before; the last piece, and every shorter
    document, longest first, goes into the bin that it leaves the least room in, or a new one. A document of no
    tokens is in no bin. Deterministic.
    """
    counts = _count(lengths, width)
    pieces, bins, cut = _place(lengths, width, *counts)
    order = np.argsort(bins, kind="stable")
    starts = np.zeros(int(bins.max(initial=-1)) + 2, np.uint64)
    starts[1:] = np.cumsum(np.bincount(bins, minlength=len(starts) - 1))
    return starts, pieces[order], int(cut)


def best_fit_groups(
    lengths: NDArray[np.uint32], firsts: Sequence[int], width: int
) -> tuple[NDArray[np.uint64], NDArray[np.uint64], NDArray[np.uint32], int]:
    """`best_fit_bins` of each group of documents by itself, group i from document `firsts[i]` to the next one's.

    Returns `starts`, the first bin of each group, `pieces` and how many documents were cut; a group needs a token.
    """
    starts, groups, pieces, cut, at, bins = [np.zeros(1, np.uint64)], [], [], 0, 0, 0
    for first, end in zip(firsts, [*firsts[1:], len(lengths)], strict=True):
        own_starts, own_pieces, own_cut = best_fit_bins(lengths[first:end], width)
        own_pieces[:, 0] += np.uint32(first)
        starts.append(own_starts[1:] + np.uint64(at))
        groups.append(bins)
        pieces.append(own_pieces)
        cut, at, bins = cut + own_cut, at + len(own_pieces), bins + len(own_starts) - 1
    return np.concatenate(starts), np.array(groups, np.uint64), np.concatenate(pieces), cut


@njit
def _count(lengths, width):  # type: ignore[no-untyped-def]
    """Pieces in all, those of W tokens, and how many of the others there are of each length."""
    full, rest = 0, 0
    by_length = np.zeros(width + 1, np.int64)
    for length in lengths:
        if length == 0:
            continue
        cuts = max(0, (length - width + width - 2) // (width - 1))
        last = length - cuts * (width - 1)
        full += cuts + (last == width)
        if last < width:
            rest += 1
            by_length[last] += 1
    return full, rest, by_length


@njit
def _place(lengths, width, full, rest, by_length):  # type: ignore[no-untyped-def]
    """Every piece and its bin; whole bins first, then the others in decreasing length."""
    pieces = np.empty((full + rest, 3), np.uint32)
    bins = np.empty(full + rest, np.int64)
    place = np.empty(width + 1, np.int64)  # where the next piece of each length goes
    at = full
    for length in range(width - 1, -1, -1):
        place[length] = at
        at += by_length[length]
    at, cut = 0, 0
    for document in range(len(lengths)):
        first, left = 0, int(lengths[document])
        cut += left > width
        while left >= width:
            pieces[at, 0], pieces[at, 1], pieces[at, 2] = document, first, width
            bins[at] = at
            at += 1
            if left == width:
                left = 0
            else:
                first += width - 1
                left -= width - 1
        if left > 0:
            p = place[left]
            place[left] += 1
            pieces[p, 0], pieces[p, 1], pieces[p, 2] = document, first, left
    _fit(pieces, bins, full, width)
    return pieces, bins, cut


@njit
def _fit(pieces, bins, full, width):  # type: ignore[no-untyped-def]
    """Best fit of `pieces[full:]`: open bins stand in stacks by their room, a tree tells which are not empty."""
    leaves = _leaves(width)
    some = np.zeros(2 * leaves, np.bool_)  # node i: a stack below it is not empty
    top = np.full(width + 1, -1, np.int64)
    below = np.empty(len(pieces), np.int64)
    opened = full
    for p in range(full, len(pieces)):
        length = int(pieces[p, 2])
        room = _least_room(some, leaves, length)
        if room < 0:
            room, bin_ = width, opened
            opened += 1
        else:
            bin_ = top[room]
            top[room] = below[bin_]
            if top[room] < 0:
                _set(some, leaves, room, False)
        bins[p] = bin_
        room -= length
        if room > 0:
            below[bin_] = top[room]
            top[room] = bin_
            _set(some, leaves, room, True)


@njit
def count_bins(lengths, width):  # type: ignore[no-untyped-def]
    """How many bins `best_fit_bins` makes, in memory for `width` numbers: only the rooms of bins matter."""
    opened, _, by_length = _count(lengths, width)
    leaves = _leaves(width)
    some = np.zeros(2 * leaves, np.bool_)
    open_ = np.zeros(width + 1, np.int64)  # bins of each room
    for length in range(width - 1, 0, -1):
        for _ in range(by_length[length]):
            room = _least_room(some, leaves, length)
            if room < 0:
                room = width
                opened += 1
            else:
                open_[room] -= 1
                if open_[room] == 0:
                    _set(some, leaves, room, False)
            room -= length
            if room > 0:
                open_[room] += 1
                _set(some, leaves, room, True)
    return opened


@njit
def _leaves(width):  # type: ignore[no-untyped-def]
    leaves = 1
    while leaves < width + 1:
        leaves *= 2
    return leaves


@njit
def _least_room(some, leaves, length):  # type: ignore[no-untyped-def]
    """The least room of `length` or more that a bin has, -1 where none has: climb to the nearest subtree on the right
    that is not empty, and go down its left edge."""
    node = leaves + length
    if not some[node]:
        while node > 1 and (node % 2 == 1 or not some[node + 1]):
            node //= 2
        if node <= 1:
            return -1
        node += 1
        while node < leaves:
            node = 2 * node if some[2 * node] else 2 * node + 1
    return node - leaves


@njit
def _set(some, leaves, room, value):  # type: ignore[no-untyped-def]
    """Bins of this room are there, or none any more."""
    node = leaves + room
    while node >= 1 and some[node] != value:
        if not value and node < leaves and (some[2 * node] or some[2 * node + 1]):
            break
        some[node] = value
        node //= 2
