"""The anchored signal by hand; signals, filters, decay gain and shadow mode in whole runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from small_run import config, in_force, newest
from velopath.audit import weights_log
from velopath.configured import with_decay_gain
from velopath.control import controller_for
from velopath.domains import DomainLoss
from velopath.errors import ConfigError
from velopath.filters import Filtered
from velopath.run import Run
from velopath.runfolder import RunFolder
from velopath.segments import cut_version, train_main
from velopath.signals import Anchored


def loss(a: float | None, b: float | None, stderr: tuple[float, float] | None = None) -> DomainLoss:
    return DomainLoss(("a", "b"), (10 * (a or 0), 10 * (b or 0)), (10 if a else 0, 10 if b else 0), stderr)


def test_anchored_by_hand() -> None:
    """keep 0.5. Anchor (4, 3); first training losses 3.9, none: no movement to know yet, so the next is an anchor too.

    There e = (3.9, -) and the anchor is (3.8, 2.9). Training 3.5, 3.1: e = 3.7, 3.1; l = 3.8 + (3.7 - 3.9) = 3.6, and
    b, read for the first time, stays at 2.9. Then 3.3, 2.9: e = 3.5, 3.0; l = 3.4, 2.9 + (3.0 - 3.1) = 2.8.
    """
    state = Anchored()
    assert state.due(4)
    state, found = state.next(loss(None, None), loss(4.0, 3.0, (0.1, 0.2)), 0.5)
    assert dict(found) == {"a": 4.0, "b": 3.0} and found.stderr_of("b") == 0.2
    assert state.due(4)
    state, found = state.next(loss(3.9, None), loss(3.8, 2.9), 0.5)
    assert dict(found) == {"a": 3.8, "b": 2.9}
    assert not state.due(4)
    state, found = state.next(loss(3.5, 3.1), None, 0.5)
    assert dict(found) == pytest.approx({"a": 3.6, "b": 2.9})
    assert Anchored.from_json(json.loads(json.dumps(state.to_json()))) == state
    state, found = state.next(loss(3.3, 2.9), None, 0.5)
    assert dict(found) == pytest.approx({"a": 3.4, "b": 2.8})
    assert [state.due(4), state.due(3)] == [False, True]
    _, found = state.next(loss(None, None), None, 0.5)  # nothing was read: nothing moves
    assert dict(found) == pytest.approx({"a": 3.4, "b": 2.8})


def test_an_anchor_is_needed_first() -> None:
    with pytest.raises(ConfigError, match="the first control needs held-out losses"):
        Anchored().next(loss(1.0, 1.0), None, 0.5)


def test_decay_gain_by_hand() -> None:
    targets, names = {"a": 1.0, "b": 2.0}, ("a", "b", "old")  # old: of another slice
    assert with_decay_gain(targets, None, names) == targets
    assert with_decay_gain(targets, 0.25, names) == {"a": 1.25, "b": 2.25}
    assert with_decay_gain(targets, {"b": 0.5, "old": 1.0}, names) == {"a": 1.0, "b": 2.5}
    with pytest.raises(ConfigError, match="control.decay_gain names 'c'; the domains are a, b, old"):
        with_decay_gain(targets, {"c": 0.1}, names)


def train(folder: Path, data: Path, *stops: int, **changes: object) -> Path:
    """The main path up to each of `stops` in turn, as so many commands, and to the end of the first slice."""
    for until in (*stops, 40):
        with Run.open(config(data, **changes), folder, command="test") as run:
            train_main(run, until)
    return folder


def controls(folder: Path) -> list[dict[str, object]]:
    return RunFolder(folder).metrics("control", "main")


def test_an_anchored_run_evaluates_seldom_and_resumes_exactly(tmp_path: Path, data: Path) -> None:
    changes = {"control__signal": "anchored", "control__anchor_every": 3, "control__filter": "trend"}
    whole = train(tmp_path / "whole", data, **changes)
    evals = [r["step"] for r in RunFolder(whole).metrics("eval", "main")]
    assert evals == [0, 5, 20, 35, 40]  # two anchors, every third update, and the end
    first = controls(whole)
    assert [r["step"] for r in first] == [0, 5, 10, 15, 20, 25, 30, 35, 40]
    between = first[2]
    assert set(between["losses"]) == {"code", "prose", "tables"}  # type: ignore[call-overload]
    assert between["losses"] != first[1]["losses"]
    assert set(between["filtered"]["code"]) == {"loss", "stderr", "slope", "slope_stderr"}  # type: ignore[index]
    # 23 lies between two updates, 30 on one.
    parts = train(tmp_path / "parts", data, 23, 30, **changes)
    assert in_force(parts, "control") == in_force(whole, "control")
    assert newest(parts) == newest(whole)


def test_shadow_mode_moves_nothing_and_resumes_exactly(tmp_path: Path, data: Path) -> None:
    shadow = train(tmp_path / "shadow", data, 23, control__shadow=True)
    still = train(tmp_path / "static", data, control__controller="static")
    live = train(tmp_path / "live", data)
    assert len(weights_log(RunFolder(shadow).audit("main", "one")).pushes) == 0
    trained = [
        [(r["step"], r["loss"], r["stream"]) for r in RunFolder(f).metrics("step", "main")]
        for f in (shadow, still)
    ]
    assert trained[0] == trained[1]  # the same rows, the same losses as without a controller that moves
    records = controls(shadow)
    assert all(r["shadow"] and r["weights"] == controls(still)[0]["weights"] for r in records[:8])
    assert records[2]["proposed"] != records[2]["weights"]
    # The first proposal is what the controller would have pushed: until there both runs read the same.
    assert records[1]["proposed"] == controls(live)[1]["weights"]
    again = train(tmp_path / "again", data, control__shadow=True)
    assert in_force(again, "control") == in_force(shadow, "control")
    assert newest(again) == newest(shadow)


def test_a_watched_controller_is_let_loose_on_its_run(tmp_path: Path, data: Path) -> None:
    folder = tmp_path / "run"
    for until, shadow in ((20, True), (40, False)):
        with Run.open(config(data, control__shadow=shadow), folder, command="test") as run:
            train_main(run, until)
    pushes = weights_log(RunFolder(folder).audit("main", "one")).pushes
    assert [push.step for push in pushes] == [25, 30, 35, 40]


@pytest.mark.parametrize(
    ("controller", "options"),
    [
        ("ado", {"credit": "code"}),
        ("odm", {}),
        ("doremi", {}),
        ("dynamic_batch_loading", {"form": "paper"}),
        ("temperature", {"tau": 3.0}),
        (
            "schedule",
            {
                "points": {
                    "0": {"code": 1, "prose": 1, "tables": 2},
                    "40": {"code": 2, "prose": 1, "tables": 1},
                }
            },
        ),
    ],
)
def test_every_rule_drives_a_run_and_resumes_exactly(
    tmp_path: Path, data: Path, controller: str, options: dict[str, object]
) -> None:
    changes = {"control__controller": controller, "control__options": options, "control__signal": "training"}
    whole = train(tmp_path / "whole", data, **changes)
    parts = train(tmp_path / "parts", data, 33, **changes)
    assert in_force(parts, "control") == in_force(whole, "control")
    moved = {json.dumps(r["weights"]) for r in controls(whole)}
    assert len(moved) > 1 or controller == "temperature"


def test_a_run_with_a_controller_in_a_file(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from velopath import controllers

    monkeypatch.setattr(controllers, "_REGISTRY", dict(controllers._REGISTRY))
    file = tmp_path / "twice.py"
    file.write_text(
        "from velopath.baselines import Uniform\nfrom velopath.controllers import register\n"
        "@register('twice')\nclass Twice(Uniform):\n    name = 'twice'\n"
    )
    folder = train(tmp_path / "run", data, control__controller="twice", control__plugin=str(file))
    assert controls(folder)[1]["weights"] == dict.fromkeys(("code", "prose", "tables"), pytest.approx(1 / 3))


def test_the_config_builds_filter_and_gain(tmp_path: Path, data: Path) -> None:
    changes = {"control__filter": {"kind": "ema"}, "control__decay_gain": {"code": 0.2}}
    with Run.open(config(data, **changes), tmp_path / "run", command="test") as run:
        controller = controller_for(run, "one")
        assert isinstance(controller, Filtered)
        assert controller.controller.targets["code"] == pytest.approx(1.2)  # type: ignore[attr-defined]
        train_main(run, 40)
        cut_version(run, "v1")
    assert controls(tmp_path / "run")[0]["target"]["code"] == pytest.approx(1.2)  # type: ignore[index]
