"""Filters of losses by hand, against an independent computation, and on simulated losses; controllers behind them."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from velopath import controllers
from velopath.baselines import Schedule
from velopath.domains import DomainLoss, Progress
from velopath.errors import ConfigError, NumericalError
from velopath.filters import Ema, Filtered, LossFilter, Median, Trend, make_filter
from velopath.velocity import Velocitune


def run(filter: LossFilter, losses: list[float | None], stderr: float = 0.0) -> tuple[float, ...]:
    memory = filter.start(losses[0] or 0.0, stderr)
    for loss in losses[1:]:
        memory = filter.observe(memory, loss, stderr)
    return memory


def test_ema_by_hand() -> None:
    """keep 0.75 of 4, 3, 2: 0.75 * 4 + 0.25 * 3 = 3.75; 0.75 * 3.75 + 0.25 * 2 = 3.3125.

    Variances of se 0.2: 0.04; 0.5625 * 0.04 + 0.0625 * 0.04 = 0.025; 0.5625 * 0.025 + 0.0025 = 0.0165625.
    """
    found = Ema(0.75).read(run(Ema(0.75), [4.0, 3.0, None, 2.0], 0.2))
    assert found.loss == pytest.approx(3.3125, abs=1e-15)
    assert found.stderr == pytest.approx(math.sqrt(0.0165625), abs=1e-15)
    assert found.slope is None


def test_median_by_hand() -> None:
    """Of the last three of 4, 3, 9, 2: the median of 3, 9, 2 is 3; of 4, 3 alone it is 3.5."""
    assert Median(3).read(run(Median(3), [4.0, 3.0, 9.0, None, 2.0])).loss == 3.0
    assert Median(3).read(run(Median(3), [4.0, 3.0], 0.1)) == (3.5, 0.1, None, None)


def test_trend_by_hand() -> None:
    """One update with se 0.1 from loss 4, first_slope_sd 0.2, level_sd 0.1, slope_sd 0; then 3.5 is measured.

    P = (0.01, 0, 0.04); predicted P11 = 0.01 + 0.04 + 0.01 = 0.06, P12 = 0.04, P22 = 0.04; S = 0.06 + 0.01 = 0.07
    gains 6/7, 4/7; surprise -0.5: x = 4 - 3/7 = 3.571429, b = -2/7 = -0.285714
    P11 = 0.06 / 7 = 0.008571, P12 = 0.04 / 7 = 0.005714, P22 = 0.04 - 4/7 * 0.04 = 0.017143
    """
    trend = Trend(level_sd=0.1, slope_sd=0.0, first_slope_sd=0.2)
    memory = run(trend, [4.0, 3.5], 0.1)
    assert memory == pytest.approx((25 / 7, -2 / 7, 0.06 / 7, 0.04 / 7, 0.12 / 7), abs=1e-12)
    found = trend.read(memory)
    assert found == pytest.approx((25 / 7, math.sqrt(0.06 / 7), -2 / 7, math.sqrt(0.12 / 7)))
    # Without a measurement it goes on along its slope, and is less sure of it.
    ahead = trend.read(trend.observe(memory, None, 0.0))
    assert ahead.loss == pytest.approx(23 / 7)
    assert ahead.stderr > found.stderr


def test_trend_equals_conditioning_of_the_joint_normal() -> None:
    """The filter against one linear solve: (x_T, b_T) given all measurements, from their joint covariance."""
    trend = Trend(level_sd=0.03, slope_sd=0.02, noise_sd=0.05, first_slope_sd=0.1)
    rng = np.random.default_rng(3)
    losses = 4 - 0.1 * np.arange(12) + 0.05 * rng.standard_normal(12)
    # Unknowns: start (x0, b0), then 11 steps of level and slope noise; x0 has the first measurement's variance.
    scale = np.array([0.05, 0.1] + [0.03, 0.02] * 11)
    rows_x, rows_b = np.zeros((12, 24)), np.zeros((12, 24))
    rows_x[0, 0] = rows_b[0, 1] = 1
    for t in range(1, 12):
        rows_x[t] = rows_x[t - 1] + rows_b[t - 1]
        rows_b[t] = rows_b[t - 1]
        rows_x[t, 2 * t] += 1
        rows_b[t, 2 * t + 1] += 1
    prior = np.diag(scale**2)
    seen = rows_x[1:]
    cov = seen @ prior @ seen.T + 0.05**2 * np.eye(11)
    wanted = np.stack([rows_x[11], rows_b[11]])
    gain = wanted @ prior @ seen.T @ np.linalg.inv(cov)
    start = np.zeros(24)
    start[0] = losses[0]
    mean = wanted @ start + gain @ (losses[1:] - seen @ start)
    left = wanted @ prior @ wanted.T - gain @ seen @ prior @ wanted.T
    memory = run(trend, [float(x) for x in losses])
    assert memory[:2] == pytest.approx(mean, abs=1e-10)
    assert memory[2:] == pytest.approx([left[0, 0], left[0, 1], left[1, 1]], abs=1e-10)


def test_trend_is_calibrated_on_simulated_losses() -> None:
    """Errors over their standard errors have mean square 1 (here within 4 standard errors of it), for loss and slope.

    2000 losses that fall by slopes of their own; 20 updates each, so 2000 independent final errors.
    """
    trend, rng, count = (
        Trend(level_sd=0.02, slope_sd=0.01, first_slope_sd=0.1),
        np.random.default_rng(5),
        2000,
    )
    scores = np.zeros((count, 2))
    for k in range(count):
        x, b = 4.0, 0.1 * rng.standard_normal()
        memory = trend.start(x + 0.04 * rng.standard_normal(), 0.04)
        for _ in range(20):
            x, b = x + b + 0.02 * rng.standard_normal(), b + 0.01 * rng.standard_normal()
            memory = trend.observe(memory, x + 0.04 * rng.standard_normal(), 0.04)
        found = trend.read(memory)
        assert found.slope is not None and found.slope_stderr is not None
        scores[k] = (found.loss - x) / found.stderr, (found.slope - b) / found.slope_stderr
    assert np.abs((scores**2).mean(0) - 1).max() < 4 * math.sqrt(2 / count)
    assert np.abs(scores.mean(0)).max() < 4 / math.sqrt(count)


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ("ema", Ema()),
        ({"kind": "median", "last": 5}, Median(5)),
        ({"kind": "trend", "slope_sd": 0.1}, Trend(slope_sd=0.1)),
    ],
)
def test_filters_by_config(choice: object, expected: LossFilter) -> None:
    assert make_filter(choice) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("kalman", "filter kind is 'kalman'; expected one of ema, median, trend"),
        ({"kind": "ema", "last": 3}, "filter 'ema' has no option 'last'; its options are keep"),
        ({"kind": "ema", "keep": 1.0}, "keep is 1.0; expected a number at least 0 and below 1"),
        ({"kind": "median", "last": 0}, "last is 0; expected a number of losses"),
        ({"kind": "trend", "noise_sd": 0}, "noise_sd is 0; expected a number above 0"),
    ],
)
def test_filters_refuse(choice: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_filter(choice)  # type: ignore[arg-type]


def test_a_controller_behind_a_filter_sees_what_it_gives() -> None:
    """Losses 2.0, 1.0 behind a mean of keep 0.5 are 2.0, 1.5; V = (1.5 - 1) / (2 - 1) = 0.5, not 0."""
    plain = Velocitune({"a": 1.0, "b": 1.0})
    controller = Filtered(plain, Ema(0.5))
    weights = {"a": 1.0, "b": 3.0}
    state = controller.start({"a": 2.0, "b": 2.0}, weights)
    seen = DomainLoss(("a", "b"), (1.0, 2.0), (1, 1), (0.1, 0.2))
    why = controller.explain(state, seen)
    state, moved = controller.observe(state, seen)
    expected = plain.observe(plain.start({"a": 2.0, "b": 2.0}, weights), {"a": 1.5, "b": 2.0})[1]
    assert moved == expected
    assert state.record()["filtered"]["a"] == {
        "loss": 1.5,
        "stderr": pytest.approx(0.05),
        "slope": None,
        "slope_stderr": None,
    }
    assert why is not None and why.terms["a"]["filtered_loss"] == 1.5 and why.terms["a"]["velocity"] == 0.5
    assert controller.state_from_json(json.loads(json.dumps(state.to_json()))) == state
    with pytest.raises(ConfigError, match="expected one behind a filter"):
        controller.state_from_json(state.inner.to_json())
    with pytest.raises(NumericalError, match="loss of domain 'a' is nan"):
        controller.observe(state, {"a": math.nan, "b": 1.0})
    # b was not measured: the filter's value stands in, so no option `missing` is needed.
    state, _ = controller.observe(state, DomainLoss(("a", "b"), (1.0, 0.0), (1, 0)))
    assert state.record()["last"] == {"a": 1.25, "b": 2.0}


def test_progress_passes_through_a_filter() -> None:
    controller = Filtered(Schedule({5: {"a": 1, "b": 0}}), Median(3))
    state = controllers.start(controller, {"a": 1.0, "b": 1.0}, {"a": 1, "b": 1}, Progress(0))
    _, weights = controllers.observe(controller, state, {"a": 1.0, "b": 1.0}, Progress(5))
    assert weights["a"] == 1.0
    assert controllers.explain(controller, state, {"a": 1.0, "b": 1.0}, Progress(5)) is None
