"""The order of rows: bijections up to 2^40, epochs that differ, windows of shards."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from sampler_reference import Reference, joined, mix, write_domain
from velopath import _core, open_sampler
from velopath.errors import ConfigError

keys = st.integers(0, (1 << 64) - 1)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40).flatmap(lambda e: st.integers(1 << (e - 1), 1 << e)), keys)
def test_blocks_of_a_large_bijection_do_not_collide(n, key):
    """The first, the last and a middle block of [0, n), n up to 2^40: distinct images inside."""
    block = min(n, 700)
    items = np.unique(np.concatenate([np.arange(block) + at for at in (0, (n - block) // 2, n - block)]))
    images = _core.permute(items, n, key)
    assert images.min() >= 0
    assert images.max() < n
    assert len(np.unique(images)) == len(items)


@pytest.mark.parametrize("n", [1 << 20, (1 << 30) + 7, 1 << 40])
def test_images_of_a_block_are_uniform(n):
    """Neighbours land uniformly (a chi-square over 64 cells, Kolmogorov-Smirnov) and independently of each other."""
    images = _core.permute(np.arange(40_000) + n // 3, n, 99) / n
    assert stats.chisquare(np.bincount((images * 64).astype(int), minlength=64)).pvalue > 1e-6
    assert stats.kstest(images, "uniform").pvalue > 1e-6
    pairs = (images[:-1] * 8).astype(int) * 8 + (images[1:] * 8).astype(int)
    assert stats.chisquare(np.bincount(pairs, minlength=64)).pvalue > 1e-6
    assert abs(np.corrcoef(images[:-1], images[1:])[0, 1]) < 0.03


@pytest.mark.parametrize("n", [97, 4096, 50_021])
def test_orders_of_epochs_are_unrelated(n):
    """Between two keys the rank correlation is that of chance, and few items keep their place."""
    one, other = (_core.permute(np.arange(n), n, mix(i)) for i in range(2))
    assert abs(stats.spearmanr(one, other).statistic) < 5 / np.sqrt(n)
    assert (one == other).sum() < 12  # 1 on average


def test_epochs_are_reshuffled_and_each_is_complete(tmp_path):
    write_domain(tmp_path / "x", [40] * 120)
    with open_sampler(tmp_path, rows=1, row_tokens=8, threads=0) as sampler:
        epochs = [np.array([next(sampler).row_ids[0] for _ in range(600)]) for _ in range(4)]
    orders = [ids - 600 * e for e, ids in enumerate(epochs)]
    for order in orders:
        assert np.array_equal(np.sort(order), np.arange(600))
    for a in range(4):
        for b in range(a):
            assert abs(stats.spearmanr(orders[a], orders[b]).statistic) < 0.2


@st.composite
def streams(draw):
    """Tokens, row tokens, offset and the positions where shards begin, some of them shorter than a row."""
    sizes = draw(st.lists(st.integers(1, 400), min_size=1, max_size=30))
    tokens = sum(sizes)
    row_tokens = draw(st.integers(1, min(tokens, 90)))
    return tokens, row_tokens, draw(st.integers(0, tokens - 1)), [0, *np.cumsum(sizes)[:-1].tolist()]


def shard_of(starts, position):
    return int(np.searchsorted(starts, position, side="right")) - 1


@settings(max_examples=200, deadline=None)
@given(streams(), st.integers(1, 9), keys)
def test_a_windowed_epoch_is_a_bijection_within_windows(stream, window, key):
    tokens, row_tokens, offset, shards = stream
    rows = tokens // row_tokens
    order = _core.windowed_order(tokens, row_tokens, offset, shards, window, key, list(range(rows)))
    assert np.array_equal(np.sort(order), np.arange(rows))
    begin_in = [shard_of(shards, (offset + n * row_tokens) % tokens) for n in order]
    # In windows: shards never come back once a window has been left.
    groups, current = [], []
    for shard in begin_in:
        if shard in current:
            continue
        if len(current) == window:
            groups.append(current)
            current = []
        current.append(shard)
    flat = [s for group in [*groups, current] for s in group]
    if all(np.diff([*shards, tokens]) >= 2 * row_tokens):  # every shard has rows, so that windows are full
        assert len(flat) == len(set(flat)), "a shard was read in two windows"


def test_a_windowed_epoch_at_scale():
    """10^4 shards in 2^40 tokens: parts of the epoch do not collide, and each part stays in few shards."""
    tokens, row_tokens, window, count = 1 << 40, 2048, 8, 10_000
    shards = [i * (tokens // count) for i in range(count)]
    rows = tokens // row_tokens
    parts = [range(at, at + 3000) for at in (0, rows // 2, rows - 3000)]
    seen = []
    for part in parts:
        order = _core.windowed_order(tokens, row_tokens, 12345, shards, window, 7, list(part))
        touched = np.unique((12345 + order * row_tokens) % tokens // (tokens // count))
        assert len(touched) <= window + 1  # the one that the offset lies in has rows at both ends
        assert stats.kstest((order % 1000) / 1000, "uniform").pvalue > 1e-6
        seen.append(order)
    assert len(np.unique(np.concatenate(seen))) == 9000


def test_shards_come_in_an_order_of_their_own_in_each_epoch():
    firsts = [
        _core.windowed_order(100_000, 10, 0, list(range(0, 100_000, 1000)), 4, mix(i), [0])[0]
        for i in range(3000)
    ]
    assert stats.chisquare(np.bincount(np.array(firsts) // 100, minlength=100)).pvalue > 1e-6


WEIGHTS = {"a": 0.7, "b": 0.3}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("windowed")
    write_domain(root / "a", [50] * 200, seed=1, size_limit=1500)
    write_domain(root / "b", [30] * 60, seed=2, size_limit=900)
    return root


@pytest.mark.parametrize("threads", [0, 3])
def test_windowed_reads_the_same_rows_as_full_in_another_order(root, threads):
    streams = {name: joined(root / name, None) for name in "ab"}
    with open_sampler(
        root, rows=1, row_tokens=20, order="windowed", window=3, weights=WEIGHTS, threads=threads
    ) as sampler:
        expected = Reference(streams, WEIGHTS, global_rows=1, row_tokens=20)
        ids = {0: [], 1: []}
        for _ in range(1600):  # several epochs of both
            batch = next(sampler)
            _, domains, _ = expected.step()
            assert np.array_equal(batch.domains, domains)  # shares know nothing of the order
            for k, number, tokens in zip(batch.domains, batch.row_ids, batch.tokens, strict=True):
                ids[int(k)].append((int(number), tokens.tolist()))
    for k, name in enumerate("ab"):
        rows = len(streams[name]) // 20
        for epoch in range(len(ids[k]) // rows):
            part = ids[k][epoch * rows : (epoch + 1) * rows]
            assert sorted(n - epoch * rows for n, _ in part) == list(range(rows))
        where = {
            tuple(np.take(streams[name], np.arange(p, p + 21), mode="wrap"))
            for p in range(len(streams[name]))
        }
        assert all(tuple(tokens) in where for _, tokens in ids[k])


def test_windowed_resumes_over_ranks_and_pushes(root):
    options = {"row_tokens": 20, "order": "windowed", "window": 2, "weights": WEIGHTS}
    with open_sampler(root, rows=4, **options) as sampler:
        whole = []
        for step in range(200):
            if step in (50, 130):
                sampler.push({"a": 1, "b": step})
            if step == 120:
                state = sampler.state_dict()
            whole.append(next(sampler).tokens.copy())
    for rank in range(2):
        with open_sampler(root, rows=2, world=2, rank=rank, **options) as part:
            part.load_state_dict(state)
            for step in range(120, 200):
                if step == 130:
                    part.push({"a": 1, "b": step})
                assert np.array_equal(next(part).tokens, whole[step][2 * rank : 2 * rank + 2])
    for other, message in (
        ({"window": 3}, "window of the state is 2, of this sampler 3"),
        ({"order": "full"}, "window of the state is 2, of this sampler 0"),
    ):
        with (
            open_sampler(root, rows=4, **options | other) as sampler,
            pytest.raises(ConfigError, match=message),
        ):
            sampler.load_state_dict(state)


def test_wrong_orders_are_refused(root):
    with pytest.raises(ConfigError, match="order is 'random'; expected one of full, windowed"):
        open_sampler(root, order="random")
    with pytest.raises(ConfigError, match="window is 0"):
        open_sampler(root, order="windowed", window=0)
    best_fit = {"row_tokens": 20, "order": "windowed", "packing": "best_fit"}
    with pytest.raises(ConfigError, match="bin_shards is 9, more than the window of 8 shards that is read"):
        open_sampler(root, **best_fit, bin_shards=9)
    with pytest.raises(ConfigError, match="bin_shards is 2, but packing 'concat' has no bins; leave it out"):
        open_sampler(root, row_tokens=20, bin_shards=2)
    for wrong in (0, True, 1.5):
        with pytest.raises(ConfigError, match=f"bin_shards is {wrong}; expected a whole number, 1 or more"):
            open_sampler(root, **best_fit, bin_shards=wrong)
