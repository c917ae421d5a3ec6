"""Learning-rate paths as tables of (step, rate), closed form against stepping, JSON and refusals."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from velopath.errors import ConfigError
from velopath.schedule import MULTISTEP, SHAPES, LrPath, RateSegment

MAIN = LrPath.main(peak=3e-4, warmup_steps=100)


@pytest.mark.parametrize(
    ("step", "rate"),
    [
        (0, 3e-6),  # 1 / 100 of the peak
        (1, 6e-6),
        (49, 1.5e-4),  # 50 / 100
        (98, 2.97e-4),
        (99, 3e-4),  # 100 / 100
        (100, 3e-4),
        (10**9, 3e-4),
    ],
)
def test_main_warms_up_and_stays(step: int, rate: float) -> None:
    assert MAIN.rate(step) == pytest.approx(rate, rel=1e-12)


def test_main_without_warm_up() -> None:
    assert LrPath.main(1.0).rates(range(3)).tolist() == [1.0, 1.0, 1.0]


# A branch at 1000 over 600 steps, peak 3e-4, floor 3e-5, so the drop is 2.7e-4; x = (s - 1000) / 600.
TABLE = {
    "cosine": [
        (1000, 3e-4),
        (1150, 3e-5 + 1.35e-4 * (1 + math.sqrt(0.5))),  # x = 1/4
        (1300, 1.65e-4),  # half way: (3e-4 + 3e-5) / 2
        (1500, 3e-5 + 1.35e-4 * (1 - math.sqrt(0.75))),  # x = 5/6: cos(150 degrees)
    ],
    "linear": [(1000, 3e-4), (1150, 2.325e-4), (1300, 1.65e-4), (1599, 3e-5 + 2.7e-4 / 600)],
    "sqrt": [(1000, 3e-4), (1150, 1.65e-4), (1384, 8.4e-5)],  # x = 1/4: 1 - 1/2; x = 0.64: 1 - 0.8
    "knee": [(1000, 3e-4), (1299, 3e-4), (1300, 3e-4), (1450, 1.65e-4), (1540, 8.4e-5)],  # x = .75, .9
    "multistep": [
        (1000, 3e-4),
        (1479, 3e-4),
        (1480, 9.48e-5),  # 0.316 * 3e-4
        (1539, 9.48e-5),
        (1540, 3e-5),  # 0.316^2 * 3e-4 = 2.9957e-5, below the floor
    ],
    "exponential": [
        (1000, 3e-4),
        (1075, 1.5e-4),
        (1150, 7.5e-5),
        (1225, 3.75e-5),
        (1300, 3e-5),
    ],  # halves in 75
}


@pytest.mark.parametrize("shape", SHAPES)
def test_branch_tables(shape: str) -> None:
    branch = MAIN.branch(at_step=1000, steps=600, shape=shape, floor=3e-5)
    for step, rate in TABLE[shape]:
        assert branch.rate(step) == pytest.approx(rate, rel=1e-9), step
    for step in (0, 50, 99, 500, 999):
        assert branch.rate(step) == MAIN.rate(step)
    for step in (1600, 1601, 10**7):
        assert branch.rate(step) == 3e-5
    assert (branch.is_branch, branch.decay_from, branch.end_step) == (True, 1000, 1600)
    assert (branch.peak, branch.floor, branch.shape, branch.warmup_steps) == (3e-4, 3e-5, shape, 100)


def test_shape_options() -> None:
    knee = MAIN.branch(1000, 600, shape="knee", hold=0.9)
    assert (knee.rate(1539), knee.rate(1570)) == (3e-4, pytest.approx(1.5e-4))
    steps = MAIN.branch(1000, 600, shape="multistep", factors=[(0.5, 0.1)])
    assert (steps.rate(1299), steps.rate(1300)) == (3e-4, pytest.approx(3e-5))
    halved = MAIN.branch(1000, 600, shape="exponential", half_life=600)
    assert halved.rate(1300) == pytest.approx(3e-4 / math.sqrt(2))
    assert math.prod(factor for _, factor in MULTISTEP) == pytest.approx(0.1, abs=2e-4)


def stepped(shape: str, steps: int, peak: float, floor: float) -> list[float]:
    """The decay as one who steps through it computes it: each rate from the last one, no cosine, no power."""
    drop, rates = peak - floor, []
    c1, s1 = math.cos(math.pi / steps), math.sin(math.pi / steps)
    c, s, left = 1.0, 0.0, 0.0 if shape == "sqrt" else 1.0
    ratio = 0.5 ** (8 / steps)
    for done in range(steps):
        match shape:
            case "cosine":  # rotate by pi / steps
                rates.append(floor + drop / 2 * (1 + c))
                c, s = c * c1 - s * s1, s * c1 + c * s1
            case "linear":
                rates.append(floor + drop * left)
                left -= 1 / steps
            case "sqrt":  # sqrt(k + 1) from sqrt(k)
                rates.append(floor + drop * (1 - left))
                left = math.hypot(left, math.sqrt(1 / steps))
            case "knee":
                rates.append(floor + drop * min(1.0, 2 * left))
                left -= 1 / steps
            case "multistep":
                rates.append(max(floor, peak * left))
                left = 0.316 ** sum((done + 1) / steps >= f for f, _ in MULTISTEP)
            case "exponential":
                rates.append(max(floor, peak * left))
                left *= ratio
    return rates


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("steps", [1, 2, 7, 420])
def test_closed_form_equals_stepping(shape: str, steps: int) -> None:
    branch = LrPath.main(2e-3).branch(at_step=5, steps=steps, shape=shape, floor=1e-5)
    assert branch.rates(range(5, 5 + steps)) == pytest.approx(stepped(shape, steps, 2e-3, 1e-5), rel=1e-12)


@given(
    peak=st.floats(1e-6, 1),
    floor_share=st.floats(0, 1),
    warmup=st.integers(0, 50),
    at=st.integers(50, 500),
    steps=st.integers(1, 300),
    shape=st.sampled_from(SHAPES),
)
@settings(max_examples=100, deadline=None)
def test_every_branch_falls_from_the_peak_to_the_floor(
    peak: float, floor_share: float, warmup: int, at: int, steps: int, shape: str
) -> None:
    floor = peak * floor_share
    main = LrPath.main(peak, warmup)
    branch = main.branch(at, steps, shape=shape, floor=floor)
    rates = branch.rates(range(at, at + steps + 2))
    assert rates[0] == pytest.approx(peak, rel=1e-12)
    assert (np.diff(rates) <= 1e-15).all()
    assert rates[-1] == rates[-2] == floor
    assert branch.rates(range(at)).tolist() == main.rates(range(at)).tolist()
    assert LrPath.from_json(json.loads(json.dumps(branch.to_json()))) == branch


def test_from_scratch() -> None:
    path = LrPath.ptfs(peak=1.0, warmup_steps=10, steps=110, floor=0.2)
    # warm-up 0.1 ... 1.0, then a cosine over 100 steps: half way, at 60, (1 + 0.2) / 2
    assert path.rates([0, 9, 10, 60]).tolist() == pytest.approx([0.1, 1.0, 1.0, 0.6])
    assert (path.rate(110), path.is_branch, path.decay_from, path.end_step) == (0.2, False, 10, 110)
    linear = LrPath.ptfs(1.0, 10, 110, shape="linear")
    assert linear.rate(35) == pytest.approx(0.75)


def test_continued_with_rewarming() -> None:
    path = LrPath.cpt(1.0, [100, 50], warmup_steps=20, rewarm_steps=10, shape="linear", floor=0.1)
    # slice 1: warm-up to step 19, decay of 0.9 over 80; slice 2 rises from 0.1 by 0.09 a step, decays over 40
    assert path.rate(60) == pytest.approx(0.1 + 0.9 / 2)
    assert path.rates([99, 100, 104, 109, 110, 130]).tolist() == pytest.approx(
        [0.1 + 0.9 / 80, 0.19, 0.55, 1.0, 1.0, 0.55]
    )
    assert (path.rate(150), path.end_step, path.decay_from) == (0.1, 150, 110)


def test_continued_at_the_end_rate_and_as_one_decay() -> None:
    end = LrPath.cpt(1.0, [100, 50], mode="end_rate", floor=0.1, shape="linear")
    assert end.rates([50, 100, 149, 150, 999]).tolist() == pytest.approx([0.55, 0.1, 0.1, 0.1, 0.1])
    assert end.end_step == 150
    one = LrPath.cpt(1.0, [100, 50, 50], mode="one_decay", shape="linear")
    assert one.rates([0, 100, 150, 200]).tolist() == pytest.approx([1.0, 0.5, 0.25, 0.0])


def test_branch_of_a_branch() -> None:
    """A branch of a decaying path starts at the rate it has there."""
    again = LrPath.main(1.0).branch(0, 100, shape="linear").branch(50, 10, shape="linear")
    assert again.rates([49, 50, 55, 60]).tolist() == pytest.approx([0.51, 0.5, 0.25, 0.0])


def test_numpy_steps_and_words() -> None:
    assert MAIN.rate(np.int64(49)) == MAIN.rate(49)
    words = MAIN.branch(1000, 600, floor=3e-5).describe()
    assert words.endswith("constant 0.0003; cosine decay from 0.0003 at step 1000 to 3e-05 at step 1600")
    assert (MAIN.end_step, MAIN.decay_from, MAIN.floor, MAIN.shape) == (None, None, 0.0, "constant")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LrPath.main(0.0), "peak is 0.0; expected a positive learning rate"),
        (lambda: LrPath.main(math.nan), "peak is nan"),
        (lambda: LrPath.main(1.0, -1), "warmup_steps is -1; expected a whole number of steps, 0 or more"),
        (lambda: LrPath.main(1.0, 1.5), "warmup_steps is 1.5"),  # type: ignore[arg-type]
        (lambda: MAIN.rate(-1), "step is -1; updates are counted from 0"),
        (lambda: MAIN.branch(1000, 0), "steps is 0; expected a whole number of steps, 1 or more"),
        (lambda: MAIN.branch(1000, 5, floor=1.0), "floor 1.0 is above the peak 0.0003"),
        (lambda: MAIN.branch(1000, 5, floor=-1e-5), "floor is -1e-05; expected a learning rate of 0 or more"),
        (lambda: MAIN.branch(50, 5), "branch at step 50 lies inside the warm-up of 100 steps"),
        (lambda: MAIN.branch(1000, 5).branch(1005, 5), "branch at step 1005, but the path ends at step 1005"),
        (lambda: MAIN.branch(1000, 5, shape="cos"), "shape is 'cos'; expected one of constant, cosine"),
        (lambda: MAIN.branch(1000, 5, shape="constant"), "shape is 'constant', which does not decay"),
        (lambda: MAIN.branch(1000, 5, hold=0.1), "shape 'cosine' has no option 'hold'; its options are none"),
        (lambda: MAIN.branch(1000, 5, shape="knee", hold=1.0), "hold is 1.0; expected a share"),
        (lambda: MAIN.branch(1000, 5, shape="multistep", factors=[(2, 0.1)]), "factor 0.1 at fraction 2.0"),
        (
            lambda: MAIN.branch(1000, 5, shape="exponential", half_life=0),
            "half_life is 0; expected a positive",
        ),
        (lambda: LrPath.ptfs(1.0, 10, 10), "a warm-up of 10 steps leaves nothing of 10 steps"),
        (lambda: LrPath.cpt(1.0, []), "no slices"),
        (lambda: LrPath.cpt(1.0, [5, 5], mode="end_rate"), "floor is 0.0; staying at the end rate needs"),
        (lambda: LrPath.cpt(1.0, [5, 5], mode="wsd"), "mode is 'wsd'"),  # type: ignore[arg-type]
        (lambda: LrPath("main", ()), "expected rising steps from 0"),
        (lambda: LrPath("odd", MAIN.segments), "kind of path is 'odd'"),  # type: ignore[arg-type]
        (lambda: RateSegment(0, None, 1.0, shape="cosine"), "a cosine decay needs a number of steps"),
    ],
)
def test_refusals(call: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call()


def test_malformed_json() -> None:
    value = MAIN.to_json()
    with pytest.raises(ConfigError, match="path has version None"):
        LrPath.from_json({})
    with pytest.raises(ConfigError, match="malformed learning-rate path: 'segments'"):
        LrPath.from_json({"version": 1, "kind": "main"})
    value["segments"][0]["speed"] = 1
    with pytest.raises(ConfigError, match="malformed learning-rate path.*speed"):
        LrPath.from_json(value)
