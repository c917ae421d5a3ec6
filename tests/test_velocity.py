"""Velocitune against values worked out by hand, its invariances, its options and its refusals."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from velopath.domains import DomainLoss, MixtureWeights
from velopath.errors import ConfigError, NumericalError
from velopath.velocity import Velocitune, bounded_shares

HALF = {"code": 0.5, "prose": 0.5}


def test_hand_worked_update() -> None:
    controller = Velocitune({"code": 1.2, "prose": 2.9})
    state = controller.start(losses={"code": 2.0, "prose": 3.4}, weights=HALF)
    state, weights = controller.observe(state, {"code": 1.6, "prose": 3.3})
    # V code = (1.6 - 1.2) / (2.0 - 1.2) = 0.4 / 0.8 = 0.5;  V prose = (3.3 - 2.9) / (3.4 - 2.9) = 0.4 / 0.5 = 0.8
    # w code = 0.5 e^0.5 / (0.5 e^0.5 + 0.5 e^0.8) = 1 / (1 + e^0.3) = 1 / 2.349858808 = 0.425557483
    assert state.velocity == pytest.approx((0.5, 0.8), abs=1e-15)
    assert weights["code"] == pytest.approx(0.425557483, abs=1e-9)
    assert weights["prose"] == pytest.approx(0.574442517, abs=1e-9)
    # A second update scales these weights, not the first ones. V code = 0.25, V prose = 0.6, so the odds
    # prose : code become e^(0.3 + 0.35) = e^0.65 = 1.915540829; w code = 1 / 2.915540829 = 0.342989537
    state, weights = controller.observe(state, {"code": 1.4, "prose": 3.2})
    assert weights["code"] == pytest.approx(0.342989537, abs=1e-9)
    assert (weights.id, state.updates) == (2, 2)


def test_three_domains_from_unequal_weights_with_step_size() -> None:
    controller = Velocitune({"a": 1.0, "b": 1.0, "c": 2.0}, step_size=2.0)
    state = controller.start({"a": 2.0, "b": 3.0, "c": 4.0}, {"a": 0.2, "b": 0.3, "c": 0.5})
    state, weights = controller.observe(state, {"a": 1.5, "b": 1.5, "c": 3.5})
    # V = (0.5 / 1, 0.5 / 2, 1.5 / 2) = (0.5, 0.25, 0.75); factors e^(2V) = e^1, e^0.5, e^1.5
    # 0.2 * 2.718281828 = 0.543656366; 0.3 * 1.648721271 = 0.494616381; 0.5 * 4.481689070 = 2.240844535
    # sum = 3.279117282
    assert state.velocity == pytest.approx((0.5, 0.25, 0.75))
    assert weights["a"] == pytest.approx(0.543656366 / 3.279117282, abs=1e-9)
    assert weights["b"] == pytest.approx(0.494616381 / 3.279117282, abs=1e-9)
    assert weights["c"] == pytest.approx(2.240844535 / 3.279117282, abs=1e-9)


def test_velocity_is_clamped_and_named() -> None:
    controller = Velocitune({"a": 1.0, "b": 1.0, "c": 1.0})
    state = controller.start({"a": 2.0, "b": 2.0, "c": 2.0}, {"a": 1, "b": 1, "c": 1})
    state, _ = controller.observe(state, {"a": 2.5, "b": 0.9, "c": 1.5})  # raw V 1.5, -0.1, 0.5
    assert state.velocity == (1.0, 0.0, 0.5)
    assert state.clipped == ("a", "b")


def test_first_losses_leave_the_weights_bit_for_bit() -> None:
    losses = {"c": 2.0, "a": 3.1, "b": 4.7}
    controller = Velocitune({"a": 1.0, "b": 1.3, "c": 1.9})
    state = controller.start(losses, {"a": 0.1, "b": 0.2, "c": 0.7})
    assert state.names == ("a", "b", "c")
    after, weights = controller.observe(state, losses)
    assert after.velocity == (1.0, 1.0, 1.0)
    assert weights.shares == state.shares
    assert (state.weights.id, weights.id) == (0, 1)


def test_weights_carry_the_id_on() -> None:
    controller = Velocitune({"a": 1.0, "b": 1.0})
    state = controller.start({"a": 2.0, "b": 2.0}, MixtureWeights(("a", "b"), (0.5, 0.5), id=7))
    assert controller.observe(state, {"a": 1.5, "b": 2.0})[1].id == 8


def test_smoothing_by_hand() -> None:
    controller = Velocitune({"code": 1.2, "prose": 2.9}, smoothing=0.1)
    state = controller.start({"code": 2.0, "prose": 3.4}, HALF)
    _, weights = controller.observe(state, {"code": 1.6, "prose": 3.3})
    # unsmoothed 0.425557483 as above; 0.9 * 0.425557483 + 0.1 / 2 = 0.433001735
    assert weights["code"] == pytest.approx(0.433001735, abs=1e-9)


def test_smoothing_to_the_prior_by_hand() -> None:
    """From 0.2, 0.8, with V 0.5, 0.8:

    code = 0.2 e^0.5 / (0.2 e^0.5 + 0.8 e^0.8) = 1 / (1 + 4 e^0.3) = 1 / 6.399435230 = 0.156263790;
    0.9 * 0.156263790 + 0.1 * 0.2 = 0.160637411.
    """
    controller = Velocitune({"code": 1.2, "prose": 2.9}, smoothing=0.1, smoothing_to="prior")
    state = controller.start({"code": 2.0, "prose": 3.4}, {"code": 0.2, "prose": 0.8})
    state, weights = controller.observe(state, {"code": 1.6, "prose": 3.3})
    assert weights["code"] == pytest.approx(0.160637411, abs=1e-9)
    # With V equal the odds stay and the weights leak back: 0.9 * 0.160637411 + 0.1 * 0.2 = 0.164573670
    _, weights = controller.observe(state, {"code": 1.6, "prose": 3.15})
    assert weights["code"] == pytest.approx(0.164573670, abs=1e-9)
    saved = state.to_json()
    del saved["prior"]  # a state from before there was one
    with pytest.raises(ConfigError, match="has no first shares"):
        controller.state_from_json(saved)
    assert Velocitune(controller.targets).state_from_json(saved).prior is None


def test_explain_shows_each_stage_and_guard() -> None:
    """V = 1.5 -> 1 (clip), 0.5, and old takes their mean 0.75; w from thirds, eta 1.

    e^1 = 2.718281828, e^0.5 = 1.648721271, e^0.75 = 2.117000017; sum 6.484003116:
    0.419229, 0.254275, 0.326496; the cap 0.4 fires for a, the others take up 0.6 in their proportions.
    """
    targets = {"a": 1.0, "b": 1.0, "old": 1.9}
    controller = Velocitune(targets, small_gap="mean", cap=0.4, floor=0.1)
    state = controller.start(dict.fromkeys(targets, 2.0), dict.fromkeys(targets, 1.0))
    losses = {"a": 2.5, "b": 1.5, "old": 2.0}
    why = controller.explain(state, losses)
    assert [round(why.terms[n]["scaled"], 6) for n in targets] == [0.419229, 0.254275, 0.326496]
    assert why.terms["a"]["raw"] == 1.5
    assert why.guards == {"a": ("clip", "cap"), "b": (), "old": ("small gap",)}
    assert (
        "V = (2.5000 - 1.0000) / (2.0000 - 1.0000) = 1.5000 / 1.0000 = 1.5000, cut to 1.0000"
        in why.worked["a"]
    )
    after = controller.observe(state, losses)[0]
    assert why.worked["a"].endswith(f"0.4192, then cap: {after.shares[0]:.4f}")
    assert after.shares[0] == 0.4


@pytest.mark.parametrize(
    ("normalise", "expected"),
    [
        ("gap", (0.5, 0.8)),  # 0.4 / 0.8, 0.4 / 0.5
        ("target", (1 / 3, 4 / 29)),  # 0.4 / 1.2, 0.4 / 2.9
        ("none", (0.4, 0.4)),
    ],
)
def test_what_the_distance_is_divided_by(normalise: str, expected: tuple[float, float]) -> None:
    controller = Velocitune({"code": 1.2, "prose": 2.9}, normalise=normalise)  # type: ignore[arg-type]
    state = controller.start({"code": 2.0, "prose": 3.4}, HALF)
    state, weights = controller.observe(state, {"code": 1.6, "prose": 3.3})
    assert state.velocity == pytest.approx(expected, abs=1e-12)
    odds = math.exp(expected[1] - expected[0])
    assert weights["prose"] / weights["code"] == pytest.approx(odds, abs=1e-12)
    worked = controller.explain(state, {"code": 1.0, "prose": 3.3})
    assert f"= {worked.terms['prose']['raw']:.4f}" in worked.worked["prose"]
    assert worked.terms["code"]["velocity"] == 0.0 and "clip" in worked.guards["code"]


def test_distances_in_nats_need_no_gap() -> None:
    """Without the gap below the line there is nothing to refuse where a domain starts at its target."""
    controller = Velocitune({"code": 2.0, "prose": 2.9}, normalise="none")
    state = controller.start({"code": 2.0, "prose": 5.4}, HALF)
    state, weights = controller.observe(state, {"code": 2.0, "prose": 5.4})
    assert state.velocity == pytest.approx((0.0, 2.5)) and weights["prose"] > weights["code"]


def test_small_gap_takes_the_mean_of_the_others() -> None:
    controller = Velocitune({"a": 1.0, "b": 1.0, "old": 1.9}, small_gap="mean")
    third = {"a": 1.0, "b": 1.0, "old": 1.0}
    state = controller.start({"a": 2.0, "b": 2.0, "old": 2.0}, third)  # old: gap 0.1 < 0.25
    assert state.flagged == ("old",)
    state, weights = controller.observe(state, {"a": 1.4, "b": 1.8, "old": 2.6})
    # V a = 0.4, V b = 0.8, V old = (0.4 + 0.8) / 2 = 0.6
    assert state.velocity == pytest.approx((0.4, 0.8, 0.6))
    assert state.clipped == ()
    # centred on 0.6: e^-0.2 + e^0.2 + 1 = 0.818730753 + 1.221402758 + 1 = 3.040133511
    assert weights["old"] == pytest.approx(1 / 3.040133511, abs=1e-9)


def test_small_gap_counts_standard_errors() -> None:
    controller = Velocitune({"a": 1.0, "b": 1.0}, small_gap="mean")
    losses = DomainLoss(("a", "b"), (200.0, 150.0), (100, 100), stderr=(0.01, 0.3))
    # b: gap 0.5 nats is above 0.25 but below 2 * 0.3
    assert controller.start(losses, {"a": 1, "b": 1}).flagged == ("b",)


def test_all_gaps_small_leaves_the_weights() -> None:
    controller = Velocitune({"a": 1.9, "b": 2.5}, small_gap="mean")
    state = controller.start({"a": 2.0, "b": 2.0}, {"a": 0.3, "b": 0.7})
    state, weights = controller.observe(state, {"a": 1.0, "b": 3.0})
    assert state.velocity == (1.0, 1.0)
    assert dict(weights) == {"a": 0.3, "b": 0.7}


def test_a_tiny_share_comes_back() -> None:
    controller = Velocitune({"a": 1.0, "b": 1.0}, step_size=100.0)
    state = controller.start({"a": 2.0, "b": 2.0}, HALF_AB)
    for _ in range(20):  # log odds fall by 100 an update: e^-2000 is no float
        state, weights = controller.observe(state, {"a": 1.0, "b": 2.0})
    assert weights["a"] == 0.0
    assert state.log_shares[0] == pytest.approx(-2000)
    for _ in range(20):
        state, weights = controller.observe(state, {"a": 2.0, "b": 1.0})
    assert weights["a"] == pytest.approx(0.5)


HALF_AB = {"a": 0.5, "b": 0.5}


def test_bounded_shares_by_hand() -> None:
    # cap 0.5 cuts 0.7; the other two keep 2 : 1 and share 0.5: 1/3 and 1/6
    assert bounded_shares([0.7, 0.2, 0.1], 0.0, 0.5) == pytest.approx((0.5, 1 / 3, 1 / 6), abs=1e-15)
    # floor 0.2 lifts 0.1; the rest keep 0.7 : 0.2 of 0.8, so 0.2 would become 0.1778, below the floor: 0.2 too
    assert bounded_shares([0.7, 0.2, 0.1], 0.2, 1.0) == pytest.approx((0.6, 0.2, 0.2), abs=1e-15)
    # both: 0.9 -> 0.5; the two zero shares have no proportion but their own equality
    assert bounded_shares([1.0, 0.0, 0.0], 0.1, 0.5) == pytest.approx((0.5, 0.25, 0.25), abs=1e-15)
    assert bounded_shares([0.6, 0.4, 0.0], 0.0, 0.55) == pytest.approx((0.55, 0.45, 0.0), abs=1e-15)


@given(
    shares=st.lists(st.floats(0, 1), min_size=1, max_size=12).filter(lambda s: sum(s) > 0),
    low=st.floats(0, 1),
    high=st.floats(0, 1),
)
@settings(max_examples=200, deadline=None)
def test_bounds_hold_and_shares_sum_to_one(shares: list[float], low: float, high: float) -> None:
    count = len(shares)
    total = math.fsum(shares)
    floor, cap = low / count, 1 / count + high * (1 - 1 / count)
    result = bounded_shares([s / total for s in shares], floor, cap)
    assert math.fsum(result) == pytest.approx(1, abs=1e-14)
    assert all(floor <= r <= cap for r in result)
    assert bounded_shares(result, floor, cap) == result
    order = sorted(range(count), key=lambda k: shares[k])
    assert all(result[i] <= result[j] for i, j in zip(order, order[1:], strict=False))


NAMES = ("a", "b", "c", "d")
LOSS = st.tuples(*[st.floats(0.5, 8)] * len(NAMES))


@given(
    start=LOSS,
    later=st.lists(LOSS, min_size=1, max_size=6),
    gaps=st.tuples(*[st.floats(0.01, 4)] * len(NAMES)),
    floor=st.floats(0, 0.25),
    cap=st.floats(0.25, 1),
    smoothing=st.sampled_from([0.0, 1e-4, 0.3]),
)
@settings(max_examples=100, deadline=None)
def test_weights_always_sum_to_one_within_bounds(
    start: tuple[float, ...],
    later: list[tuple[float, ...]],
    gaps: tuple[float, ...],
    floor: float,
    cap: float,
    smoothing: float,
) -> None:
    targets = {n: s - g for n, s, g in zip(NAMES, start, gaps, strict=True)}
    controller = Velocitune(targets, floor=floor, cap=cap, smoothing=smoothing)
    state = controller.start(dict(zip(NAMES, start, strict=True)), dict.fromkeys(NAMES, 0.25))
    for losses in later:
        state, weights = controller.observe(state, dict(zip(NAMES, losses, strict=True)))
        assert math.fsum(weights.values()) == pytest.approx(1, abs=1e-12)
        assert all(floor <= w <= cap for w in weights.values())
        assert (
            MixtureWeights.of(weights).shares == weights.shares
        )  # what is pushed and logged is what was decided
        assert controller.state_from_json(json.loads(json.dumps(state.to_json()))) == state


@given(start=LOSS, later=LOSS, scale=st.floats(0.1, 10), shift=st.floats(-5, 5))
@settings(max_examples=100, deadline=None)
def test_velocity_ignores_scale_and_shift(
    start: tuple[float, ...], later: tuple[float, ...], scale: float, shift: float
) -> None:
    def run(a: float, b: float) -> tuple[float, ...]:
        controller = Velocitune({n: a * (s - 0.4) + b for n, s in zip(NAMES, start, strict=True)})
        state = controller.start(
            {n: a * s + b for n, s in zip(NAMES, start, strict=True)}, dict.fromkeys(NAMES, 1.0)
        )
        state, weights = controller.observe(state, {n: a * x + b for n, x in zip(NAMES, later, strict=True)})
        return weights.shares

    assert run(scale, shift) == pytest.approx(run(1, 0), abs=1e-9)


def test_json_keeps_a_zero_share() -> None:
    controller = Velocitune({"a": 1.0, "b": 1.0})
    state = controller.start({"a": 2.0, "b": 2.0}, {"a": 0.0, "b": 1.0})
    text = json.dumps(state.to_json(), allow_nan=False)
    assert controller.state_from_json(json.loads(text)) == state
    assert controller.observe(state, {"a": 2.0, "b": 1.0})[1]["a"] == 0.0


def test_record_names_everything() -> None:
    controller = Velocitune({"a": 1.0, "b": 1.0})
    state = controller.start({"a": 2.0, "b": 3.0}, HALF_AB)
    assert state.record() == {
        "weights": HALF_AB,
        "velocity": None,
        "initial": {"a": 2.0, "b": 3.0},
        "target": {"a": 1.0, "b": 1.0},
        "last": {"a": 2.0, "b": 3.0},
        "flagged": [],
        "clipped": [],
        "updates": 0,
    }


def test_domain_without_tokens() -> None:
    losses = DomainLoss(("a", "b"), (150.0, 0.0), (100, 0))
    start = {"a": 2.0, "b": 2.0}
    controller = Velocitune({"a": 1.0, "b": 1.0})
    with pytest.raises(ConfigError, match=r"no loss for domain 'b' \(no tokens of it were evaluated\)"):
        controller.observe(controller.start(start, HALF_AB), losses)
    lenient = Velocitune({"a": 1.0, "b": 1.0}, missing="last")
    state, _ = lenient.observe(lenient.start(start, HALF_AB), losses)
    assert state.last == (1.5, 2.0)
    assert state.velocity == (0.5, 1.0)


def test_nan_raises_and_the_old_state_stays_good() -> None:
    controller = Velocitune({"a": 1.0, "b": 1.0})
    state = controller.start({"a": 2.0, "b": 2.0}, HALF_AB)
    for bad in (math.nan, math.inf):
        with pytest.raises(NumericalError, match=f"loss of domain 'b' is {bad}"):
            controller.observe(state, {"a": 1.5, "b": bad})
    assert controller.observe(state, {"a": 1.5, "b": 2.0})[1].id == 1


@pytest.mark.parametrize(
    ("losses", "weights", "message"),
    [
        (
            {"a": 2.0, "b": 1.0},
            HALF_AB,
            r"domain 'b' starts at a loss of 1.0000 nats, not above its target 1.0000",
        ),
        ({"a": 2.0, "b": 0.5}, HALF_AB, r"set small_gap='mean'"),
        ({"a": 2.0}, HALF_AB, r"no loss for domain 'b'"),
        ({"a": 2.0, "b": 2.0, "x": 1.0}, HALF_AB, r"loss for unknown domain 'x'; the domains are a, b"),
        ({"a": 2.0, "b": 2.0}, {"a": 1.0}, r"no weight for domain 'b'"),
        ({"a": 2.0, "b": 2.0}, {"a": 1.0, "b": 1.0, "c": 1.0}, r"unknown domain 'c'"),
        ({"a": 2.0, "b": 2.0}, {"a": 1.0, "b": math.nan}, r"weight of 'b' is nan"),
    ],
)
def test_start_refuses(losses: dict[str, float], weights: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Velocitune({"a": 1.0, "b": 1.0}).start(losses, weights)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step_size": 0.0}, "step_size is 0.0; expected a number positive"),
        ({"step_size": math.nan}, "step_size is nan"),
        ({"smoothing": 1.5}, r"smoothing is 1.5; expected a number in \[0, 1\]"),
        ({"small_gap": "skip"}, "small_gap is 'skip'; expected one of 'raise', 'mean'"),
        ({"min_gap": -1.0}, "min_gap is -1.0; expected a number 0 nats or more"),
        ({"cap": 2}, "cap is 2"),
        ({"targets": {"a": math.inf}}, "target of domain 'a' is inf"),
    ],
)
def test_options_are_checked(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Velocitune(**{"targets": {"a": 1.0}, **options})  # type: ignore[arg-type]


def test_infeasible_bounds_are_refused() -> None:
    losses = {"a": 2.0, "b": 2.0}
    with pytest.raises(ConfigError, match="floor 0.6 and cap 1.0 cannot hold for 2 domains"):
        Velocitune({"a": 1.0, "b": 1.0}, floor=0.6).start(losses, HALF_AB)
    with pytest.raises(ConfigError, match="the cap at least 0.5"):
        Velocitune({"a": 1.0, "b": 1.0}, cap=0.4).start(losses, HALF_AB)


def test_foreign_state_is_refused() -> None:
    controller = Velocitune({"a": 1.0, "b": 1.0})
    state = controller.start({"a": 2.0, "b": 2.0}, HALF_AB).to_json()
    with pytest.raises(ConfigError, match="state of controller 'static' version 1; expected 'velocitune'"):
        controller.state_from_json({**state, "controller": "static"})
    del state["initial"]
    with pytest.raises(ConfigError, match="velocitune state lacks 'initial'"):
        controller.state_from_json(state)
    with pytest.raises(ConfigError, match="saved state has domains a, b but the targets name a"):
        Velocitune({"a": 1.0}).state_from_json(controller.start({"a": 2.0, "b": 2.0}, HALF_AB).to_json())
