"""Static and uniform weights, and the registry that a third party extends."""

from __future__ import annotations

import json
import math

import pytest

from velopath import controllers
from velopath.baselines import Static, Uniform
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
    with pytest.raises(ConfigError, match="no loss for domain 'b'"):
        controller.observe(state, {"a": 1.0})
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
