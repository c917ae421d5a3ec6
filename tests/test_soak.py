"""R17 and R18 in short: a soak of 10^4 steps holds what it holds; assembling is off the caller's path."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from velopath import open_sampler
from velopath.mds import MdsWriter

ROOT = Path(__file__).parents[1]


def test_a_soak_holds_nothing_more_at_its_end(tmp_path: Path) -> None:
    """`python -m benchmarks soak` is the long form. A process of its own: other tests' leftovers are no growth."""
    command = [sys.executable, "-m", "benchmarks", "soak", "--quick", "--json", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [bar["met"] for bar in found["bars"]] == [True] * 4, found["bars"]
    result = found["result"]
    assert (result["steps"], result["pushes"], result["resumes"]) == (10_000, 40, 10)
    assert len(result["looks"]) == 40 and min(result["epochs"].values()) > 2


@pytest.mark.parametrize("threads", [1, 2])
def test_the_caller_of_next_assembles_nothing(tmp_path: Path, threads: int) -> None:
    """Its own CPU time (not the clock's: a busy machine changes nothing) is a small part of what assembling takes."""
    with MdsWriter(tmp_path / "a") as writer:
        for k in range(8):
            writer.write(np.full(400_000, k, "uint16"))

    def cpu_ms(threads: int) -> float:
        options = {"rows": 8, "row_tokens": 300_000, "prefetch": 2, "cache": tmp_path / "cache"}
        with open_sampler({"a": tmp_path / "a"}, threads=threads, **options) as sampler:
            for _ in range(3):
                next(sampler)
            start = time.thread_time()
            for _ in range(20):
                next(sampler)
            return (time.thread_time() - start) / 20 * 1e3

    assert cpu_ms(threads) < cpu_ms(0) / 4
