"""`velopath run`: a whole plan with targets, versions, exports and downstream scores; over kills and failing judges."""

from __future__ import annotations

import random
import signal
import sys
import time
from pathlib import Path

import pytest

from commands import start, velopath
from small_run import outcome, write_config
from velopath.downstream import _numbers
from velopath.runfolder import RunFolder
from velopath.runlineage import read_lineage

JUDGE = """
import json, sys
from pathlib import Path
model = Path(sys.argv[1])
size = (model / "model.safetensors").stat().st_size
print("judging", model.name)
print(json.dumps({"bytes": size, "deep": {"share": 0.5}, "words": "left out"}))
"""


@pytest.fixture(scope="module")
def plan(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config whose controller needs targets that nobody gave, and a judge."""
    root = tmp_path_factory.mktemp("plan")
    (root / "judge.py").write_text(JUDGE)
    command = f"{sys.executable} {root / 'judge.py'} {{model}}"
    return write_config(root / "run.yaml", data, control__targets=None, evaluate__command=command)


@pytest.fixture(scope="module")
def whole(plan: Path) -> Path:
    folder = plan.parent / "run"
    done = velopath("run", plan, "--run", folder)
    assert done.code == 0, done.err
    assert "report: " in done.out and (folder / "report.html").is_file()
    return folder


def test_a_plan_is_executed_to_its_end(whole: Path) -> None:
    lineage = read_lineage(RunFolder(whole))
    assert [v.name for v in lineage.versions] == ["v1", "v2"]
    for version in lineage.versions:
        size = (whole / "exports" / version.name / "model.safetensors").stat().st_size
        assert version.scores == {"bytes": size, "deep/share": 0.5}
    assert (whole / "targets.json").is_file() and lineage.cost.proxy_steps == 30
    assert "deep/share 0.5" in velopath("log", whole).out
    assert velopath("verify", whole).code == 0


def test_a_finished_plan_is_passed_over(whole: Path, plan: Path) -> None:
    before = outcome(whole)
    assert velopath("run", whole).code == 0
    assert outcome(whole) == before


def test_killed_at_random_points_it_ends_the_same(whole: Path, plan: Path, tmp_path: Path) -> None:
    folder, rng, kills = tmp_path / "run", random.Random(6), 0
    expected = outcome(whole)
    while True:
        process = start("run", plan, "--run", folder)
        size = sum(p.stat().st_size for p in folder.glob("*.jsonl"))
        goal = size + rng.randint(12_000, 40_000)
        while process.running and sum(p.stat().st_size for p in folder.glob("*.jsonl")) < goal:
            time.sleep(0.01)
        if not process.running:
            break
        process.signal(signal.SIGKILL)
        process.wait()
        kills += 1
    done = process.wait()
    assert done.code == 0, done.err
    assert kills >= 2
    found = outcome(folder)
    for part in ("checkpoints", "exports", "metrics"):
        assert found[part] == expected[part], part
    scores = {v.name: v.scores for v in read_lineage(RunFolder(folder)).versions}
    assert scores == {v.name: v.scores for v in read_lineage(RunFolder(whole)).versions}


def test_a_judge_that_fails_stops_nothing_but_is_told(whole: Path, plan: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (tmp_path / "judge.py").write_text("import sys; print('no GPU', file=sys.stderr); sys.exit(7)")
    command = f"evaluate.command={sys.executable} {tmp_path / 'judge.py'} {{model}}"
    failed = velopath("run", plan, command, "control.controller=static", "--run", folder)
    assert failed.code == 1 and "ended with code 7" in failed.err and "no GPU" in failed.err
    lineage = read_lineage(RunFolder(folder))
    assert all((folder / "exports" / v.name).is_dir() and not v.scores for v in lineage.versions)
    for text, code, message in (
        ("print('fine')", 3, "wrote no JSON"),
        ("print('{}')", 3, "gave no number to keep"),
    ):
        (tmp_path / "judge.py").write_text(text)
        ended = velopath("run", folder)
        assert ended.code == code and message in ended.err
    (tmp_path / "judge.py").write_text("print(3.5)")
    assert velopath("run", folder).code == 0
    assert [v.scores for v in read_lineage(RunFolder(folder)).versions] == [{"score": 3.5}] * 2


def test_the_numbers_of_lm_eval_and_what_is_left_out() -> None:
    value = {"results": {"arc": {"acc,none": 0.25, "alias": "arc"}}, "config": {"seed": 1}}
    assert dict(_numbers(value)) == {"arc/acc,none": 0.25}
    assert dict(_numbers({"a": True, "b": float("nan"), "c": 2})) == {"c": 2.0}


@pytest.mark.parametrize(
    ("command", "message"),
    [("nowhere-9 {model}", "cannot start 'nowhere-9'"), ("judge {nobody}", "expected words with {model}")],
)
def test_a_command_that_cannot_run_is_named(plan: Path, tmp_path: Path, command: str, message: str) -> None:
    ended = velopath(
        "run", plan, f"evaluate.command={command}", "control.controller=static", "--run", tmp_path
    )
    assert ended.code == 2 and message in ended.err, ended.err
