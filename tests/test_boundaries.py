"""Document boundaries in batches: documents, positions and cu_seqlens, against the documents themselves."""

import gc

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mds_builder import write_folder
from sampler_reference import write_domain
from velopath import open_sampler
from velopath.mds import read_documents

T = 16


def write_documents(folder, lengths):
    """One shard of documents, empty ones among them, as only other writers make them."""
    rng = np.random.default_rng(len(lengths))
    documents = [rng.integers(0, 60_000, n).astype("<u2").tobytes() for n in lengths]
    write_folder(
        folder,
        [[bytes([4, len(d) // 2]) + d] for d in documents],
        {"tokens": ("ndarray:uint16", None)},
    )


def labelled_stream(folder, eos):
    """The domain's stream and the number of the document of each token; an eos is of the document it ends."""
    documents = [np.append(d, eos) if eos is not None else d for d in read_documents(folder)]
    numbers = [np.full(len(d), i) for i, d in enumerate(documents)]
    return np.concatenate(documents).astype(np.int32), np.concatenate(numbers)


def expected_row(stream, numbers, starts, position, width):
    """Tokens, documents and positions of a row, token by token."""
    tokens, documents, positions = [], [], []
    for i in range(width):
        at = (position + i) % len(stream)
        begins = i == 0 or at in starts
        documents.append(0 if i == 0 else documents[-1] + begins)
        positions.append(0 if begins else positions[-1] + 1)
        tokens.append(stream[at])
    return tokens, documents, positions


def sequences(positions):
    """cu_seqlens of the inputs by their definition: where a position is 0, and the end."""
    inputs = positions[:, :-1].reshape(-1)
    return [*np.flatnonzero(inputs == 0).tolist(), inputs.size]


# Documents shorter and longer than a row, of one token, and empty ones; one that goes round the end of the stream.
LENGTHS = [3, 1, 40, 0, 0, 7, 16, 17, 1, 1, 65, 0]


@pytest.mark.parametrize("eos", [None, 7])
@pytest.mark.parametrize("threads", [0, 2])
def test_boundaries_follow_the_documents(tmp_path, eos, threads):
    write_documents(tmp_path / "x", LENGTHS)
    stream, numbers = labelled_stream(tmp_path / "x", eos)
    starts = {0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist()}
    rows_of_epoch = len(stream) // T
    with open_sampler(
        tmp_path, rows=3, row_tokens=T, eos=eos, boundaries=True, threads=threads, prefetch=3
    ) as sampler:
        assert sampler.table.tokens == (len(stream),)
        seen = set()
        for _ in range(60):
            batch = next(sampler)
            for values in (batch.documents, batch.positions):
                assert values.dtype == np.int32
                assert values.shape == batch.tokens.shape == (3, T + 1)
            assert batch.cu_seqlens.dtype == np.int32
            assert batch.cu_seqlens.tolist() == sequences(batch.positions)
            assert batch.counts is None
            for row in range(3):
                fits = [
                    p for p in range(len(stream))
                    if np.array_equal(np.take(stream, np.arange(p, p + T + 1), mode="wrap"), batch.tokens[row])
                ]  # fmt: skip
                assert len(fits) == 1, "the random tokens are not random enough for this test"
                _, documents, positions = expected_row(stream, numbers, starts, fits[0], T + 1)
                assert batch.documents[row].tolist() == documents
                assert batch.positions[row].tolist() == positions
                seen.add(int(batch.row_ids[row]) % rows_of_epoch)
        assert len(seen) == rows_of_epoch


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(0, 50), min_size=1, max_size=60),
    row_tokens=st.integers(1, 40),
    eos=st.one_of(st.none(), st.just(5)),
    packing=st.sampled_from(["concat", "best_fit"]),
)
def test_asking_changes_no_token(tmp_path_factory, lengths, row_tokens, eos, packing):
    root = tmp_path_factory.mktemp("any")
    write_documents(root / "x", [*lengths, row_tokens])
    options = {"rows": 2, "row_tokens": row_tokens, "eos": eos, "packing": packing, "threads": 0}
    with open_sampler(root, **options) as plain, open_sampler(root, **options, boundaries=True) as asked:
        for _ in range(15):
            one, other = next(plain), next(asked)
            assert np.array_equal(one.tokens, other.tokens)
            assert np.array_equal(one.row_ids, other.row_ids)
            assert one.documents is one.positions is one.cu_seqlens is None
            assert other.cu_seqlens.tolist() == sequences(other.positions)
            assert (np.diff(other.documents) == 0)[np.diff(other.positions) == 1].all()
            assert (other.positions[:, 1:] == 0)[np.diff(other.documents) != 0].all()


def test_an_eos_ends_its_document(tmp_path):
    write_domain(tmp_path / "x", [5] * 30)
    with open_sampler(tmp_path, rows=4, row_tokens=23, eos=65535, boundaries=True) as sampler:
        for _ in range(40):
            batch = next(sampler)
            ends = batch.tokens[:, :-1] == 65535
            assert (batch.positions[:, 1:][ends] == 0).all()
            assert (batch.positions[:, 1:] == 0).sum() == ends.sum()
            assert np.array_equal(np.diff(batch.documents)[ends], np.ones(ends.sum()))


def test_ranks_and_resume_mark_alike(tmp_path):
    write_documents(tmp_path / "x", LENGTHS * 5)
    options = {"row_tokens": T, "boundaries": True, "eos": 3}
    with open_sampler(tmp_path, rows=4, **options) as whole:
        state = whole.state_dict()
        batches = [next(whole) for _ in range(10)]
    for rank in range(2):
        with open_sampler(tmp_path, rows=2, world=2, rank=rank, **options) as part:
            part.load_state_dict(state)
            for batch in batches:
                mine, own = next(part), slice(2 * rank, 2 * rank + 2)
                assert np.array_equal(mine.documents, batch.documents[own])
                assert np.array_equal(mine.positions, batch.positions[own])
                assert mine.cu_seqlens.tolist() == sequences(batch.positions[own])


def test_arrays_keep_their_contents_while_any_is_held(tmp_path):
    write_domain(tmp_path / "x", [9] * 50)
    made = []

    def allocate(shape):
        made.append(np.full(shape, -5, np.int32))
        return made[-1]

    with open_sampler(
        tmp_path, rows=2, row_tokens=T, boundaries=True, prefetch=2, allocate=allocate
    ) as sampler:
        batch = next(sampler)
        held = batch.positions
        assert any(np.shares_memory(held, m) for m in made)
        copy = held.copy()
        del batch
        gc.collect()
        for _ in range(50):
            next(sampler)
        assert np.array_equal(held, copy)
        assert len(made) <= 3 * 5  # three arrays for each of: ring, held, coming
