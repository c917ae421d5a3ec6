"""Readers that hang and shards that shrink while they are mapped: noticed, with an error, and nothing is lost."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from inspect import signature
from pathlib import Path

import pytest

from sampler_reference import write_domain
from velopath import open_sampler
from velopath.errors import DataError, VelopathError

libc = ctypes.CDLL(None, use_errno=True)


def address(name):
    return ctypes.cast(getattr(libc, name), ctypes.c_void_p)


class Stalled:
    """A thread of this process that hangs: it runs a signal handler that is libc's `pause`."""

    def __init__(self, thread):
        self.thread = thread
        libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
        libc.signal(signal.SIGUSR2, address("pause"))
        libc.signal(signal.SIGUSR1, address("abs"))  # does nothing, but ends the pause
        assert libc.tgkill(os.getpid(), thread, signal.SIGUSR2) == 0

    def wake(self):
        assert libc.tgkill(os.getpid(), self.thread, signal.SIGUSR1) == 0


def readers(opening):
    """The sampler and the ids of the threads that opening it started."""
    before = set(os.listdir("/proc/self/task"))
    sampler = opening()
    time.sleep(0.1)  # those that opened the shards have ended
    return sampler, [int(t) for t in set(os.listdir("/proc/self/task")) - before]


@pytest.fixture
def handlers():
    old = {s: signal.getsignal(s) for s in (signal.SIGUSR1, signal.SIGUSR2)}
    yield
    for number, handler in old.items():
        signal.signal(number, handler)


@pytest.fixture
def root(tmp_path):
    write_domain(tmp_path / "x", [300] * 40)
    return tmp_path


def drain(sampler):
    """Steps handed out until none comes, and the seconds that took."""
    steps, start = [], time.monotonic()
    with pytest.raises(VelopathError, match="no reader thread finished a step") as caught:
        for _ in range(10_000):
            steps.append(next(sampler).step)
    return steps, time.monotonic() - start, str(caught.value)


def test_a_hanging_reader_is_noticed_and_no_step_is_lost(root, handlers):
    assert signature(open_sampler).parameters["stall_seconds"].default == 5
    sampler, (thread,) = readers(lambda: open_sampler(root, rows=2, row_tokens=16, stall_seconds=0.4))
    with sampler:
        stalled = Stalled(thread)
        steps, seconds, message = drain(sampler)
        assert 0.4 < seconds < 5
        assert f"while waiting for step {len(steps)}" in message
        stalled.wake()
        steps += [next(sampler).step for _ in range(50)]
    assert steps == list(range(len(steps)))
    with open_sampler(root, rows=2, row_tokens=16) as untouched:
        for _ in steps:
            expected = next(untouched)
    assert expected.step == steps[-1]


def test_closing_does_not_wait_for_a_hanging_reader_for_ever(root, handlers):
    sampler, (thread,) = readers(lambda: open_sampler(root, rows=2, row_tokens=16, stall_seconds=0.3))
    stalled = Stalled(thread)
    time.sleep(0.1)
    start = time.monotonic()
    sampler.close()
    assert time.monotonic() - start < 3
    del sampler  # the thread left behind keeps what it uses
    stalled.wake()
    time.sleep(0.1)
    with open_sampler(root, rows=2, row_tokens=16) as other:
        assert next(other).step == 0


@pytest.mark.parametrize("threads", [0, 1])
def test_a_shard_cut_while_mapped_is_an_error_and_no_crash(root, threads):
    code = f"""if True:
    import os, time
    from velopath import open_sampler
    with open_sampler({str(root)!r}, rows=1, row_tokens=64, threads={threads}, prefetch=1) as sampler:
        next(sampler)
        time.sleep(0.5)  # a thread that reads right now would not look at the file's size again
        os.truncate({str(root / "x" / "shard.00000.mds")!r}, 5000)
        time.sleep(0.05)
        for _ in range(200):
            next(sampler)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1, "killed by a signal" if done.returncode < 0 else done.stderr
    assert "DataError" in done.stderr
    assert "was cut to 5000 bytes while it was in use" in done.stderr


def test_a_shard_replaced_or_removed_while_mapped_is_read_on(root):
    shard = root / "x" / "shard.00000.mds"
    with open_sampler(root, rows=1, row_tokens=64, threads=0) as sampler:
        state = sampler.state_dict()
        expected = [next(sampler).tokens.tolist() for _ in range(5)]
        other = Path(f"{shard}.other")
        other.write_bytes(b"short")
        other.replace(shard)
        time.sleep(0.02)
        sampler.load_state_dict(state)
        assert [next(sampler).tokens.tolist() for _ in range(5)] == expected
        shard.unlink()
        time.sleep(0.02)
        next(sampler)
    with pytest.raises(DataError, match="missing"):
        open_sampler(root, row_tokens=64)
