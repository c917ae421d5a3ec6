"""The fit recovers exact laws, chooses between laws, refuses and warns; targets survive JSON."""

from __future__ import annotations

import json
import math
import time

import numpy as np
import pytest

from velopath.errors import ConfigError, NumericalError
from velopath.law import TargetLaw, check_points, fit_target
from velopath.law_sized import SizedLaw, fit_sized, law_from_json
from velopath.law_solve import (
    BETA_BOUNDS,
    PRIOR_BETA,
    PRIOR_MISFIT,
    PRIOR_SPREAD,
    _cost_and_gradient,
)
from velopath.targets import DomainTarget, Targets

LAST = 1e6


def exact(e: float, drop: float, beta: float, tokens: np.ndarray) -> np.ndarray:
    """E + B / D^beta with B such that the second term is `drop` nats at 1e6 tokens."""
    return e + drop * (LAST / tokens) ** beta


@pytest.mark.parametrize("e", [0.0, 0.7, 1.69, 3.2])
@pytest.mark.parametrize("beta", [0.1, 0.34, 0.5, 1.1])
@pytest.mark.parametrize(("count", "span", "drop"), [(6, 6, 0.3), (8, 10, 1.5), (12, 20, 3.0)])
def test_recovers_an_exact_law(e: float, beta: float, count: int, span: float, drop: float) -> None:
    tokens = np.geomspace(LAST / span, LAST, count)
    law = fit_target(tokens, exact(e, drop, beta, tokens))
    assert law.predict(4 * LAST) == pytest.approx(e + drop / 4**beta, abs=0.01)
    assert law.leave_last_out < 0.01
    assert law.huber == pytest.approx(0, abs=1e-6)
    low, high = law.interval(4 * LAST)
    assert low - 1e-9 <= law.predict(4 * LAST) <= high + 1e-9
    assert high - low < 0.02


def test_parameters_of_an_exact_law() -> None:
    tokens = np.geomspace(1e5, 1e6, 8)
    # Chinchilla's own data term: E 1.69, B 410.7, beta 0.28
    law = fit_target(tokens, 1.69 + 410.7 / tokens**0.28)
    assert (law.law, law.E) == ("three", pytest.approx(1.69, abs=0.01))
    assert law.beta == pytest.approx(0.28, abs=0.001)
    assert pytest.approx(410.7, rel=0.01) == law.B
    # 410.7 / (1e6)^0.28 = 410.7 / e^(0.28 * 13.815511) = 410.7 / e^3.868343 = 410.7 / 47.863 = 8.5807
    assert law.predict(1e6) == pytest.approx(1.69 + 8.5807, abs=1e-3)
    assert law.warnings == ()


def test_order_of_points_does_not_matter() -> None:
    tokens = np.geomspace(1e5, 1e6, 7)
    losses = exact(1.5, 0.4, 0.5, tokens) * np.array([1.002, 0.999, 1.001, 0.998, 1.003, 0.997, 1.0])
    shuffled = [3, 0, 6, 2, 5, 1, 4]
    assert fit_target(tokens[shuffled], losses[shuffled]) == fit_target(tokens, losses)


def test_one_outlier_hardly_moves_the_fit() -> None:
    tokens = np.geomspace(1e5, 1e6, 9)
    losses = exact(2.0, 0.5, 0.5, tokens)
    losses[3] *= 1.05
    law = fit_target(tokens, losses)
    assert law.predict(4e6) == pytest.approx(2.25, abs=0.01)
    assert "rises by" in fit_target(tokens, losses[::-1]).warnings[0]


def test_gradient_agrees_with_differences() -> None:
    x, y = np.linspace(-1, 1, 6), np.log(np.array([3.1, 2.9, 2.8, 2.75, 2.65, 2.6]))
    for theta in (np.array([0.5, -0.2, 0.4]), np.array([1.02, 0.13])):
        _, gradient = _cost_and_gradient(theta, x, y, 1e-3)
        for k in range(theta.size):
            step = np.zeros_like(theta)
            step[k] = 1e-7
            up, down = (_cost_and_gradient(theta + s, x, y, 1e-3)[0] for s in (step, -step))
            assert gradient[k] == pytest.approx((up - down) / 2e-7, rel=1e-4, abs=1e-2)


def test_the_law_can_be_asked_for() -> None:
    tokens = np.geomspace(1e5, 1e6, 6)
    power = 9.0 / tokens**0.1
    assert fit_target(tokens, power, law="two").E == 0
    assert fit_target(tokens, power, law="two").beta == pytest.approx(0.1, abs=1e-4)
    bent = exact(2.0, 0.3, 0.6, tokens)
    # A power law cannot bend to E = 2: it goes on falling, and its own last point shows it.
    assert fit_target(tokens, bent, law="two").predict(1e7) < fit_target(tokens, bent).predict(1e7) - 0.03
    assert fit_target(tokens, bent).law == "three"


def test_auto_falls_back_to_two_parameters() -> None:
    tokens = np.geomspace(1e5, 1e6, 6)
    # falls ever faster in ln D: no E > 0 explains that
    law = fit_target(tokens, 4.0 - 0.02 * np.arange(6) ** 1.5)
    assert law.law == "two"
    assert law.E == 0
    assert any("E is not identifiable" in w for w in law.warnings)


def test_interval_covers_about_its_level() -> None:
    rng = np.random.default_rng(5)
    tokens, inside = np.linspace(1e5, 8e5, 8), 0
    for _ in range(24):
        e, beta = rng.uniform(1, 3), rng.uniform(0.2, 0.8)
        truth = exact(e, 0.5, beta, tokens)
        law = fit_target(tokens, truth * np.exp(rng.normal(0, 0.004, 8)), law="three")
        low, high = law.interval(2.4e6)
        inside += bool(low <= exact(e, 0.5, beta, np.array([2.4e6]))[0] <= high)
    assert inside >= 17  # 0.9 nominal; 17 of 24 or fewer has a chance of 0.5 %


def test_interval_is_seeded_and_widens() -> None:
    tokens = np.geomspace(1e5, 1e6, 8)
    noise = np.array([1.004, 0.997, 1.002, 0.996, 1.003, 1.0, 0.998, 1.001])
    law = fit_target(tokens, exact(2.0, 0.5, 0.4, tokens) * noise)
    assert law.interval(4e6) == law.interval(4e6)
    assert law.interval(4e6) != law.interval(4e6, seed=1)
    near, far = (np.subtract(*law.interval(t)[::-1]) for t in (1e6, 8e6))
    assert 0 < near < far
    wide, narrow = law.interval(4e6, 0.95), law.interval(4e6, 0.5)
    assert wide[0] < narrow[0] < narrow[1] < wide[1]
    with pytest.raises(ConfigError, match="level is 90; expected a share in"):
        law.interval(4e6, level=90)


def test_a_fit_is_fast() -> None:
    rng = np.random.default_rng(0)
    tokens = np.linspace(1e5, 8e5, 8)
    losses = exact(2.0, 0.5, 0.5, tokens) * np.exp(rng.normal(0, 0.004, 8))
    fit_target(tokens, losses)
    best = math.inf
    for _ in range(3):
        start = time.process_time()
        fit_target(tokens, losses)
        best = min(best, time.process_time() - start)
    assert best < 0.6  # 0.15 s on the machine it was written on


@pytest.mark.parametrize(
    ("tokens", "losses", "error", "message"),
    [
        ([1, 2, 3], [3.0, 2.0, 1.5], ConfigError, "3 points; a law needs at least 4"),
        ([1, 2, 3, 4], [3.0, 2.0, 1.5], ConfigError, "4 token counts for 3 losses"),
        ([0, 2, 3, 4], [3.0, 2.0, 1.5, 1.4], ConfigError, "expected positive numbers"),
        ([1, 2, 2, 4], [3.0, 2.0, 1.5, 1.4], ConfigError, "repeat; average losses"),
        ([1, 2, 3, 4], [3.0, math.nan, 1.5, 1.4], NumericalError, "a proxy loss is nan"),
        ([1, 2, 3, 4], [3.0, 2.0, 1.5, 0.0], NumericalError, "a proxy loss is 0.0"),
    ],
)
def test_refusals(tokens: list[float], losses: list[float], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fit_target(tokens, losses)


def test_unknown_law() -> None:
    with pytest.raises(ConfigError, match="law is 'four'; expected 'auto', 'three', 'two' or 'prior'"):
        fit_target([1, 2, 3, 4], [4, 3, 2.5, 2.2], law="four")  # type: ignore[arg-type]


def test_prior_leads_where_the_points_reach_little() -> None:
    """Eight points up to 15 % of a run whose loss is still flat from the change of mixture; as in the mixing study."""
    steps = np.array([36, 42, 48, 54, 60, 68, 76, 90], dtype=float)
    flat = [4.744, 4.761, 4.735, 4.737, 4.748, 4.751, 4.776, 4.745]
    short, far = fit_target(steps, flat), fit_target(steps, flat, extrapolation=600 / 90)
    assert (short.law, far.law) == ("two", "prior")
    assert short.predict(600) > 4.6  # the flat beginning goes on for ever
    assert abs(far.predict(600) - 4.344) < 0.15  # what that run came to
    low, high = far.interval(600)
    assert low < 4.344 < high and 0.1 < high - low < 0.6
    assert any("leans on a prior" in text for text in far.warnings)
    # Without any spread in D beta is the belief; with some, beta = (slope Sxx + b k) / (Sxx + k), all worked by hand:
    # D = 1, e, e^2, e^3 weigh as D; L = D^-0.2 exactly, so the slope is 0.2 whatever the weights.
    two = fit_target([1.0, 1.0001, 1.0002, 1.0003], [4.0, 4.0, 4.0, 4.0], law="prior")
    assert two.beta == pytest.approx(PRIOR_BETA, abs=1e-6) and two.predict(1.0) == pytest.approx(
        4.0, abs=1e-3
    )
    x = np.arange(4.0)
    w = np.exp(x) / np.exp(x).mean()
    sxx = float((w * (x - (w * x).sum() / 4) ** 2).sum())  # 2.4663
    k = (PRIOR_MISFIT / PRIOR_SPREAD) ** 2
    assert sxx == pytest.approx(2.4663, abs=1e-4)
    steep = fit_target(np.exp(x), np.exp(-0.2 * x), law="prior")
    assert steep.beta == pytest.approx((0.2 * sxx + PRIOR_BETA * k) / (sxx + k), abs=1e-9)
    assert TargetLaw.from_json(far.to_json()) == far


@pytest.mark.parametrize("e", [0.0, 1.5])
def test_an_exact_law_needs_no_prior(e: float) -> None:
    tokens = np.geomspace(1e5, 1e6, 7)
    law = fit_target(tokens, exact(e, 50.0, 0.3, tokens), extrapolation=10.0)
    assert law.law == "three" or e == 0
    assert law.predict(1e7) == pytest.approx(float(exact(e, 50.0, 0.3, np.array([1e7]))[0]), abs=0.01)


def test_warnings() -> None:
    tokens = np.geomspace(1e5, 1e6, 5)
    losses = exact(2.0, 0.5, 0.5, tokens)
    assert "only 5 points" in fit_target(tokens, losses).warnings[0]
    losses[2] += 0.5
    rise = fit_target(tokens, losses).warnings[1]
    assert "the loss does not fall everywhere: it rises by" in rise
    assert "between 1.778e+05 and 3.162e+05 tokens" in rise


def test_target_above_the_last_loss_is_refused() -> None:
    tokens = np.geomspace(1e5, 1e6, 6)
    losses = exact(2.0, 0.5, 0.5, tokens)
    law = fit_target(tokens, losses)
    with pytest.raises(
        NumericalError, match=r"the target 3\.\d+ nats at 2e\+05 tokens is above the last proxy loss 2.5"
    ):
        law.predict_target(2e5)
    assert law.predict_target(4e6) == pytest.approx(2.25, abs=0.01)
    with pytest.raises(ConfigError, match="a law is read at a positive number of tokens"):
        law.predict(0)


def curves() -> dict[str, list[tuple[float, float]]]:
    tokens = np.geomspace(1e5, 1e6, 6)
    return {
        "prose": list(zip(tokens.tolist(), exact(2.0, 0.5, 0.5, tokens).tolist(), strict=True)),
        "code": list(zip(tokens.tolist(), exact(1.0, 0.2, 0.3, tokens).tolist(), strict=True)),
    }


def test_targets_fit_and_json() -> None:
    targets = Targets.fit(
        curves(),
        4e6,
        shares={"code": 0.25, "prose": 0.75},
        proxy_steps=350,
        proxy_tokens=358_400,
        evaluation_tokens=24_576,
    )
    assert list(targets.domains) == ["code", "prose"]
    assert targets.losses == pytest.approx({"code": 1 + 0.2 / 4**0.3, "prose": 2.25}, abs=0.01)
    assert targets.warnings == ()
    prose = targets.domains["prose"]
    assert (prose.tokens, prose.error, len(prose.points)) == (4e6, pytest.approx(0, abs=0.01), 6)
    text = json.dumps(targets.to_json(), allow_nan=False)
    again = Targets.from_json(json.loads(text))
    assert again == targets
    assert again.at(8e6).losses["prose"] == pytest.approx(2 + 0.5 / 8**0.5, abs=0.01)
    assert (
        targets.at(9e6)
        .warnings[0]
        .startswith("code: read at 9.0 times the last proxy's tokens (more than 8)")
    )


def test_targets_name_the_domain_in_errors() -> None:
    rising = {**curves(), "old": [(t, 2.0 + 1e-7 * t) for t in (1e5, 2e5, 4e5, 5e5, 6e5, 8e5)]}
    with pytest.raises(ConfigError, match="domain 'short': 3 points"):
        Targets.fit({"short": curves()["code"][:3]}, 1e6)
    bumpy = [(t, loss) for t, loss in curves()["prose"][:-1]] + [(1e6, 2.3)]
    early = {"prose": [*bumpy[:-1], (1e6, 2.3)]}
    with pytest.raises(NumericalError, match="domain 'prose': the target"):
        Targets.fit(early, 1e6)
    held = Targets.fit(early, 1e6, above_last="last").domains["prose"]
    assert held.target == 2.3
    assert any("above the last proxy loss; took 2.3000" in w for w in held.warnings)
    assert Targets.fit(rising, 1e6, above_last="last").domains["old"].target <= 2.08


def test_given_targets() -> None:
    targets = Targets.given({"b": 2, "a": 1.5})
    assert targets.losses == {"a": 1.5, "b": 2.0}
    assert targets.domains["a"] == DomainTarget(1.5)
    assert targets.at(1e9) == targets
    assert Targets.from_json(json.loads(json.dumps(targets.to_json()))) == targets
    with pytest.raises(ConfigError, match="target of domain 'a' is nan"):
        Targets.given({"a": math.nan})


def test_malformed_json() -> None:
    with pytest.raises(ConfigError, match="targets have version 2; expected 1"):
        Targets.from_json({"version": 2})
    value = Targets.given({"a": 1.0}).to_json()
    del value["domains"]["a"]["law"]
    with pytest.raises(ConfigError, match="malformed targets: KeyError"):
        Targets.from_json(value)
    with pytest.raises(ConfigError, match="malformed law"):
        TargetLaw.from_json({"points": [[1, 2]]})


def test_points_are_sorted() -> None:
    counts, losses = check_points([4, 1, 3, 2], [1.0, 4.0, 2.0, 3.0])
    assert counts.tolist() == [1, 2, 3, 4]
    assert losses.tolist() == [4, 3, 2, 1]
    assert BETA_BOUNDS == (0.01, 1.5)


def sized(n: float, d: np.ndarray, e: float = 1.7, a: float = 30.0, b: float = 400.0) -> np.ndarray:
    """Chinchilla's form with both exponents about as published."""
    return np.asarray(e + a / n**0.34 + b / d**0.28)


def test_a_sibling_lends_its_curve() -> None:
    """Three own points say nothing of the slope; a sibling of a third of the size, trained ten times as far, does."""
    own, theirs = np.geomspace(1e5, 2e5, 3), np.geomspace(1e5, 2e6, 8)
    points = list(zip(own, sized(9e6, own), strict=True))
    law = fit_sized(points, 9e6, {3e6: list(zip(theirs, sized(3e6, theirs), strict=True))})
    assert law.predict(4e6) == pytest.approx(float(sized(9e6, np.array(4e6))), abs=0.005)
    assert (law.law, law.size) == ("sized", 9e6) and law.beta == pytest.approx(0.28, abs=0.01)
    assert law.leave_last_out < 0.01 and law.huber < 1e-9
    low, high = law.interval(4e6)
    assert low <= law.predict(4e6) <= high and high - low < 0.02
    again = law_from_json(json.loads(json.dumps(law.to_json())))
    assert again == law and isinstance(again, SizedLaw) and again.interval(4e6) == (low, high)
    rng = np.random.default_rng(0)
    noisy = [(d, x * math.exp(0.003 * rng.standard_normal())) for d, x in law.siblings[0][1]]
    rough = fit_sized(points, 9e6, {3e6: noisy})
    low, high = rough.interval(4e6)
    assert low < float(sized(9e6, np.array(4e6))) < high and 0.01 < high - low < 0.5


def test_two_siblings_and_a_single_level() -> None:
    """With two siblings E and A part; the band covers the model's own size."""
    d = np.geomspace(1e5, 1e6, 6)
    siblings = {n: list(zip(d, sized(n, d), strict=True)) for n in (1e6, 3e6)}
    law = fit_sized(list(zip(d[:2], sized(9e6, d[:2]), strict=True)), 9e6, siblings)
    assert pytest.approx((1.7, 30.0), rel=0.02) == (law.floor, law.A)
    assert pytest.approx(1.7 + 30 / 9e6**0.34, abs=0.01) == law.E


POINTS = [(1e5 * 2**k, 5 - 0.1 * k) for k in range(6)]


@pytest.mark.parametrize(
    ("points", "siblings", "exponent", "message"),
    [
        (POINTS, {}, 0.34, "siblings have no parameters and the model 9,000,000"),
        (POINTS, {9e6: POINTS}, 0.34, "models of different sizes"),
        (POINTS, {3e6: POINTS[:3]}, 0.34, "3 points; a law needs at least 4"),
        (POINTS[:1], {3e6: POINTS}, 0.34, "1 points; a law needs at least 2"),
        (POINTS, {0.0: POINTS}, 0.34, "a model of 0.0 parameters"),
        (POINTS, {3e6: POINTS}, 0.0, "exponent of the size is 0.0"),
    ],
)
def test_sized_laws_refuse(points: list, siblings: dict, exponent: float, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fit_sized(points, 9e6, siblings, exponent=exponent)


def test_targets_with_siblings() -> None:
    d = np.geomspace(1e5, 1e6, 8)
    theirs = Targets.fit({"a": list(zip(d, sized(3e6, d), strict=True))}, 1e6, parameters=3_000_000)
    mine = {"a": list(zip(d[:3], sized(9e6, d[:3]), strict=True))}
    found = Targets.fit(mine, 4e6, parameters=9_000_000, siblings={"small": theirs})
    assert found.losses["a"] == pytest.approx(float(sized(9e6, np.array(4e6))), abs=0.005)
    assert Targets.from_json(json.loads(json.dumps(found.to_json()))) == found
    for changes, message in (
        ({"siblings": {"small": theirs}}, "siblings need the model's own number of parameters"),
        (
            {"siblings": {"small": Targets.given({"a": 2.0})}},
            "'small': its targets do not say how many parameters",
        ),
        ({"siblings": {"s": theirs, "t": theirs}}, "'t': another one has 3,000,000 parameters, too"),
        ({"siblings": {"s": theirs}, "decay": 0.2}, "'s' was read with proxy.decay None, the model with 0.2"),
    ):
        size = {} if "need" in message else {"parameters": 9_000_000}
        with pytest.raises(ConfigError, match=message):
            Targets.fit(mine, 4e6, **size, **changes)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="sibling 'small' has no points of domain 'b'"):
        Targets.fit(mine | {"b": mine["a"]}, 4e6, parameters=9_000_000, siblings={"small": theirs})
