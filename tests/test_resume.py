"""Runs that are stopped, killed and resumed: bit for bit what they would have been."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from commands import Process, start, velopath
from small_run import outcome, write_config
from velopath.audit import verify
from velopath.checkpoint import latest_checkpoint, load_checkpoint
from velopath.runfolder import RunFolder

VARIANTS: dict[str, dict[str, Any]] = {
    "heldout": {"control__rotate": True, "train__keep_last": 1},
    "training": {
        "control__signal": "training",
        "control__in_branch": "live",
        "train__micro_rows": 2,
        "train__threads": 0,
    },
}


@pytest.fixture(scope="module")
def jobs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Configs of runs with two versions, each with its outcome when nothing disturbs it."""
    made = {}
    for name, changes in VARIANTS.items():
        root = tmp_path_factory.mktemp(name)
        path = write_config(root / "run.yaml", data, **changes)
        done = velopath("train", path, "--run", root / "run", "--versions")
        assert done.code == 0, done.err
        made[name] = path, outcome(root / "run")
    return made


def same(folder: Path, expected: dict[str, Any]) -> None:
    found = outcome(folder)
    for key, value in expected.items():
        assert found[key] == value, key
    for log in (folder / "audit").iterdir():
        verify(log)


def steps(folder: Path, segment: str) -> int:
    """The last step that the metrics know of a segment."""
    records = RunFolder(folder).metrics("step", segment) if folder.is_dir() else []
    return max((r["step"] for r in records), default=0)


def train(path: Path, folder: Path, *more: object) -> Process:
    return start("train", path, "--run", folder, "--versions", *more)


@pytest.mark.parametrize(
    ("segment", "step", "number"),
    [
        ("main", 1, signal.SIGTERM),
        ("main", 10, signal.SIGINT),
        ("v1", 20, signal.SIGTERM),
        ("main", 44, signal.SIGTERM),
        ("v2", 70, signal.SIGINT),
    ],
)
def test_a_stopped_run_saves_and_resumes(
    jobs: dict[str, tuple[Path, dict[str, Any]]],
    tmp_path: Path,
    segment: str,
    step: int,
    number: signal.Signals,
) -> None:
    path, expected = jobs["heldout"]
    folder = tmp_path / "run"
    process = train(path, folder)
    process.until(lambda: steps(folder, segment) >= step)
    process.signal(number)
    stopped = process.wait()
    assert stopped.code == 4, stopped
    at = steps(folder, segment)
    assert f"StoppedError: stopped at step {at} of " in stopped.err
    assert "the same command resumes it" in stopped.err
    newest = latest_checkpoint(folder / "checkpoints" / segment)
    assert newest is not None and load_checkpoint(newest).state["step"] == at
    assert RunFolder(folder).read_json("run.json")["state"] == "stopped"
    resumed = train(path, folder).wait()
    assert resumed.code == 0, resumed.err
    assert RunFolder(folder).read_json("run.json")["state"] == "done"
    same(folder, expected)


def written(folder: Path) -> int:
    """Bytes of metrics, pushes and lineage so far."""
    return sum(p.stat().st_size for pattern in ("*.jsonl", "audit/*.jsonl") for p in folder.glob(pattern))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("seed", range(int(os.environ.get("VELOPATH_KILL_ROUNDS", "1"))))
def test_killed_again_and_again_at_random_points(
    jobs: dict[str, tuple[Path, dict[str, Any]]], tmp_path: Path, variant: str, seed: int
) -> None:
    """Some 20 kills and stops, wherever they fall: start, training, evaluation, save, push, branch, export.

    VELOPATH_KILL_ROUNDS=8 in the environment makes it 200, in under 2 minutes.
    """
    path, expected = jobs[variant]
    folder = tmp_path / "run"
    rng = random.Random(f"{variant} {seed}")
    kills = 0
    while True:
        process = train(path, folder)
        goal = written(folder) + rng.randint(0, 12_000)
        while process.running and written(folder) < goal:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.03))
        if not process.running:
            break
        number = rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM])
        process.signal(number)
        code = process.wait(25).code
        # 0: it was at its end; -SIGTERM: it had not begun
        assert code in ((4, 0, -number) if number == signal.SIGTERM else (0, -number)), (code, number)
        kills += 1
    done = process.wait()
    assert done.code == 0, done.err
    assert kills >= 3
    same(folder, expected)
    at: dict[str, int] = {}
    for record in RunFolder(folder).records():
        if record["kind"] == "resume":
            assert at.get(record["segment"], 0) - record["step"] <= 7, (
                "more than checkpoint_every steps were lost"
            )
        if record["kind"] in ("step", "resume"):
            at[record["segment"]] = record["step"]
