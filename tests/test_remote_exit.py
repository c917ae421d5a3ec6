"""Leaving Python while remote shards are fetched: at once, with nothing half done, whatever the server does."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from object_server import ObjectServer, serving
from test_remote import write_folders
from velopath import remote_loop
from velopath.errors import ConfigError
from velopath.remote_loop import StoppedReadError, wait_for
from velopath.remote_threads import FetchThreads

MOST_SECONDS = 5.0
OPEN = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job is born without it
from velopath import open_sampler
sampler = open_sampler({places!r}, rows=2, row_tokens=32, cache={cache!r}, **{options!r})
print("opened", flush=True)
sys.stdin.readline()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("exit")
    write_folders(root / "counted")
    write_folders(root / "bare", counts=False)
    return root


@contextmanager
def running(code: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )  # fmt: skip
    with process:
        try:
            yield process
        finally:
            process.kill()


def fill(template: str, server: ObjectServer, kind: str, cache: Path, **options: object) -> str:
    places = {name: f"{server.url}/{kind}/{name}" for name in "ab"}
    return template.format(places=places, cache=str(cache), options=options)


def wait_until(holds: object, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not holds() and time.monotonic() < deadline:  # type: ignore[operator]
        time.sleep(0.02)
    assert holds()  # type: ignore[operator]


def shards_asked(server: ObjectServer) -> int:
    return sum(n for path, n in server.gets.items() if "shard" in path)


def stall(server: ObjectServer, folder: Path, fault: object = "stall") -> None:
    for path in folder.glob("*/*/shard*"):
        server.faults["/" + path.relative_to(folder).as_posix()] = [fault, "..."]


@pytest.mark.parametrize("fault", ["stall", 30.0, 503])
@pytest.mark.parametrize("end", ["", "sampler.close()", "raise SystemExit(3)"])
def test_leaving_python_waits_for_no_fetch(folder: Path, tmp_path: Path, fault: object, end: str) -> None:
    """A body that stops halfway, no answer at all, and pauses between attempts (5 of 10 s each by default)."""
    with serving(folder) as server:
        stall(server, folder, fault)
        with running(fill(OPEN + end, server, "counted", tmp_path)) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "opened\n"
            wait_until(lambda: shards_asked(server) >= 4)
            wait_until(lambda: list(tmp_path.glob("*.tmp")))
            begin = time.monotonic()
            out, err = process.communicate("\n", timeout=60)
            seconds = time.monotonic() - begin
    assert process.returncode == (3 if "3" in end else 0), err
    assert seconds < MOST_SECONDS, err
    assert not [line for line in err.splitlines() if not re.search(r"attempt \d of|tried again", line)]
    left = [p.name for p in tmp_path.iterdir() if p.suffix not in (".lock",)]
    assert left == [] and out == ""


def test_two_processes_that_wait_for_one_stalled_shard_leave_at_once(folder: Path, tmp_path: Path) -> None:
    with serving(folder) as server:
        stall(server, folder)
        code = fill(OPEN, server, "counted", tmp_path)
        with running(code) as one, running(code) as two:
            for process in (one, two):
                assert process.stdout is not None and process.stdout.readline() == "opened\n"
            wait_until(lambda: len(list(tmp_path.glob("*.tmp"))) >= 4)
            for process in (two, one):  # whichever of them fetches and whichever waits
                begin = time.monotonic()
                process.communicate("\n", timeout=60)
                assert process.returncode == 0
                assert time.monotonic() - begin < MOST_SECONDS
    assert not list(tmp_path.glob("*.mds*"))


HANG = """
import fsspec, time
from fsspec.implementations.local import LocalFileSystem
class Hanging(LocalFileSystem):
    protocol = "hang"
    def _open(self, path, mode="rb", **options):
        file = super()._open(path, mode, **options)
        if "shard" in path:
            file.read = lambda *size: time.sleep(120)
        return file
fsspec.register_implementation("hang", Hanging)
"""


def test_a_file_system_that_hangs_keeps_nobody(folder: Path, tmp_path: Path) -> None:
    places = {name: f"hang://{folder}/counted/{name}" for name in "ab"}
    code = HANG + OPEN.format(places=places, cache=str(tmp_path), options={})
    with running(code) as process:
        assert process.stdout is not None and process.stdout.readline() == "opened\n"
        wait_until(lambda: list(tmp_path.glob("*.tmp")))
        begin = time.monotonic()
        _, err = process.communicate("\n", timeout=60)
    assert (process.returncode, err) == (0, "")
    assert time.monotonic() - begin < MOST_SECONDS
    assert not list(tmp_path.glob("*.mds*"))


def test_ctrl_c_ends_the_opening(folder: Path, tmp_path: Path) -> None:
    """While the index stalls, and while shards are fetched to be measured."""
    for path, kind in (("/counted/a/index.json", "counted"), ("*", "bare")):
        with serving(folder) as server:
            server.faults[path] = ["stall", "..."]
            if path == "*":
                server.faults.clear()
                stall(server, folder)
            with running(fill(OPEN, server, kind, tmp_path)) as process:
                wait_until(lambda s=server, p=path: s.gets[p] or shards_asked(s))
                time.sleep(0.3)
                begin = time.monotonic()
                process.send_signal(signal.SIGINT)
                _, err = process.communicate(timeout=60)
            assert time.monotonic() - begin < MOST_SECONDS, path
            assert process.returncode == -signal.SIGINT and "KeyboardInterrupt" in err
        assert not list(tmp_path.glob("*.mds*"))


def test_a_stopped_read_drops_its_connection() -> None:
    """The coroutine is cancelled where it stands, in the loop's thread."""
    import asyncio

    begun, ended, stop = threading.Event(), threading.Event(), threading.Event()

    async def hang() -> None:
        begun.set()
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    threading.Timer(0.2, stop.set).start()
    begin = time.monotonic()
    with pytest.raises(StoppedReadError):
        wait_for(hang(), stop)
    assert begun.is_set() and ended.wait(5) and time.monotonic() - begin < 5


def test_the_fork_of_a_process_that_read_remote_files_is_told(folder: Path) -> None:
    """Its network threads stayed in the parent: a read would never end."""
    code = """
import os, sys
from velopath.mds import load_index
url = sys.argv[1]
load_index(url)
child = os.fork()
if child == 0:
    try:
        load_index(url)
    except Exception as error:
        print(type(error).__name__, error, flush=True)
    os._exit(0)
os.waitpid(child, 0)
print(child, os.getpid(), len(load_index(url).shards), flush=True)
"""
    with serving(folder) as server:
        done = subprocess.run(
            [sys.executable, "-c", code, f"{server.url}/counted/a"],
            capture_output=True,
            text=True,
            timeout=60,
        )
    told, numbers = done.stdout.splitlines()
    child, parent, shards = numbers.split()
    assert told == (
        f"ConfigError process {parent} read remote files and then forked this process {child}, which can read none: "
        "fork before the first one is read, or start processes by spawn"
    ), done.stderr
    assert int(shards) > 5


def test_threads_run_in_order_and_drop_what_has_not_begun() -> None:
    threads, seen, go = FetchThreads(1), [], threading.Event()
    first = threads.submit(lambda: go.wait(10))
    others = [threads.submit(lambda i=i: seen.append(i)) for i in range(3)]
    failing = threads.submit(lambda: 1 / 0)
    wait_until(first.running)
    assert not threads.close(0.05)
    go.set()
    assert threads.close(5) and first.result() is True
    assert all(f.cancelled() for f in [*others, failing]) and seen == []
    threads = FetchThreads(2)
    assert [threads.submit(lambda i=i: i * i).result(5) for i in range(5)] == [0, 1, 4, 9, 16]
    failing = threads.submit(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        failing.result(5)
    assert threads.close(5)


def test_after_a_fork_nothing_is_left_of_the_parents_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_loop, "_forked_from", os.getpid())

    async def nothing() -> None:
        pass

    with pytest.raises(ConfigError, match=f"process {os.getpid()} read remote files and then forked"):
        wait_for(nothing(), threading.Event())
    with suppress(StoppedReadError):
        monkeypatch.undo()
        wait_for(nothing(), threading.Event())
