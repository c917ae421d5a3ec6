"""Runs whose lengths are given in tokens: turned into steps once, recorded, followed on any number of ranks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from commands import Finished, start_ranks, velopath
from conftest import write_data
from small_run import in_force, outcome, tree
from velopath.runconfig import recorded_config
from velopath.runfolder import RunFolder

# 12 rows of 32 tokens are 384 a step: 15,400 tokens are 40.1 steps, 1,500 are 3.9, "two" is 40 steps as given.
TOKENS = {"one": "15_400", "warm-up": 1500}
SETTINGS: dict[str, Any] = {
    "control__controller": "uniform",
    "control__heldout_tokens": 40,
    "evaluate__tokens": 40,
    "train__rows": 12,
}


def written(path: Path, data: Path, in_tokens: bool, **more: Any) -> Path:
    made = tree(data, **SETTINGS, **more)
    if in_tokens:
        del made["data"]["slices"]["one"]["steps"], made["path"]["warmup_steps"]
        made["data"]["slices"]["one"]["tokens"] = TOKENS["one"]
        made["path"]["warmup_tokens"] = TOKENS["warm-up"]
    path.write_text(yaml.safe_dump(made, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def config(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("tokens") / "run.yaml", data, in_tokens=True)


@pytest.fixture(scope="module")
def begun(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The main path at step 4."""
    run = tmp_path_factory.mktemp("begun") / "run"
    assert velopath("train", config, "--run", run, "--until", 4).code == 0
    return run


@pytest.fixture
def run(begun: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(begun, tmp_path / "run"))


def on_ranks(world: int, *arguments: object) -> list[Finished]:
    return [rank.wait() for rank in start_ranks(world, *arguments)]


def lengths(run: Path) -> tuple[Any, ...]:
    tree = yaml.safe_load((run / "config.yaml").read_text())
    one, two = (tree["data"]["slices"][name] for name in ("one", "two"))
    return (
        one["steps"],
        one["tokens"],
        two["steps"],
        tree["path"]["warmup_steps"],
        tree["path"]["warmup_tokens"],
    )


def test_a_run_given_tokens_is_the_run_given_the_steps(config: Path, data: Path, tmp_path: Path) -> None:
    in_steps = written(tmp_path / "steps.yaml", data, in_tokens=False)
    for name, path in (("tokens", config), ("steps", in_steps)):
        assert velopath("train", path, "--run", tmp_path / name, "--versions").code == 0
    assert lengths(tmp_path / "tokens") == (40, None, 40, 4, None)
    assert outcome(tmp_path / "tokens") == outcome(tmp_path / "steps")
    again = velopath("train", config, "--run", tmp_path / "tokens")  # the config in tokens still is the run's
    assert again.code == 0 and "is at step 56 already" in again.out
    assert velopath("train", in_steps, "--run", tmp_path / "tokens").code == 0


def test_a_resume_on_other_ranks_follows_the_recorded_steps(run: Path, config: Path) -> None:
    ended = on_ranks(3, "train", config, "train.rows=4", "--run", run, "--until", 8)
    assert [rank.code for rank in ended] == [0, 0, 0], ended
    ended = on_ranks(2, "train", run, "--until", 10)  # the folder alone
    assert [rank.code for rank in ended] == [0, 0], ended
    assert lengths(run) == (40, None, 40, 4, None)
    assert [
        b["start_step"] for b in RunFolder(run).read_json("plan.json")["segments"] if b["kind"] == "branch"
    ] == [
        16,
        56,
    ]
    assert [r["rate"] for r in in_force(run, "step", "main")] == [0.0025, 0.005, 0.0075] + [0.01] * 7


def test_other_rows_a_step_are_no_new_conversion(run: Path, config: Path) -> None:
    """24 rows a step would make 20 steps of the slice: the rows are refused, the steps stay as recorded."""
    (ended, _) = on_ranks(2, "train", config, "--run", run, "--until", 8)
    assert ended.code == 2 and "train.rows: 6 -> 12 on 2 ranks: 12 -> 24 rows a step" in ended.err, ended
    assert "data.slices" not in ended.err and "warmup" not in ended.err
    assert lengths(run) == (40, None, 40, 4, None)


def test_other_tokens_are_another_run(run: Path, config: Path) -> None:
    for override, line in (
        ("data.slices.one.tokens=2e4", "data.slices.one.steps: 40 -> 52"),  # 52.08
        ("path.warmup_tokens=3e3", "path.warmup_steps: 4 -> 8"),  # 7.8
    ):
        done = velopath("train", config, override, "--run", run)
        assert done.code == 2 and line in done.err, done.err
    assert (
        velopath("train", config, "data.slices.one.tokens=15300", "--run", run, "--until", 5).code == 0
    )  # 39.8


def test_begun_is_also_what_was_saved_before_a_step_was_recorded(config: Path, tmp_path: Path) -> None:
    """A kill between a save and the first record: the checkpoint belongs to the recorded steps."""
    run = tmp_path / "run"
    done = velopath("train", config, "train.checkpoint_every=2", "--run", run, "--until", 3)
    assert done.code == 0, done.err
    kept = [line for line in (run / "metrics.jsonl").read_text().splitlines() if '"kind":"step"' not in line]
    (run / "metrics.jsonl").write_text("\n".join(kept) + "\n")
    done = velopath("train", config, "train.checkpoint_every=2", "data.slices.one.tokens=2e4", "--run", run)
    assert done.code == 2 and "data.slices.one.steps: 40 -> 52" in done.err, done.err


@pytest.mark.parametrize("value", ["12", 0, 12.5, None, {"x": 1}])
def test_rows_that_run_json_cannot_have_are_named(run: Path, config: Path, value: Any) -> None:
    about = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**about, "global_rows": value}))
    for arguments in (("train", run), ("train", config, "--run", run), ("plan", run)):
        done = velopath(*arguments)
        assert done.code == 3 and f"global_rows and world are [{value!r}, 1]; expected" in done.err, done.err


def test_a_dry_run_and_the_plan_show_both(config: Path, run: Path) -> None:
    text = " ".join(velopath("train", config, "--dry-run").out.split())
    assert "Lengths at 384 tokens a step" in text and "steps: 40" in text
    assert "warm-up │ 1,500 │ 4 │ 1,536" in text and "slice one │ 15,400 │ 40 │ 15,360" in text
    assert "slice two │ │ 40 │ 15,360" in text and "branch v1 │ │ 24 │ 9,216" in text
    assert "slice one │ 15,400 │ 40 │ 15,360" in " ".join(velopath("plan", config).out.split())
    # as on two ranks: 768 tokens a step, 20.05 and 1.95 steps
    value = json.loads(velopath("plan", config, "--tokens-per-step", 768, "--json").out)
    assert value["plan"]["slices"] == [["one", 20], ["two", 40]]
    assert [(x["asked_tokens"], x["steps"]) for x in value["lengths"][:2]] == [(1500, 2), (15400, 20)]
    assert json.loads(velopath("plan", run, "--json").out)["plan"]["slices"] == [["one", 40], ["two", 40]]
    # on a run that has begun its own tokens a step count, whatever rows the config has for a rank
    text = " ".join(velopath("train", config, "train.rows=4", "--run", run, "--dry-run").out.split())
    assert "Lengths at 384 tokens a step" in text and "slice one │ 15,400 │ 40 │ 15,360" in text


def test_a_slice_is_added_in_tokens(run: Path, tmp_path: Path) -> None:
    more = write_data(tmp_path / "more", ("code", "prose", "tables"), documents=60)
    add = ("data", "add", run, "three", more)
    for options, message in (
        ((), "give either --steps or --tokens"),
        (("--steps", 5, "--tokens", "2e3"), "give either --steps or --tokens"),
        (("--tokens", "2.5"), "'2.5' is no number of tokens"),
        (("--tokens", "0"), "tokens is 0; expected 1 or more"),
    ):
        done = velopath(*add, *options)
        assert done.code == 2 and message in done.err, (options, done.err)
    assert list(recorded_config(RunFolder(run)).data.slices) == ["one", "two"]
    done = velopath(*add, "--tokens", "7.7e3")  # 20.05 steps
    assert done.code == 0, done.err
    assert "three: steps 80 to 100 of the main path (7,680 tokens)" in done.out
    assert velopath(*add, "--tokens", "7_700").out == done.out == velopath(*add, "--steps", 20).out
    entry = recorded_config(RunFolder(run)).data.slices["three"]
    assert (entry.steps, entry.tokens) == (20, None)
    assert RunFolder(run).events()[-1]["slice"]["steps"] == 20
    (run / "run.json").unlink()
    done = velopath("data", "add", run, "four", more, "--tokens", "2e3")
    assert done.code == 2 and "the run has not been opened yet, so 2000 tokens are no steps" in done.err
