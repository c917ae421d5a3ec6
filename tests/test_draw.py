"""Drawing: the bijection on [0, n) and the rounding of shares to rows."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats

import sampler_reference as reference
from velopath import _core
from velopath.domains import SHARE_ONE, integer_shares, normalised
from velopath.errors import ConfigError

keys = st.integers(0, (1 << 64) - 1)


# Sizes around squares, where the sides of the grid change, and primes, where the grid is larger than n.
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 9, 10, 16, 17, 99, 100, 101, 1009, 4095, 4096, 4097, 65537])
@pytest.mark.parametrize("key", [0, 1, (1 << 64) - 1])
def test_permute_is_a_bijection(n, key):
    images = _core.permute(np.arange(n), n, key)
    assert np.array_equal(np.sort(images), np.arange(n))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 1 << 42), keys)
def test_permute_is_injective_and_inside_up_to_2_to_the_42(n, key):
    some = np.unique(np.random.default_rng(n).integers(0, n, 2000))
    images = _core.permute(some, n, key)
    assert images.min() >= 0
    assert images.max() < n
    assert len(np.unique(images)) == len(some)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 1 << 42), keys, st.data())
def test_permute_equals_the_reference(n, key, data):
    x = data.draw(st.integers(0, n - 1))
    assert _core.permute(np.array([x]), n, key)[0] == reference.permute(x, n, key)


def test_permute_refuses_items_outside():
    with pytest.raises(ConfigError, match="outside"):
        _core.permute(np.array([7]), 7, 0)


@pytest.mark.parametrize("n", [2, 3, 5, 12, 101])
def test_every_item_goes_everywhere_equally_often(n):
    # Over keys the pair of images of two neighbours must be uniform over all ordered pairs; p below 1e-6 is no chance.
    keys_used = [reference.mix(i) for i in range(200 * n * (n - 1) if n <= 12 else 20_000)]
    images = np.array([_core.permute(np.array([0, 1]), n, key) for key in keys_used])
    pairs = images[:, 0] * n + images[:, 1]
    counts = np.bincount(pairs, minlength=n * n)[[i for i in range(n * n) if i // n != i % n]]
    if n <= 12:
        assert stats.chisquare(counts).pvalue > 1e-6
    assert stats.chisquare(np.bincount(images[:, 0], minlength=n)).pvalue > 1e-6


def test_order_of_one_key_looks_random():
    n = 100_003
    images = _core.permute(np.arange(n), n, 12345)
    assert abs(np.corrcoef(np.arange(n), images)[0, 1]) < 0.02
    steps = np.diff(images) % n
    assert stats.chisquare(np.bincount(steps * 64 // n, minlength=64)).pvalue > 1e-6
    assert np.sum(images == np.arange(n)) < 15  # a random permutation has one fixed point on average


def worst_error(shares_by_push, rows):
    """Largest |asked - given| of any domain at any row, in rows."""
    error, worst = [0] * len(shares_by_push[0]), 0
    for weights in shares_by_push:
        shares = integer_shares(weights)
        for _ in range(rows):
            (given_to,), error = _core.give_rows(shares, error, 1)
            assert shares[given_to] > 0, "a domain of share 0 was given a row"
            worst = max(worst, max(map(abs, error)))
        assert sum(error) == 0
    return worst / SHARE_ONE


weight = st.floats(0, 1, allow_subnormal=False)


def shares_in_fractions(weights):
    """`integer_shares` by its definition: largest remainder in rational arithmetic, ties to the lower index."""
    exact = [Fraction(w) for w in weights]
    quotas = [w * SHARE_ONE / sum(exact) for w in exact]
    shares = [q.numerator // q.denominator for q in quotas]
    by_remainder = sorted(range(len(shares)), key=lambda k: (shares[k] - quotas[k], k))
    for k in by_remainder[: SHARE_ONE - sum(shares)]:
        shares[k] += 1
    return shares


# Subnormal and huge weights in one mix, equal ones (ties), zeros.
@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.one_of(st.floats(0, 1e300), weight, st.sampled_from([0.0, 0.1, 1 / 3, 1, 7])), min_size=1
    ).filter(any)
)
def test_integer_shares_equal_their_definition(weights):
    shares = integer_shares(weights)
    assert shares == shares_in_fractions(weights)
    assert sum(shares) == SHARE_ONE


# The last: three shares of an update that sum to 1 - 2^-53.
@settings(max_examples=300, deadline=None)
@given(st.lists(weight, min_size=1, max_size=1000).filter(any))
@example([0.31632630581219556, 0.4466660707278305, 0.23700762345997387])
def test_normalising_twice_is_normalising_once(weights):
    once = normalised(weights)
    total = sum(map(Fraction, weights))
    assert once == pytest.approx([float(Fraction(w) / total) for w in weights], rel=1e-15, abs=1e-300)
    assert normalised(once) == once


@settings(max_examples=50, deadline=None)
@given(st.lists(weight, min_size=1, max_size=100).filter(any))
def test_rows_stay_within_one_of_the_asked_share(weights):
    assert worst_error([weights], 600) < 1


@settings(max_examples=20, deadline=None)
@given(st.lists(weight, min_size=2, max_size=100).filter(any), st.integers(1, 9))
def test_pushing_equal_weights_again_changes_nothing(weights, rows):
    assert worst_error([weights] * 40, rows) < 1


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 100), st.integers(1, 12), st.integers(0, 1 << 32), st.booleans())
def test_rows_stay_within_two_after_pushes(k, rows, seed, zeros):
    rng = np.random.default_rng(seed)
    pushes = []
    for _ in range(60):
        weights = rng.dirichlet(np.full(k, 10 ** rng.uniform(-1.5, 1))) + 1e-12
        keep = rng.random(k) < rng.random() if zeros else np.ones(k, bool)
        keep[rng.integers(k)] = True
        pushes.append(np.where(keep, weights, 0.0).tolist())
    assert worst_error(pushes, rows) < 2


def test_small_shares_are_served_under_frequent_pushes():
    # The case that starting the count anew at each push starves: .01 at 4 rows a step, pushed at every step.
    shares, error = integer_shares([0.9, 0.06, 0.03, 0.01]), [0, 0, 0, 0]
    counts = np.zeros(4, int)
    for _ in range(250):
        given_to, error = _core.give_rows(shares, error, 4)
        counts += np.bincount(given_to, minlength=4)
    assert np.abs(counts - [900, 60, 30, 10]).max() <= 1


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(0, 20), min_size=5, max_size=5).filter(any), min_size=1, max_size=5))
def test_rounding_equals_the_reference_in_fractions(pushes):
    error, exact = [0] * 5, [Fraction(0)] * 5
    for weights in pushes:
        shares = integer_shares(weights)
        given_to, error = _core.give_rows(shares, error, 50)
        asked = [Fraction(s, SHARE_ONE) for s in shares]
        assert given_to == [reference.give_row(asked, exact) for _ in range(50)]
        assert [Fraction(e, SHARE_ONE) for e in error] == exact


@pytest.mark.parametrize("k", [32, 33, 100, 1000])
@pytest.mark.parametrize("zeros", [False, True])
def test_many_rows_at_once_equal_one_by_one(k, zeros):
    # From 32 domains and 16 rows on another way is taken than row by row; errors are carried over between pushes; with
    # shares of 0 some are left behind, so that at times no domain has reached its share.
    rng, error = np.random.default_rng(k), [0] * k
    for rows in [16, 100, 400, 16, 1000, 77]:
        weights = rng.dirichlet(np.full(k, 10 ** rng.uniform(-1.5, 1))) + 1e-12
        if zeros:
            weights[rng.random(k) < rng.random()] = 0
            weights[rng.integers(k)] = 1e-3
        elif rows == 1000:
            weights[:] = 1  # every deadline is shared
        shares, one_by_one = integer_shares(weights.tolist()), []
        after = error
        for _ in range(rows):
            given_to, after = _core.give_rows(shares, after, 1)
            one_by_one += given_to
        assert _core.give_rows(shares, error, rows) == (one_by_one, after)
        error = after


def test_one_domain_gets_every_row():
    assert _core.give_rows([SHARE_ONE], [0], 5) == ([0] * 5, [0])
