"""The sampler: rows, shares, epochs, exhaustion, buffers and threads."""

import gc
import json
import os
import signal
import threading
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sampler_reference import Reference, joined, write_domain
from velopath import open_sampler
from velopath.errors import ConfigError, DataError, VelopathError

WEIGHTS = {"a": 0.5, "b": 0.3, "c": 0.2}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Three domains: many short documents over several shards, a few long ones, one document in zstd."""
    root = tmp_path_factory.mktemp("domains")
    rng = np.random.default_rng(0)
    write_domain(root / "a", rng.integers(1, 30, 400).tolist(), seed=1, size_limit=2000)
    write_domain(root / "b", [700, 300, 1, 900, 65], seed=2, dtype="int32")
    write_domain(root / "c", [333], seed=3, compression="zstd")
    return root


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("VELOPATH_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def streams(root, eos=None):
    return {p.name: joined(p, eos) for p in sorted(root.iterdir())}


@pytest.mark.parametrize("threads", [0, 1, 3])
@pytest.mark.parametrize("eos", [None, 7])
def test_rows_equal_the_reference(root, eos, threads):
    with open_sampler(
        root, rows=5, row_tokens=16, seed=9, weights=WEIGHTS, eos=eos, threads=threads
    ) as sampler:
        expected = Reference(streams(root, eos), WEIGHTS, global_rows=5, row_tokens=16, seed=9)
        assert sampler.names == ("a", "b", "c")
        assert sampler.table.tokens == tuple(len(s) for s in expected.streams)
        for step in range(150):  # several epochs of every domain
            batch = next(sampler)
            tokens, domains, ids = expected.step()
            assert batch.step == step
            assert batch.tokens.dtype == batch.domains.dtype == np.int32
            assert np.array_equal(batch.tokens, tokens)
            assert np.array_equal(batch.domains, domains)
            assert np.array_equal(batch.row_ids, ids)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=150),
    row_tokens=st.integers(1, 40),
    eos=st.one_of(st.none(), st.integers(0, 2**31 - 1)),
    seed=st.integers(0, 2**63 - 1),
    limit=st.integers(500, 20_000),
)
def test_any_documents_equal_the_reference(tmp_path_factory, lengths, row_tokens, eos, seed, limit):
    root = tmp_path_factory.mktemp("any")
    lengths = [*lengths, row_tokens]
    write_domain(root / "x", lengths, size_limit=limit)
    with open_sampler(
        root, rows=2, row_tokens=row_tokens, seed=seed, eos=eos, domain_key_salt="s", threads=0
    ) as sampler:
        expected = Reference(
            streams(root, eos), {"x": 1}, global_rows=2, row_tokens=row_tokens, seed=seed, salt="s"
        )
        for _ in range(20):
            assert np.array_equal(next(sampler).tokens, expected.step()[0])


def test_an_epoch_covers_every_row_once_and_epochs_differ(root):
    with open_sampler({"b": root / "b"}, rows=1, row_tokens=20, threads=0) as sampler:
        epoch = 1966 // 20
        seen = [[next(sampler) for _ in range(epoch)] for _ in range(3)]
    orders = [[int(b.row_ids[0]) for b in batches] for batches in seen]
    for number, order in enumerate(orders):
        assert sorted(order) == list(range(number * epoch, (number + 1) * epoch))
    assert orders[0] != [i - epoch for i in orders[1]]
    starts = [{b.row_ids[0] % epoch: b.tokens[0, 0] for b in batches}[0] for batches in seen]
    assert len(set(starts)) == 3  # another offset in every epoch


def test_seed_salt_and_other_domains_key_the_order(root):
    def ids(names, **options):
        with open_sampler(
            {n: root / n for n in names}, rows=4, row_tokens=8, weights=None, **options
        ) as sampler:
            batches = [next(sampler) for _ in range(40)]
        a = sampler.names.index("a")
        return [i for b in batches for i in np.sort(b.row_ids[b.domains == a]).tolist()][:20]

    base = ids("a")
    assert base == ids("a")
    assert base != ids("a", seed=1)
    assert base != ids("a", domain_key_salt="slice-2")
    assert sorted(base)[:3] != list(range(3)) or base != sorted(base)
    with open_sampler(root, rows=1, row_tokens=8, weights={"a": 1, "b": 0, "c": 0}) as sampler:
        beside = [int(next(sampler).row_ids[0]) for _ in range(20)]
    with open_sampler({"a": root / "a"}, rows=1, row_tokens=8) as sampler:
        alone = [int(next(sampler).row_ids[0]) for _ in range(20)]
    assert beside == alone


def test_cumulative_rows_stay_within_one_of_the_shares(root):
    with open_sampler(root, rows=8, row_tokens=4, weights={"a": 0.61, "b": 0.38, "c": 0.01}) as sampler:
        cumulative = np.cumsum(sampler.plan(500), axis=0)
        asked = np.arange(1, 501)[:, None] * 8 * np.array([0.61, 0.38, 0.01])
        assert np.abs(cumulative - asked).max() < 1
        assert np.array_equal(
            sum(np.bincount(next(sampler).domains, minlength=3) for _ in range(500)), cumulative[-1]
        )


def test_plan_counts_without_moving(root):
    with open_sampler(root, rows=4, row_tokens=4, weights=WEIGHTS) as sampler:
        next(sampler)
        sampler.push({"a": 0, "b": 0, "c": 1}, at_step=3)
        counts = sampler.plan(5)
        assert counts.dtype == np.int64
        assert counts.shape == (5, 3)
        assert counts[2:].tolist() == [[0, 0, 4]] * 3
        assert sampler.step == 1
        assert [np.bincount(next(sampler).domains, minlength=3).tolist() for _ in range(5)] == counts.tolist()


def test_exposure_counts_what_was_handed_out(root):
    with open_sampler(root, rows=4, row_tokens=10, world=2, weights=WEIGHTS) as sampler:
        rows = np.zeros(3, int)
        for done in range(1, 120):
            next(sampler)
            exposure = sampler.exposure()
            assert sum(e["rows"] for e in exposure.values()) == 8 * done
        rows = [exposure[n]["rows"] for n in sampler.names]
        assert exposure["c"] == {
            "rows": rows[2],
            "tokens": 10 * rows[2],
            "epochs": rows[2] / 33,
            "unique_tokens": 330,
        }
        assert np.abs(np.array(rows) - 119 * 8 * np.array([0.5, 0.3, 0.2])).max() < 1


def test_stop_ends_before_the_step_that_cannot_be_filled(root):
    with open_sampler(
        root, rows=4, row_tokens=10, weights={"a": 0.5, "b": 0.5, "c": 0}, exhaustion="stop"
    ) as sampler:
        steps = len(list(sampler))
        assert steps == 196 // 2  # b has 196 rows and gives 2 a step
        with pytest.raises(StopIteration):
            next(sampler)
        assert sampler.exposure()["b"]["epochs"] == 1
        assert len(sampler.plan(9)) == 0
        sampler.push({"a": 1, "b": 0, "c": 0})  # the others can go on
        assert next(sampler).step == steps


@pytest.mark.parametrize("threads", [0, 2])
def test_renormalise_goes_on_without_an_exhausted_domain(root, threads):
    with open_sampler(
        root, rows=4, row_tokens=10, weights=WEIGHTS, exhaustion="renormalise", threads=threads
    ) as sampler:
        batches = list(sampler)
        assert len(sampler.plan(1)) == 0
        exposure = sampler.exposure()
    rows = [int(n) // 10 for n in sampler.table.tokens]
    assert len(batches) == sum(rows) // 4
    assert sum(e["rows"] for e in exposure.values()) == sum(rows) // 4 * 4
    read = [(int(k), int(i)) for b in batches for k, i in zip(b.domains, b.row_ids, strict=True)]
    assert len(set(read)) == len(read), "a row was read twice"
    # c (33 rows at .2) is out first; from there on a and b share as .5 to .3
    ends = max(b.step for b in batches if (b.domains == 2).any())
    after = np.concatenate([b.domains for b in batches if ends < b.step <= ends + 40])
    assert abs((after == 0).mean() - 0.5 / 0.8) < 2 / len(after) * 4


def test_a_prepared_folder_gives_its_train_part_and_eos(tmp_path):
    write_domain(tmp_path / "train" / "x", [9, 9])
    write_domain(tmp_path / "heldout" / "x", [9])
    for folder in (tmp_path, tmp_path / "train"):
        (tmp_path / "domains.json").write_text(json.dumps({"version": 1, "eos": 5}))
        assert open_sampler(folder, row_tokens=4).table.tokens == (20,)
        assert open_sampler(folder, row_tokens=4).eos == 5
        assert open_sampler(folder, row_tokens=4, eos=6).eos == 6
        (tmp_path / "domains.json").write_text(json.dumps({"version": 1, "eos": None}))
        assert open_sampler(folder, row_tokens=4).table.tokens == (18,)
    (tmp_path / "domains.json").write_text("{}")
    with pytest.raises(DataError, match=r"domains\.json: not a table of domains"):
        open_sampler(tmp_path, row_tokens=4)


def test_token_shares_are_the_default(root):
    with open_sampler(root, row_tokens=4) as sampler:
        total = sum(sampler.table.tokens)
        assert dict(sampler.weights) == {
            n: t / total for n, t in zip("abc", sampler.table.tokens, strict=True)
        }
        assert (sampler.weights.id, sampler.weights.from_step) == (0, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": 0}, "rows is 0; expected a whole number, 1 or more"),
        ({"row_tokens": True}, "row_tokens is True"),
        ({"rank": 2, "world": 2}, "rank is 2; expected less than world, 2"),
        ({"seed": -1}, "seed is -1"),
        ({"prefetch": 0}, "prefetch is 0"),
        ({"exhaustion": "wrap"}, "exhaustion is 'wrap'; expected one of repeat, renormalise, stop"),
        ({"eos": 1 << 31}, "eos is 2147483648"),
        ({"weights": {"a": 1}}, "no weight for domain 'b'"),
        ({"allocate": lambda shape: np.empty(shape, np.int64)}, "expected a writable C-contiguous .* int32"),
        ({"allocate": lambda shape: np.empty(shape[::-1], np.int32)}, "expected a writable"),
    ],
)
def test_wrong_arguments_are_refused(root, options, message):
    with pytest.raises(ConfigError, match=message):
        open_sampler(root, **{"row_tokens": 8} | options)


def test_a_root_without_domains_is_refused(root, tmp_path):
    with pytest.raises(DataError, match="expected sub-folders that each hold an index.json"):
        open_sampler(tmp_path)
    with pytest.raises(DataError, match="one MDS folder; give the folder above"):
        open_sampler(root / "a")
    with pytest.raises(ConfigError, match="mapping domain -> folder is empty"):
        open_sampler({})


def test_batches_keep_their_contents_while_they_are_held(root):
    with open_sampler(root, rows=3, row_tokens=8, weights=WEIGHTS, prefetch=4) as sampler:
        expected = Reference(streams(root), WEIGHTS, global_rows=3, row_tokens=8)
        held = [next(sampler) for _ in range(60)]
        views = [b.tokens[:, 1:] for b in held]
    del sampler
    gc.collect()
    for batch, view in zip(held, views, strict=True):
        tokens, _, _ = expected.step()
        assert np.array_equal(batch.tokens, tokens)
        assert np.array_equal(view, tokens[:, 1:])


def test_buffers_come_from_allocate_and_return_when_let_go(root):
    made = []

    def allocate(shape):
        made.append(np.full(shape, -1, np.int32))
        return made[-1]

    with open_sampler(root, rows=3, row_tokens=8, prefetch=4, allocate=allocate) as sampler:
        for _ in range(200):
            batch = next(sampler)
            assert any(np.shares_memory(batch.tokens, m) for m in made)
        assert len(made) <= 4 + 2  # the ring, the batch held, and the one that comes
        held = [next(sampler) for _ in range(20)]
        assert len({b.tokens.ctypes.data for b in held}) == 20
        bound = len(made)
        view = held[0].tokens[1]
        kept = view.copy()
        del held, batch
        for _ in range(50):
            next(sampler)
        assert len(made) == bound
        assert np.array_equal(view, kept)  # a view keeps the buffer


def test_an_error_in_a_thread_is_raised_for_its_step(tmp_path):
    write_domain(tmp_path / "x", [40, 40, 40], dtype="int32")
    shard = tmp_path / "x" / "shard.00000.mds"
    content = bytearray(shard.read_bytes())
    content[-4:] = b"\xff\xff\xff\xff"  # the last token becomes -1
    shard.write_bytes(content)
    for threads in (0, 1):
        with open_sampler(tmp_path, rows=1, row_tokens=10, threads=threads) as sampler:
            failed = None
            for _ in range(12):
                try:
                    next(sampler)
                except DataError as error:
                    failed = error
                    break
            assert failed is not None
            assert (failed.path, failed.sample) == (str(shard), 2)
            step = sampler.step
            with pytest.raises(DataError, match="token 39 is -1"):
                next(sampler)
            assert sampler.step == step  # the step was not skipped


def test_a_stall_is_an_error_and_no_step_is_lost(root):
    with open_sampler(root, rows=2, row_tokens=8, weights=WEIGHTS, stall_seconds=0.2) as sampler:
        first = next(sampler)
        sampler._core.begin_push(None)  # as if the disk of the audit log hung
        start = time.monotonic()
        with pytest.raises(VelopathError, match=r"waiting for step 1"):
            next(sampler)
        assert time.monotonic() - start < 5
        sampler._core.abort_push()
        assert [first.step, next(sampler).step, next(sampler).step] == [0, 1, 2]


@pytest.fixture
def interruptible():
    """SIGINT raises `KeyboardInterrupt`, also where whoever started the tests had it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_keyboard_interrupt_reaches_a_waiting_next(root, interruptible):
    with open_sampler(root, rows=2, row_tokens=8) as sampler:
        sampler._core.begin_push(None)
        timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            next(sampler)
        timer.join()
        sampler._core.abort_push()
        assert next(sampler).step == 0


def test_other_threads_run_while_next_waits(root):
    with open_sampler(root, rows=2, row_tokens=8) as sampler:
        sampler._core.begin_push(None)
        timer = threading.Timer(0.2, sampler._core.abort_push)
        timer.start()
        assert next(sampler).step == 0
        timer.join()


def test_a_fork_is_refused_and_the_parent_goes_on(root):
    with open_sampler(root, rows=2, row_tokens=8) as sampler:
        next(sampler)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                next(sampler)
            except VelopathError as error:
                code = 0 if "open the sampler after forking" in str(error) else 2
            sampler.close()
            del sampler
            gc.collect()
            os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert next(sampler).step == 1


def test_a_closed_sampler_says_so_and_closes_twice(root):
    sampler = open_sampler(root, rows=2, row_tokens=8)
    batch = next(sampler)
    kept = batch.tokens.copy()
    sampler.close()
    sampler.close()
    assert np.array_equal(batch.tokens, kept)
    for call in (lambda: next(sampler), lambda: sampler.push({"a": 1, "b": 1, "c": 1})):
        with pytest.raises(VelopathError, match="closed"):
            call()
