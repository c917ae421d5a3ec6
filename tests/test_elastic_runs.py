"""Whole runs on other numbers of ranks, and two runs on one folder (R3 and R11)."""

from __future__ import annotations

import json
import signal
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from commands import start, velopath
from small_run import in_force, write_config
from velopath.runfolder import RunFolder


@pytest.fixture(scope="module")
def config(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 rows a step, pushes every 5 steps by weights that do not depend on rounding."""
    return write_config(
        tmp_path_factory.mktemp("elastic") / "run.yaml",
        data,
        control__controller="uniform",
        control__heldout_tokens=40,
        train__rows=12,
        evaluate__tokens=40,
    )


def on_ranks(world: int, *arguments: object) -> list[Any]:
    """The command on `world` ranks, as torchrun starts it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [
        start(*arguments, env=shared | {"RANK": str(r), "LOCAL_RANK": str(r)} if world > 1 else {})
        for r in range(world)
    ]
    return [rank.wait() for rank in ranks]


def test_a_run_resumes_on_other_numbers_of_ranks(config: Path, tmp_path: Path) -> None:
    """1 -> 3 -> 1 ranks, and a branch on 2 without being told its rows: the same stream, losses close."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert velopath("train", config, "--run", whole, "--until", 16).code == 0
    assert velopath("branch", whole, "v1").code == 0
    for world, until in ((1, 4), (3, 10), (1, 16)):
        ended = on_ranks(world, "train", config, f"train.rows={12 // world}", "--run", run, "--until", until)
        assert [rank.code for rank in ended] == [0] * world, ended
        assert RunFolder(run).read_json("run.json")["global_rows"] == 12
    ended = on_ranks(2, "branch", run, "v1")
    assert [rank.code for rank in ended] == [0, 0], ended
    for segment, count in (("main", 16), ("v1", 24)):
        expected, found = (in_force(folder, "step", segment) for folder in (whole, run))
        assert len(expected) == count
        assert [r["stream"] for r in found] == [r["stream"] for r in expected]
        assert np.allclose([r["loss"] for r in found], [r["loss"] for r in expected], rtol=1e-3)
        assert [r["tokens"] for r in found] == [r["tokens"] for r in expected]
    assert velopath("verify", run).code == 0


def test_other_rows_a_step_are_refused_with_both_shapes(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert velopath("train", config, "--run", run, "--until", 2).code == 0
    before = (run / "config.yaml").read_bytes(), (run / "run.json").read_bytes()
    (ended, _) = on_ranks(2, "train", config, "--run", run, "--until", 3)
    assert ended.code == 2 and "train.rows: 6 -> 12 on 2 ranks: 12 -> 24 rows a step" in ended.err, ended
    for done in on_ranks(5, "branch", run, "v1"):
        assert done.code == 2
        assert (
            "the run has 12 rows x 1 ranks = 12 rows a step, which 5 ranks cannot share equally" in done.err
        )
    assert before == ((run / "config.yaml").read_bytes(), (run / "run.json").read_bytes())


def test_two_runs_on_one_folder(config: Path, tmp_path: Path) -> None:
    """R11: the second is refused by pid and host; a killed one's lock is taken over; no line is torn."""
    run = tmp_path / "run"
    first = start("train", config, "--run", run, "--until", 40)
    first.until(lambda: (run / "metrics.jsonl").exists())
    second = velopath("train", config, "--run", run, "--until", 40)
    assert second.code == 2, second
    assert f"is being written by process {first.pid} on host {socket.gethostname()}" in second.err
    first.signal(signal.SIGKILL)
    first.wait()
    third = velopath("train", config, "--run", run, "--until", 16)
    assert third.code == 0, third
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert velopath("verify", run).code == 0
