"""Rows of whole documents from remote shards: measured once, in a bounded cache, whatever happens on the way."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from object_server import ACCESS_KEY, REGION, SECRET_KEY, ObjectServer, serving
from test_remote import OPTIONS, QUICK, SHARD_BYTES, SIZES, path_of, write_folders
from velopath import open_sampler
from velopath.cli.app import app
from velopath.durable import locked
from velopath.errors import DataError
from velopath.mds import load_index, read_documents
from velopath.pack import load_bins
from velopath.shard_journal import _read
from velopath.stream import Sampler
from velopath.stream_data import open_domains
from velopath.token_counts import write_counts

ROWS: dict[str, Any] = OPTIONS | {"packing": "best_fit", "boundaries": True, "eos": 7, "fetch": QUICK}
LOCAL = {name: value for name, value in ROWS.items() if name != "fetch"} | {"order": "windowed"}


@pytest.fixture
def bucket(tmp_path: Path) -> Path:
    """A folder of its own for each test: bins may be written beside its shards."""
    write_folders(tmp_path / "store" / "bucket" / "data")
    return tmp_path / "store"


@pytest.fixture
def s3(bucket: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectServer]:
    for name in [n for n in os.environ if n.startswith("AWS_")]:
        monkeypatch.delenv(name)
    with serving(bucket, s3=True) as server:
        settings = {"ACCESS_KEY_ID": ACCESS_KEY, "SECRET_ACCESS_KEY": SECRET_KEY, "REGION": REGION}
        for name, value in (settings | {"ENDPOINT_URL": server.url}).items():
            monkeypatch.setenv(f"AWS_{name}", value)
        yield server


@pytest.fixture
def near(bucket: Path, tmp_path: Path) -> Callable[..., Sampler]:
    """A sampler on a copy of the data that stays here, so that its bins are not found in the store."""
    write_folders(tmp_path / "near")
    return lambda **options: open_sampler(tmp_path / "near", cache=tmp_path / "near-cache", **LOCAL | options)


def same_steps(far: Sampler, near: Sampler, steps: int) -> None:
    for _ in range(steps):
        a, b = next(far), next(near)
        assert (a.step, a.row_ids.tolist()) == (b.step, b.row_ids.tolist())
        for one, other in ((a.tokens, b.tokens), (a.documents, b.documents), (a.cu_seqlens, b.cu_seqlens)):
            assert one is not None and other is not None and np.array_equal(one, other)
        assert np.array_equal(a.targets(), b.targets())


def shard_gets(server: ObjectServer) -> dict[str, int]:
    return {path: n for path, n in server.gets.items() if "shard" in path}


def all_shards() -> list[Any]:
    return [entry for name in SIZES for entry in load_index(f"s3://bucket/data/{name}").shards]


@contextmanager
def watched(cache: Path) -> Iterator[list[int]]:
    """Bytes of the cache's shards, looked at all the while between two changes of them."""
    seen, stop = [0], threading.Event()

    def look() -> None:
        while not stop.is_set():
            if cache.is_dir():
                with locked(cache / "evict.lock"), suppress(FileNotFoundError):  # a file that is renamed
                    seen.append(sum(p.stat().st_size for p in cache.glob("*.mds*")))
            time.sleep(0.003)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("options", [{}, {"bin_shards": 2}, {"order": "full"}, {"threads": 0}])
def test_the_same_rows_as_from_local_shards(
    s3: ObjectServer, near: Callable[..., Sampler], tmp_path: Path, options: dict[str, Any]
) -> None:
    """Of single shards by default, of two, of all; each shard is fetched once for both measuring and reading."""
    cache = tmp_path / "cache"
    with (
        open_sampler("s3://bucket/data", cache=cache, **ROWS | options) as far,
        near(**options) as local,
    ):
        assert far.order == local.order
        assert far.order.window == {"order": 0, "bin_shards": 1}.get(next(iter(options), ""), 2)
        same_steps(far, local, 60)
        for sampler in (far, local):
            sampler.push({"a": 0.1, "b": 0.9})
        same_steps(far, local, 20)
        state = json.loads(json.dumps(far.state_dict()))
        same_steps(far, local, 60)
        local.load_state_dict(state)
        with open_sampler("s3://bucket/data", cache=cache, **ROWS | options) as resumed:
            resumed.load_state_dict(state)
            same_steps(resumed, local, 150)
            assert resumed.exposure() == local.exposure()
    gets = shard_gets(s3)
    assert len(gets) == len(all_shards()) and set(gets.values()) == {1}


def test_measuring_and_training_in_a_cache_smaller_than_the_data(
    s3: ObjectServer, near: Callable[..., Sampler], tmp_path: Path
) -> None:
    """The limit holds while shards are measured, and then while they are read; a window of two fits it."""
    cache, limit = tmp_path / "cache", 9 * SHARD_BYTES
    assert sum(entry.raw_bytes for entry in all_shards()) > 2 * limit
    with watched(cache) as seen:
        pack(cache, "-g", 1, "--cache-limit", limit)
        measured = max(seen)
        assert set(shard_gets(s3).values()) == {1} and len(shard_gets(s3)) == len(all_shards())
        s3.gets.clear()
        far = open_sampler("s3://bucket/data", cache=cache, cache_limit=limit, **ROWS)
        with far, near() as local:
            same_steps(far, local, 900)
            assert far.feed_report.fetched > len(all_shards())
    assert limit / 3 < measured <= limit
    assert max(seen) <= limit


@pytest.mark.parametrize("limit", [1, SHARD_BYTES, 2 * SHARD_BYTES])
def test_a_cache_smaller_than_one_window(
    s3: ObjectServer,
    near: Callable[..., Sampler],
    tmp_path: Path,
    limit: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Rows as ever; the limit is passed by no more than what the three rows of a step need, one shard each."""
    options, cache = {"window": 8}, tmp_path / "cache"
    pack(cache, "-g", 1)
    for path in cache.glob("*.mds"):
        path.unlink()
    with (
        watched(cache) as seen,
        caplog.at_level(logging.WARNING),
        open_sampler("s3://bucket/data", cache=cache, cache_limit=limit, **ROWS | options) as far,
        near(**options) as local,
    ):
        same_steps(far, local, 60)
    assert max(seen) <= max(limit, 3 * SHARD_BYTES)
    assert f"cache_limit is {limit} bytes, and up to " in caplog.text
    assert "are read at a time (windows of 8 shards): shards will be fetched again and again" in caplog.text


def test_bins_beside_the_shards_make_measuring_needless(
    s3: ObjectServer,
    near: Callable[..., Sampler],
    bucket: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    ran = CliRunner().invoke(app, ["pack", str(bucket / "bucket/data"), "-t", "32", "-g", "1"])
    assert ran.exit_code == 0, ran.output
    with open_sampler(bucket / "bucket/data", **LOCAL):
        pass  # bins of this eos
    with caplog.at_level(logging.WARNING), near() as local:
        with open_sampler("s3://bucket/data", cache=tmp_path / "cache", **ROWS) as far:
            assert far.feed_report.fetched <= len(all_shards()) / 2
            same_steps(far, local, 200)
        assert "once" not in caplog.text
        assert not list((tmp_path / "cache").glob("*.shards"))
        for k, damage in enumerate((lambda c: c[:-1], lambda c: b"", lambda c: c + bytes(1 << 20))):
            for file in (bucket / "bucket/data").glob("*/*.g1.bins"):
                file.write_bytes(damage(file.read_bytes()))
            caplog.clear()
            with (
                open_sampler("s3://bucket/data", cache=tmp_path / str(k), **ROWS) as far,
                near() as local_again,
            ):
                same_steps(far, local_again, 30)
            assert (
                "s3://bucket/data/a/best_fit.t32.eos7.g1.bins is of other data; the documents are"
                in caplog.text
            )
            assert max(p.stat().st_size for p in (tmp_path / str(k)).glob("*.bins")) < 1 << 20


def pack(cache: Path, *options: object) -> dict[str, Any]:
    ran = CliRunner().invoke(
        app, ["pack", "s3://bucket/data", "-t", "32", "--cache", str(cache), "--json", *map(str, options)]
    )
    assert ran.exit_code == 0, ran.output
    return json.loads(ran.stdout[ran.stdout.index("{") :])["domains"]


def test_the_command_on_remote_data(s3: ObjectServer, near: Callable[..., Sampler], tmp_path: Path) -> None:
    near().close()
    found = pack(tmp_path / "cache", "-g", 2, "--cache-limit", 3 * SHARD_BYTES)
    data = open_domains({n: tmp_path / "near" / n for n in "ab"}, None)
    for name in SIZES:
        local, whole = (load_bins(data[name], 32, None, bin_shards=g) for g in (2, 0))
        shown = found[name]
        assert (shown["documents"], shown["rows"], shown["tokens"]) == (
            local.documents,
            local.rows,
            local.tokens,
        )
        assert (
            shown["padding_share"]
            == local.padding_share
            > shown["whole_padding_share"]
            == whole.padding_share
        )
        lengths = np.array([len(d) for d in read_documents(tmp_path / "near" / name)])
        assert shown["truncated_share"] == (lengths > 33).mean()
        stored = Path(shown["file"])
        assert stored.parent == tmp_path / "cache" and stored.name.endswith(".best_fit.t32.eos.g2.bins")
    s3.gets.clear()
    assert pack(tmp_path / "cache", "-g", 2) == found
    pack(tmp_path / "cache", "-g", 1)  # other bins of the same documents
    assert not shard_gets(s3)


PACK = "import sys; from velopath.cli import main; sys.argv[0] = 'velopath'; main()"


@pytest.mark.parametrize("when", [3, 30])
def test_what_was_measured_before_a_kill_is_kept(s3: ObjectServer, tmp_path: Path, when: int) -> None:
    """Killed behind so many fetches, with a cache that keeps two shards: what was read is not fetched again."""
    cache = tmp_path / "cache"
    s3.faults["*"] = [0.03, "..."]
    command = [sys.executable, "-c", PACK, "pack", "s3://bucket/data", "-t", "32", "--cache", str(cache)]
    with subprocess.Popen(
        [*command, "--cache-limit", str(2 * SHARD_BYTES)], stderr=subprocess.DEVNULL
    ) as process:
        deadline = time.monotonic() + 60
        while sum(shard_gets(s3).values()) < when and time.monotonic() < deadline:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    kept = sum(len(_read(path)[0]) for path in cache.glob("*.shards"))
    assert when - 4 <= kept < len(all_shards())  # two at a time
    s3.faults.clear()
    s3.gets.clear()
    found = pack(cache, "--cache-limit", 2 * SHARD_BYTES)
    assert sum(shard_gets(s3).values()) == len(all_shards()) - kept
    clean = pack(tmp_path / "other")
    assert [found[n] | {"file": ""} for n in found] == [clean[n] | {"file": ""} for n in clean]


def test_faults_while_documents_are_measured(
    s3: ObjectServer, near: Callable[..., Sampler], tmp_path: Path
) -> None:
    """Those that pass cost attempts; one that stays is an error that names the URL, and the rest is not read again."""
    shards = all_shards()
    for k, fault in enumerate((500, "reset", "stall", "short", "wrong", 0.2)):
        s3.faults[path_of(shards[3 * k])] = [fault, "ok"]
    bad = shards[20]
    s3.faults[path_of(bad)] = ["wrong", "..."]
    place = f"^{bad.place} field 'hashes': xxh64 is"
    with pytest.raises(DataError, match=place):
        open_sampler("s3://bucket/data", cache=tmp_path / "cache", **ROWS)
    before = dict(shard_gets(s3))
    s3.faults.clear()
    with open_sampler("s3://bucket/data", cache=tmp_path / "cache", **ROWS) as far, near() as local:
        same_steps(far, local, 100)
    again = {path for path, n in shard_gets(s3).items() if n > before.get(path, 0) and path in before}
    assert path_of(bad) in again and len(again) <= 8  # it, and what was under way when it failed
    assert not list((tmp_path / "cache").glob("*.tmp"))


def test_two_processes_measure_each_shard_once(s3: ObjectServer, tmp_path: Path) -> None:
    s3.faults["*"] = [0.02, "..."]
    command = [sys.executable, "-c", PACK, "pack", "s3://bucket/data", "-t", "32", "-g", "1", "--json"]
    command += ["--cache", str(tmp_path / "cache"), "--cache-limit", str(3 * SHARD_BYTES)]
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    shown = [process.communicate(timeout=120) for process in running]
    assert all(process.returncode == 0 for process in running), shown
    assert len({out for out, _ in shown}) == 1
    assert set(shard_gets(s3).values()) == {1} and len(shard_gets(s3)) == len(all_shards())
    assert sum("waiting for another process that reads its shards" in err for _, err in shown) >= 1


def test_counts_that_do_not_fit_the_documents(s3: ObjectServer, bucket: Path, tmp_path: Path) -> None:
    index = load_index(bucket / "bucket/data/a")
    write_counts(index, [70] * len(index.shards))
    with pytest.raises(
        DataError, match=r"a/shard.00000.mds.zstd: the shard holds \d+ tokens, 70 were counted; remove"
    ):
        open_sampler("s3://bucket/data", cache=tmp_path / "cache", **ROWS)


def test_only_the_shards_of_the_plan_are_fetched(
    s3: ObjectServer, bucket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bins at hand, the plan seen 16 steps ahead: windows of one shard touch few, and an epoch fetches each once."""
    monkeypatch.setattr("velopath.stream_feed._STEPS_AHEAD", 16)
    monkeypatch.setattr("velopath.stream_feed._CHUNK", 16)
    ran = CliRunner().invoke(app, ["pack", str(bucket / "bucket/data"), "-t", "32", "-g", "1"])
    assert ran.exit_code == 0, ran.output
    only, shards = {"a": "s3://bucket/data/a"}, len(load_index("s3://bucket/data/a").shards)
    options = {"rows": 1, "row_tokens": 32, "window": 1, "exhaustion": "stop", "packing": "best_fit"}
    with open_sampler(only, cache=tmp_path / "cache", **options) as sampler:  # type: ignore[arg-type]
        for _ in range(4):
            next(sampler)
        time.sleep(0.3)  # time to do what it should not
        assert 1 <= sampler.feed_report.fetched <= shards // 3
        steps = 4 + sum(1 for _ in sampler)
        assert steps == sampler.order.bins["a"]  # type: ignore[index]
        assert sampler.feed_report.fetched == shards
    assert set(shard_gets(s3).values()) == {1}
