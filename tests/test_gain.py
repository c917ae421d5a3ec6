"""MarginalGain against values worked out by hand, and on domains that follow known laws."""

from __future__ import annotations

import json
import math

import pytest

from velopath import controllers
from velopath.domains import DomainLoss, Progress
from velopath.errors import ConfigError
from velopath.gain import MarginalGain, level_shares, pooled_lines

NAMES = ("a", "b", "c")
FLAT = dict.fromkeys(NAMES, 3.0)
PRIOR = {"a": 0.8, "b": 0.15, "c": 0.05}


def test_means_hold_the_metric_s_own_shares() -> None:
    for metric, expected in (("mean", [1 / 3] * 3), ({"a": 1.0, "b": 2.0, "c": 5.0}, [1 / 8, 2 / 8, 5 / 8])):
        controller = controllers.build("marginal_gain", metric=metric)
        state = controller.start(FLAT, PRIOR)
        assert list(state.shares) == pytest.approx(expected)
        after, weights = controller.observe(state, {"a": 9.0, "b": 1.0, "c": 2.0})
        assert (after.shares, after.id, after.updates) == (state.shares, 0, 1)
        assert list(weights.values()) == pytest.approx(expected)


def test_level_shares_by_hand() -> None:
    """Two domains, 100 tokens read and 300 expected each, s = 0.5, so 400 are left.

    N = 300 exp((l - level) / 0.5). With l = 3.5 and 3.0, N_a / N_b = e = 2.7183 and N_a + N_b = 600: N_b = 161.3649,
    N_a = 438.6351; less the 100: 338.6351 and 61.3649 of 400. With a floor of 0.25, b takes 100 and a 300.
    """
    found = level_shares([3.5, 3.0], [300, 300], [100, 100], 0.5, 0.0)
    assert found == pytest.approx((0.8465879, 0.1534121), abs=1e-6)
    assert level_shares([3.5, 3.0], [300, 300], [100, 100], 0.5, 0.25) == pytest.approx((0.75, 0.25))


def test_pooled_lines_by_hand() -> None:
    """Exact lines l = 4 - 0.2 ln n and 5 - 0.6 ln n: trust 0 gives both the mean slope 0.4 through their centres, a
    large trust their own slopes."""
    at = [math.exp(x) for x in (1.0, 2.0, 3.0)]
    rows = [[v for n in at for v in (n, c - s * math.log(n), 1.0)] for c, s in ((4.0, 0.2), (5.0, 0.6))]
    own = pooled_lines(rows, 100.0)
    assert own is not None
    assert own[0] == pytest.approx((4.0, 0.2, 0.4), abs=1e-6)
    assert own[1] == pytest.approx((5.0, 0.6, 0.4), abs=1e-6)
    pooled = pooled_lines(rows, 0.0)
    # Through the centres (2, 3.6) and (2, 3.8): c = 3.6 + 0.4 * 2 = 4.4, and 3.8 + 0.8 = 4.6.
    assert pooled is not None
    assert pooled[0] == pytest.approx((4.4, 0.4, 0.4)) and pooled[1] == pytest.approx((4.6, 0.4, 0.4))
    assert pooled_lines([rows[0][:6], rows[1]], 1.0) is None  # two points say nothing of their error
    rising = [[v for n in at for v in (n, 3.0 + math.log(n), 1.0)]]
    assert pooled_lines(rising, 1.0) is None


def test_worst_moves_slowly_between_learn_and_settle_and_lowers_the_worst() -> None:
    """Domains l = c - s ln(1 + n / 1000), read in 1000 steps of 100 tokens; b starts highest, c learns fastest."""
    laws = {"a": (4.0, 0.3), "b": (4.4, 0.3), "c": (5.0, 0.6)}

    def loss(name: str, tokens: float) -> float:
        c, s = laws[name]
        return c - s * math.log(1 + tokens / 1000)

    controller = MarginalGain(metric="worst", shock=0.1, learn=0.15, settle=0.6, trust=0.5)
    read = dict.fromkeys(NAMES, 0.0)
    state = controller.start({n: loss(n, 0) for n in NAMES}, PRIOR)
    moved = []
    for step in range(50, 1001, 50):
        for name in NAMES:
            read[name] += 50 * 100 * state.weights[name]
        counted = {n: round(t) for n, t in read.items()}
        losses = DomainLoss(NAMES, tuple(1000 * loss(n, read[n]) for n in NAMES), (1000,) * 3)
        before, why = state, controller.explain(state, losses, Progress(step, 0, 1000, counted))
        state, weights = controller.observe(state, losses, Progress(step, 0, 1000, counted))
        assert math.fsum(weights.values()) == pytest.approx(1) and min(weights.values()) >= 0.0999
        assert set(why.worked) == set(NAMES)
        if state.id != before.id:
            moved.append(step)
            ratios = [math.log(now / then) for now, then in zip(state.shares, before.shares, strict=True)]
            assert max(ratios) - min(ratios) <= 2 * controller.pace + 1e-9
    # Points from step 100 on, three of them at 200; from 600 on nothing moves.
    assert moved == list(range(200, 600, 50))
    ends = {n: loss(n, read[n]) for n in NAMES}
    even = {n: loss(n, 100_000 / 3) for n in NAMES}
    assert max(ends.values()) < max(even.values()) - 0.1
    assert ends["b"] == pytest.approx(ends["a"], abs=0.2)  # even shares leave them 0.4 apart


def test_state_survives_json() -> None:
    controller = MarginalGain(metric="worst")
    state = controller.start(FLAT, PRIOR)
    for step in (30, 60, 90, 120, 150):
        progress = Progress(step, 0, 300, dict.fromkeys(NAMES, 100 * step))
        state, _ = controller.observe(state, {"a": 3.0, "b": 3.1 - step / 999, "c": 3.2}, progress)
    again = controller.state_from_json(json.loads(json.dumps(state.to_json())))
    assert again == state
    progress = Progress(160, 0, 300, dict.fromkeys(NAMES, 16000))
    assert controller.observe(again, FLAT, progress)[1] == controller.observe(state, FLAT, progress)[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "best"}, "metric is 'best'; expected 'mean', 'worst' or a weight for each domain"),
        ({"metric": {"a": -1.0}}, "weight of 'a' is -1.0"),
        ({"learn": 1.5}, "learn is 1.5"),
        ({"pace": 0.0}, "pace is 0.0; expected a number above 0"),
    ],
)
def test_wrong_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        controllers.build("marginal_gain", **options)


def test_wrong_calls() -> None:
    with pytest.raises(ConfigError, match="no weight for domain 'c'"):
        MarginalGain(metric={"a": 1.0, "b": 1.0}).start(FLAT, PRIOR)
    controller = MarginalGain(metric="worst")
    state = controller.start(FLAT, PRIOR)
    with pytest.raises(ConfigError, match="plans up to the end of a run"):
        controller.observe(state, FLAT)
    with pytest.raises(ConfigError, match="plans up to the end of a run"):
        controller.observe(state, FLAT, Progress(10))
