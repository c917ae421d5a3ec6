"""Years of a run in small: new slices, overridden rates, rollbacks, tidying up; each over a kill at every write."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from commands import start, velopath
from conftest import write_data
from small_run import in_force, newest, outcome, write_config
from velopath.runconfig import recorded_config
from velopath.runfolder import RunFolder
from velopath.runlineage import read_lineage


@pytest.fixture(scope="module")
def more(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second quarter's data: a new domain, and more of an old one."""
    return write_data(tmp_path_factory.mktemp("more"), ("code", "maths"), documents=60)


@pytest.fixture(scope="module")
def cut(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one slice: the main path to its end at 40, version v1 at 16, exported."""
    root = tmp_path_factory.mktemp("cut")
    slices = {"one": {"root": str(data), "steps": 40}}
    config = write_config(root / "run.yaml", data, data__slices=slices, control__controller="static")
    assert velopath("train", config, "--run", root / "run", "--versions").code == 0
    done = velopath("train", root / "run", "--until", 40)
    assert done.code == 0, done.err
    return root / "run"


@pytest.fixture
def run(cut: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(cut, tmp_path / "run"))


def ok(*arguments: object) -> str:
    done = velopath(*arguments)
    assert done.code == 0, done.err
    return done.out


def refused(*arguments: object, code: int = 2) -> str:
    done = velopath(*arguments)
    assert done.code == code, (done.code, done.err)
    return " ".join(done.err.split())


def test_a_slice_is_added_trained_on_and_cut(run: Path, more: Path) -> None:
    out = ok("data", "add", run, "two", more, "--steps", 20, "--replay", 0.25)
    assert "two: steps 40 to 60 of the main path" in out
    entry = recorded_config(RunFolder(run)).data.slices["two"]
    assert entry.replay == {"prose": "one", "tables": "one"} and entry.weights is not None
    assert sum(entry.weights[d] for d in entry.replay) == pytest.approx(0.25)
    tokens = {d: f["tokens"] for d, f in json.loads((more / "domains.json").read_text())["domains"].items()}
    assert entry.weights["maths"] / entry.weights["code"] == pytest.approx(tokens["maths"] / tokens["code"])
    ok("train", run)
    ok("branch", run, "v2")
    read = in_force(run, "exposure", "v2")[-1]["domains"]
    total = sum(d["tokens"] for d in read.values())
    assert (read["prose"]["tokens"] + read["tables"]["tokens"]) / total == pytest.approx(0.25, abs=0.02)
    version = read_lineage(RunFolder(run)).find("v2")
    assert (version.branch_step, version.steps, version.slice) == (48, 12, "two")
    assert set(version.heldout_loss) == {"code", "maths", "prose", "tables"}
    assert version.seconds > 0 and version.notes["hardware"]["ranks"] == 1 and version.notes["data"]
    assert "maths" in (run / "exports" / "v2" / "README.md").read_text()
    assert ok("verify", run)
    found = json.loads(ok("diff", run, "v1", "v2", "--json"))
    assert (found["common"], found["one"]["slices"], found["other"]["slices"]) == (
        "main@16",
        ["one"],
        ["one", "two"],
    )
    assert found["domains"]["maths"]["loss"][0] is None and found["domains"]["maths"]["tokens"][1] > 0
    trained = sum(facts["tokens"][1] for facts in found["domains"].values())
    assert trained == found["other"]["tokens_behind"] == 60 * 128
    text = ok("diff", run, "v1", "v2")
    assert "main@16" in text and "maths" in text


def test_slices_that_cannot_be_read_are_refused(run: Path, data: Path, more: Path, tmp_path: Path) -> None:
    assert "nothing to replay" in refused("data", "add", run, "x", data, "--steps", 5, "--replay", 0.5)
    assert "replay share is 1.5" in refused("data", "add", run, "x", more, "--steps", 5, "--replay", 1.5)
    assert "slice name '../x'" in refused("data", "add", run, "../x", more, "--steps", 5)
    assert "slice 'one' exists already" in refused("data", "add", run, "one", more, "--steps", 5)
    assert "expected DOMAIN=NATS" in refused("data", "add", run, "x", more, "--steps", 5, "--target", "code")
    refused("data", "add", run, "x", more, "--steps", 0)
    assert "no domains" in refused("data", "add", run, "x", tmp_path, "--steps", 5, code=3)
    assert "not a run folder" in refused("data", "add", more, "x", more, "--steps", 5, code=3)
    bare = Path(shutil.copytree(more, tmp_path / "bare"))
    shutil.rmtree(bare / "heldout" / "maths")
    assert "'maths' of slice 'x' has no held-out" in refused(
        "data", "add", run, "x", bare, "--steps", 5, code=3
    )
    table = json.loads((bare / "domains.json").read_text()) | {"eos": 5}
    (bare / "domains.json").write_text(json.dumps(table))
    assert "its eos is 5" in refused("data", "add", run, "x", bare, "--steps", 5, code=3)
    assert list(recorded_config(RunFolder(run)).data.slices) == ["one"]


def test_a_rate_changes_on_record_only(run: Path, cut: Path, tmp_path: Path) -> None:
    config = cut.parent / "run.yaml"
    message = refused("train", config, "path.peak=2e-3", "--run", run)
    assert "path.peak: 0.01 -> 0.002" in message and "`velopath override` changes a rate on record" in message
    out = ok("override", run, "path.peak=2e-3", "--reason", "spikes")
    assert "peak 0.01, 0.002 from step 40" in out
    event = RunFolder(run).events()[-1]
    assert (event["event"], event["step"], event["old"], event["new"]) == ("override", 40, 0.01, 0.002)
    assert event["reason"] == "spikes"
    ok("override", run, "path.floor=1e-4", "--reason", "keep learning")
    more = write_data(tmp_path / "more", ("code", "prose", "tables"), documents=60)
    ok("data", "add", run, "two", more, "--steps", 20)
    ok("train", run, "--until", 50)
    rates = {r["step"]: r["rate"] for r in in_force(run, "step", "main")}
    assert (rates[40], rates[41], rates[50]) == (0.01, 0.002, 0.002)
    saved = json.loads((run / "checkpoints" / "main" / "step-00000050" / "optimizer.json").read_text())
    assert [group["options"]["lr"] for group in saved["groups"]] == [0.002, 0.002]
    ok("branch", run, "v2", "--no-export")
    path = read_lineage(RunFolder(run)).find("v2").path
    assert path is not None and (path.rate(39), path.rate(48), path.floor) == (0.01, 0.002, 1e-4)
    assert "seed cannot be overridden" in refused("override", run, "seed=3", "--reason", "x")
    assert "needs a reason" in refused("override", run, "path.peak=3e-3", "--reason", " ")
    assert "greater than 0" in refused("override", run, "path.peak=-1", "--reason", "x")
    assert "not of the form" in refused("override", run, "path.peak", "--reason", "x")


def test_a_rollback_is_undone_bit_for_bit(run: Path, more: Path) -> None:
    ok("data", "add", run, "two", more, "--steps", 20)
    ok("train", run, "--until", 45)
    before, config = outcome(run), recorded_config(RunFolder(run))
    out = ok("rollback", run, 16)
    assert "rollback 1: the main path is at step 16 again, was at 45; the slices two are out" in out
    assert list(recorded_config(RunFolder(run)).data.slices) == ["one"]
    assert max(r["step"] for r in in_force(run, "step", "main")) == 16
    lineage = read_lineage(RunFolder(run))
    assert [n.name for n in lineage.main] == ["main@16"]
    assert [n.name for n in lineage.rolled_back] == ["main@40~1", "main@45~1"]
    assert "main@45~1" in ok("log", run) and "rolled back" in ok("log", run)
    assert ok("verify", run)
    assert ok("rollback", run, 16) == out  # asked for twice
    assert "slices two are back" in ok("rollback", run, "--undo")
    after = outcome(run)
    for key in ("checkpoints", "exports"):
        assert after[key] == before[key]
    assert [{k: v for k, v in r.items() if k != "change"} for r in after["metrics"]] == before["metrics"]
    assert recorded_config(RunFolder(run)) == config
    assert read_lineage(RunFolder(run)).rolled_back == ()
    assert "nothing to undo" in refused("rollback", run, "--undo")
    assert "no main checkpoint at step 17" in refused("rollback", run, 17)
    assert "give either" in refused("rollback", run)
    ok("train", run, "--until", 50)
    assert ok("verify", run)


def test_after_a_rollback_the_main_path_goes_on_and_tidying_ends_the_way_back(run: Path) -> None:
    digest = read_lineage(RunFolder(run)).find("main@40").checkpoint
    ok("rollback", run, 16)
    ok("train", run, "--until", 40)
    lineage = read_lineage(RunFolder(run))
    assert lineage.find("main@40").checkpoint == digest == lineage.find("main@40~1").checkpoint
    assert "has trained on from step 16 to 40" in refused("rollback", run, "--undo")
    ok("rollback", run, 16)
    ok("gc", run, "--yes")
    assert not (run / "rolled-back" / "2").exists()
    assert "`velopath gc` has deleted what it took back" in refused("rollback", run, "--undo")
    assert ok("verify", run)
    ok("branch", run, "again", "--at", 16, "--no-export")


def test_gc_shows_first_and_keeps_what_the_lineage_needs(run: Path) -> None:
    files = sorted(p for p in run.rglob("*"))
    shown = json.loads(ok("gc", run, "--json"))
    assert not shown["deleted"] and sorted(p for p in run.rglob("*")) == files
    reasons = {row["path"]: row["kept"] for row in shown["checkpoints"]}
    assert reasons["checkpoints/main/step-00000016"] == "v1 was cut from here"
    assert reasons["checkpoints/v1/step-00000040"] == "the version"
    assert reasons["checkpoints/main/step-00000040"] == "the main path goes on from here"
    gone = [path for path, kept in reasons.items() if kept is None]
    assert gone and all(path.startswith("checkpoints/v1/") for path in gone)
    assert "--yes deletes it" in " ".join(ok("gc", run).split())
    assert "deleted" in ok("gc", run, "--yes")
    assert not any((run / path).exists() for path in gone) and len(newest(run)) == 2
    assert RunFolder(run).events()[-1]["removed"] == gone
    assert ok("verify", run)


KILL = """
import os, signal, sys
left = [{count}]
def before(name):
    original = getattr(os, name)
    def call(*arguments, **keywords):
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
        return original(*arguments, **keywords)
    setattr(os, name, call)
for name in ("rename", "replace", "unlink", "rmdir", "write", "fsync"):
    before(name)
from velopath.cli.app import app
app()
"""
STRIDE = 1 if int(os.environ.get("VELOPATH_KILL_ROUNDS", "1")) > 1 else 3
CHANGES: dict[str, tuple[object, ...]] = {
    "data": ("data", "add", "RUN", "two", "MORE", "--steps", 20, "--replay", 0.25),
    "override": ("override", "RUN", "path.peak=2e-3", "--reason", "spikes"),
    "rollback": ("rollback", "RUN", 16),
    "undo": ("rollback", "RUN", "--undo"),
    "gc": ("gc", "RUN", "--yes"),
}


def state(folder: Path) -> dict[str, Any]:
    """Everything that a change can touch."""
    found: dict[str, Any] = {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.suffix != ".tmp" and p.name not in ("lock", "metrics.jsonl", "lineage.jsonl")
    }
    return found | {"metrics": in_force(folder), "lineage": RunFolder(folder).events()}


@pytest.mark.parametrize("name", CHANGES)
def test_killed_before_any_of_its_writes_a_change_is_completed(
    cut: Path, more: Path, tmp_path: Path, name: str
) -> None:
    """kill -9 before every third write (VELOPATH_KILL_ROUNDS=8: before every one); the same command then ends where an
    undisturbed one does."""
    begin = Path(shutil.copytree(cut, tmp_path / "begin"))
    if name == "undo":
        ok("rollback", begin, 16)

    def arguments(folder: Path) -> list[object]:
        return [folder if a == "RUN" else more if a == "MORE" else a for a in CHANGES[name]]

    whole = Path(shutil.copytree(begin, tmp_path / "whole"))
    ok(*arguments(whole))
    expected = state(whole)
    kills = writes = 0
    while True:
        folder = Path(shutil.copytree(begin, tmp_path / "killed"))
        if start(*arguments(folder), code=KILL.format(count=writes)).wait().code == 0:
            break
        kills += 1
        writes += STRIDE
        again = velopath(*arguments(folder))
        # undone already: the undo itself is then refused, having nothing left to undo
        assert again.code == 0 or (name == "undo" and "nothing to undo" in again.err), again.err
        assert state(folder) == expected, writes
        shutil.rmtree(folder)
    assert writes >= 9


def test_a_second_writer_is_refused(run: Path, more: Path) -> None:
    with RunFolder(run).lock():
        for arguments in (
            ("data", "add", run, "two", more, "--steps", 20),
            ("override", run, "path.peak=2e-3", "--reason", "x"),
            ("rollback", run, 16),
            ("gc", run, "--yes"),
            ("branch", run, "v3", "--at", 16),
            ("train", run, "--until", 45),
        ):
            assert "is being written by process" in refused(*arguments)
        ok("gc", run)
        ok("log", run)
