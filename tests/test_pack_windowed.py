"""Bins of groups of shards, read in windows: packing, order and what is read at a time, against plain Python."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats
from typer.testing import CliRunner

from mds_builder import raw_shard
from sampler_reference import WINDOW, Reference, make_key, windowed_epoch, write_domain
from test_pack import best_fit_decreasing
from velopath import _core, open_sampler
from velopath.cli.app import app
from velopath.errors import ConfigError, DataError
from velopath.mds import load_index, read_documents
from velopath.pack import Bins, load_bins
from velopath.pack_bins import best_fit_groups, count_bins
from velopath.stream import Sampler
from velopath.stream_data import open_domains
from velopath.stream_order import Order

WEIGHTS = {"a": 0.7, "b": 0.3}
OPTIONS: dict[str, Any] = {
    "rows": 1, "row_tokens": 32, "packing": "best_fit", "order": "windowed", "window": 4, "weights": WEIGHTS
}  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 70), min_size=1, max_size=20).filter(any), min_size=1, max_size=8),
    st.integers(2, 40),
)
def test_bins_of_a_group_are_best_fit_decreasing_of_its_documents(parts: list[list[int]], width: int) -> None:
    lengths = np.array([n for part in parts for n in part], np.uint32)
    firsts = np.cumsum([0, *map(len, parts)]).tolist()
    starts, groups, pieces, cut = best_fit_groups(lengths, firsts[:-1], width)
    bounds = [*groups.tolist(), len(starts) - 1]
    assert cut == sum(n > width for n in lengths)
    for part, first, begin, end in zip(parts, firsts, bounds, bounds[1:], strict=False):
        bins = [
            pieces[int(a) : int(b)]
            for a, b in zip(starts[begin:end], starts[begin + 1 : end + 1], strict=True)
        ]
        assert sorted(width - int(b[:, 2].sum()) for b in bins) == best_fit_decreasing(part, width)
        held = {int(d) for b in bins for d in b[:, 0]}
        assert held == {first + i for i, n in enumerate(part) if n}
    one = best_fit_groups(lengths, [0], width)
    assert count_bins(lengths, width) == len(one[0]) - 1
    assert sum(int(p[2]) for p in pieces) == sum(int(p[2]) for p in one[2]) and cut == one[3]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 20 and 7 shards that hold tokens; among the 7 two without, of no sample and of empty ones."""
    root = tmp_path_factory.mktemp("windowed")
    rng = np.random.default_rng(0)
    write_domain(root / "a", rng.integers(1, 60, 400).tolist(), seed=1, size_limit=1200)
    write_domain(root / "b", rng.integers(1, 90, 70).tolist(), seed=2, size_limit=1000)
    index = json.loads((root / "b" / "index.json").read_text())
    for place, samples in ((0, [b"\x02\0\0\0\x04\0"] * 3), (4, [])):
        name, content = f"hollow.{place}.mds", raw_shard(samples)
        (root / "b" / name).write_bytes(content)
        file = {"basename": name, "bytes": len(content), "hashes": {}}
        entry = index["shards"][-1] | {"samples": len(samples), "raw_data": file}
        index["shards"].insert(place, entry)
    (root / "b" / "index.json").write_text(json.dumps(index))
    return root


def bins_of(root: Path, name: str, bin_shards: int, eos: int | None = None, row_tokens: int = 32) -> Bins:
    return load_bins(open_domains({name: root / name}, eos)[name], row_tokens, eos, bin_shards=bin_shards)


def shards_of(root: Path, name: str) -> NDArray[np.int64]:
    """The shard of each document."""
    samples = [entry.samples for entry in load_index(root / name).shards]
    return np.repeat(np.arange(len(samples)), samples)


class WindowedBins(Reference):
    """The sampler on bins, by the words of its design: parts are groups of bins."""

    def __init__(
        self, root: Path, bin_shards: int, eos: int | None, padding: int = 0, **options: Any
    ) -> None:
        self.window = OPTIONS["window"] // bin_shards
        self.padding = padding
        self.bins = [bins_of(root, name, bin_shards, eos) for name in "ab"]
        end = [] if eos is None else [eos]
        self.documents = [[[*d.tolist(), *end] for d in read_documents(root / name)] for name in "ab"]
        super().__init__({name: np.zeros(1) for name in "ab"}, WEIGHTS, row_tokens=32, **options)
        self.epoch = cache(self.epoch)  # type: ignore[method-assign]

    def epoch(self, k: int, number: int) -> list[int]:
        bounds = [*self.bins[k].groups.tolist(), self.bins[k].rows]
        parts = [range(a, b) for a, b in zip(bounds, bounds[1:], strict=False)]
        return windowed_epoch(parts, self.window, make_key(WINDOW, self.seed, self.keys[k], number))

    def row(self, k: int, number: int) -> tuple[np.ndarray, int]:
        bins, rows = self.bins[k], self.bins[k].rows
        epoch, within = divmod(number, rows)
        bin_ = self.epoch(k, epoch)[within]
        pieces = bins.pieces[int(bins.starts[bin_]) : int(bins.starts[bin_ + 1])].tolist()
        tokens = [t for d, first, n in pieces for t in self.documents[k][d][first : first + n]]
        return np.array(tokens + [self.padding] * (33 - len(tokens))), epoch * rows + bin_


@pytest.mark.parametrize(("bin_shards", "eos"), [(1, None), (2, 9), (3, None), (4, 9)])
@pytest.mark.parametrize("threads", [0, 2])
def test_rows_are_those_of_the_reference(root: Path, bin_shards: int, eos: int | None, threads: int) -> None:
    """Two epochs or more, pushes among them; windows of 4, 2 and 1 groups."""
    options = OPTIONS | {"rows": 3, "seed": 7, "bin_shards": bin_shards, "eos": eos, "threads": threads}
    expected = WindowedBins(root, bin_shards, eos, padding=eos or 0, global_rows=3, seed=7)
    with open_sampler(root, **options) as sampler:
        for step in range(900):
            if step % 100 == 60:
                weights = {"a": 0.2 + step / 1000, "b": 0.5}
                sampler.push(weights)
                expected.push(weights)
            tokens, domains, ids = expected.step()
            batch = next(sampler)
            assert np.array_equal(batch.domains, domains)
            assert np.array_equal(batch.row_ids, ids)
            assert np.array_equal(batch.tokens, tokens)
    assert min(d // b.rows for d, b in zip(expected.drawn, expected.bins, strict=True)) >= 2


def epochs_of(sampler: Sampler, rows: int, count: int) -> list[list[int]]:
    """Rows of the only domain, epoch by epoch, as numbers in the epoch."""
    return [[int(next(sampler).row_ids[0]) - e * rows for _ in range(rows)] for e in range(count)]


@pytest.mark.parametrize(("bin_shards", "window"), [(1, 1), (1, 4), (2, 4), (2, 5), (4, 4)])
def test_what_is_read_at_a_time_is_the_window(root: Path, bin_shards: int, window: int) -> None:
    """Every epoch is a bijection on the bins; a group's bins touch its shards alone, and none comes in two windows."""
    bins, shard = bins_of(root, "a", bin_shards), shards_of(root, "a")
    group = np.searchsorted(bins.groups, np.arange(bins.rows), side="right") - 1
    for number, (a, b) in enumerate(zip(bins.starts, bins.starts[1:], strict=False)):
        assert {int(shard[d]) // bin_shards for d in bins.pieces[int(a) : int(b), 0]} == {int(group[number])}
    options = OPTIONS | {"weights": None, "bin_shards": bin_shards, "window": window, "threads": 0}
    with open_sampler({"a": root / "a"}, **options) as sampler:
        epochs = epochs_of(sampler, bins.rows, 4)
    for order in epochs:
        assert sorted(order) == list(range(bins.rows))
        windows: list[set[int]] = [set()]
        for bin_ in order:
            if len(windows[-1] | {int(group[bin_])}) > window // bin_shards:
                windows.append(set())
            windows[-1].add(int(group[bin_]))
        assert sum(map(len, windows)) == len(set().union(*windows)), "a group was read in two windows"
    for a in range(4):
        for b in range(a):
            assert epochs[a] != epochs[b]


def test_a_window_shuffles_as_far_as_it_can(tmp_path: Path) -> None:
    """Over 2000 epochs: which group comes first, which share a window, which bin of a window comes when, are even."""
    write_domain(tmp_path / "a", [33] * 64, size_limit=830)  # a bin each; 8 shards of 8
    assert [s.samples for s in load_index(tmp_path / "a").shards] == [8] * 8
    options = OPTIONS | {"weights": None, "window": 2, "threads": 0}
    firsts, mates, places = np.zeros(8), np.zeros((8, 8)), np.zeros((16, 16))
    with open_sampler({"a": tmp_path / "a"}, **options) as sampler:
        order = np.array(epochs_of(sampler, 64, 2000))
    for epoch in order:
        groups = [sorted(set((epoch[i : i + 16] // 8).tolist())) for i in range(0, 64, 16)]
        assert [len(g) for g in groups] == [2] * 4
        firsts[epoch[0] // 8] += 1
        for a, b in groups:
            mates[a, b] += 1
        low = groups[0]  # bins of the first window numbered 0 to 15, whichever its groups are
        for place, bin_ in enumerate(epoch[:16]):
            places[place, 8 * low.index(bin_ // 8) + bin_ % 8] += 1
    assert stats.chisquare(firsts).pvalue > 1e-4
    assert stats.chisquare(mates[np.triu_indices(8, 1)]).pvalue > 1e-4
    assert stats.chi2_contingency(places).pvalue > 1e-4
    assert stats.chisquare(places[0]).pvalue > 1e-4


@pytest.mark.parametrize("threads", [0, 3])
def test_resume_and_world_size_change_no_row(root: Path, threads: int) -> None:
    """Through 1, 2, 3 and 6 ranks, with pushes in between, from a state taken in the midst of an epoch."""
    options = OPTIONS | {"bin_shards": 2, "threads": threads, "audit": None}

    def run(
        world: int, state: dict[str, Any] | None, first: int, last: int
    ) -> tuple[list[Any], dict[str, Any]]:
        found = []
        samplers = [
            open_sampler(root, **options | {"rows": 6 // world}, world=world, rank=r) for r in range(world)
        ]
        for s in samplers:
            if state is not None:
                s.load_state_dict(state)
        for step in range(first, last):
            if step % 7 == 3:
                for s in samplers:
                    s.push({"a": 1, "b": step})
            batches = [next(s) for s in samplers]
            assert np.array_equal(samplers[-1].ids(step)[1], np.concatenate([b.row_ids for b in batches]))
            found.append(np.concatenate([b.tokens for b in batches]).tolist())
        state = json.loads(json.dumps(samplers[0].state_dict()))
        assert all(
            s.state_dict() | {"rows": 0, "world": 0} == state | {"rows": 0, "world": 0} for s in samplers
        )
        exposures = [s.exposure() for s in samplers]
        assert all(e == exposures[0] for e in exposures)
        for s in samplers:
            s.close()
        return found, state

    whole, final = run(1, None, 0, 120)
    parts, state, at = [], None, 0
    for world, until in ((2, 31), (6, 60), (3, 61), (1, 120)):
        found, state = run(world, state, at, until)
        parts += found
        at = until
    assert parts == whole
    assert state == final


@pytest.mark.parametrize("exhaustion", ["renormalise", "stop"])
def test_an_epoch_that_ends_holds_every_bin_at_most_once(root: Path, exhaustion: str) -> None:
    with open_sampler(root, **OPTIONS | {"rows": 2}, exhaustion=exhaustion) as sampler:
        read = [(int(d), int(r)) for b in sampler for d, r in zip(b.domains, b.row_ids, strict=True)]
    bins = [bins_of(root, name, 1).rows for name in "ab"]
    assert len(set(read)) == len(read)
    assert all(row < bins[k] for k, row in read)
    if exhaustion == "renormalise":
        assert sum(bins) - 1 <= len(read) <= sum(bins)  # the last step is of two rows
    else:
        assert any(sum(d == k for d, _ in read) >= bins[k] - 2 for k in range(2))


def test_the_log_alone_gives_the_same_rows(root: Path) -> None:
    with open_sampler(root, **OPTIONS | {"rows": 3, "bin_shards": 2}) as sampler:
        order = Order.from_json(json.loads(json.dumps(sampler.order.to_json())))
        assert order.window == 2 and order.bins == {n: bins_of(root, n, 2).rows for n in "ab"}
        domains, ids, _, _ = order.draw(0, 300, sampler._core.mixes_at(0)[0][2], [0, 0], [0, 0])
        for step in range(300):
            batch = next(sampler)
            assert np.array_equal(batch.domains, domains[step]) and np.array_equal(batch.row_ids, ids[step])
    wrong = order.to_json() | {"shards": {n: [0, b] for n, b in (order.bins or {}).items()}}
    with pytest.raises(ConfigError, match="the arguments of the plan do not fit each other"):
        Order.from_json(wrong).draw(0, 1, [1 << 31] * 2, [0, 0], [0, 0])


def test_the_default_and_what_a_state_refuses(root: Path) -> None:
    with open_sampler(root, **OPTIONS) as sampler:
        next(sampler)
        state = sampler.state_dict()
        assert (state["packing"], state["window"], state["bin_shards"]) == ("best_fit", 4, 1)
    for other, message in (
        ({"bin_shards": 2}, "bin_shards of the state is 1, of this sampler 2"),
        ({"order": "full", "bin_shards": 1}, "window of the state is 4, of this sampler 0"),
        ({"packing": "concat"}, "packing of the state is 'best_fit', of this sampler 'concat'"),
    ):
        with (
            open_sampler(root, **OPTIONS | other) as sampler,
            pytest.raises(ConfigError, match=message),
        ):
            sampler.load_state_dict(state)
    old = {k: v for k, v in state.items() if k not in ("window", "bin_shards")}
    with open_sampler(root, **OPTIONS | {"order": "full"}) as sampler:
        sampler.load_state_dict(old)  # from before there were groups: bins over the whole domain


def test_grouped_bins_in_the_order_over_the_whole_domain(root: Path) -> None:
    bins = bins_of(root, "a", 2)
    options = OPTIONS | {"weights": None, "order": "full", "bin_shards": 2}
    with open_sampler({"a": root / "a"}, **options) as sampler:
        (order,) = epochs_of(sampler, bins.rows, 1)
    assert sorted(order) == list(range(bins.rows))
    window = np.array(order[: bins.rows // 4])
    assert len(np.unique(np.searchsorted(bins.groups, window, side="right"))) > 6


def test_files_of_groups_stand_by_themselves(root: Path, tmp_path: Path) -> None:
    write_domain(tmp_path / "b", [200, 3, 33, 33, 1, 50, 40, 7], seed=2, size_limit=500)
    found = {g: bins_of(tmp_path, "b", g) for g in (0, 1, 2)}
    groups, pieces = found[1].groups.copy(), found[0].pieces.copy()  # the files are mapped
    assert [f.path.name for f in found.values()] == [
        "best_fit.t32.eos.bins", "best_fit.t32.eos.g1.bins", "best_fit.t32.eos.g2.bins"
    ]  # fmt: skip
    assert [len(f.groups) for f in found.values()] == [0, 3, 2]
    whole, one, _ = (f.path for f in found.values())
    content = one.read_bytes()
    at = content.index(b"\n") // 64 * 64 + 64 + 8 * (found[1].rows + 1)
    for damage in (
        found[2].path.read_bytes(),
        whole.read_bytes(),
        content[:at] + bytes([1]) + content[at + 1 :],
        content.replace(b'"groups": 3', b'"groups": 2'),
        content.replace(b'"groups": 3', b'"groups": 0'),
        content.replace(b'"bin_shards": 1', b'"bin_shards": 2'),
    ):
        assert damage != content
        one.write_bytes(damage)
        assert np.array_equal(bins_of(tmp_path, "b", 1).groups, groups)
        assert one.read_bytes() == content
    whole.write_bytes(content)
    assert np.array_equal(bins_of(tmp_path, "b", 0).pieces, pieces)


@pytest.mark.parametrize("groups", [[1], [0, 0], [0, 2, 1], [0, 3], [0, 1 << 63]])
def test_groups_that_do_not_fit_their_bins_are_refused(groups: list[int]) -> None:
    starts, pieces = np.arange(4, dtype=np.uint64), np.array([[0, 0, 5], [1, 0, 5], [2, 0, 5]], np.uint32)
    assert _core.Packing(starts, pieces, width=5, path="x", groups=[0, 1, 2]).groups.tolist() == [0, 1, 2]
    with pytest.raises(DataError, match="the bins do not fit each other; remove the file"):
        _core.Packing(starts, pieces, width=5, path="x", groups=groups)
    pieces[1, 2] = 0
    with pytest.raises(DataError, match="the bins do not fit each other; remove the file"):
        _core.Packing(starts, pieces, width=5, path="x", groups=[])


def test_the_command_compares_groups_with_the_whole_domain(root: Path) -> None:
    ran = CliRunner().invoke(app, ["pack", str(root), "-t", "32", "-g", "1", "--json"])
    assert ran.exit_code == 0, ran.output
    shown = json.loads(ran.output)
    assert shown["bin_shards"] == 1
    for name in "ab":
        grouped, whole, found = bins_of(root, name, 1), bins_of(root, name, 0), shown["domains"][name]
        assert found["file"] == str(grouped.path)
        assert found["padding_share"] == 1 - grouped.tokens / (33 * grouped.rows)
        assert found["whole_padding_share"] == 1 - whole.tokens / (33 * whole.rows) < found["padding_share"]
        assert found["truncated_share"] == grouped.truncated_share == whole.truncated_share
    table = CliRunner().invoke(app, ["pack", str(root), "-t", "32", "--bin-shards", "1"]).output
    assert "padding, whole" in table
    assert f"{whole.padding_share:.3%}" in table


def test_groups_of_full_shards_pad_next_to_nothing_more() -> None:
    """16 shards of 2M tokens (4 MB; those of prepare have 64 MiB): below 0.1 % at T = 2048, and nothing more is cut."""
    rng = np.random.default_rng(0)
    shards = [np.clip(rng.lognormal(6, 1.2, 2500), 1, 200_000).astype(np.uint32) for _ in range(16)]
    lengths, firsts = np.concatenate(shards), list(range(0, 40_000, 2500))
    padding, cut = {}, {}
    for g in (1, 4, 16):
        starts, _, pieces, cut[g] = best_fit_groups(lengths, firsts[::g], 2049)
        padding[g] = 1 - pieces[:, 2].sum() / ((len(starts) - 1) * 2049)
    assert cut[1] == cut[4] == cut[16] == (lengths > 2049).sum()
    assert padding[16] <= padding[4] <= padding[1] < 0.001
