"""Worker processes: results of every task, errors whole, and none left when the parent is killed."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from velopath.errors import VelopathError
from velopath.workers import Workers

KILLED = """
import multiprocessing, os, signal, threading, time
from velopath.workers import Workers

def kill():
    while len(multiprocessing.active_children()) < 2:
        time.sleep(0.05)
    time.sleep(1.0)  # both are up and asleep in their task
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    threading.Thread(target=kill).start()
    with Workers(2) as workers:
        list(workers.run(time.sleep, [120] * 4))
"""


def ended(pid: int) -> bool:
    try:
        return "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text()  # dead, not yet reaped
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.mark.parametrize("processes", [1, 2])
def test_every_task_gives_its_result(processes: int) -> None:
    with Workers(processes) as workers:
        assert sorted(workers.run(math.factorial, range(20))) == [(n, math.factorial(n)) for n in range(20)]
        with pytest.raises(ValueError, match="not defined for negative|expected a nonnegative|factorial"):
            list(workers.run(math.factorial, [-1]))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads process states from /proc")
def test_workers_end_with_their_parent(tmp_path: Path) -> None:
    (tmp_path / "killed.py").write_text(KILLED)
    command = [sys.executable, str(tmp_path / "killed.py")]
    # The workers hold stdout too: this call returns when the last of them has ended.
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 2
    end = time.monotonic() + 20
    while not all(map(ended, pids)) and time.monotonic() < end:
        time.sleep(0.05)
    assert all(map(ended, pids))


def test_a_worker_that_dies_is_an_error() -> None:
    with (
        Workers(2) as workers,
        pytest.raises(VelopathError, match="a worker process died, for want of memory perhaps"),
    ):
        list(workers.run(os._exit, [3]))
