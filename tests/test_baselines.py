"""Static and uniform weights, and the registry that a third party extends."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from velopath import controllers
from velopath.baselines import Schedule, Static, Temperature, Uniform
from velopath.domains import Progress
from velopath.errors import ConfigError, NumericalError
from velopath.velocity import Velocitune

LOSSES = {"b": 3.0, "a": 2.0}


def test_static_keeps_its_weights() -> None:
    controller = Static()
    state = controller.start(LOSSES, {"b": 3.0, "a": 1.0})
    for loss in (2.5, 1.0):
        state, weights = controller.observe(state, {"a": loss, "b": loss})
        assert dict(weights) == {"a": 0.25, "b": 0.75}
    assert (state.updates, weights.id) == (2, 0)
    assert state.record()["last"] == {"a": 1.0, "b": 1.0}
    assert controller.state_from_json(json.loads(json.dumps(state.to_json()))) == state


def test_uniform_ignores_the_first_weights() -> None:
    controller = Uniform()
    state = controller.start({**LOSSES, "c": 1.0}, {"a": 5, "b": 1, "c": 0})
    assert state.shares == (1 / 3, 1 / 3, 1 / 3)
    assert controller.state_from_json(state.to_json()) == state


@pytest.mark.parametrize("controller", [Static(), Uniform()])
def test_bad_losses_and_foreign_states(controller: Static) -> None:
    state = controller.start(LOSSES, {"a": 1, "b": 1})
    with pytest.raises(NumericalError, match="loss of domain 'a' is nan"):
        controller.observe(state, {"a": math.nan, "b": 1.0})
    assert controller.observe(state, {"a": 1.0})[0].record()["last"] == {"a": 1.0, "b": 3.0}  # b not measured
    with pytest.raises(ConfigError, match=f"expected '{controller.name}' version 1"):
        controller.state_from_json({"controller": "velocitune", "version": 1})
    value = state.to_json()
    del value["shares"]
    with pytest.raises(ConfigError, match="state lacks 'shares'"):
        controller.state_from_json(value)


def test_static_and_uniform_states_differ_in_name() -> None:
    state = Static().start(LOSSES, {"a": 1, "b": 1})
    with pytest.raises(ConfigError, match="state of controller 'static' version 1; expected 'uniform'"):
        Uniform().state_from_json(state.to_json())


def test_build_by_name() -> None:
    assert set(controllers.names()) >= {"static", "uniform", "velocitune"}
    assert controllers.build("static") == Static()
    built = controllers.build("velocitune", targets={"a": 1.0}, small_gap="mean", cap=0.5)
    assert built == Velocitune({"a": 1.0}, small_gap="mean", cap=0.5)
    assert controllers.needs_targets("velocitune")
    assert not controllers.needs_targets("uniform")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("velocity", {}, "unknown controller 'velocity'; registered are .*static"),
        ("velocitune", {}, "controller 'velocitune' needs 'targets'"),
        (
            "velocitune",
            {"targets": {"a": 1.0}, "eta": 2},
            "has no option 'eta'; its options are targets, step_size",
        ),
        ("temperature", {"tau": 0}, "tau is 0; expected a number above 0"),
        ("schedule", {"points": {"ten": {"a": 1}}}, "points has 'ten': .*expected a step, 0 or more"),
        ("schedule", {"points": {}}, "points is {}; expected a map from step to weights"),
        (
            "schedule",
            {"points": {1: {"a": 1}}, "shape": "cubic"},
            "shape is 'cubic'; expected 'hold' or 'linear'",
        ),
        (
            "dynamic_batch_loading",
            {"targets": {"a": 1.0}, "form": "both"},
            "form is 'both'; expected 'code' or",
        ),
        ("ado", {"refit": 0}, "refit is 0; expected a number of updates"),
        ("ado", {"credit": "h"}, "credit is 'h'; expected 'paper' or 'code'"),
        ("odm", {"reward": "loss"}, "reward is 'loss'; expected 'drawn' or 'mean'"),
        ("static", {"targets": {}}, "has no option 'targets'; its options are none"),
    ],
)
def test_build_refuses(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        controllers.build(name, **options)


def test_a_third_party_registers_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controllers, "_REGISTRY", dict(controllers._REGISTRY))

    @controllers.register("largest")
    class Largest(Static):
        """All weight on the domain with the largest loss."""

    assert controllers.build("largest").start(LOSSES, {"a": 1, "b": 1}).weights["a"] == 0.5
    with pytest.raises(ConfigError, match="controller name 'static' is taken by velopath.baselines.Static"):
        controllers.register("static")(Largest)
    with pytest.raises(ConfigError, match="controller 'half' lacks 'start'"):
        controllers.register("half")(dict)


def test_temperature_by_hand() -> None:
    """tau 2 of tokens 900 and 100: 900^0.5 = 30, 100^0.5 = 10; w = 30/40, 10/40."""
    weights = Temperature(2.0, tokens={"a": 900, "b": 100}).start(LOSSES, {"a": 1, "b": 1}).weights
    assert dict(weights) == pytest.approx({"a": 0.75, "b": 0.25}, abs=1e-15)
    # Without token counts the first weights stand for them; tau 1 leaves those as they are.
    assert dict(Temperature(2.0).start(LOSSES, {"a": 0.9, "b": 0.1}).weights) == pytest.approx(dict(weights))
    assert dict(Temperature().start(LOSSES, {"a": 0.9, "b": 0.1}).weights) == pytest.approx(
        {"a": 0.9, "b": 0.1}
    )
    with pytest.raises(ConfigError, match="no weight for domain 'b'"):
        Temperature(2.0, tokens={"a": 900}).start(LOSSES, {"a": 1, "b": 1})


@pytest.mark.parametrize(
    ("shape", "expected"), [("hold", [0.5, 0.2, 0.2, 0.8, 0.8]), ("linear", [0.5, 0.2, 0.35, 0.8, 0.8])]
)
def test_schedule_by_hand(shape: str, expected: list[float]) -> None:
    """Share of a at steps 0, 100, 125, 200, 900 of {100: 1:4, 200: 4:1}, from 0.5 before.

    1:4 is 0.2, 4:1 is 0.8; a quarter of the way from step 100 to 200: 0.2 + (0.8 - 0.2) * 25 / 100 = 0.35.
    """
    controller = Schedule({"200": {"a": 4, "b": 1}, 100: {"a": 1, "b": 4}}, shape=shape)
    state = controller.start(LOSSES, {"a": 1, "b": 1})
    found = []
    for step in (0, 100, 125, 200, 900):
        state, weights = controllers.observe(controller, state, LOSSES, Progress(step))
        found.append(weights["a"])
        state = controller.state_from_json(json.loads(json.dumps(state.to_json())))
    assert found == pytest.approx(expected, abs=1e-15)
    assert state.id == len({*expected}) - 1  # the id grows with the weights only
    assert controller.start(LOSSES, {"a": 1, "b": 1}, Progress(900)).weights["a"] == pytest.approx(0.8)
    with pytest.raises(ConfigError, match="needs to know the step"):
        controller.observe(state, LOSSES)
    with pytest.raises(ConfigError, match="unknown domain 'a'"):
        controller.start({"c": 1.0}, {"c": 1})


def test_progress_goes_only_to_those_who_take_it() -> None:
    progress = Progress(7, first=5, end=9, tokens={"a": 3, "b": 4}, epoch={"a": 10, "b": 10})
    assert Progress.from_json(json.loads(json.dumps(progress.to_json()))) == progress
    static = Static()  # takes none
    state = controllers.start(static, LOSSES, {"a": 1, "b": 1}, progress)
    assert dict(controllers.observe(static, state, LOSSES, progress)[1]) == {"a": 0.5, "b": 0.5}
    assert controllers.explain(static, state, LOSSES, progress) is None


PLUGIN = """
from velopath.baselines import Static
from velopath.controllers import register

@register("first_only")
class FirstOnly(Static):
    name = "first_only"

    def _shares(self, weights):
        return (1.0, *(0.0 for _ in list(weights)[1:]))
"""


def test_a_controller_in_a_file_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controllers, "_REGISTRY", dict(controllers._REGISTRY))
    file = tmp_path / "mine.py"
    file.write_text(PLUGIN)
    for _ in range(2):  # the second time it is there already
        controllers.load_plugin(file)
    assert dict(controllers.build("first_only").start(LOSSES, {"a": 1, "b": 1}).weights) == {"a": 1, "b": 0}
    with pytest.raises(ConfigError, match="no Python file .*other.py"):
        controllers.load_plugin(tmp_path / "other.py")
    (tmp_path / "bad.py").write_text("1 / 0")
    with pytest.raises(ConfigError, match="bad.py failed: ZeroDivisionError"):
        controllers.load_plugin(tmp_path / "bad.py")


def test_a_controller_of_an_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An entry point of a distribution on the path, as pip leaves it."""
    monkeypatch.setattr(controllers, "_REGISTRY", dict(controllers._REGISTRY))
    (tmp_path / "someones_rule.py").write_text(
        "from velopath.baselines import Uniform\nclass Rule(Uniform): pass\n"
    )
    about = tmp_path / "someones_rule-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: someones-rule\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[velopath.controllers]\nsomeones = someones_rule:Rule\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "someones" in controllers.names()
    assert controllers.build("someones").start(LOSSES, {"a": 3, "b": 1}).weights["a"] == 0.5
