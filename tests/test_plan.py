"""Costs and plans against sums worked out by hand; the plan is what the cost says."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from velopath.errors import ConfigError
from velopath.plan import Plan, Segment, branch_steps, compare_costs, cost_table, make_plan, token_steps
from velopath.plan_lengths import Length, plan_lengths


def test_the_published_share() -> None:
    # PTFS 1000 (1 + 2 + 3 + 4); CPT 4 * 1000; switching 4 * 1000 + 3 * 600
    assert compare_costs([1000] * 4, 0.6) == {"ptfs": 10000, "cpt": 4000, "switching": 5800}
    last = cost_table([1000] * 4, 0.6).rows[-1]
    assert (last.of_ptfs, last.of_cpt) == (0.58, 1.45)


@pytest.mark.parametrize(
    ("count", "ptfs", "switching", "share"),
    [
        (1, 1, 1.0, 1.0),
        (2, 3, 2.6, 0.867),
        (3, 6, 4.2, 0.700),
        (4, 10, 5.8, 0.580),
        (5, 15, 7.4, 0.493),
        (6, 21, 9.0, 0.429),
        (8, 36, 12.2, 0.339),
        (10, 55, 15.4, 0.280),
    ],
)
def test_cost_by_number_of_versions(count: int, ptfs: int, switching: float, share: float) -> None:
    """In units of T, alpha 0.6."""
    costs = compare_costs([1000] * count, 0.6)
    assert costs == {"ptfs": 1000 * ptfs, "cpt": 1000 * count, "switching": round(1000 * switching)}
    assert costs["switching"] / costs["ptfs"] == pytest.approx(share, abs=5e-4)


def test_unequal_slices() -> None:
    table = cost_table({"spring": 100, "summer": 301, "autumn": 50}, 0.5)
    # S = 100, 401, 451; r = 50, 150.5 -> 151, 25
    # PTFS 100 + 401 + 451 = 952; CPT 451; switching 451 + 50 + 151 = 652
    assert table.totals == {"ptfs": 952, "cpt": 451, "switching": 652}
    assert [row.branch for row in table] == [50, 151, 25]
    assert [(row.ptfs, row.cpt, row.switching) for row in table] == [
        (100, 100, 100),
        (401, 301, 351),
        (451, 50, 201),
    ]
    assert [row.switching_total for row in table] == [100, 451, 652]
    assert [row.slice for row in table] == ["spring", "summer", "autumn"]
    value = json.loads(json.dumps(table.to_json()))
    assert value["rows"][2]["of_ptfs"] == 652 / 952
    assert value["totals"]["switching"] == 652
    assert len(table) == 3


OWN = {"spring": 0.6, "summer": 0.2, "autumn": 0.5}


@pytest.mark.parametrize("shares", [OWN, list(OWN.values()), tuple(OWN.values())])
def test_a_branch_share_per_version(shares: Any) -> None:
    slices = {"spring": 100, "summer": 301, "autumn": 50}
    table = cost_table(slices, shares)
    # r = 60, 60.2 -> 60, 25; switching S_N + r_1 + r_2 = 451 + 60 + 60; PTFS and CPT as for any shares
    assert table.totals == {"ptfs": 952, "cpt": 451, "switching": 571}
    assert [(row.branch_share, row.branch, row.switching) for row in table] == [
        (0.6, 60, 100),
        (0.2, 60, 361),
        (0.5, 25, 110),
    ]
    assert table.branch_share is None and table.share_words == "branch shares 0.2 to 0.6"
    assert cost_table(slices, 0.5).share_words == "branch share 0.5"
    assert compare_costs(slices, shares)["switching"] == 571
    assert (
        compare_costs(slices, {**OWN, "autumn": 0.02})["switching"] == 571
    )  # the last share changes no cost
    plan = make_plan(slices, shares, shapes=["cosine", "knee", None])
    assert plan.segments == (
        Segment("main", "main", "spring", 0, 40),
        Segment("v1", "branch", "spring", 40, 100, "main", "cosine"),
        Segment("main", "main", "spring", 40, 100),
        Segment("main", "main", "summer", 100, 341),
        Segment("v2", "branch", "summer", 341, 401, "main", "knee"),
        Segment("main", "main", "summer", 341, 401),
        Segment("main", "main", "autumn", 401, 426),
        Segment("v3", "branch", "autumn", 426, 451, "main"),
    )
    assert (plan.branch_shares, plan.steps, plan.planned_over_ptfs) == ((0.6, 0.2, 0.5), 571, 571 / 952)
    value = json.loads(json.dumps(plan.to_json()))
    assert value["version"] == 2 and Plan.from_json(value) == plan
    value["segments"][4]["start_step"] = 340
    with pytest.raises(ConfigError, match="do not follow from its slices and branch shares"):
        Plan.from_json(value)


def test_a_plan_of_version_1_is_read() -> None:
    """As runs before there were shares of their own have it in plan.json."""
    segments = [
        {"name": "main", "kind": "main", "slice": "first", "start_step": 0, "end_step": 280, "parent": None},
        {
            "name": "v1",
            "kind": "branch",
            "slice": "first",
            "start_step": 280,
            "end_step": 700,
            "parent": "main",
        },
    ]
    old = {"version": 1, "slices": [["first", 700]], "branch_share": 0.6, "segments": segments}
    assert Plan.from_json(old) == make_plan({"first": 700}, 0.6)


@pytest.mark.parametrize(
    ("steps", "share", "rounded"),
    [
        (1000, 0.6, 600),
        (100, 0.145, 15),  # 14.5 exactly, though 0.145 * 100 is 14.499999999999998 in floats
        (100, 0.29, 29),  # 28.999999999999996 in floats
        (5, 0.5, 3),  # 2.5, half up
        (7, 0.1, 1),  # 0.7
        (3, 1, 3),
        (10**15 + 1, 0.3, 300000000000000),  # 3e14 + 0.3: beyond what a float product keeps
    ],
)
def test_branch_steps_round_half_up_on_decimals(steps: int, share: float, rounded: int) -> None:
    assert branch_steps(steps, share) == rounded


@pytest.mark.parametrize(
    ("tokens", "per_step", "steps"),
    [
        (2_000_000_000, 16384, 122070),  # 122070.3125
        (2_000_000_000, 131072, 15259),  # 15258.789
        (192, 128, 2),  # 1.5, half up
        (191, 128, 1),
        (1, 128, 1),  # at least 1
        (10**18, 3, 333333333333333333),  # beyond what a float keeps
    ],
)
def test_tokens_become_the_nearest_steps(tokens: int, per_step: int, steps: int) -> None:
    assert token_steps(tokens, per_step) == steps


def test_tokens_that_are_no_steps() -> None:
    with pytest.raises(ConfigError, match="tokens is 0; expected 1 or more"):
        token_steps(0, 128)
    with pytest.raises(ConfigError, match="tokens_per_step is 0; expected 1 or more"):
        token_steps(5, 0)


def test_lengths_side_by_side() -> None:
    plan = make_plan({"one": 40, "two": 20}, [0.6, 0.25])
    assert plan_lengths(plan, 128, {"one": 5200, "two": None}, (500, 4)) == [
        Length("warm-up", "", 500, 4, 512),
        Length("slice", "one", 5200, 40, 5120),
        Length("slice", "two", None, 20, 2560),
        Length("branch", "v1", None, 24, 3072),
        Length("branch", "v2", None, 5, 640),
    ]
    assert [length.kind for length in plan_lengths(plan, 128)] == ["slice", "slice", "branch", "branch"]


def test_the_demo_plan() -> None:
    plan = make_plan({"first": 700, "second": 700}, 0.6)
    assert plan.segments == (
        Segment("main", "main", "first", 0, 280),
        Segment("v1", "branch", "first", 280, 700, "main"),
        Segment("main", "main", "first", 280, 700),
        Segment("main", "main", "second", 700, 980),
        Segment("v2", "branch", "second", 980, 1400, "main"),
    )
    assert (plan.main_steps, plan.branch_steps, plan.steps) == (980, 840, 1820)
    assert plan.costs == {"ptfs": 2100, "cpt": 1400, "switching": 1820}
    assert plan.planned_over_ptfs == 1820 / 2100
    assert plan.versions == ("v1", "v2")
    assert [branch.start_step for branch in plan.branches] == [280, 980]


def test_a_branch_as_long_as_its_slice() -> None:
    plan = make_plan([10, 20], 1.0, versions=["spring", "autumn"])
    assert plan.segments == (
        Segment("spring", "branch", "slice-1", 0, 10, "main"),
        Segment("main", "main", "slice-1", 0, 10),
        Segment("autumn", "branch", "slice-2", 10, 30, "main"),
    )


@given(
    slices=st.lists(st.tuples(st.integers(20, 10_000), st.floats(0.05, 1)), min_size=1, max_size=8),
    one=st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_plan_and_cost_agree(slices: list[tuple[int, float]], one: bool) -> None:
    steps, shares = [n for n, _ in slices], [share for _, share in slices]
    share: Any = shares[0] if one else shares
    plan = make_plan(steps, share)
    costs = compare_costs(steps, share)
    assert plan.steps == costs["switching"] == sum(steps) + sum(b.steps for b in plan.branches[:-1])
    assert costs["ptfs"] == sum((len(steps) - i) * n for i, n in enumerate(steps))
    assert costs["cpt"] <= costs["switching"] <= costs["ptfs"]
    at = 0
    for segment in plan.segments:  # the main path has no gap, and every branch leaves it where it stands
        assert segment.start_step == at
        assert segment.steps >= 1
        at = segment.end_step if segment.kind == "main" else at
    assert [b.end_step for b in plan.branches] == [sum(steps[: i + 1]) for i in range(len(steps))]
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


@pytest.mark.parametrize(
    ("steps", "share", "message"),
    [
        ([], 0.6, "no slices: a plan needs the steps of at least one version"),
        ({}, 0.6, "no slices"),
        ([100, 0], 0.6, "slice 'slice-2' has 0 steps; expected a whole number, 1 or more"),
        ({"a": 1.5}, 0.6, "slice 'a' has 1.5 steps"),
        ({"a": True}, 0.6, "slice 'a' has True steps"),
        ([100], 1.2, "branch_share is 1.2: the branch would be longer than its slice of 100 steps"),
        ([100], 0, r"branch_share is 0; expected a share of the slice in \(0, 1\]"),
        ([100], float("nan"), "branch_share is nan"),
        ([100], "0.6", "branch_share is '0.6'; expected a number"),
        ([100, 2], 0.1, "slice 'slice-2': branch_share 0.1 of a slice of 2 steps is a branch of 0 steps"),
        (
            [100, 2],
            [0.1, 0.2],
            "slice 'slice-2': branch_share 0.2 of a slice of 2 steps is a branch of 0 steps",
        ),
        ([100, 50], [0.6], "1 branch shares for 2 slices; expected one for all, or one each"),
        ({"a": 9}, {"b": 0.5}, "branch shares are given for b; expected one for each of the slices a"),
        ({"a": 9}, {}, "branch shares are given for nothing"),
        ({"a": 9, "b": 9}, {"a": 0.5, "b": None}, "slice 'b': branch_share is None; expected a number"),
    ],
)
def test_refusals(steps: Any, share: Any, message: str) -> None:
    for call in (compare_costs, make_plan):
        with pytest.raises(ConfigError, match=message):
            call(steps, share)


@pytest.mark.parametrize("names", [["v1", "v1"], ["main", "v2"], ["", "v2"]])
def test_version_names_are_checked(names: list[str]) -> None:
    with pytest.raises(ConfigError, match="expected different names, none empty and none 'main'"):
        make_plan([5, 5], 0.6, versions=names)
    with pytest.raises(ConfigError, match="1 version names for 2 slices"):
        make_plan([5, 5], 0.6, versions=["a"])
    with pytest.raises(ConfigError, match="3 shapes for 2 slices"):
        make_plan([5, 5], 0.6, shapes=["knee"] * 3)
    with pytest.raises(ConfigError, match="shape is 'round'; expected one of cosine, linear"):
        make_plan([5, 5], 0.6, shapes=["knee", "round"])


def test_malformed_json() -> None:
    value = make_plan([700, 700], 0.6).to_json()
    with pytest.raises(ConfigError, match="plan has version 3; expected 1 or 2"):
        Plan.from_json({**value, "version": 3})
    with pytest.raises(ConfigError, match="malformed plan: 'slices'"):
        Plan.from_json({"version": 1})
    value["segments"][0]["end_step"] = 281
    with pytest.raises(ConfigError, match="its segments do not follow from its slices"):
        Plan.from_json(value)
