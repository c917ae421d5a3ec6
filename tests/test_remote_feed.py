"""The feed of remote shards when things around it go wrong: names, folders, caches and networks that misbehave."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from object_server import ACCESS_KEY, REGION, SECRET_KEY, ObjectServer, serving
from velopath import open_sampler, remote
from velopath.cache import Cache
from velopath.durable import locked
from velopath.errors import DataError, VelopathError
from velopath.mds import MdsWriter, load_index, read_documents
from velopath.remote import FetchPolicy, folders, read
from velopath.stream import Sampler
from velopath.token_counts import write_counts

QUICK = FetchPolicy(attempts=2, stall_seconds=0.5, backoff_seconds=0.01)
SHARD_BYTES = 3000
ODD = ("c#", "50% off", "what?", "é+1")
OPTIONS = {"rows": 2, "row_tokens": 32, "seed": 5, "window": 2}


def write_folder(folder: Path, seed: int = 0, documents: int = 150) -> None:
    rng = np.random.default_rng(seed)
    with MdsWriter(folder, compression="zstd", size_limit=SHARD_BYTES) as writer:
        for _ in range(documents):
            writer.write(rng.integers(1, 60_000, int(rng.integers(50, 150))).astype(np.uint16))
    stored = iter(read_documents(folder))
    write_counts(
        load_index(folder),
        [sum(len(next(stored)) for _ in range(s.samples)) for s in load_index(folder).shards],
    )


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("store")
    for k, name in enumerate(ODD):
        write_folder(root / "bucket/odd" / name, k, documents=40)
    for k, name in enumerate("ab"):
        write_folder(root / "bucket/data" / name, 10 + k)
    return root


@pytest.fixture
def s3(store: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectServer]:
    with serving(store, s3=True) as server:
        settings = {"ACCESS_KEY_ID": ACCESS_KEY, "SECRET_ACCESS_KEY": SECRET_KEY, "REGION": REGION}
        for name, value in (settings | {"ENDPOINT_URL": server.url}).items():
            monkeypatch.setenv(f"AWS_{name}", value)
        yield server


def same_steps(far: Sampler, near: Sampler, steps: int) -> None:
    for _ in range(steps):
        a, b = next(far), next(near)
        assert (a.step, a.row_ids.tolist()) == (b.step, b.row_ids.tolist())
        assert np.array_equal(a.tokens, b.tokens)


@pytest.mark.parametrize("kind", ["s3", "http", "memory"])
def test_names_that_mean_something_else_in_a_url(
    s3: ObjectServer, store: Path, tmp_path: Path, kind: str
) -> None:
    near = store / "bucket/odd"
    with serving(store) as web:
        if kind == "s3":
            root: object = "s3://bucket/odd/"
            assert folders("s3://bucket/odd") == sorted(ODD)
        elif kind == "http":
            root = {name: f"{web.url}/bucket/odd/{quoted(name)}" for name in ODD}
        else:
            import fsspec

            for file in near.glob("*/*"):
                fsspec.filesystem("memory").pipe(f"/odd/{file.parent.name}/{file.name}", file.read_bytes())
            root = "memory://odd"
        with (
            open_sampler(root, cache=tmp_path, fetch=QUICK, **OPTIONS) as far,  # type: ignore[arg-type]
            open_sampler(near, order="windowed", **OPTIONS) as local,
        ):
            assert far.names == tuple(sorted(ODD))
            same_steps(far, local, 40)


def quoted(name: str) -> str:
    return name.replace("%", "%25").replace("?", "%3F").replace(" ", "%20")  # a plain # is taken as it stands


def test_a_listing_is_tried_again(s3: ObjectServer) -> None:
    s3.faults["/bucket"] = [503, "ok"]
    assert folders("s3://bucket/data", QUICK) == ["a", "b"]
    s3.faults["/bucket"] = [503, "..."]
    with pytest.raises(DataError, match="s3://bucket/data: cannot be fetched, 2 attempts failed"):
        folders("s3://bucket/data", QUICK)


def test_redirects_are_followed_and_a_file_without_end_is_not(
    s3: ObjectServer, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = "/bucket/data/a/index.json", "/bucket/data/b/index.json"
    with serving(store) as web, serving(store) as other:
        web.faults[here] = [other.url + there, "..."]
        assert read(web.url + here, policy=QUICK) == (store / there[1:]).read_bytes()
        web.faults[here] = [web.url + here, "..."]
        with pytest.raises(DataError, match="2 attempts failed"):
            read(web.url + here, policy=QUICK)
    monkeypatch.setattr("velopath.remote._MOST_BYTES", 100)
    with pytest.raises(DataError, match="the body has more than 100 bytes"):
        read("s3://bucket/data/a/index.json", policy=QUICK)


def test_a_network_that_was_down_ends_no_run(
    s3: ObjectServer, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards of later steps whose fetches failed are asked for again before their steps come."""
    monkeypatch.setattr("velopath.stream_feed._AGAIN_SECONDS", 0.2)
    shards = [s.place for name in "ab" for s in load_index(f"s3://bucket/data/{name}").shards]
    broken: list[object] = ["ok"] * 8 + [503, "..."]  # of all shards together: 8 fetches, then none
    s3.faults |= dict.fromkeys(["/" + place.removeprefix("s3://") for place in shards], broken)
    with (
        open_sampler("s3://bucket/data", cache=tmp_path, fetch=QUICK, **OPTIONS) as far,
        open_sampler(store / "bucket/data", order="windowed", **OPTIONS) as near,
    ):
        same_steps(far, near, 1)
        deadline = time.monotonic() + 30
        while broken != [503, "..."] and time.monotonic() < deadline:
            time.sleep(0.02)
        before = s3.gets.total()
        while s3.gets.total() < before + 8 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert s3.gets.total() >= before + 8
        s3.faults.clear()
        feed = far._feed
        assert feed is not None
        while (feed._failed or feed._fetching) and time.monotonic() < deadline:
            time.sleep(0.02)
        same_steps(far, near, 150)


def test_next_goes_on_after_an_error_that_passes(
    s3: ObjectServer, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("velopath.stream_feed._AGAIN_SECONDS", 0.1)
    with (
        open_sampler("s3://bucket/data", cache=tmp_path, fetch=QUICK, **OPTIONS) as far,
        open_sampler(store / "bucket/data", order="windowed", **OPTIONS) as near,
    ):
        s3.faults["*"] = [500, "..."]
        with pytest.raises(DataError, match="2 attempts failed"):
            for _ in range(2000):
                next(far), next(near)
        for sampler in (far, near):  # a push looks at the plan anew, and does not forget that nothing comes
            sampler.push({"a": 0.2, "b": 0.8})
        with pytest.raises(DataError, match="2 attempts failed"):
            for _ in range(2000):
                next(far), next(near)
        s3.faults.clear()
        time.sleep(0.3)
        same_steps(far, near, 50)


def test_a_cache_that_is_taken_away(
    s3: ObjectServer, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Removed: made again. Not to be used: told by next, also behind a push, until it is back."""
    monkeypatch.setattr("velopath.stream_feed._AGAIN_SECONDS", 0.1)
    cache = tmp_path / "cache"
    options = OPTIONS | {"cache_limit": 9 * SHARD_BYTES}
    with (
        open_sampler("s3://bucket/data", cache=cache, fetch=QUICK, **options) as far,
        open_sampler(store / "bucket/data", order="windowed", **OPTIONS) as near,
    ):
        same_steps(far, near, 10)
        for _ in range(5):
            shutil.rmtree(cache, ignore_errors=True)
            same_steps(far, near, 20)
        while not cache.is_file():
            shutil.rmtree(cache, ignore_errors=True)
            with suppress(IsADirectoryError):  # made again meanwhile
                cache.write_bytes(b"in the way")
        for weights in ({"a": 0.5, "b": 0.5}, None):
            with pytest.raises(VelopathError, match="cache"):
                for _ in range(2000):
                    next(far), next(near)
            for sampler in (far, near) if weights else ():
                sampler.push(weights)
        cache.unlink()
        time.sleep(0.3)
        same_steps(far, near, 30)


def test_samplers_of_one_process_in_a_cache_smaller_than_a_window(
    s3: ObjectServer, store: Path, tmp_path: Path
) -> None:
    options = OPTIONS | {"window": 8}
    with (
        open_sampler(
            "s3://bucket/data", cache=tmp_path, cache_limit=2 * SHARD_BYTES, fetch=QUICK, **options
        ) as one,
        open_sampler(
            "s3://bucket/data", cache=tmp_path, cache_limit=2 * SHARD_BYTES, fetch=QUICK, **options
        ) as two,
        open_sampler(store / "bucket/data", order="windowed", **options) as near,
    ):
        for step in range(60):
            a, b, c = next(one), next(two), next(near)
            assert np.array_equal(a.tokens, c.tokens)
            assert np.array_equal(b.tokens, c.tokens)
            if step % 20 == 10:
                state = near.state_dict()
                for sampler in (one, two, near):
                    sampler.push({"a": 0.3, "b": 0.7})
                    sampler.load_state_dict(state)


@pytest.mark.parametrize(("limit", "bound"), [(1, 4), (3, 4), (9, 9)])
def test_the_limit_is_passed_by_no_more_than_a_step_needs(
    s3: ObjectServer, store: Path, tmp_path: Path, limit: int, bound: int, caplog: pytest.LogCaptureFixture
) -> None:
    """In shards: two rows of two shards each at most. What is needed last goes first, and a window fetches again."""
    options = OPTIONS | {"window": 8}
    cache, most = tmp_path / "cache", 0
    with (
        open_sampler(
            "s3://bucket/data", cache=cache, cache_limit=limit * SHARD_BYTES, fetch=QUICK, **options
        ) as far,
        open_sampler(store / "bucket/data", order="windowed", **options) as near,
    ):
        for _ in range(80):
            same_steps(far, near, 1)
            with locked(cache / "evict.lock"), suppress(FileNotFoundError):
                most = max(most, sum(p.stat().st_size for p in cache.glob("*.mds*")))
    assert 0 < most <= bound * SHARD_BYTES
    assert "are read at a time (windows of 8 shards): shards will be fetched again and again" in caplog.text


def test_what_was_released_stays_in_sight_behind_a_push(
    s3: ObjectServer, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A push far ahead has the plan looked at anew; that must not lose the shards of steps that may be read already."""
    monkeypatch.setattr("velopath.stream_feed._STEPS_AHEAD", 32)
    options = OPTIONS | {"threads": 1, "prefetch": 1, "cache_limit": "1GB"}
    with open_sampler("s3://bucket/data", cache=tmp_path, fetch=QUICK, **options) as far:
        next(far)
        feed, core = far._feed, far._core
        assert feed is not None
        deadline = time.monotonic() + 30
        while core.released <= far.step + 40 and time.monotonic() < deadline:
            time.sleep(0.01)
        released = core.released
        assert released > far.step + 40
        far.push({"a": 0.9, "b": 0.1}, at_step=released)
        before = core.scout(None, [], [], 0)[0]
        while (feed._plan is None or feed._plan.id != before) and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.2)
        plan = feed._plan
        assert plan is not None and plan.id == before
        assert plan.first + len(plan.steps) >= released
        steps = list(plan.steps)[: released - plan.first]
        assert all(shard in feed._attached for step in steps for shard in step)


def test_only_shards_of_the_cache_are_evicted(s3: ObjectServer, tmp_path: Path) -> None:
    """A cache folder that is a folder of data, by mistake."""
    write_folder(tmp_path)
    mine = {path: path.stat().st_size for path in tmp_path.iterdir()}
    raw = tmp_path / "shard.99999.mds"
    raw.write_bytes(b"mine")
    with Cache(tmp_path, limit=SHARD_BYTES) as cache:
        for entry in load_index("s3://bucket/data/a").shards[:4]:
            with cache.held(entry):
                pass
    assert raw.is_file()
    assert mine.items() <= {path: path.stat().st_size for path in tmp_path.iterdir()}.items()


def test_marks_in_a_folder_that_was_emptied(s3: ObjectServer, tmp_path: Path) -> None:
    first, second = load_index("s3://bucket/data/a").shards[:2]
    cache, other = Cache(tmp_path / "x"), Cache(tmp_path / "x", limit=SHARD_BYTES)
    cache.hold(first)
    shutil.rmtree(tmp_path / "x")
    held = cache.hold(second)
    assert not other.has_room(SHARD_BYTES)
    assert held.is_file()
    cache.release(second)
    assert other.has_room(SHARD_BYTES)


def test_a_folder_removed_in_the_midst_of_a_fetch(
    s3: ObjectServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch, cache = remote.read, tmp_path / "cache"
    removed: list[str] = []

    def read_and_remove(url: str, **options: Any) -> bytes:
        if not removed:
            shutil.rmtree(cache)
            removed.append(url)
        return fetch(url, **options)

    monkeypatch.setattr(remote, "read", read_and_remove)
    entry = load_index("s3://bucket/data/a").shards[0]
    assert Cache(cache).hold(entry).stat().st_size == entry.raw_bytes
    assert removed


def test_errors_of_a_remote_index_name_its_url(tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text('{"version": 2, "shards": [{"format": "other"}]}')
    with serving(tmp_path, query="sig=feed0badcafe") as web:
        place = rf"^{web.url}/index.json\?\*\*\* field 'shards\[0\].format': "
        with pytest.raises(DataError, match=place):
            load_index(f"{web.url}?sig=feed0badcafe")
        (tmp_path / "index.json").write_text("{")
        with pytest.raises(DataError, match=rf"^{web.url}/index.json\?\*\*\*: not valid JSON"):
            load_index(f"{web.url}/?sig=feed0badcafe")
