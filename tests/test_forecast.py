"""The forecast: its law recovered from curves that follow it, its errors, and the command on a run."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from commands import velopath
from small_run import write_config
from velopath.errors import ConfigError
from velopath.forecast import POWER, Cut, expected_gain, fit_forecast

REFERENCE = 1000
LAW = {"code": (5.0, 0.2, 0.3), "prose": (6.0, 0.3, 0.2)}
"""Domain -> a, b, g."""


def curve(name: str, steps: range) -> list[tuple[int, float]]:
    a, b, _ = LAW[name]
    return [(s, a - b * math.log(s)) for s in steps if s > 0]


def cut(name: str, at: int, steps: int, power: float, shift: float = 0.0) -> Cut:
    def end(domain: str) -> float:
        a, b, g = LAW[domain]
        return a - b * math.log(at + steps) - g * (steps / REFERENCE) ** power + shift

    before = {d: LAW[d][0] - LAW[d][1] * math.log(at) for d in LAW}
    curves = {d: curve(d, range(at - 400, at + 1, 50)) for d in LAW}
    return Cut(name, at, steps, before, {d: end(d) for d in LAW}, curves)


def forecast(*cuts: Cut, step: int = 4000):  # type: ignore[no-untyped-def]
    curves = {d: curve(d, range(step - 800, step + 1, 100)) for d in LAW}
    return fit_forecast(step, REFERENCE, curves, cuts, {d: curves[d][-1][1] for d in LAW})


@pytest.mark.parametrize("power", [0.15, 0.4])
def test_the_law_is_recovered(power: float) -> None:
    found = forecast(cut("v1", 900, 600, power), cut("v2", 1900, 300, power), cut("v3", 2900, 900, power))
    assert found.power == pytest.approx(power, abs=1e-9)
    for steps in (100, 600, 1000):
        for name, (a, b, g) in LAW.items():
            real = a - b * math.log(4000 + steps) - g * (steps / REFERENCE) ** power
            prediction = found.predict(steps)[name]
            assert prediction.loss == pytest.approx(real, abs=1e-9)
            assert prediction.low <= prediction.loss <= prediction.high
    assert set(found.errors) == {"v2", "v3"}
    assert all(abs(e) < 1e-9 for e in found.errors["v3"].values())
    assert found.mean(600).loss == pytest.approx(sum(p.loss for p in found.predict(600).values()) / 2)


def test_a_slice_of_new_data_is_followed_from_its_own_start() -> None:
    """What a slice brings is learnt fast at first: its curve counts from the slice's first step."""
    curves = {"code": [(1000, 6.0), *((s, 5.0 - 0.3 * math.log(s - 1000)) for s in range(1050, 1401, 50))]}
    old = Cut("v1", 400, 600, {"code": 4.0}, {"code": 3.7}, {"code": [(100, 4.0), (400, 4.0)]})
    found = fit_forecast(1400, 1000, curves, [old], {"code": curves["code"][-1][1]}, origin=1000)
    real = 5.0 - 0.3 * math.log(1000) - 0.3
    assert found.predict(600)["code"].loss == pytest.approx(real, abs=1e-9)


def test_one_version_takes_the_default_power_and_says_nothing_of_its_error() -> None:
    found = forecast(cut("v1", 900, 600, 0.25))
    assert found.power == POWER and found.errors == {}
    wide = found.predict(600)["code"]
    assert wide.high - wide.low > 0.2  # one gain: its spread is taken to be half of it


def test_the_interval_holds_the_spread_of_the_gains() -> None:
    cuts = [cut(f"v{k}", 900 + 500 * k, 600, POWER, shift) for k, shift in enumerate((-0.05, 0.0, 0.05))]
    found = forecast(*cuts)
    prediction = found.predict(600)["code"]
    a, b, g = LAW["code"]
    real = a - b * math.log(4600) - g * 0.6**POWER
    assert prediction.loss == pytest.approx(real, abs=1e-9)
    assert prediction.low < real - 0.05 and prediction.high > real + 0.05
    assert found.errors["v2"]["code"] == pytest.approx(
        -0.05 - 0.025
    )  # v0 and v1 gained 0.05 and 0 more than v2's law


def test_what_a_shorter_branch_may_be_expected_to_gain() -> None:
    # (100 / 1600)^0.25 = 1/2 and (100 / 100)^0.25 = 1: the mean of 0.2 and 0.3
    assert expected_gain([(1600, 0.4), (100, 0.3)], 100) == pytest.approx(0.25)
    assert expected_gain([(100, 0.3)], 1600) == pytest.approx(0.6)
    assert expected_gain([], 100) == 0.0


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="no version was cut yet"):
        forecast()
    with pytest.raises(ConfigError, match="has 1 evaluations in this slice; a slope needs two"):
        fit_forecast(10, 5, {"code": [(10, 3.0)]}, [cut("v1", 900, 600, 0.25)], {"code": 3.0})


def test_the_command(data: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.yaml", data, control__controller="static")
    run = tmp_path / "run"
    assert velopath("train", config, "--run", run, "--until", 20).code == 0
    refused = velopath("forecast", run)
    assert refused.code == 2 and "no version was cut yet" in refused.err
    assert velopath("train", config, "--run", run, "--versions").code == 0
    value = json.loads(velopath("forecast", run, "--json").out)
    assert value["law"]["step"] == 56 and set(value["law"]["errors"]) == {"v2"}
    assert [row["steps"] for row in value["alphas"]] == [4, 8, 12, 16, 20, 24, 32, 40]
    assert value["chosen"]["steps"] == 24 and set(value["chosen"]["domains"]) == {"code", "prose", "tables"}
    goal = value["alphas"][2]["loss"]
    chosen = json.loads(velopath("forecast", run, "--json", "--target", goal).out)["chosen"]
    assert chosen["mean"]["loss"] <= goal and chosen["steps"] <= 12
    assert json.loads(velopath("forecast", run, "--json", "--budget", 10).out)["chosen"]["steps"] == 10
    assert json.loads(velopath("forecast", run, "--json", "--target", 0.001).out)["chosen"] is None
    text = velopath("forecast", run, "--alpha", 0.5).out
    assert "If a branch were cut at step 56" in text and "alpha 0.5: 20 steps" in text
    assert velopath("forecast", run, "--alpha", 0.5, "--budget", 3).code == 2
