"""R7: a disk that is full, read-only or broken: a clear error with its exit code, what was there whole, no half files.

Mechanisms that work for every user, root or not: a limit on the size of files (EFBIG), /dev/full (ENOSPC),
/proc/self/mem (its start cannot be written: EIO), permissions that also root has to obey without one capability, and a
small tmpfs in a namespace of its own where the kernel allows that to everybody, else the limit instead.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from commands import start, velopath
from small_corpus import make_codec, make_corpus, same_tree
from small_run import in_force, newest, write_config
from velopath import open_sampler
from velopath.audit import AuditLog, read_log
from velopath.cache import raw_path
from velopath.durable import write_durably
from velopath.errors import DataError, WriteError
from velopath.mds import MdsWriter, load_index
from velopath.prepare import prepare
from velopath.runfolder import RunFolder

Limit = Callable[[int], None]
FULL = "the disk is full; free some space or write elsewhere"
BROKEN = r"the disk failed \(input/output error\); look at the system's log and write elsewhere"
LARGE = "the file would be larger than the file system or `ulimit -f` allows; raise that or write elsewhere"
LIMITED = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, ({most}, {most}))
from velopath.cli import main
main()
"""


def limited_command(most: int, *arguments: object) -> Any:
    return start(*arguments, code=LIMITED.format(most=most)).wait()


@pytest.fixture
def obeying() -> Iterator[None]:
    """Root, too, obeys permissions: this thread lives without CAP_DAC_OVERRIDE."""
    libc = ctypes.CDLL(None, use_errno=True)
    head = (ctypes.c_uint32 * 2)(0x20080522, 0)
    sets = (ctypes.c_uint32 * 6)()
    assert libc.capget(head, sets) == 0
    before = sets[0]
    sets[0] = before & ~(1 << 1)
    assert libc.capset(head, sets) == 0
    yield
    sets[0] = before
    assert libc.capset(head, sets) == 0


@pytest.fixture
def closed(tmp_path: Path, obeying: None) -> Iterator[Path]:
    """A folder that may only be read."""
    folder = tmp_path / "closed"
    folder.mkdir()
    folder.chmod(0o555)
    yield folder
    folder.chmod(0o755)


# ---- lines: metrics, lineage, audit


@pytest.mark.parametrize("name", ["metrics.jsonl", "lineage.jsonl"])
def test_a_line_is_appended_whole_or_not_at_all(tmp_path: Path, limited: Limit, name: str) -> None:
    with RunFolder(tmp_path) as run:
        append = run.append_metric if name == "metrics.jsonl" else run.append_event
        path = tmp_path / name
        append({"kind": "step", "step": 1})
        before = path.read_bytes()
        limited(len(before) + 10)
        with pytest.raises(WriteError, match=f"{name}: {LARGE}"):
            append({"kind": "step", "step": 2})
        assert path.read_bytes() == before
        limited(resource.RLIM_INFINITY)
        append({"kind": "step", "step": 3})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 3]


@pytest.mark.parametrize(("device", "message"), [("/dev/full", FULL), ("/proc/self/mem", BROKEN)])
@pytest.mark.parametrize("name", ["metrics.jsonl", "lineage.jsonl", "audit.jsonl"])
def test_a_full_and_a_broken_disk_are_named(tmp_path: Path, device: str, message: str, name: str) -> None:
    (tmp_path / name).symlink_to(device)
    with (
        RunFolder(tmp_path) as run,
        pytest.raises(WriteError, match=f"{tmp_path}/{name}: {message}") as error,
    ):
        if name == "audit.jsonl":
            log = AuditLog.__new__(AuditLog)  # its opening reads the file, which these devices have no end of
            log.path, log.records, log.last_hash = tmp_path / name, 0, "0" * 64
            log._file = os.open(tmp_path / name, os.O_RDWR)
            log.append("push", step=1)
        elif name == "metrics.jsonl":
            run.append_metric({"kind": "step", "step": 1})
        else:
            run.append_event({"kind": "cost"})
    assert error.value.exit_code == 3 and isinstance(error.value, DataError)


def test_a_push_that_finds_the_disk_full_has_no_effect(tmp_path: Path, limited: Limit) -> None:
    for name in "ab":
        with MdsWriter(tmp_path / "data" / name) as writer:
            writer.write(np.arange(300, dtype="uint16"))
    log = tmp_path / "audit.jsonl"
    with open_sampler(tmp_path / "data", rows=2, row_tokens=8, cache=tmp_path / "c", audit=log) as sampler:
        first = next(sampler)
        sampler.push({"a": 1, "b": 3})
        before = log.read_bytes()
        limited(len(before) + 100)
        with pytest.raises(WriteError, match=f"audit.jsonl: {LARGE}"):
            sampler.push({"a": 3, "b": 1}, at_step=5)
        assert log.read_bytes() == before and sampler.weights["b"] == 0.75
        limited(resource.RLIM_INFINITY)
        assert sampler.push({"a": 3, "b": 1}, at_step=5).id == 2
        assert next(sampler).step == first.step + 1
    assert [r["kind"] for r in read_log(log)] == ["start", "push", "push"]


# ---- whole files and folders


def test_a_folder_that_may_only_be_read(tmp_path: Path, closed: Path, limited: Limit) -> None:
    refused = "the permissions forbid to write; change them or write elsewhere"
    with MdsWriter(tmp_path / "d") as writer:
        writer.write(np.arange(300, dtype="uint16"))
    entry = load_index(tmp_path / "d").shards[0]
    for write in (
        lambda: write_durably(closed / "x", b"x"),
        lambda: RunFolder(closed).append_metric({}),
        lambda: RunFolder(closed).append_event({}),
        lambda: RunFolder(closed).lock(),
        lambda: RunFolder(closed).write_json("run.json", {}),
        lambda: RunFolder(closed / "new", create=True),
        lambda: AuditLog(closed / "audit.jsonl"),
        lambda: MdsWriter(closed / "shards"),
        lambda: raw_path(entry, closed),
    ):
        with pytest.raises(WriteError, match=f"closed.*: {refused}"):
            write()
    assert not list(closed.iterdir())


@pytest.mark.parametrize("most", [0, 700, 5_000])
def test_inflating_leaves_no_half_shard(tmp_path: Path, limited: Limit, most: int) -> None:
    with MdsWriter(tmp_path / "d") as writer:
        writer.write(np.arange(3000, dtype="uint16"))
    entry = load_index(tmp_path / "d").shards[0]
    limited(most)
    with pytest.raises(WriteError, match=rf"cache/\w+\.mds: {LARGE}"):
        raw_path(entry, tmp_path / "cache")
    assert {p.suffix for p in (tmp_path / "cache").iterdir()} == {".lock"}  # the shard's and the cache's
    limited(resource.RLIM_INFINITY)
    assert raw_path(entry, tmp_path / "cache", verify=True).stat().st_size == entry.raw_bytes


def test_prepare_leaves_nothing_that_looks_complete(tmp_path: Path, limited: Limit) -> None:
    corpus, codec = make_corpus(tmp_path), make_codec(tmp_path)
    out, whole = tmp_path / "out", tmp_path / "whole"
    prepare(corpus, whole, tokenizer=codec, heldout_percent=10)
    for most in (300, 3_000, 12_000):
        limited(most)
        with pytest.raises(WriteError) as error:
            prepare(corpus, out, tokenizer=codec, heldout_percent=10)
        assert str(tmp_path) in str(error.value) and "write elsewhere" in str(error.value).lower()
        assert not out.exists()
    limited(resource.RLIM_INFINITY)
    prepare(corpus, out, tokenizer=codec, heldout_percent=10)
    assert same_tree(out, whole) and not list(tmp_path.glob("out.*"))


# ---- commands


def test_a_run_whose_disk_is_full_keeps_its_saves_and_goes_on(data: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.yaml", data, data__cache=str(tmp_path / "cache"))
    run, whole = tmp_path / "run", tmp_path / "whole"
    assert velopath("train", config, "--run", whole, "--until", 16).code == 0
    assert velopath("train", config, "--run", run, "--until", 8).code == 0
    before = newest(run)
    failed = limited_command(20_000, "train", config, "--run", run, "--until", 16)
    assert failed.code == 3
    assert (
        failed.err.splitlines()[-1] == f"velopath: WriteError: {run}/checkpoints/main/step-00000014: {LARGE}"
    )
    assert newest(run) == before and not list(run.glob("checkpoints/main/.tmp-*"))
    assert (run / "lock").read_text() == ""
    log = (run / "metrics.jsonl").read_bytes()
    failed = limited_command(len(log) + 200, "train", config, "--run", run, "--until", 16)
    assert failed.code == 3 and failed.err.splitlines()[-1].endswith(f"{run}/metrics.jsonl: {LARGE}"), failed
    assert (run / "metrics.jsonl").read_bytes()[:-1].startswith(log) and newest(run) == before
    assert velopath("train", config, "--run", run, "--until", 16).code == 0
    assert newest(run) == newest(whole) and in_force(run, "step") == in_force(whole, "step")
    assert velopath("verify", run).code == 0
    assert velopath("export", run, "main@16").code == 0
    export = {p.name: p.read_bytes() for p in (run / "exports" / "main-16").iterdir()}
    failed = limited_command(20_000, "export", run, "main@16")
    assert failed.code == 3 and f"{run}/exports/main-16: {LARGE}" in failed.err
    assert {p.name: p.read_bytes() for p in (run / "exports" / "main-16").iterdir()} == export
    assert [p.name for p in (run / "exports").iterdir()] == ["main-16"]


SMALL_DISK = """
import ctypes, os, resource, shutil, sys
from pathlib import Path
from velopath.cli import main
libc, disk, kept = ctypes.CDLL(None), Path({disk!r}), Path({kept!r})
ids = os.getuid(), os.getgid()
mounts = libc.unshare(0x10020000) == 0  # user and mount namespace
if mounts:
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {{ids[0]}} 1")
    Path("/proc/self/gid_map").write_text(f"0 {{ids[1]}} 1")
    mounts = libc.mount(b"none", b"/", None, 0x44000, None) == 0  # private: nobody else sees what is mounted
    mounts = mounts and libc.mount(b"tmpfs", bytes(disk), b"tmpfs", 0, b"size=350k") == 0

def command():
    try:
        main()
    except SystemExit as end:
        return end.code
    return 0

if not mounts:
    resource.setrlimit(resource.RLIMIT_FSIZE, (20000, resource.RLIM_INFINITY))
first = command()
print("first", first, mounts, *os.listdir(disk / "run" / "checkpoints" / "main"))
if mounts:
    assert libc.mount(b"tmpfs", bytes(disk), b"tmpfs", 32, b"size=9m") == 0
else:
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print("second", command())
shutil.copytree(disk / "run", kept)
"""


def test_a_run_on_a_small_disk_of_its_own(data: Path, tmp_path: Path) -> None:
    """A tmpfs of 350 kB, which a later checkpoint fills; it is enlarged, and the run goes on to the same end."""
    config = write_config(
        tmp_path / "run.yaml", data, data__cache=str(tmp_path / "cache"), train__keep_last=9
    )
    disk, kept, whole = (tmp_path / name for name in ("disk", "kept", "whole"))
    disk.mkdir()
    code = SMALL_DISK.format(disk=str(disk), kept=str(kept))
    done = start("train", config, "--run", disk / "run", "--until", 40, code=code).wait()
    assert done.code == 0, done
    (error,) = (line for line in done.err.splitlines() if line.startswith("velopath: "))
    first, second = (line.split() for line in done.out.splitlines() if line.startswith(("first ", "second ")))
    wanted = FULL if first[2] == "True" else LARGE
    assert error.startswith(f"velopath: WriteError: {disk}/run/") and error.endswith(wanted), error
    assert first[1] == "3" and second == ["second", "0"]
    assert all(name.startswith("step-") for name in first[3:])
    assert velopath("train", config, "--run", whole, "--until", 40).code == 0
    assert newest(kept) == newest(whole)
