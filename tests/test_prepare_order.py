"""The order of documents in `prepare`: that of one sort of all, found with little memory."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from velopath.prepare import order
from velopath.prepare.documents import DOCUMENT, Scan


def scans_of(sizes: list[int], seed: int, hashes: int) -> list[Scan]:
    """Scans of pieces 0, 3, 6, ..: documents of two files each, some of which are copies of others."""
    rng = np.random.default_rng(seed)
    pool = rng.integers(0, 1 << 64, (hashes, 2), np.uint64)
    found = []
    for number, size in enumerate(sizes):
        documents = np.zeros(size, DOCUMENT)
        documents["high"], documents["low"] = pool[rng.integers(0, hashes, size)].T
        documents["low"] ^= rng.integers(0, 2, size, np.uint64)  # equal in one half only
        documents["file"], documents["begin"] = rng.integers(0, 2, size), rng.permutation(size)
        found.append(Scan(documents, {}, np.zeros((size, 0)), np.zeros((size, 0)), 3 * number))
    return found


@pytest.mark.parametrize("sizes", [[0], [1], [0, 7, 0], [100, 1, 40], [3000, 2000, 1000]])
@pytest.mark.parametrize("bucket", [1, 10, 1 << 18])
@pytest.mark.parametrize("in_files", [False, True])
def test_equals_one_sort(
    sizes: list[int], bucket: int, in_files: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(order, "BUCKET", bucket)
    scans = scans_of(sizes, seed=len(sizes), hashes=1 + sum(sizes) // 3)
    place = {name: tmp_path / name if in_files else None for name in ("all", "taken")}
    found = order.joined(scans, place["all"])
    rows = [(int(d["high"]), int(d["low"]), int(d["file"]), int(d["begin"]), k) for k, d in enumerate(found)]
    assert [r[2] for r in rows] == [int(f) + s.first for s in scans for f in s.documents["file"]]
    expected = {
        row[:2]: row[4] for row in sorted(rows, reverse=True)
    }  # the first of equal ones is written last
    indexes = order.sorted_by_hash(found)
    assert indexes.tolist() == [expected[key] for key in sorted(expected)]
    assert np.array_equal(order.taken(found, indexes, place["taken"]), found[indexes])
    assert np.array_equal(order.remainders(found, indexes, 10_000), found["low"][indexes] % 10_000)


def test_memory_of_the_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table is 44 bytes a document and used to lie in memory twice; what a sort of all takes came on top."""
    monkeypatch.setattr(order, "BUCKET", 1 << 13)
    (scan,) = scans_of([600_000], seed=1, hashes=500_000)
    np.save(tmp_path / "scan.npy", scan.documents)
    stored = Scan(tmp_path / "scan.npy", {}, scan.keys, scan.sketches)
    parts = [stored]
    tracemalloc.start()
    found = order.joined(parts, tmp_path / "all")
    tracemalloc.reset_peak()  # a scan is as large as a piece of a file, whatever the corpus
    indexes = order.sorted_by_hash(found)
    order.taken(found, indexes, tmp_path / "taken")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 30 * len(found)
