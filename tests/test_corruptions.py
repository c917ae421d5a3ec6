"""Every corruption of the table is an error of both readers that names the place; nothing hangs or is made outside."""

from __future__ import annotations

import copy
import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest

from corruptions import CORRUPTIONS
from damage import Case, Folder
from velopath import open_sampler
from velopath.errors import DataError
from velopath.mds import load_index, read_documents

SECONDS = 10.0


@pytest.fixture(autouse=True)
def limit() -> Iterator[None]:
    """A reader that hangs is a failure."""

    def late(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"still reading after {SECONDS:.0f} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def documents(folder: Path, cache: Path) -> list[list[int]]:
    return [d.tolist() for d in read_documents(folder)]


def sampled(folder: Path, cache: Path, verify: bool = True) -> list[list[int]]:
    """An epoch of the sampler, its rows by number."""
    rows = {}
    with open_sampler(
        {"a": folder},
        rows=1,
        row_tokens=2,
        exhaustion="stop",
        cache=cache,
        verify=verify,
        threads=1,
        prefetch=4,
    ) as sampler:
        for batch in sampler:
            rows[int(batch.row_ids[0])] = batch.tokens[0, :-1].tolist()
    return [rows[k] for k in sorted(rows)]


READERS: dict[str, Callable[..., list[list[int]]]] = {"read_documents": documents, "open_sampler": sampled}


def test_the_table_is_long_and_its_names_are_its_own() -> None:
    assert len(CORRUPTIONS) >= 70
    assert len({c.name for c in CORRUPTIONS}) >= len(CORRUPTIONS) - 1


@pytest.mark.parametrize("variant", ["raw", "zstd", "bare"])
def test_the_sound_folder_is_read(tmp_path: Path, variant: str) -> None:
    folder = Folder(tmp_path / "a", variant)
    assert len(documents(folder.path, tmp_path)) == 12
    assert sorted(t for row in sampled(folder.path, tmp_path / "cache") for t in row) == sorted(
        t for d in documents(folder.path, tmp_path) for t in d
    )


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("corruption", CORRUPTIONS, ids=lambda c: c.name.replace(" ", "-"))
def test_corruption(tmp_path: Path, corruption: Case, reader: str) -> None:
    folder = Folder(tmp_path / "a", corruption.variant)
    corruption.damage(folder)
    before = set(tmp_path.rglob("*"))
    cache = tmp_path / "cache"
    message = corruption.sampler if reader == "open_sampler" and corruption.sampler else corruption.error
    with pytest.raises(DataError, match=message) as caught:
        READERS[reader](folder.path, cache)
    assert str(tmp_path / "a") in str(caught.value) or str(cache) in str(caught.value)
    made = set(tmp_path.rglob("*")) - before
    assert all(cache in (p, *p.parents) for p in made)
    assert (
        sum(p.stat().st_size for p in made if p.is_file()) < 2_000
    )  # the sound shards, nothing of the bad one


# ---- mutations by chance: an error of ours or the tokens that are there, never anything else

ODD: list[Any] = [None, -1, 0, 1, 2**31, 2**32, 2**64, 10**40, 0.5, float("nan"), True]
ODD += ["", "..", "a\0", "zstd", "pkl", [], {}, [[]]]


def places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) of a JSON value."""
    for key in range(len(tree)) if isinstance(tree, list) else tree:
        yield tree, key
        if isinstance(tree[key], (list, dict)):
            yield from places(tree[key])


@pytest.mark.parametrize("variant", ["raw", "zstd"])
def test_any_value_of_the_index_may_be_anything(tmp_path: Path, variant: str) -> None:
    folder = Folder(tmp_path / "a", variant)
    del folder.index["shards"][1:]
    count = len(list(places(folder.index)))
    read = 0
    for k in range(count):
        for value in (*ODD, ...):
            index = copy.deepcopy(folder.index)
            container, key = list(places(index))[k]
            if value is ...:
                del container[key]
            else:
                container[key] = value
            (folder.path / "index.json").write_text(json.dumps(index))
            try:
                load_index(folder.path)
                read += 1
            except DataError as error:
                assert str(folder.path) in str(error)
    assert read < count * len(ODD) / 2


@pytest.mark.parametrize("variant", ["bare", "zstd"])
def test_flipped_bits_are_found_or_read_alike(tmp_path: Path, variant: str) -> None:
    """Both readers agree on every flip of a shard: both refuse it, or both read the same tokens."""
    folder = Folder(tmp_path / "a", variant)
    shard, rng = folder.file(), np.random.default_rng(0)
    sound = shard.read_bytes()
    for at in [*range(24), *rng.integers(0, len(sound), 40)]:
        damaged = bytearray(sound)
        damaged[int(at)] ^= 1 << int(rng.integers(8))
        shard.write_bytes(damaged)
        found: dict[str, list[int] | None] = {}
        for name, reader in READERS.items():
            try:
                found[name] = sorted(t for row in reader(folder.path, tmp_path / "cache") for t in row)
            except DataError:
                found[name] = None
        assert found["read_documents"] == found["open_sampler"], at
        assert variant == "bare" or found["open_sampler"] is None
