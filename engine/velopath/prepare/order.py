"""The documents of a domain in their final order, sorted with little memory: tables lie in files, hashes in buckets.

A table of n documents takes 44 n bytes of disk, and the sort some 20 n bytes of memory besides a bucket.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from velopath.durable import durable
from velopath.prepare.documents import DOCUMENT, Scan

BUCKET = 1 << 18
"""About how many documents are sorted, or copied, at a time."""


def joined(scans: Sequence[Scan], path: Path | None) -> NDArray[np.void]:
    """All documents of the scans, in the file `path` (in memory where that is None)."""

    def blocks() -> list[NDArray[np.void]]:
        return [_of(scan) for scan in scans]

    if path is None:
        return np.concatenate([np.zeros(0, DOCUMENT), *blocks()])
    with durable(path) as file:
        for scan in scans:
            file.write(_of(scan).tobytes())
    return _mapped(path)


def sorted_by_hash(found: NDArray[np.void]) -> NDArray[np.int64]:
    """Indexes of the documents by hash, of equal ones only the first by file and place."""
    bits = max(0, (len(found) // BUCKET).bit_length())
    bucket = np.zeros(len(found), np.uint16)
    for at in range(0, len(found) if bits else 0, BUCKET):
        bucket[at : at + BUCKET] = found["high"][at : at + BUCKET] >> np.uint64(64 - min(bits, 16))
    order = np.argsort(bucket, kind="stable")
    ends = np.cumsum(np.bincount(bucket, minlength=1))
    del bucket
    kept, begin = 0, 0
    for end in ends.tolist():
        places = order[begin:end]
        some = found[places]
        by_hash = np.lexsort((some["begin"], some["file"], some["low"], some["high"]))
        some, places = some[by_hash], places[by_hash]
        fresh = np.ones(len(places), dtype=bool)
        fresh[1:] = (some["high"][1:] != some["high"][:-1]) | (some["low"][1:] != some["low"][:-1])
        places = places[fresh]
        order[kept : kept + len(places)] = places  # never beyond what was read
        kept, begin = kept + len(places), end
    return order[:kept]


def taken(found: NDArray[np.void], order: NDArray[np.int64], path: Path | None) -> NDArray[np.void]:
    """`found[order]`, in the file `path` (in memory where that is None)."""
    if path is None:
        return found[order]
    with durable(path) as file:
        for at in range(0, len(order), BUCKET):
            file.write(found[order[at : at + BUCKET]].tobytes())
    return _mapped(path)


def remainders(found: NDArray[np.void], order: NDArray[np.int64], parts: int) -> NDArray[np.uint16]:
    """hash % `parts` (fewer than 2^16) of the documents `found[order]`."""
    result = np.empty(len(order), np.uint16)
    for at in range(0, len(order), BUCKET):
        result[at : at + BUCKET] = found["low"][order[at : at + BUCKET]] % np.uint64(parts)
    return result


def _of(scan: Scan) -> NDArray[np.void]:
    """The documents of a scan, numbered by the files of the domain."""
    if isinstance(scan.documents, Path):
        documents = np.array(np.load(scan.documents, mmap_mode="r", allow_pickle=False))
    else:
        documents = scan.documents.copy()
    documents["file"] += scan.first
    return documents


def _mapped(path: Path) -> NDArray[np.void]:
    if not path.stat().st_size:
        return np.zeros(0, DOCUMENT)
    return np.asarray(np.memmap(path, DOCUMENT, "r"))
