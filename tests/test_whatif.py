"""`velopath explain` and `velopath whatif` on a run: made again from its log, bit for bit, and by other rules."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from small_run import config
from velopath.cli.app import app
from velopath.cli.explain import explained
from velopath.cli.whatif import tried
from velopath.config import ControlConfig
from velopath.errors import ConfigError
from velopath.retrace import controller_of, read_courses, retrace
from velopath.run import Run
from velopath.runfolder import RunFolder
from velopath.segments import train_main


def invoke(*words: object) -> Result:
    """What the command prints; its error is raised as it is."""
    return CliRunner().invoke(app, [str(w) for w in words], catch_exceptions=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, data: Path) -> RunFolder:
    """Two slices under Velocitune with a cap that fires, resumed once inside the first slice."""
    path = tmp_path_factory.mktemp("whatif") / "run"
    options = {"cap": 0.52, "small_gap": "mean", "step_size": 2.0}
    for until in (23, 56):
        with Run.open(config(data, control__options=options), path, command="test") as run:
            train_main(run, until)
    return RunFolder(path)


def test_every_update_is_made_again_bit_for_bit(folder: RunFolder) -> None:
    courses = read_courses(folder)
    assert [c.slice for c in courses] == ["one", "two"]
    for course in courses:
        for update in retrace(controller_of(folder, course), course):
            assert dict(update.after.weights) == update.seen.result, update.seen.step


def test_explain_shows_the_update_in_force(folder: RunFolder) -> None:
    value = explained(folder, 12)
    record = next(r for r in folder.metrics("control", "main") if r["step"] == 10)
    assert (value["step"], value["slice"], value["made_again"]) == (10, "one", True)
    code = value["domains"]["code"]
    assert code["loss"] == record["losses"]["code"]
    assert code["after"] == record["weights"]["code"]
    # V from the record alone
    raw = (code["loss"] - record["target"]["code"]) / (record["initial"]["code"] - record["target"]["code"])
    assert code["terms"]["raw"] == pytest.approx(raw)
    assert f"= {raw:.4f}" in code["worked"]
    assert explained(folder, 41)["reason"] == "start"
    assert explained(folder, None)["step"] == 55
    fired = {
        g for s in range(5, 56, 5) for d in explained(folder, s)["domains"].values() for g in d["guards"]
    }
    assert "cap" in fired


def test_explain_prints_a_table_and_json(folder: RunFolder) -> None:
    done = invoke("explain", folder.path, "--step", 10, "--domain", "prose", "--json")
    value = json.loads(done.stdout)
    assert list(value["domains"]) == ["prose"]
    text = invoke("explain", folder.path, "--step", 10).stdout
    assert "velocitune, update at step 10 of main (one)" in text
    assert "bit for bit" in " ".join(text.split())
    assert "V = (l - l_target) / (l_init - l_target)" in text
    assert "The controller starts here" in invoke("explain", folder.path, "--step", 3).stdout
    with pytest.raises(ConfigError, match="no domain 'music'; the domains are code, prose, tables"):
        invoke("explain", folder.path, "--domain", "music")
    with pytest.raises(ConfigError, match="no control record; it had no controller"):
        invoke("explain", folder.path, "--segment", "proxy")


def test_whatif_with_the_same_controller_gives_the_log(folder: RunFolder) -> None:
    value = tried(folder, None)
    for name, shares in value["logged"].items():
        assert value["whatif"][name] == pytest.approx(shares, abs=1e-12)


def test_whatif_by_hand(folder: RunFolder) -> None:
    """Dynamic batch loading of the first update: odds of code to prose 5:3 times e^(d code - d prose)."""
    value = tried(folder, "dynamic_batch_loading", ["form=paper", "targets.code=1.5"])
    record = next(r for r in folder.metrics("control", "main") if r["step"] == 5)
    distance = {n: record["losses"][n] - {"code": 1.5, "prose": 1.2}[n] for n in ("code", "prose")}
    odds = 5 / 3 * math.exp(distance["code"] - distance["prose"])
    assert value["whatif"]["code"][1] / value["whatif"]["prose"][1] == pytest.approx(odds)
    assert value["logged"]["code"][1] == record["weights"]["code"]


@pytest.mark.parametrize("name", ["static", "uniform", "temperature", "ado", "odm", "doremi"])
def test_whatif_runs_every_rule_and_says_what_it_is_not(folder: RunFolder, name: str) -> None:
    done = invoke("whatif", folder.path, "--controller", name, "filter.kind=trend", "--json")
    value = json.loads(done.stdout)
    assert "the losses themselves would have changed" in value["note"]
    assert Path(value["picture"]).read_bytes().startswith(b"\x89PNG")
    sums = [sum(shares) for shares in zip(*value["whatif"].values(), strict=True)]
    assert sums == pytest.approx([1.0] * len(value["steps"]))


def test_whatif_shows_a_table(folder: RunFolder) -> None:
    text = " ".join(invoke("whatif", folder.path, "cap=0.4").stdout.split())
    assert "losses themselves would have changed" in text
    assert "whatif-velocitune.png" in text.replace(" ", "")
    assert max(tried(folder, None, ["cap=0.4"])["whatif"]["tables"]) <= 0.4 + 1e-12


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--controller", "velocity"], "unknown controller 'velocity'"),
        (["eta=2"], "controller 'velocitune' has no option 'eta'; its options are cap, floor"),
        (["cap"], "option 'cap' is not of the form key=value"),
        (["filter=kalman"], "filter kind is 'kalman'"),
        (["targets.code=low"], "control: targets"),
        (["cap=2"], "cap is 2; expected a number in"),
    ],
)
def test_whatif_refuses(folder: RunFolder, words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        invoke("whatif", folder.path, *words)


def test_a_record_from_before_losses_were_logged(folder: RunFolder, tmp_path: Path) -> None:
    """Without `losses`, `stderr`, `progress` and `slice` the losses are found under `last`."""
    old = RunFolder(tmp_path / "old", create=True)
    old.write_text("config.yaml", (folder.path / "config.yaml").read_text())
    for record in folder.records():
        old.append_metric(
            {k: v for k, v in record.items() if k not in ("losses", "stderr", "progress", "slice")}
        )
    assert [c.slice for c in read_courses(old)] == ["one", "two"]
    assert (
        explained(old, 12)["domains"]["code"]["worked"] == explained(folder, 12)["domains"]["code"]["worked"]
    )


def test_targets_must_be_known(folder: RunFolder, tmp_path: Path) -> None:
    course = read_courses(folder)[0]
    bare = type(course)(course.slice, course.controls, None)
    with pytest.raises(ConfigError, match="needs a target for domain 'code' and the run recorded none"):
        controller_of(folder, bare, ControlConfig())
