"""Slices with a branch share and a shape of their own: plan, run, report, forecast, health and `data add` follow."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from commands import velopath
from conftest import write_data
from small_run import in_force, write_config
from velopath.plan import make_plan
from velopath.runconfig import recorded_config
from velopath.runfolder import RunFolder
from velopath.runhealth import run_health
from velopath.runlineage import read_lineage
from velopath.schedule import LrPath

# Slices of 40 steps. "one" by path.branch_share 0.6 and the cosine: 24 steps from 16. "two" by its own: 10 from 70.
OWN = {"branch_share": 0.25, "shape": "knee"}


@pytest.fixture(scope="module")
def config(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    slices = {"one": {"root": str(data), "steps": 40}, "two": {"root": str(data), "steps": 40, **OWN}}
    root = tmp_path_factory.mktemp("own")
    return write_config(root / "run.yaml", data, data__slices=slices, control__controller="static")


@pytest.fixture(scope="module")
def finished(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own") / "run"
    done = velopath("run", config, "--run", folder)
    assert done.code == 0, done.err
    return folder


def ok(*arguments: object) -> str:
    done = velopath(*arguments)
    assert done.code == 0, done.err
    return done.out


def refused(*arguments: object) -> str:
    done = velopath(*arguments)
    assert done.code == 2, (done.code, done.err)
    return " ".join(done.err.split())


def test_the_plan_of_a_config(config: Path) -> None:
    value = json.loads(ok("plan", config, "--json"))
    # S_N + r_1 = 80 + 24; v2's share moves its branch point and changes no cost
    assert value["costs"]["totals"] == {"ptfs": 120, "cpt": 80, "switching": 104}
    branches = [s for s in value["plan"]["segments"] if s["kind"] == "branch"]
    assert [(b["start_step"], b["end_step"], b["shape"]) for b in branches] == [
        (16, 40, "cosine"),
        (70, 80, "knee"),
    ]
    turned = json.loads(ok("plan", config, "data.slices.one.branch_share=0.5", "--json"))
    assert turned["costs"]["totals"]["switching"] == 80 + 20
    text = " ".join(ok("plan", config).split())
    assert "branch shares 0.25 to 0.6" in text and "as planned" in text and "knee" in text
    assert "slice 'two': branch_share 0.01" in refused("plan", config, "data.slices.two.branch_share=0.01")


def test_a_dry_run_shows_the_rates_of_each_branch(config: Path) -> None:
    text = " ".join(ok("train", config, "--dry-run").split())
    knee = LrPath.main(1e-2, 4).branch(70, 10, "knee")
    assert "v1, cosine" in text and "v2, knee" in text and f"79: {knee.rate(79):.2e}" in text


def test_the_run_follows_its_plan(finished: Path) -> None:
    v1, v2 = read_lineage(RunFolder(finished)).versions
    assert [(v.branch_step, v.steps, v.slice) for v in (v1, v2)] == [(16, 24, "one"), (70, 10, "two")]
    assert v1.path is not None and v2.path is not None
    assert (v1.path.shape, v2.path.shape) == ("cosine", "knee")
    main = LrPath.main(1e-2, 4)
    for name, path in (("v1", main.branch(16, 24)), ("v2", main.branch(70, 10, "knee"))):
        steps = in_force(finished, "step", name)
        assert [r["rate"] for r in steps] == [path.rate(r["step"] - 1) for r in steps]
    plan = make_plan({"one": 40, "two": 40}, [0.6, 0.25], shapes=["cosine", "knee"])
    assert RunFolder(finished).read_json("plan.json") == json.loads(json.dumps(plan.to_json()))
    actual = json.loads(ok("plan", "--actual", finished, "--json"))
    assert actual["planned"] == actual["actual"] and actual["actual"]["steps"] == 104
    assert {r["segment"]: r["actual_steps"] for r in actual["rows"]} == {"main": 70, "v1": 24, "v2": 10}


def test_report_forecast_and_health_follow(finished: Path, tmp_path: Path) -> None:
    versions = json.loads((finished / "summary.json").read_text())["versions"]
    assert [(v["branch_share"], v["shape"]) for v in versions] == [(0.6, "cosine"), (0.25, "knee")]
    assert "10<small>25.0% of its slice, knee</small>" in (finished / "report.html").read_text()
    chosen = json.loads(ok("forecast", finished, "--json"))["chosen"]
    assert (chosen["alpha"], chosen["steps"]) == (0.25, 10)  # the main path stands in slice "two"
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    events = (run / "lineage.jsonl").read_text().splitlines(True)
    (run / "lineage.jsonl").write_text(
        "".join(e for e in events if '"name":"v2"' not in e)
    )  # v2 is under way
    (v1,) = read_lineage(RunFolder(run)).versions
    gain = sum(v1.notes["before"][d] - loss for d, loss in v1.heldout_loss.items()) / 3
    payback = next(f for f in run_health(RunFolder(run), "v2").findings if f.rule == "payback")
    assert f"of {gain * (10 / 24) ** 0.25:.3f} expected at step 80" in payback.text  # 10 steps, not v1's 24


def test_a_branch_that_is_given_no_shape_takes_its_slices(finished: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    ok("branch", run, "again", "--at", 70, "--steps", 4, "--no-export")
    ok("branch", run, "round", "--at", 70, "--steps", 4, "--shape", "linear", "--no-export")
    ok("branch", run, "early", "--at", 16, "--steps", 4, "--no-export")
    paths = {v.name: v.path for v in read_lineage(RunFolder(run)).versions}
    assert {n: p.shape for n, p in paths.items() if p is not None} == {
        "v1": "cosine",
        "v2": "knee",
        "again": "knee",
        "round": "linear",
        "early": "cosine",
    }


def test_a_slice_is_added_with_its_own(finished: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    more = write_data(tmp_path / "more", ("code", "prose", "tables"), documents=60)
    add = ("data", "add", run, "three", more, "--steps", 20)
    for option, message in (
        (("--branch-share", 1.5), "data.slices.three.branch_share: Input should be less than or equal to 1"),
        (
            ("--branch-share", 0),
            "data.slices.three.branch_share: Input should be greater than 0 (given: 0.0)",
        ),
        (
            ("--branch-share", 0.01),
            "slice 'three': branch_share 0.01 of a slice of 20 steps is a branch of 0 steps",
        ),
        (("--shape", "round"), "data.slices.three.shape: Input should be 'cosine'"),
    ):
        assert message in refused(*add, *option)
    assert list(recorded_config(RunFolder(run)).data.slices) == ["one", "two"]
    own = ("--branch-share", 0.5, "--shape", "linear")
    out = ok(*add, *own)
    assert "three: steps 80 to 100 of the main path" in out and "v3: linear over 10 steps from step 90" in out
    assert ok(*add, *own) == out  # the same again
    assert "exists already with other settings" in refused(*add, "--branch-share", 0.4)
    entry = recorded_config(RunFolder(run)).data.slices["three"]
    assert (entry.branch_share, entry.shape) == (0.5, "linear")
    assert RunFolder(run).events()[-1]["slice"]["branch_share"] == 0.5
    kept = json.loads(ok("gc", run, "--json"))["checkpoints"]
    assert {row["kept"] for row in kept} >= {"v2 was cut from here"}
    ok("run", run)
    v3 = read_lineage(RunFolder(run)).find("v3")
    assert (v3.branch_step, v3.steps) == (90, 10) and v3.path is not None and v3.path.shape == "linear"
    ok("rollback", run, 80)
    assert "the slices three are back" in ok("rollback", run, "--undo")
    assert recorded_config(RunFolder(run)).data.slices["three"] == entry
    ok("verify", run)
