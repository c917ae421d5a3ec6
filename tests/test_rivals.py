"""The rules to compare with, against values worked out by hand from their formulas."""

from __future__ import annotations

import json
import math

import pytest

from velopath import controllers
from velopath.domains import DomainLoss, Progress
from velopath.errors import ConfigError
from velopath.rivals import Ado, DoReMi, DynamicBatchLoading, Odm

HALF = {"a": 0.5, "b": 0.5}
REFERENCE = {"a": 1.0, "b": 2.0}


@pytest.mark.parametrize(("form", "expected"), [("code", 0.668170953), ("paper", 0.622459331)])
def test_dynamic_batch_loading_by_hand(form: str, expected: float) -> None:
    """l = 1.5, 1.8 against 1.0, 2.0: d = 0.5, -0.2.

    code: a = e^0.5 / (e^0.5 + e^-0.2) = 1 / (1 + e^-0.7) = 1 / 1.496585304 = 0.668187772;
          0.9999 * 0.668187772 + 0.0001 / 2 = 0.668170953
    paper: d = 0.5, 0: a = 1 / (1 + e^-0.5) = 1 / 1.606530660 = 0.622459331
    """
    controller = DynamicBatchLoading(REFERENCE, form=form)
    state, weights = controller.observe(controller.start(REFERENCE, HALF), {"a": 1.5, "b": 1.8})
    assert weights["a"] == pytest.approx(expected, abs=1e-9)
    why = controller.explain(controller.start(REFERENCE, HALF), {"a": 1.5, "b": 1.8})
    assert why.guards["b"] == (("smoothing",) if form == "code" else ("clip",))
    assert f"= {weights['a']:.4f}" in why.worked["a"]
    # Both forms scale the weights before: d = 0.1, 0.1 leaves the odds, and the code smooths once more.
    _, again = controller.observe(state, {"a": 1.1, "b": 2.1})
    assert again["a"] == pytest.approx(0.9999 * expected + 0.00005 if form == "code" else expected, abs=1e-9)


def test_doremi_by_hand() -> None:
    """d = 0.5, -0.2, clipped 0.5, 0: a = 0.622459331 as above; 0.99 * 0.622459331 + 0.01 / 2 = 0.621234738.

    Then d = 0, 0: 0.99 * 0.621234738 + 0.005 = 0.620022391. The mean of the two is 0.6206285645.
    """
    controller = DoReMi(REFERENCE, smoothing=0.01)
    state, weights = controller.observe(controller.start(REFERENCE, HALF), {"a": 1.5, "b": 1.8})
    assert weights["a"] == pytest.approx(0.621234738, abs=1e-9)
    state, weights = controller.observe(state, {"a": 0.9, "b": 1.8})
    assert weights["a"] == pytest.approx(0.620022391, abs=1e-9)
    assert state.memory["average"][0] == pytest.approx(0.6206285645, abs=1e-9)


def test_a_share_too_small_for_a_float_comes_back() -> None:
    controller = DynamicBatchLoading(REFERENCE, form="paper", step_size=1000.0)
    state = controller.start(REFERENCE, HALF)
    state, weights = controller.observe(state, {"a": 1.0, "b": 4.0})
    assert weights["a"] == 0.0
    assert controller.state_from_json(json.loads(json.dumps(state.to_json()))) == state
    _, weights = controller.observe(state, {"a": 3.0, "b": 2.0})
    assert weights["a"] == pytest.approx(0.5)


@pytest.mark.parametrize(("reward", "expected"), [("drawn", 0.516525), ("mean", 0.508344)])
def test_odm_by_hand(reward: str, expected: float) -> None:
    """K = 2, w = 0.5 each; losses 4 and 2, twice.

    eps_0 = 1/2, eps_1 = min(1/2, sqrt(ln 2 / 2)) = min(0.5, 0.588705) = 0.5: 1 - K eps_1 = 0, so w stays 0.5, 0.5.
    drawn: R = 0.4 / 0.5, 0.2 / 0.5 = 0.8, 0.4 and again: 1.6, 0.8. mean: 0.4, 0.2, then 0.8, 0.4.
    eps_2 = sqrt(ln 2 / 4) = 0.416277: 1 - 2 eps_2 = 0.167445. With eps_1 = 0.5:
    drawn: a = 1 / (1 + e^(-0.5 * 0.8)) = 1 / 1.670320 = 0.598688; w = 0.167445 * 0.598688 + 0.416277 = 0.516525
    mean:  a = 1 / (1 + e^(-0.5 * 0.4)) = 1 / 1.818731 = 0.549834; w = 0.167445 * 0.549834 + 0.416277 = 0.508344
    """
    controller = Odm(reward=reward)
    losses = {"a": 4.0, "b": 2.0}
    state, weights = controller.observe(controller.start(losses, HALF), losses)
    assert dict(weights) == pytest.approx(HALF)
    why = controller.explain(state, losses)
    state, weights = controller.observe(state, losses)
    assert weights["a"] == pytest.approx(expected, abs=2e-6)
    assert state.memory["reward"] == pytest.approx((1.6, 0.8) if reward == "drawn" else (0.8, 0.4))
    assert f"+ 0.4163 = {expected:.4f}" in why.worked["a"]


def test_odm_pays_only_domains_that_were_read() -> None:
    controller = Odm()
    state = controller.start({"a": 3.0, "b": 3.0}, HALF)
    state, _ = controller.observe(state, DomainLoss(("a", "b"), (300.0, 0.0), (100, 0)))
    assert state.memory["reward"] == pytest.approx((0.6, 0.0))
    with pytest.raises(ConfigError, match="domain 'b' has a first weight of 0"):
        controller.start({"a": 3.0, "b": 3.0}, {"a": 1, "b": 0})


def law(eps: float, amount: float, alpha: float, n: float) -> float:
    return eps + amount / n**alpha


@pytest.mark.parametrize("credit", ["paper", "code"])
def test_ado_by_hand(credit: str) -> None:
    """Exact laws 2 + 8 / n^0.5 and 1 + 4 / n^0.25 at n = 100, 200, ... 500 tokens in all, equal shares read.

    At n = 400 (the 4th update, the first with laws): slopes 0.5 * 8 / 20 / 400 = 5e-4 and
    0.25 * 4 / 4.472136 / 400 = 5.590170e-4. Prior and credit are equal (h = 0.5, so h^0.5 and (h (1-h))^0.5 are
    too), so score = 5 / 10.590170 = 0.472136. w = 0.9 * 0.5 + 0.1 * 0.472136 = 0.4972136.
    The average becomes 0.5 + (0.472136 - 0.5) / 5 = 0.494427, with t + 1 = 5.
    """
    controller = Ado(credit=credit)
    state = controller.start({"a": 3.0, "b": 3.0}, HALF)
    weights = state.weights
    for step in range(1, 5):
        n = 100 * step
        assert dict(weights) == HALF
        losses = {"a": law(2, 8, 0.5, n), "b": law(1, 4, 0.25, n)}
        progress = Progress(step, tokens={"a": n // 2, "b": n // 2})
        before = state
        state, weights = controllers.observe(controller, state, losses, progress)
    assert state.memory["eps"] == pytest.approx((2, 1), abs=1e-3)
    assert weights["a"] == pytest.approx(0.4972136, abs=1e-5)
    assert state.memory["average"][0] == pytest.approx(0.494427, abs=1e-4)
    why = controllers.explain(controller, before, losses, progress)
    assert why is not None
    assert why.worked["a"].endswith("w = 0.9 * 0.5000 + 0.1 * 0.4721 = 0.4972")
    assert controller.state_from_json(json.loads(json.dumps(state.to_json()))) == state


def test_ado_weighs_by_prior_credit_and_floor() -> None:
    """Prior 0.9, 0.1; all tokens read are of a, so h goes from 0.9 to 0.9^4 * 0.9 + (1 - 0.9^4) = 0.934390.

    Equal slopes: score ~ 0.9 * sqrt(0.934390), 0.1 * sqrt(0.065610) = 0.869975, 0.025614: 0.028600 for b.
    (code: h (1 - h) is the same for both: 0.9, 0.1.) The floor 0.05 raises b to 0.05 / (0.9714 + 0.05) = 0.048953.
    """
    for credit, floor, score in (("paper", 0.01, 0.028600), ("code", 0.01, 0.1), ("paper", 0.05, 0.048953)):
        controller = Ado(credit=credit, floor=floor)
        state = controller.start({"a": 3.0, "b": 3.0}, {"a": 0.9, "b": 0.1})
        for step in range(1, 5):
            losses = dict.fromkeys("ab", law(2, 8, 0.5, 100 * step))
            state, weights = controller.observe(
                state, losses, Progress(step, tokens={"a": 100 * step, "b": 0})
            )
        assert weights["b"] == pytest.approx(0.9 * 0.1 + 0.1 * score, abs=1e-5)


def test_ado_needs_progress_and_keeps_a_law_that_no_longer_fits() -> None:
    controller = Ado()
    state = controller.start({"a": 3.0, "b": 3.0}, HALF)
    with pytest.raises(ConfigError, match="ado needs the tokens read"):
        controller.observe(state, {"a": 3.0, "b": 3.0})
    for step in range(1, 7):
        losses = dict.fromkeys("ab", law(2, 8, 0.5, 100 * step))
        state, weights = controller.observe(
            state, losses, Progress(step, tokens={"a": 50 * step, "b": 50 * step})
        )
    assert math.fsum(weights.values()) == pytest.approx(1)
    assert len(state.memory["points of a"]) == 12
