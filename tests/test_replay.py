"""Replays and verification: a run's ids again from its logs alone, and every change of a run folder found."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from commands import start, velopath
from sampler_reference import Reference, joined
from small_run import write_config
from velopath.audit import AuditLog, read_log, weights_log
from velopath.errors import ConfigError, DataError
from velopath.replay import replay, segments, steps, stretches
from velopath.runfolder import RunFolder
from velopath.verification import verify_run


@pytest.fixture(scope="module")
def job(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two slices, pushes every 5 steps, two live branches and their exports; and its config."""
    root = tmp_path_factory.mktemp("replayed")
    path = write_config(root / "run.yaml", data, control__in_branch="live")
    done = velopath("train", path, "--run", root / "run", "--versions")
    assert done.code == 0, done.err
    return root


@pytest.fixture
def run(job: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(job / "run", tmp_path / "run"))


def hashes(run: Path, segment: str) -> list[str]:
    return [s.hash for part in stretches(RunFolder(run), segment) for s in replay(part, part.start, part.end)]


def damages(run: Path) -> list[DataError]:
    return [f.error for f in verify_run(run) if f.error is not None]


def test_a_replay_gives_the_rows_of_the_reference(job: Path, data: Path) -> None:
    """The slow Python sampler, pushed what the metrics say of the controller, reads the ids that the logs give."""
    folder = RunFolder(job / "run")
    assert segments(folder) == ["main", "v1", "v2"]
    pushed = {r["step"]: r["weights"] for r in folder.metrics("control", "main") if r["reason"] == "update"}
    slices = {"one": (0, {"code": 0.5, "prose": 0.3, "tables": 0.2}), "two": (40, None)}
    streams = {p.name: joined(p, eos=0) for p in sorted((data / "train").iterdir())}
    for part in stretches(folder, "main"):
        first, weights = slices[part.slice]
        weights = weights or {n: len(s) for n, s in streams.items()}
        expected = Reference(
            streams, weights, global_rows=4, row_tokens=32, salt=part.slice, start_step=first
        )
        found = list(replay(part, part.start, part.end))
        assert [s.step for s in found] == list(range(part.start, part.end))
        assert len(found) == {"one": 40, "two": 16}[part.slice]
        for step in found:
            if step.step in pushed and step.step > first:
                expected.push(pushed[step.step])
            _, domains, ids = expected.step()
            assert np.array_equal(step.domains, domains) and np.array_equal(step.row_ids, ids)


def test_a_branch_reads_the_main_path_up_to_its_fork(job: Path) -> None:
    run = RunFolder(job / "run")
    (main,), (branch,) = stretches(run, "main")[:1], stretches(run, "v1")
    assert (branch.start, branch.end, branch.slice) == (16, 40, "one")
    records = read_log(branch.path)
    assert records[0]["kind"] == "fork" and records[0]["details"]["parent"] == "main.one.jsonl"
    assert records[0]["details"]["parent_hash"] in {r["hash"] for r in read_log(main.path)}
    common = zip(steps(main.log, 40), steps(branch.log, 40), strict=True)
    same = [a.hash == b.hash for a, b in common]
    first_push = next(p.step for p in branch.log.pushes if p.step > 16)
    assert all(same[:first_push]) and not same[-1]  # the live controller saw losses at another rate


def test_a_killed_and_resumed_run_replays_to_the_same_hashes(job: Path, tmp_path: Path) -> None:
    folder, rng = tmp_path / "run", random.Random(4)
    for _ in range(4):
        process = start("train", job / "run.yaml", "--run", folder, "--versions")
        goal = rng.randint(1, 25) + _lines(folder)
        while process.running and _lines(folder) < goal:
            time.sleep(0.002)
        process.signal(signal.SIGKILL)
        process.wait()
    done = start("train", job / "run.yaml", "--run", folder, "--versions").wait()
    assert done.code == 0, done.err
    kinds = [r["kind"] for log in (folder / "audit").glob("*.jsonl") for r in read_log(log)]
    assert kinds.count("rewind") > 3  # it was resumed, and branched
    for segment in ("main", "v1", "v2"):
        assert hashes(folder, segment) == hashes(job / "run", segment)
    assert not damages(folder)


def _lines(folder: Path) -> int:
    return sum(p.read_bytes().count(b"\n") for p in folder.glob("metrics.jsonl"))


def test_a_whole_run_is_found_whole(job: Path) -> None:
    found = list(verify_run(job / "run"))
    assert not damages(job / "run")
    kinds = {kind: sum(f.kind == kind for f in found) for kind in ("log", "stream", "lineage", "export")}
    assert kinds == {"log": 4, "stream": 3, "lineage": 5, "export": 2}
    assert {f.name for f in found if f.kind == "checkpoint"} >= {"main@16", "main@56", "v1@40", "v2@80"}
    assert "main@56" in {f.name for f in found if f.kind == "lineage" and "digest agrees" in f.found}
    done = velopath("verify", job / "run")
    assert done.code == 0 and f"whole: {len(found)} things" in done.out
    assert json.loads(velopath("verify", job / "run", "--json").out)["whole"] is True


def _edit(path: str, change: Callable[[str], str]) -> Callable[[Path], None]:
    def damage(run: Path) -> None:
        file = run / path
        before = file.read_text()
        after = change(before)
        assert after != before
        file.write_text(after)

    return damage


def _flip(path: str, at: int) -> Callable[[Path], None]:
    def damage(run: Path) -> None:
        content = bytearray((run / path).read_bytes())
        content[at] ^= 0x10
        (run / path).write_bytes(content)

    return damage


def _forge(run: Path) -> None:
    """Other weights under an intact chain of hashes: only the replay can tell."""
    path = run / "audit/v2.two.jsonl"
    records = read_log(path)
    path.unlink()
    log = AuditLog(path)
    for r in records:
        new = r["new"]
        if r["kind"] == "push" and r["step"] == 60:
            new = {"code": 0.2, "prose": 0.2, "tables": 0.6}
        log.append(r["kind"], step=r["step"], new=new, details=r["details"])
    log.close()


def _line_of(change: Callable[[dict[str, Any]], None], number: int) -> Callable[[str], str]:
    def edit(text: str) -> str:
        lines = text.splitlines()
        record = json.loads(lines[number - 1])
        change(record)
        lines[number - 1] = json.dumps(record)
        return "\n".join(lines) + "\n"

    return edit


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_edit("audit/main.two.jsonl", lambda t: t.replace('"step":45', '"step":46', 1)), r"main\.two\.jsonl:2 .*hash"),
        (_edit("audit/v1.one.jsonl", lambda t: "".join(t.splitlines(True)[1:])), r"v1\.one\.jsonl:1 "),
        (_edit("audit/main.one.jsonl", lambda t: t[:-9]), r"main\.one\.jsonl:\d+: the last record is unfinished"),
        (_forge, r"metrics\.jsonl:\d+ field 'stream': .* up to step 61 .* differs from the log .* after step 60"),
        (_edit("metrics.jsonl", _line_of(lambda r: r.update(stream="0" * 64), 4)), r"metrics\.jsonl:4 field 'stream'"),
        (_edit("metrics.jsonl", lambda t: t.replace("{", "(", 2)), r"metrics\.jsonl:1: not JSON"),
        (_flip("checkpoints/v1/step-00000040/model.safetensors", -3), r"v1/step-00000040/model\.safetensors: .*sha256"),
        (_flip("checkpoints/main/step-00000016/state.json", 30), r"main/step-00000016/state\.json"),
        (
            _edit("lineage.jsonl", _line_of(lambda r: r.update(checkpoint="0" * 64), 1)),
            r"lineage\.jsonl:1 field 'checkpoint': the digest of checkpoints/main/step-00000016",
        ),
        (lambda run: shutil.rmtree(run / "checkpoints/v2"), r"lineage\.jsonl:\d+: no whole checkpoint checkpoints/v2"),
        (_flip("exports/v2/model.safetensors", -3), r"exports/v2: tensor '.*' is not that of checkpoints/v2"),
        (_edit("exports/v1/velopath.json", lambda t: t.replace("v1", "v2")), r"velopath\.json field .model.: no check"),
    ],
    ids=lambda value: None if callable(value) else value[:24],
)  # fmt: skip
def test_every_damage_is_named(run: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(run)
    found = damages(run)
    assert found
    with pytest.raises(DataError, match=message):
        raise found[0]


def test_the_commands_end_with_code_3(run: Path) -> None:
    _forge(run)
    for command in (("verify", run), ("replay", run, "--segment", "v2")):
        done = velopath(*command)
        assert done.code == 3, done
        assert "metrics.jsonl:" in done.err and "up to step 61" in done.err
    before = velopath("replay", run, "--segment", "v2", "--steps", "56:60")
    assert before.code == 0, before  # what came before is not touched


def test_replay_prints_ids(job: Path, tmp_path: Path) -> None:
    run = job / "run"
    part = stretches(RunFolder(run), "v1")[0]
    expected = list(replay(part, 20, 23))
    asked = ("replay", run, "--segment", "v1", "--steps", "20:23")
    lines = velopath(*asked, "--csv", "-").out.splitlines()
    rows = [f"{s.step},{s.names[k]},{i}" for s in expected for k, i in zip(s.domains, s.row_ids, strict=True)]
    assert lines == ["step,domain,row", *rows]
    velopath(*asked, "--csv", tmp_path / "rows.csv")
    assert (tmp_path / "rows.csv").read_text().splitlines() == lines
    value = json.loads(velopath(*asked, "--json", "--show").out)
    assert [s["hash"] for s in value["stream"]] == [s.hash for s in expected]
    assert value["stretches"] == [
        {"slice": "one", "steps": [20, 23], "rows": 12, "hash": expected[-1].hash, "compared": 3}
    ]
    shown = velopath(*asked, "--show").out
    assert f"      20  {expected[0].hash[:12]}" in shown and "steps 20:23, 12 rows" in shown
    whole = velopath("replay", run).out
    assert "main, one: steps 0:40, 160 rows" in whole and "main, two: steps 40:56, 64 rows" in whole


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--steps", "5"), "--steps is '5'; expected a:b"),
        (("--steps", "9:4"), "--steps 9:4: the segment's recorded steps are 0:56"),
        (("--steps", "0:57"), "recorded steps are 0:56"),
        (("--segment", "v9"), "no segment 'v9' in .*; there are main, v1, v2"),
    ],
)
def test_what_cannot_be_replayed_is_refused(job: Path, arguments: tuple[str, ...], message: str) -> None:
    done = velopath("replay", job / "run", *arguments)
    assert done.code == 2
    with pytest.raises(ConfigError, match=message):
        raise ConfigError(done.err)


def test_a_replay_needs_neither_data_nor_torch(job: Path, tmp_path: Path) -> None:
    log = weights_log(shutil.copy(job / "run/audit/main.one.jsonl", tmp_path))
    assert [s.hash for s in steps(log, 40)] == hashes(job / "run", "main")[:40]
