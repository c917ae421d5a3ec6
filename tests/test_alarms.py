"""Alarms: each rule on records written by hand, and what a run does with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from small_run import config, in_force, write_config
from velopath import alarms
from velopath.alarms import alarms_now, all_alarms, new_alarms
from velopath.cli.app import app
from velopath.cli.explain import alarms_of
from velopath.config import validate_config
from velopath.config_watch import AlarmsConfig
from velopath.errors import AlarmError, ConfigError, StoppedError
from velopath.report import write_report
from velopath.run import Run
from velopath.runfolder import RunFolder
from velopath.segments import train_main

OFF: dict[str, Any] = dict.fromkeys(alarms.RULES) | {"negative_gap": False}


def only(**limits: Any) -> AlarmsConfig:
    return AlarmsConfig(**OFF | limits)


def shares(*of_a: float) -> list[dict[str, Any]]:
    """Records of domains a and b with these shares of a."""
    return [
        {"step": k, "reason": "update" if k else "start", "weights": {"a": w, "b": 1 - w}, "velocity": None}
        for k, w in enumerate(of_a)
    ]


def found(records: list[dict[str, Any]], **limits: Any) -> list[tuple[str, str | None]]:
    return [(a.rule, a.domain) for a in alarms_now(records, only(**limits))]


def test_one_hot() -> None:
    assert found(shares(0.5, 0.9), one_hot=0.9) == [("one_hot", "a")]
    assert found(shares(0.5, 0.1), one_hot=0.9) == [("one_hot", "b")]
    assert found(shares(0.5, 0.89), one_hot=0.9) == []
    proposed = [
        {**shares(0.5)[0], "proposed": {"a": 0.95, "b": 0.05}}
    ]  # in shadow mode what is proposed counts
    assert found(proposed, one_hot=0.9) == [("one_hot", "a")]
    assert found([{"weights": {"a": 1.0}}], one_hot=0.9) == []  # one domain alone is no mixture


def test_starved() -> None:
    assert found(shares(0.5, 0.01, 0.005, 0.01), starved=0.01) == [("starved", "a")]
    assert found(shares(0.5, 0.02, 0.005, 0.01), starved=0.01) == []
    assert found(shares(0.0, 0.0, 0.0, 0.0), starved=0.01) == []  # never had more


def test_oscillation() -> None:
    """Moves of +-0.2 with 5, 4 or 3 changes of sign among 6 updates; smaller moves; too few updates."""
    assert found(shares(0.4, 0.6, 0.4, 0.6, 0.4, 0.6, 0.4), oscillation=0.2 - 1e-9) == [
        ("oscillation", "a"),
        ("oscillation", "b"),
    ]
    assert len(found(shares(0.4, 0.6, 0.4, 0.6, 0.4, 0.6, 0.8), oscillation=0.1)) == 2
    assert found(shares(0.4, 0.6, 0.4, 0.6, 0.4, 0.2, 0.1), oscillation=0.1) == []
    assert found(shares(0.4, 0.6, 0.4, 0.6, 0.4, 0.6, 0.4), oscillation=0.21) == []
    assert found(shares(0.4, 0.6, 0.4, 0.6, 0.4, 0.6), oscillation=0.1) == []


def test_epochs() -> None:
    told = {"tokens": {"a": 450, "b": 90}, "epoch": {"a": 100, "b": 100}}
    assert found([{**shares(0.5)[0], "progress": told}], epochs=4) == [("epochs", "a")]
    assert found([{**shares(0.5)[0], "progress": told}], epochs=4.5) == []
    assert found(shares(0.5), epochs=4) == []  # a record of an older run


@pytest.mark.parametrize(("error", "expected"), [(0.05, [("regression", "a")]), (0.08, [])])
def test_regression(error: float, expected: list[tuple[str, str]]) -> None:
    """a rose by 0.15: above 0.1, and above 2 * 0.05 but not above 2 * 0.08; b fell."""
    record = {**shares(0.5)[0], "losses": {"a": 2.15, "b": 2.0}, "initial": {"a": 2.0, "b": 3.0}}
    assert found([{**record, "stderr": {"a": error, "b": 0.01}}], regression=0.1) == expected


def test_stalled() -> None:
    def records(*of_a: float, flagged: tuple[str, ...] = ()) -> list[dict[str, Any]]:
        return [
            {**r, "velocity": {"a": v}, "flagged": flagged} for r, v in zip(shares(*of_a), of_a, strict=True)
        ]

    assert found(records(0.9, 0.5, 0.6, 0.5, 0.495), stalled=3) == [("stalled", "a")]
    assert found(records(0.9, 0.5, 0.6, 0.5, 0.4), stalled=3) == []
    assert found(records(0.9, 0.04, 0.04, 0.04, 0.04), stalled=3) == []  # at its target
    assert found(records(0.9, 0.5, 0.6, 0.5), stalled=4) == []  # too early to say
    assert found(records(0.9, 0.5, 0.6, 0.5, 0.5, flagged=("a",)), stalled=3) == []


def test_negative_gap() -> None:
    first = {**shares(0.5)[0], "initial": {"a": 2.0, "b": 3.0}, "target": {"a": 2.1, "b": 2.9}}
    assert found([first], negative_gap=True) == [("negative_gap", "a")]
    assert found([first], negative_gap=False) == []
    assert found([{**first, "target": None}], negative_gap=True) == []


def test_an_alarm_is_said_once_until_it_ends() -> None:
    records = shares(0.5, 0.95, 0.96, 0.5, 0.95)
    said = all_alarms(records, only(one_hot=0.9))
    assert [(step, [a.rule for a in of_step]) for step, of_step in said] == [
        (1, ["one_hot"]),
        (4, ["one_hot"]),
    ]
    assert new_alarms(records[:3], only(one_hot=0.9)) == []
    assert new_alarms([], only(one_hot=0.9)) == []
    # Another slice starts again.
    again = [*records, *shares(0.95)]
    assert [step for step, _ in all_alarms(again, only(one_hot=0.9))] == [1, 4, 0]


def test_limits_are_checked() -> None:
    tree = {"data": {"slices": {"a": {"root": "x", "steps": 1}}}, "alarms": {"one_hot": 1.5}}
    with pytest.raises(ConfigError, match=r"alarms\.one_hot: .*less than or equal to 1 \(given: 1\.5\)"):
        validate_config(tree)


# -- in a run ------------------------------------------------------------------------------------------------

LIMITS = OFF | {"one_hot": 0.42}  # of three domains that begin at 0.5, 0.3, 0.2: holds from the start


def train(folder: Path, data: Path, *stops: int, **limits: Any) -> RunFolder:
    for until in (*stops, 40):
        with Run.open(config(data, alarms=LIMITS | limits), folder, command="test") as run:
            train_main(run, until)
    return RunFolder(folder)


def test_alarms_are_logged_once_through_resumes_and_shown(tmp_path: Path, data: Path) -> None:
    whole = train(tmp_path / "whole", data)
    records = whole.metrics("alarm", "main")
    assert (records[0]["step"], records[0]["slice"]) == (0, "one")
    assert records[0]["alarms"][0]["rule"] == "one_hot"
    parts = train(tmp_path / "parts", data, 13, 25)
    assert in_force(parts.path, "alarm") == in_force(whole.path, "alarm")
    logged = [{"step": r["step"], **a} for r in records for a in r["alarms"]]
    assert alarms_of(whole) == logged  # what the rules say of the record afterwards
    text = CliRunner().invoke(app, ["log", str(whole.path)]).stdout
    assert "alarm at step 0: code has 50.0% of the batch (limit 42.0%)" in text
    page = write_report(whole.path).read_text()
    assert "<h3>Alarms</h3>" in page and "the mixture is near one-hot" in page


def test_an_alarm_stops_the_run_which_resumes(tmp_path: Path, data: Path) -> None:
    with pytest.raises(
        AlarmError, match=r"stopped by an alarm \(code has 50.0% .*\) at step 1 of 40; state saved"
    ):
        train(tmp_path / "run", data, on_alarm="stop")
    assert AlarmError.exit_code == 6 and issubclass(AlarmError, StoppedError)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["state"] == "stopped"
    with pytest.raises(
        AlarmError, match=r"prose has .* at step 36 of 40"
    ):  # said already: it goes on to the next one
        train(tmp_path / "run", data, on_alarm="stop")
    folder = train(tmp_path / "run", data, on_alarm="stop")
    whole = train(tmp_path / "whole", data)
    for kind in ("control", "alarm"):
        assert in_force(folder.path, kind) == in_force(whole.path, kind)


def test_an_alarm_runs_a_command(tmp_path: Path, data: Path) -> None:
    notes: list[str] = []
    with Run.open(
        config(data, alarms=LIMITS | {"on_alarm": f"cat >> {tmp_path}/said; exit 3"}),
        tmp_path / "run",
        command="test",
    ) as run:
        run.watchers.append(lambda r: notes.append(r["text"]) if r["kind"] == "note" else None)
        train_main(run, 5)
    value = json.loads((tmp_path / "said").read_text())
    assert value["run"] == str(tmp_path / "run")
    assert (value["step"], value["alarms"][0]["domain"]) == (0, "code")
    assert any("ended with exit code 3" in text for text in notes)


def test_explain_evaluates_alarms_on_an_old_run(tmp_path: Path, data: Path) -> None:
    path = write_config(tmp_path / "c.yaml", data, alarms=OFF)
    words = ["train", str(path), "--run", str(tmp_path / "run"), "--until", "20"]
    assert CliRunner().invoke(app, words, catch_exceptions=False).exit_code == 0
    command = ["explain", str(tmp_path / "run"), "--alarms"]
    assert CliRunner().invoke(app, command).stdout.strip() == "no alarm"
    done = CliRunner().invoke(app, [*command, "--limit", "one_hot=0.45", "--json"])
    assert [(a["step"], a["rule"]) for a in json.loads(done.stdout)][0] == (0, "one_hot")
    with pytest.raises(ConfigError, match="alarms: one_cold: unknown key"):
        CliRunner().invoke(app, [*command, "--limit", "one_cold=1"], catch_exceptions=False)


def test_shadow_mode_is_said_and_drawn(tmp_path: Path, data: Path) -> None:
    with Run.open(config(data, control__shadow=True), tmp_path / "run", command="test") as run:
        train_main(run, 16)
    text = CliRunner().invoke(app, ["log", str(tmp_path / "run")]).stdout
    assert "shadow mode at steps 0 to 15: weights were proposed and none pushed" in text
    page = write_report(tmp_path / "run").read_text()
    assert "dashed: proposed" in page and '"id":"proposed"' in page
