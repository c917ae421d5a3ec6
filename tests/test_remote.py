"""Remote shards: read as local ones are, with faults on the way, a bounded cache, and no credentials shown.

Everything goes through obstore to a server on localhost that speaks S3 and checks signatures, or a plain web server.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from object_server import ACCESS_KEY, REGION, SECRET_KEY, ObjectServer, serving
from velopath import open_sampler
from velopath.cache import Cache, raw_path
from velopath.errors import ConfigError, DataError
from velopath.mds import MdsWriter, load_index, read_documents
from velopath.remote import FetchError, FetchPolicy, MissingError, folders, read
from velopath.stream import Sampler
from velopath.token_counts import write_counts
from velopath.urls import redact

QUICK = FetchPolicy(attempts=3, stall_seconds=0.5, backoff_seconds=0.01)
SHARD_BYTES = 4000
SIZES = {"a": 400, "b": 250}
OPTIONS = {"rows": 3, "row_tokens": 32, "seed": 5, "window": 2, "weights": {"a": 0.6, "b": 0.4}}


def write_folders(root: Path, *, compression: str | None = "zstd", counts: bool = True) -> None:
    """Two domains of about 20 small shards each."""
    for k, (name, documents) in enumerate(SIZES.items()):
        rng = np.random.default_rng(k)
        with MdsWriter(root / name, compression=compression, size_limit=SHARD_BYTES) as writer:
            for _ in range(documents):
                writer.write(rng.integers(1, 60_000, int(rng.integers(50, 150))).astype(np.uint16))
        index = load_index(root / name)
        if counts:
            stored = iter(read_documents(root / name))
            write_counts(index, [sum(len(next(stored)) for _ in range(s.samples)) for s in index.shards])


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("store")
    write_folders(root / "bucket" / "data")
    return root


@pytest.fixture
def s3(bucket: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectServer]:
    """A server with the bucket, and the environment that finds it."""
    with serving(bucket, s3=True) as server:
        settings = {"ACCESS_KEY_ID": ACCESS_KEY, "SECRET_ACCESS_KEY": SECRET_KEY, "REGION": REGION}
        for name, value in (settings | {"ENDPOINT_URL": server.url}).items():
            monkeypatch.setenv(f"AWS_{name}", value)
        yield server


def same_steps(far: Sampler, near: Sampler, steps: int) -> None:
    for _ in range(steps):
        a, b = next(far), next(near)
        assert a.step == b.step
        assert np.array_equal(a.tokens, b.tokens)
        assert np.array_equal(a.row_ids, b.row_ids)


def path_of(entry: object) -> str:
    return "/" + str(entry.place).split("://", 1)[1]  # type: ignore[attr-defined]


def test_the_same_stream_as_from_local_shards(s3: ObjectServer, bucket: Path, tmp_path: Path) -> None:
    local = bucket / "bucket" / "data"
    with (
        open_sampler("s3://bucket/data", cache=tmp_path, fetch=QUICK, **OPTIONS) as far,
        open_sampler(local, order="windowed", **OPTIONS) as near,
    ):
        assert far.order == near.order  # windowed is the default of a remote root
        same_steps(far, near, 60)
        for sampler in (far, near):
            sampler.push({"a": 0.1, "b": 0.9})
        same_steps(far, near, 20)
        state = far.state_dict()
        same_steps(far, near, 60)
        near.load_state_dict(state)
        with open_sampler("s3://bucket/data", cache=tmp_path, fetch=QUICK, **OPTIONS) as resumed:
            resumed.load_state_dict(state)
            same_steps(resumed, near, 100)
    shards = [path for path in s3.gets if path.endswith(".zstd")]
    assert shards
    assert all(s3.gets[path] == 1 for path in shards)  # of the second sampler too: the cache has them


def test_without_threads_and_of_each_rank(s3: ObjectServer, bucket: Path, tmp_path: Path) -> None:
    """A rank fetches what its own rows need, in the caller's thread or in readers."""
    options = OPTIONS | {"order": "full", "rows": 1}
    for rank in range(2):
        ranks = options | {"rank": rank, "world": 2}
        with (
            open_sampler("s3://bucket/data", threads=0, cache=tmp_path / str(rank), **ranks) as far,
            open_sampler(bucket / "bucket" / "data", **ranks) as near,
        ):
            same_steps(far, near, 12)


def test_a_shard_is_fetched_only_when_the_plan_comes_to_it(
    s3: ObjectServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the plan seen 32 steps ahead, 40 rows in windows of one shard touch few shards."""
    monkeypatch.setattr("velopath.stream_feed._STEPS_AHEAD", 32)
    only = {"a": "s3://bucket/data/a"}
    shards = len(load_index(only["a"]).shards)
    with open_sampler(only, rows=1, row_tokens=32, window=1, exhaustion="stop", cache=tmp_path) as sampler:
        for _ in range(8):
            next(sampler)
        time.sleep(0.3)  # time to do what it should not
        assert 1 <= sampler.feed_report.fetched <= shards // 4
        steps = 8 + sum(1 for _ in sampler)
        assert steps == sampler.table.tokens[0] // 32
        assert sampler.feed_report.fetched == shards


@pytest.mark.parametrize("fault", [500, 503, "reset", "stall", "short", 0.2])
def test_faults_that_pass(
    s3: ObjectServer, bucket: Path, tmp_path: Path, fault: object, caplog: pytest.LogCaptureFixture
) -> None:
    entry = load_index("s3://bucket/data/a").shards[0]
    s3.faults[path_of(entry)] = [fault, fault, "ok"]
    with caplog.at_level(logging.WARNING, logger="velopath.remote"):
        path = raw_path(entry, tmp_path) if fault == 0.2 else Cache(tmp_path, policy=QUICK).hold(entry)
    assert (
        path.read_bytes() == raw_path(load_index(bucket / "bucket/data/a").shards[0], tmp_path).read_bytes()
    )
    if fault != 0.2:
        assert "attempt 2 of 3" in caplog.text
        assert "attempt 3 of 3" in caplog.text
        assert s3.gets[path_of(entry)] == 3


@pytest.mark.parametrize(
    ("fault", "message"),
    [(500, "3 attempts failed"), ("stall", "3 attempts failed"), ("short", "3 attempts failed"), (404, "no such file"),
     (403, "access is denied; check the name, and the credentials in the environment")],
)  # fmt: skip
def test_faults_that_stay_are_raised_by_next(
    s3: ObjectServer, tmp_path: Path, fault: object, message: str
) -> None:
    s3.faults["*"] = []
    with open_sampler("s3://bucket/data", cache=tmp_path, fetch=QUICK, **OPTIONS | {"threads": 1}) as sampler:
        s3.faults["*"] = [fault, "..."]
        with pytest.raises(DataError, match=rf"s3://bucket/data/\w/shard.0\d+.mds.zstd: .*{message}"):
            for _ in range(2000):
                next(sampler)
        with pytest.raises(DataError, match=message):  # and again, without another wait
            next(sampler)
    deadline = time.monotonic() + 10  # fetches under way end by themselves
    while list(tmp_path.glob("*.tmp")) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not list(tmp_path.glob("*.tmp"))


def test_a_wrong_hash_is_fetched_once_more_then_refused(s3: ObjectServer, tmp_path: Path) -> None:
    first, second = load_index("s3://bucket/data/a").shards[:2]
    s3.faults[path_of(first)] = ["wrong", "ok"]
    s3.faults[path_of(second)] = ["wrong", "..."]
    with Cache(tmp_path, policy=QUICK) as cache:
        assert cache.hold(first).is_file()
        with pytest.raises(
            DataError, match=r"s3://bucket/data/a/shard.00001.mds.zstd field 'hashes': xxh64 is"
        ):
            cache.hold(second)
    assert s3.gets[path_of(second)] == 2
    assert len(list(tmp_path.glob("*.mds"))) == 1
    assert not list(tmp_path.glob("*.tmp"))


def test_training_goes_on_in_a_cache_smaller_than_the_data(
    s3: ObjectServer, bucket: Path, tmp_path: Path
) -> None:
    local = bucket / "bucket" / "data"
    limit = 9 * SHARD_BYTES
    total = sum(s.raw_bytes for name in SIZES for s in load_index(local / name).shards)
    assert total > 2 * limit
    most = 0
    with (
        open_sampler("s3://bucket/data", cache=tmp_path, cache_limit=limit, fetch=QUICK, **OPTIONS) as far,
        open_sampler(local, order="windowed", **OPTIONS) as near,
    ):
        for _ in range(250):
            same_steps(far, near, 1)
            with suppress(FileNotFoundError):  # evicted between its listing and its size
                most = max(most, sum(p.stat().st_size for p in tmp_path.glob("*.mds")))
        assert far.feed_report.fetched > len(list(tmp_path.glob("*.mds")))
    assert limit / 3 < most <= limit


def test_a_shard_in_use_is_not_evicted(s3: ObjectServer, tmp_path: Path) -> None:
    first, second, third = load_index("s3://bucket/data/a").shards[:3]
    mine, other = Cache(tmp_path), Cache(tmp_path, limit=2 * SHARD_BYTES)
    held = mine.hold(first)
    free = other.hold(second)
    other.release(second)
    kept = other.hold(third)  # room for two: the one that nobody uses goes, older or not
    assert held.is_file()
    assert kept.is_file()
    assert not free.exists()
    assert not other.has_room(SHARD_BYTES)
    mine.close()
    assert other.has_room(SHARD_BYTES)
    assert not held.exists()


_HOLDER = """
import sys, time
from velopath.cache import Cache
from velopath.mds import load_index
cache = Cache(sys.argv[1])
cache.hold(load_index(sys.argv[2]).shards[0])
print("held", flush=True)
time.sleep(60)
"""


def test_the_mark_of_another_process_holds_until_it_dies(s3: ObjectServer, tmp_path: Path) -> None:
    command = [sys.executable, "-c", _HOLDER, str(tmp_path), "s3://bucket/data/a"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            (held,) = tmp_path.glob("*.mds")
            cache = Cache(tmp_path, limit=SHARD_BYTES)
            assert not cache.has_room(SHARD_BYTES)
            assert held.is_file()
        finally:
            holder.send_signal(signal.SIGKILL)
    assert cache.has_room(SHARD_BYTES)
    assert not held.exists()


def _hold_all(url: str, cache: str, ready: multiprocessing.synchronize.Barrier) -> None:  # type: ignore[name-defined]
    entries = load_index(url).shards
    ready.wait(60)
    with Cache(cache) as shared:
        for entry in entries:
            shared.hold(entry)


def test_processes_share_a_cache(s3: ObjectServer, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ready = context.Barrier(2)
    url = "s3://bucket/data/b"
    s3.faults["*"] = [0.02, "..."]
    workers = [context.Process(target=_hold_all, args=(url, str(tmp_path), ready)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    entries = load_index(url).shards
    assert [s3.gets[path_of(entry)] for entry in entries] == [1] * len(entries)


def test_a_kill_in_a_fetch_leaves_nothing_that_looks_complete(s3: ObjectServer, tmp_path: Path) -> None:
    entry = load_index("s3://bucket/data/a").shards[0]
    s3.faults[path_of(entry)] = ["stall", "ok"]
    command = [sys.executable, "-c", _HOLDER, str(tmp_path), "s3://bucket/data/a"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        deadline = time.monotonic() + 30
        while not list(tmp_path.glob("*.tmp")) and time.monotonic() < deadline:
            time.sleep(0.02)
        holder.send_signal(signal.SIGKILL)
    assert list(tmp_path.glob("*.tmp"))
    assert not list(tmp_path.glob("*.mds"))
    assert Cache(tmp_path, limit=10**6).hold(entry).stat().st_size == entry.raw_bytes
    assert not list(tmp_path.glob("*.tmp"))


def test_credentials_are_never_shown(bucket: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with serving(bucket, query="X-Amz-Signature=feed0badcafe", user="Basic ") as server:
        host = server.url.removeprefix("http://")
        url = f"http://somebody:hunter2hunter@{host}/bucket/data/a?X-Amz-Signature=feed0badcafe"
        index = load_index(url)
        cache = Cache(tmp_path, policy=QUICK)
        cache.hold(index.shards[0])  # user and query go with every request
        server.faults["*"] = [500, "..."]
        with caplog.at_level(logging.DEBUG), pytest.raises(FetchError) as caught:
            cache.hold(index.shards[1])
        shown = [str(caught.value), repr(caught.value), caplog.text, repr(index), str(index.shards[1].place)]
        assert caught.value.__cause__ is None
        assert caught.value.__context__ is None
        server.faults.clear()
        server.query = "another"
        with pytest.raises(MissingError) as denied:
            load_index(url)
        shown += [str(denied.value), redact(url)]
    for text in shown:
        assert "hunter2" not in text
        assert "feed0bad" not in text
        assert "somebody" not in text
    assert f"http://***@{host}/bucket/data/a/shard.00001.mds.zstd?***" in shown[0]


def test_counts_are_made_once_where_there_are_none(
    bucket: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_folders(tmp_path / "web", compression=None, counts=False)
    with serving(tmp_path / "web") as server:
        places = {name: f"{server.url}/{name}" for name in SIZES}
        for attempt in range(2):
            caplog.clear()
            with (
                open_sampler(places, cache=tmp_path / "cache", fetch=QUICK, **OPTIONS) as far,
                open_sampler(bucket / "bucket" / "data", order="windowed", **OPTIONS) as near,
            ):
                same_steps(far, near, 20)
            assert ("once to count their tokens" in caplog.text) == (attempt == 0)
        assert all(n == 1 for path, n in server.gets.items() if path.endswith(".mds"))
        (tmp_path / "web/a/token_counts.json").write_text('{"version": 1}')
        with pytest.raises(DataError, match=r"a/token_counts.json: not counts of tokens: KeyError"):
            open_sampler(places, cache=tmp_path / "cache", fetch=QUICK, **OPTIONS)
        index = load_index(tmp_path / "web/a")
        right = [70] * len(index.shards)
        write_counts(index, right)
        with (
            open_sampler(
                {"a": places["a"]}, rows=1, row_tokens=8, cache=tmp_path / "cache", fetch=QUICK
            ) as sampler,
            pytest.raises(DataError, match=r"tokens with their ends, 70 were counted; remove the counts"),
        ):
            next(sampler)


def test_what_cannot_be_opened(s3: ObjectServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="a web server lists no folders"):
        folders(s3.url + "/bucket")
    assert folders("s3://bucket/data") == ["a", "b"]
    with pytest.raises(DataError, match="s3://bucket/nothing: no domains"):
        open_sampler("s3://bucket/nothing", cache=tmp_path)
    with pytest.raises(DataError, match=r"s3://bucket/data/c/index.json: no such file"):
        open_sampler({"c": "s3://bucket/data/c"}, cache=tmp_path)
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(ConfigError, match=r"need the package obstore: pip install 'velopath\[remote\]'"):
        read("s3://bucket/data/a/index.json")
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(ConfigError, match=r"need the package fsspec: pip install 'velopath\[remote\]'"):
        read("memory://x")


@pytest.fixture(autouse=True)
def no_own_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """What this machine's user has set does not count."""
    for name in [n for n in os.environ if n.startswith(("AWS_", "GOOGLE_", "AZURE_"))]:
        monkeypatch.delenv(name)
