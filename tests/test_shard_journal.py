"""The journal of what was read of a folder's shards: believed as far as it is sound, and no further."""

from __future__ import annotations

import resource
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import FILE_LIMIT
from test_remote import SIZES, write_folders
from velopath.cache import Cache
from velopath.errors import DataError, WriteError
from velopath.mds import MdsFolder, MdsWriter, ShardEntry, load_index, read_shard
from velopath.remote_threads import as_done
from velopath.shard_journal import Lengths, _read, measure


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> MdsFolder:
    root = tmp_path_factory.mktemp("journal")
    write_folders(root)
    return load_index(root / "a")


def lengths_of(entry: ShardEntry) -> Lengths:
    return np.array([len(d) for d in read_shard(entry)], np.uint32)


def measured(index: MdsFolder, cache: Path, **options: Any) -> tuple[list[list[int] | str], int]:
    """Lengths, or what is wrong, by shard, and how many shards were read for them."""
    read: list[ShardEntry] = []

    def look(entry: ShardEntry) -> Lengths | str:
        read.append(entry)
        return options.get("look", lengths_of)(entry)

    given = {"bytes_dtype": "int64"} | {k: v for k, v in options.items() if k != "look"}
    found = measure(index, look, cache=Cache(cache), why="in a test", **given)
    return [x if isinstance(x, str) else x.tolist() for x in found], len(read)


def test_what_a_torn_or_damaged_journal_lost_is_read_again(index: MdsFolder, tmp_path: Path) -> None:
    cache, shards = tmp_path / "cache", len(index.shards)
    expected = [lengths_of(entry).tolist() for entry in index.shards]
    assert measured(index, cache) == (expected, shards)
    assert measured(index, cache) == (expected, 0)
    (path,) = cache.glob("*.shards")
    sound = path.read_bytes()
    ends = [18]  # of records, which stand in the order in which shards were read
    while ends[-1] < len(sound):
        ends.append(ends[-1] + 24 + 4 * int.from_bytes(sound[ends[-1] + 20 : ends[-1] + 24], "little") + 8)
    assert len(ends) == shards + 1 and sum(map(sum, expected)) == sum(map(sum, measured(index, cache)[0]))
    rng = np.random.default_rng(0)
    for cut in [0, 5, 17, 18, 19, ends[1], ends[-1] - 1, *rng.integers(18, len(sound), 20).tolist()]:
        path.write_bytes(sound[:cut])
        kept = sum(end <= cut for end in ends[1:])
        assert measured(index, cache) == (expected, shards - kept)
        assert len(path.read_bytes()) == len(sound) and measured(index, cache)[1] == 0
    for at in rng.integers(0, len(sound), 30).tolist():
        path.write_bytes(sound[:at] + bytes([sound[at] ^ 16]) + sound[at + 1 :])
        kept = 0 if at < 18 else sum(end <= at for end in ends[1:])
        assert measured(index, cache) == (expected, shards - kept)
        path.write_bytes(sound)


def test_other_shards_and_other_types_are_read_by_themselves(index: MdsFolder, tmp_path: Path) -> None:
    assert measured(index, tmp_path)[1] == len(index.shards)
    assert measured(index, tmp_path, bytes_dtype="uint16")[1] == len(index.shards)
    more = MdsFolder(index.folder, index.shards[:5])
    assert measured(more, tmp_path)[1] == 0
    with MdsWriter(tmp_path / "new") as writer:
        writer.write(np.arange(9, dtype=np.uint16))
    new = load_index(tmp_path / "new").shards
    found, read = measured(MdsFolder(index.folder, (*new, *index.shards[3:])), tmp_path)
    assert read == 1 and found[0] == [9] and len(found) == len(index.shards) - 2


def test_a_full_disk_ends_it_and_a_later_start_goes_on(
    index: MdsFolder, tmp_path: Path, limited: Callable[[int], None]
) -> None:
    limited(1500)  # bytes: of 23 records more than half
    with pytest.raises(WriteError, match=r"\.shards: the file would be larger than"):
        measured(index, tmp_path)
    (path,) = tmp_path.glob("*.shards")
    kept = len(_read(path)[0])
    assert 5 < kept < len(index.shards) - 5
    resource.setrlimit(resource.RLIMIT_FSIZE, FILE_LIMIT)
    found, read = measured(index, tmp_path)
    assert read == len(index.shards) - kept
    assert sum(map(len, found)) == SIZES["a"]


def test_an_error_keeps_what_was_read_before(index: MdsFolder, tmp_path: Path) -> None:
    bad = index.shards[12]

    def fail(entry: ShardEntry) -> Lengths:
        if entry == bad:
            raise DataError("it is damaged", path=entry.place)
        return lengths_of(entry)

    with pytest.raises(DataError, match="shard.00012.mds.zstd: it is damaged"):
        measured(index, tmp_path, look=fail)
    kept = len(_read(next(tmp_path.glob("*.shards")))[0])
    assert kept >= 4  # of the 12 before it, 8 may be under way
    assert measured(index, tmp_path)[1] == len(index.shards) - kept


def test_results_come_as_they_are_done_and_a_failure_stops_the_others() -> None:
    stop, go = threading.Event(), threading.Event()
    seen = []

    def run(item: int) -> int:
        if item == 0:
            assert go.wait(10)
        if item == 9:
            raise ValueError("the ninth")
        return item * item

    for number, found in as_done(run, list(range(4)), threads=2, stop=stop):
        seen.append(number)
        assert found == number * number
        go.set()
    assert sorted(seen) == [0, 1, 2, 3] and seen[0] != 0 and not stop.is_set()
    with pytest.raises(ValueError, match="the ninth"):
        list(as_done(run, list(range(20)), threads=3, stop=stop))
    assert stop.is_set()
    stop.clear()
    results = as_done(run, list(range(4)), threads=1, stop=stop)
    next(results)
    results.close()
    assert stop.is_set()
