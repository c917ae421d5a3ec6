"""Packing whole documents into rows: best-fit decreasing, its file, and the sampler on it."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sampler_reference import write_domain
from velopath import open_sampler
from velopath.errors import ConfigError, DataError
from velopath.mds import load_index, read_documents
from velopath.pack import load_bins
from velopath.pack_bins import best_fit_bins
from velopath.stream_data import open_domains
from velopath.stream_order import Order


def best_fit_decreasing(lengths, width):
    """The rooms left over, by definition: longest first, each into the bin it leaves the least room in."""
    pieces = []
    for length in lengths:
        while length > width:
            pieces.append(width)
            length -= width - 1
        pieces += [length] if length else []
    rooms = []
    for piece in sorted(pieces, reverse=True):
        fits = [i for i, room in enumerate(rooms) if room >= piece]
        if fits:
            rooms[min(fits, key=lambda i: rooms[i])] -= piece
        else:
            rooms.append(width - piece)
    return sorted(rooms)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 70), max_size=60), st.integers(2, 40))
def test_bins_are_best_fit_decreasing(lengths, width):
    starts, pieces, cut = best_fit_bins(np.array(lengths, np.uint32), width)
    assert starts[0] == 0
    assert starts[-1] == len(pieces)
    filled = [
        int(pieces[a:b, 2].sum())
        for a, b in zip(starts[:-1].astype(int), starts[1:].astype(int), strict=True)
    ]
    assert sorted(width - f for f in filled) == best_fit_decreasing(lengths, width)
    assert cut == sum(length > width for length in lengths)
    for document, length in enumerate(lengths):  # every token, in pieces that overlap by one
        mine = sorted((int(f), int(n)) for d, f, n in pieces if d == document)
        ends = [f + n for f, n in mine]
        assert [f for f, _ in mine] == ([0, *(e - 1 for e in ends[:-1])] if length else [])
        assert (ends[-1] if ends else 0) == length


def test_few_documents_are_cut_and_little_is_padded():
    lengths = np.clip(np.random.default_rng(0).lognormal(6, 1, 20_000), 1, 20_000).astype(np.uint32)
    starts, pieces, cut = best_fit_bins(lengths, 2049)
    assert cut == (lengths > 2049).sum() < 0.06 * len(lengths)
    assert 1 - pieces[:, 2].sum() / ((len(starts) - 1) * 2049) < 0.001
    assert len(starts) - 1 < 1.001 * (pieces[:, 2].sum() / 2049) + 1


@pytest.fixture
def root(tmp_path):
    rng = np.random.default_rng(0)
    write_domain(tmp_path / "a", rng.integers(1, 60, 150).tolist(), seed=1, size_limit=2000)
    write_domain(tmp_path / "b", [200, 3, 33, 33, 1, 50], seed=2)
    return tmp_path


WEIGHTS = {"a": 0.7, "b": 0.3}
OPTIONS = {"rows": 1, "row_tokens": 32, "packing": "best_fit", "weights": WEIGHTS}


def bins_of(root, name, eos=None, row_tokens=32):
    return load_bins(open_domains({name: root / name}, eos)[name], row_tokens, eos)


@pytest.mark.parametrize("eos", [None, 9])
@pytest.mark.parametrize("threads", [0, 2])
def test_an_epoch_holds_every_document_once(root, eos, threads):
    """Rows equal their bins token by token, an epoch holds every bin once, epochs differ in order."""
    documents = {n: [np.append(d, [eos] * (eos is not None)) for d in read_documents(root / n)] for n in "ab"}
    bins = {n: bins_of(root, n, eos) for n in "ab"}
    with open_sampler(root, **OPTIONS, eos=eos, boundaries=True, threads=threads) as sampler:
        seen = {"a": [], "b": []}
        for _ in range(5 * (bins["a"].rows + bins["b"].rows)):
            batch = next(sampler)
            name, number = "ab"[batch.domains[0]], int(batch.row_ids[0])
            seen[name].append(number)
            bin_ = number % bins[name].rows
            starts = bins[name].starts.astype(int)
            pieces = bins[name].pieces[starts[bin_] : starts[bin_ + 1]].astype(int)
            parts = [documents[name][d][f : f + n] for d, f, n in pieces]
            count = sum(map(len, parts))
            assert batch.counts.tolist() == [count]
            padding = [9 if eos is not None else 0] * (33 - count)
            assert batch.tokens[0].tolist() == [*np.concatenate(parts).tolist(), *padding]
            numbers = [i for i, part in enumerate(parts) for _ in part]
            assert batch.documents[0].tolist() == numbers + [-1] * (33 - count)
            places = [i for part in [*parts, padding] for i in range(len(part))]
            assert batch.positions[0].tolist() == places
            bounds = np.cumsum([0, *map(len, parts)]).tolist()
            assert batch.cu_seqlens.tolist() == [*(b for b in bounds if b < 32), 32]
            labels = batch.targets()
            assert labels.dtype == np.int32
            assert labels[0].tolist() == [*batch.tokens[0, 1:count].tolist(), *[-100] * (33 - count)]
            assert (batch.targets(ignore_index=-1)[0] == -1).sum() == 33 - count
    for name in "ab":
        rows = bins[name].rows
        epochs = [seen[name][i : i + rows] for i in range(0, len(seen[name]) - rows + 1, rows)]
        assert len(epochs) >= 2
        for number, epoch in enumerate(epochs):
            assert sorted(epoch) == list(range(number * rows, (number + 1) * rows))
        assert epochs[0] != [i - rows for i in epochs[1]]
        held = {(d, f) for d, f, _ in bins[name].pieces.tolist()}
        assert len(held) == len(bins[name].pieces)


def test_concat_has_no_padding_and_its_labels_are_its_tokens(root):
    with open_sampler(root, rows=2, row_tokens=32) as sampler:
        batch = next(sampler)
        assert batch.counts is None
        assert np.array_equal(batch.targets(), batch.tokens[:, 1:])


def test_exposure_counts_labels_and_is_exact_after_resume(root):
    bins = {n: bins_of(root, n) for n in "ab"}
    with open_sampler(root, **OPTIONS | {"rows": 4}) as sampler:
        labels, rows = {"a": 0, "b": 0}, {"a": 0, "b": 0}
        for step in range(90):
            if step == 40:
                sampler.push({"a": 0.2, "b": 0.8})
            if step == 60:
                state, rows_then = json.loads(json.dumps(sampler.state_dict())), dict(rows)
            batch = next(sampler)
            for k, name in enumerate("ab"):
                mine = batch.domains == k
                labels[name] += int((batch.targets()[mine] != -100).sum())
                rows[name] += int(mine.sum())
            exposure = sampler.exposure()
            for name in "ab":
                found, epoch = exposure[name], bins[name].rows
                assert (found["rows"], found["tokens"]) == (rows[name], labels[name])
                assert found["epochs"] == rows[name] / epoch
                if rows[name] <= epoch:
                    assert found["unique_tokens"] == labels[name]
                else:
                    assert found["unique_tokens"] == bins[name].tokens - epoch
    with open_sampler(root, **OPTIONS | {"rows": 2, "world": 2}) as resumed:
        resumed.load_state_dict(state)
        for _ in range(30):
            next(resumed)
        assert resumed.exposure() == exposure
        resumed.load_state_dict(state)  # back: what was counted behind it does not count
        before = resumed.exposure()
        assert {name: found["rows"] for name, found in before.items()} == rows_then
        for _ in range(30):
            next(resumed)
        assert resumed.exposure() == exposure
    with (
        open_sampler(root, rows=4, row_tokens=32, weights=WEIGHTS) as concat,
        pytest.raises(ConfigError, match="packing of the state is 'best_fit', of this sampler 'concat'"),
    ):
        concat.load_state_dict(state)


@pytest.mark.parametrize("threads", [0, 3])
def test_world_size_and_pushes_change_no_row(root, threads):
    def run(world):
        samplers = [
            open_sampler(root, **OPTIONS | {"rows": 6 // world}, world=world, rank=r, threads=threads)
            for r in range(world)
        ]
        found = []
        for step in range(40):
            if step % 7 == 3:
                for s in samplers:
                    s.push({"a": 1, "b": step})
            batches = [next(s) for s in samplers]
            found.append(
                (np.concatenate([b.tokens for b in batches]).tolist(), sum(b.counts.sum() for b in batches))
            )
            domains, ids = samplers[-1].ids(step)
            assert np.array_equal(ids, np.concatenate([b.row_ids for b in batches]))
            assert np.array_equal(domains, np.concatenate([b.domains for b in batches]))
        for s in samplers:
            s.close()
        return found

    assert run(1) == run(2) == run(3)


@pytest.mark.parametrize("options", [{"packing": "best_fit"}, {"order": "windowed", "window": 2}])
def test_the_order_alone_gives_the_same_rows(root, options):
    with open_sampler(root, rows=3, row_tokens=16, weights=WEIGHTS, **options) as sampler:
        order = Order.from_json(json.loads(json.dumps(sampler.order.to_json())))
        shares = sampler._core.mixes_at(0)[0][2]
        domains, ids, _, _ = order.draw(0, 60, shares, [0, 0], [0, 0])
        for step in range(60):
            batch = next(sampler)
            assert np.array_equal(batch.domains, domains[step])
            assert np.array_equal(batch.row_ids, ids[step])


def test_renormalise_reads_every_bin_once(root):
    with open_sampler(root, **OPTIONS, exhaustion="renormalise") as sampler:
        read = [(int(b.domains[0]), int(b.row_ids[0])) for b in sampler]
    assert len(read) == len(set(read)) == bins_of(root, "a").rows + bins_of(root, "b").rows


def stored(root):
    return sorted(p.name for p in (root / "b").glob("*.bins"))


def test_the_file_is_used_again_and_renewed_when_it_does_not_fit(root):
    first = bins_of(root, "b")
    (name,) = stored(root)
    path = root / "b" / name
    written = path.stat().st_mtime_ns
    assert np.array_equal(bins_of(root, "b").pieces, first.pieces)
    assert path.stat().st_mtime_ns == written
    content = path.read_bytes()
    for damage in (
        content[:-1],
        content[:-1] + bytes([content[-1] ^ 1]),
        b"",
        b"{}\n",
        content.replace(b'"version": 1', b'"version": 2'),
    ):
        path.write_bytes(damage)
        assert np.array_equal(bins_of(root, "b").pieces, first.pieces)
        assert path.read_bytes() == content
    bins_of(root, "b", eos=4)
    bins_of(root, "b", row_tokens=20)
    assert len(stored(root)) == 3
    index = root / "b" / "index.json"
    index.unlink()
    for shard in (root / "b").glob("shard*"):
        shard.unlink()
    write_domain(root / "b", [200, 3, 33, 34, 1, 49], seed=3)  # as many tokens and documents as before
    renewed = bins_of(root, "b")
    assert not np.array_equal(renewed.pieces, first.pieces)
    assert len(load_index(root / "b").shards) == 1


def test_a_folder_that_cannot_be_written_leaves_the_cache(root, tmp_path_factory, monkeypatch):
    cache = tmp_path_factory.mktemp("cache")
    (
        root / "b" / "best_fit.t32.eos.lock"
    ).mkdir()  # refuses the lock, as a read-only folder would (root may write)
    data = open_domains({"b": root / "b"}, None)["b"]
    bins = load_bins(data, 32, None, cache=cache)
    assert bins.path.parent == cache
    assert load_bins(data, 32, None, cache=cache).path == bins.path
    (tmp_path_factory.getbasetemp() / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be stored in .* nor in"):
        load_bins(data, 32, None, cache=tmp_path_factory.getbasetemp() / "file")


def test_processes_that_ask_at_once_agree(root):
    code = f"""if True:
    from velopath import open_sampler
    with open_sampler({{"b": {str(root / "b")!r}}}, rows=2, row_tokens=32, packing="best_fit") as sampler:
        print(sum(int(next(sampler).tokens.sum()) for _ in range(20)))
    """
    running = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) for _ in range(2)]
    assert len({p.communicate(timeout=60)[0] for p in running}) == 1
    assert all(p.returncode == 0 for p in running)
    assert not list(Path(root).rglob("*.tmp"))


def test_bins_of_other_documents_are_refused(root):
    """Hashes missing in the index, so that the file seems to fit: the documents themselves tell."""
    data = open_domains({"b": root / "b"}, None)["b"]
    bins = load_bins(data, 32, None)
    write_domain(root / "c", [1, 1, 1, 1, 1, 311], seed=2)
    other = open_domains({"c": root / "c"}, None)["c"]
    from velopath import _core

    core = _core.Sampler(
        [other.stream], [bins.packing], keys=[0], shares=[1 << 32], seed=0, rank=0, world=1, rows=1, row_tokens=32,
        exhaustion="repeat", start_step=0, threads=0, prefetch=1, stall_seconds=5, window=0, boundaries=False,
        padding=0, staged=False, allocate=lambda shape: np.empty(shape, np.int32),
    )  # fmt: skip
    with pytest.raises(DataError, match=r"the bins are of other data, remove (their file|.*\.bins$)"):
        for _ in range(bins.rows):
            core.next()


def test_the_command_shows_what_packing_costs(root):
    from typer.testing import CliRunner

    from velopath.cli.app import app

    ran = CliRunner().invoke(app, ["pack", str(root), "--row-tokens", "32", "--json"])
    assert ran.exit_code == 0, ran.output
    found = json.loads(ran.output)["domains"]
    for name in "ab":
        lengths = np.array([len(d) for d in read_documents(root / name)])
        bins = bins_of(root, name)
        assert found[name]["file"] == str(bins.path)
        assert found[name]["documents"] == len(lengths)
        assert found[name]["truncated_share"] == (lengths > 33).mean()
        assert found[name]["padding_share"] == 1 - bins.tokens / (33 * bins.rows)
        assert found[name]["cut_by_concat"] == pytest.approx(np.minimum(1, (lengths - 1) / 32).mean())
    shown = CliRunner().invoke(app, ["pack", str(root), "-t", "32"]).output
    assert f"{bins_of(root, 'a').rows:,}" in shown
    assert "cut by concat" in shown
