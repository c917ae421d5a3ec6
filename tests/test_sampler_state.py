"""The sampler's pushes and state: exactly once, at the named step, and bit-identical after any resume."""

import copy
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sampler_reference import Reference, joined, write_domain
from velopath import open_sampler
from velopath.errors import ConfigError, PushRejectedError

NAMES = ("a", "b", "c", "d")
WEIGHTS = {"a": 0.4, "b": 0.3, "c": 0.2, "d": 0.1}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("domains")
    for k, name in enumerate(NAMES):
        write_domain(root / name, [50 + 7 * k] * (6 + k), seed=k)
    return root


def opened(root, **options):
    return open_sampler(root, **({"rows": 4, "row_tokens": 8, "weights": WEIGHTS} | options))


def facts(batch):
    return batch.step, batch.weights_id, batch.tokens.tolist(), batch.domains.tolist(), batch.row_ids.tolist()


def run(sampler, pushes, until):
    """Steps up to `until`; `pushes` maps a step to the weights pushed, by default, just before it."""
    found = []
    while sampler.step < until:
        if sampler.step in pushes:
            sampler.push(pushes[sampler.step])
        found.append(facts(next(sampler)))
    return found


PUSHES = {
    5: {"a": 1, "b": 2, "c": 3, "d": 4},
    6: {"a": 0, "b": 0, "c": 1, "d": 1},
    17: {"a": 1, "b": 1, "c": 1, "d": 1},
}


@pytest.mark.parametrize("threads", [0, 1, 4])
@pytest.mark.parametrize("prefetch", [1, 3, 8])
def test_a_push_reaches_the_very_next_step(root, threads, prefetch):
    expected = Reference({n: joined(root / n, None) for n in NAMES}, WEIGHTS, global_rows=4, row_tokens=8)
    with opened(root, threads=threads, prefetch=prefetch) as sampler:
        for step in range(30):
            if step in PUSHES:
                pushed = sampler.push(PUSHES[step])
                expected.push(PUSHES[step])
                assert (pushed.from_step, sampler.weights) == (step, pushed)
            batch = next(sampler)
            assert batch.weights_id == sum(s <= step for s in PUSHES)
            tokens, domains, ids = expected.step()
            assert np.array_equal(batch.tokens, tokens)
            assert np.array_equal(batch.domains, domains)
            assert np.array_equal(batch.row_ids, ids)


def test_a_push_at_every_step_is_planned_anew_each_time(root):
    rng = np.random.default_rng(0)
    every = {s: dict(zip(NAMES, rng.dirichlet(np.ones(4)).tolist(), strict=True)) for s in range(300)}
    with opened(root, threads=0) as inline, opened(root, threads=2) as ahead:
        assert run(inline, every, 300) == run(ahead, every, 300)
        drawn, error = ahead._core.cursor_at(300)
        asked = 4 * np.sum([list(w.values()) for w in every.values()], axis=0)
        assert np.abs(asked - drawn).max() < 2


def test_equal_weights_pushed_at_every_step_read_the_same(root):
    with opened(root) as one, opened(root) as other:
        plain = run(one, {}, 100)
        pushed = run(other, dict.fromkeys(range(100), WEIGHTS), 100)
    assert [(s, *rest) for s, _, *rest in plain] == [(s, *rest) for s, _, *rest in pushed]


def test_a_push_for_a_later_step_waits_for_it(root):
    with opened(root) as sampler:
        first = sampler.push({"a": 1, "b": 0, "c": 0, "d": 0}, at_step=3)
        second = sampler.push({"a": 0, "b": 1, "c": 0, "d": 0}, at_step=20)
        assert (first.id, first.from_step, second.id, second.from_step) == (1, 3, 2, 20)
        assert sampler.weights.id == 0
        batches = [next(sampler) for _ in range(25)]
        assert [b.weights_id for b in batches] == [0] * 3 + [1] * 17 + [2] * 5
        assert set(np.concatenate([b.domains for b in batches[3:20]])) == {0}
        assert set(np.concatenate([b.domains for b in batches[20:]])) == {1}
        assert sampler.weights == second


@pytest.mark.parametrize(
    ("weights", "at_step", "message"),
    [
        (WEIGHTS, 2, "push for step 2 is late: the next step not handed out is 5"),
        (WEIGHTS, 9, "push for step 9 is a duplicate: weights 1 take effect at that step"),
        (WEIGHTS, 8, "push for step 8 is out of order: weights 1 are pushed for step 9"),
        (WEIGHTS, None, "push for step 5 is out of order"),
        (WEIGHTS, -1, "at_step is -1"),
        (WEIGHTS, 9.0, "at_step is 9.0"),
        (WEIGHTS | {"a": float("nan")}, 12, "weight of 'a' is nan; expected a finite number"),
        (WEIGHTS | {"a": float("inf")}, 12, "weight of 'a' is inf"),
        (WEIGHTS | {"b": -0.1}, 12, "weight of 'b' is -0.1; expected 0 or more"),
        (dict.fromkeys(NAMES, 0), 12, "all weights are 0"),
        (dict.fromkeys(NAMES, 1e308), 12, "too large"),
        (WEIGHTS | {"x": 1}, 12, "unknown domain 'x'; the domains are a, b, c, d"),
        ({"a": 1}, 12, "no weight for domain 'b'"),
    ],
)
def test_a_rejected_push_changes_nothing(root, weights, at_step, message):
    with opened(root) as sampler, opened(root) as untouched:
        for one in (sampler, untouched):
            run(one, {}, 5)
            one.push({"a": 1, "b": 2, "c": 3, "d": 4}, at_step=9)
        before = sampler.state_dict()
        with pytest.raises(PushRejectedError, match=message):
            sampler.push(weights, at_step=at_step)
        assert sampler.state_dict() == before
        assert run(sampler, {}, 20) == run(untouched, {}, 20)


def test_a_second_push_for_the_next_step_is_a_duplicate(root):
    with opened(root) as sampler:
        sampler.push(WEIGHTS)
        with pytest.raises(PushRejectedError, match="push for step 0 is a duplicate"):
            sampler.push(WEIGHTS)
        next(sampler)
        assert sampler.push(WEIGHTS).id == 2


@settings(max_examples=40, deadline=None)
@given(
    at=st.integers(0, 40),
    back=st.integers(0, 30),
    options=st.sampled_from([{"threads": 0}, {"threads": 1}, {"threads": 4, "prefetch": 3}]),
    other=st.sampled_from([{"threads": 0}, {"threads": 1, "prefetch": 1}, {"rows": 2, "world": 2}]),
)
def test_resume_is_bit_identical(root, at, back, options, other):
    """From any step, also from `after` an earlier one, with pushes done and pending, to other threads."""
    pending = {"a": 5, "b": 1, "c": 1, "d": 1}
    with opened(root, **options) as sampler:
        found = run(sampler, PUSHES, at)
        if at > max(PUSHES):
            sampler.push(pending, at_step=45)
        back = min(back, at)
        state = json.loads(json.dumps(sampler.state_dict(after=at - back - 1 if back else None)))
        tail = found[at - back :] + run(sampler, {s: w for s, w in PUSHES.items() if s >= at}, 60)
        exposure = sampler.exposure()
    with opened(root, **other) as resumed:
        run(resumed, {}, 3)
        resumed.load_state_dict(state)
        assert resumed.step == at - back
        assert resumed.state_dict() == state | {k: other[k] for k in ("rows", "world") if k in other}
        known = {p["from_step"] for p in state["weights"]}
        again = run(resumed, {s: w for s, w in PUSHES.items() if s >= at - back and s not in known}, 60)
        assert resumed.exposure() == exposure
    if "world" in other:
        tail = [(s, w, t[:2], d[:2], i[:2]) for s, w, t, d, i in tail]
    assert again == tail


def test_state_after_is_kept_for_64_steps(root):
    with opened(root, start_step=100) as sampler:
        states = [sampler.state_dict()]
        for _ in range(100):
            next(sampler)
            states.append(sampler.state_dict())
        assert sampler.step == 200
        for back in range(64):
            assert sampler.state_dict(after=199 - back) == states[-1 - back]
        with pytest.raises(
            ConfigError, match="state before step 130 is not kept; the oldest one is that before step 136"
        ):
            sampler.state_dict(after=129)
        with pytest.raises(ConfigError, match="step 201 is not reached; the next one is 200"):
            sampler.state_dict(after=200)


@pytest.mark.parametrize("threads", [0, 2])
def test_world_size_never_changes_what_is_read(root, threads):
    def global_steps(world):
        samplers = [
            opened(root, rows=12 // world, world=world, rank=r, threads=threads) for r in range(world)
        ]
        ranks = [run(s, PUSHES, 30) for s in samplers]
        states = [s.state_dict() for s in samplers]
        assert all(s == states[0] for s in states), "the state differs between ranks"
        for s in samplers:
            s.close()
        return [[sum((r[step][part] for r in ranks), []) for part in (2, 3, 4)] for step in range(30)]

    alone = global_steps(1)
    for world in (2, 3, 4, 12):
        assert global_steps(world) == alone


def test_a_run_through_several_world_sizes_reads_the_same(root):
    with opened(root, rows=12) as sampler:
        whole = run(sampler, PUSHES, 25)
    state, found = None, []
    for world, until in ((1, 5), (2, 10), (4, 15), (3, 20), (1, 25)):
        samplers = [
            opened(root, rows=12 // world, world=world, rank=r, threads=world % 3) for r in range(world)
        ]
        for s in samplers:
            if state is not None:
                s.load_state_dict(state)
        ranks = [run(s, PUSHES, until) for s in samplers]
        state = samplers[-1].state_dict()
        for s in samplers:
            s.close()
        found += [
            (*steps[0][:2], *(sum((x[i] for x in steps), []) for i in (2, 3, 4)))
            for steps in zip(*ranks, strict=True)
        ]
    assert found == whole


def test_start_step_only_shifts_the_numbers(root):
    with opened(root, start_step=700) as sampler:
        expected = Reference(
            {n: joined(root / n, None) for n in NAMES}, WEIGHTS, global_rows=4, row_tokens=8, start_step=700
        )
        assert (sampler.step, sampler.weights.from_step) == (700, 700)
        for step in range(700, 710):
            batch = next(sampler)
            assert batch.step == step
            assert np.array_equal(batch.tokens, expected.step()[0])
        with pytest.raises(PushRejectedError, match="late"):
            sampler.push(WEIGHTS, at_step=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 1}, "seed of the state is 0, of this sampler 1"),
        ({"rows": 5}, r"4 rows x 1 ranks = 4 rows a step, this sampler 5 x 1 = 5"),
        ({"rows": 4, "world": 2}, r"this sampler 4 x 2 = 8"),
        ({"row_tokens": 9}, "row_tokens of the state is 8, of this sampler 9"),
        ({"eos": 3}, "eos of the state is None, of this sampler 3"),
        ({"exhaustion": "stop"}, "exhaustion of the state is 'repeat', of this sampler 'stop'"),
        ({"domain_key_salt": "s"}, "domain_key_salt of the state is '', of this sampler 's'"),
        ({"start_step": 2}, "start_step of the state is 0, of this sampler 2"),
    ],
)
def test_a_state_of_another_stream_is_refused(root, options, message):
    with opened(root) as sampler:
        run(sampler, {}, 3)
        state = sampler.state_dict()
    with opened(root, **options) as other:
        with pytest.raises(ConfigError, match=message):
            other.load_state_dict(state)
        assert next(other).step == options.get("start_step", 0)


def test_other_data_are_refused(root, tmp_path):
    with opened(root) as sampler:
        state = sampler.state_dict()
    folders = {n: root / n for n in NAMES}
    write_domain(tmp_path / "a", [57, 43], seed=9)
    with (
        opened(folders | {"a": tmp_path / "a"}) as other,
        pytest.raises(ConfigError, match="data of domain 'a' differ: tokens"),
    ):
        other.load_state_dict(state)
    write_domain(tmp_path / "same", [50] * 6, seed=9)  # as many tokens, but others: the hashes tell
    with (
        opened(folders | {"a": tmp_path / "same"}) as other,
        pytest.raises(ConfigError, match="'a' differ: fingerprint"),
    ):
        other.load_state_dict(state)
    folders["e"] = folders.pop("d")
    weights = dict.fromkeys("abce", 1)
    with (
        opened(folders, weights=weights) as other,
        pytest.raises(ConfigError, match=r"has the domains .*'d'.*'e'"),
    ):
        other.load_state_dict(state)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: s.update(version=2), "not a sampler state of version 1"),
        (lambda s: s.pop("step"), "damaged: KeyError"),
        (lambda s: s.update(step=-1), "step of the state is -1"),
        (lambda s: s.update(step=1.5), "step of the state is 1.5"),
        (lambda s: s.update(step=4), "counts 12 rows; expected 4 steps x 4"),
        (lambda s: s.update(domains=None), "damaged"),
        (
            lambda s: s["domains"]["a"].update(error=s["domains"]["a"]["error"] + 1),
            "errors of the state sum to 1",
        ),
        (lambda s: s["domains"]["a"].update(drawn="4"), "drawn of 'a' of the state is '4'"),
        (lambda s: s.update(weights=[]), "no weights for its step"),
        (lambda s: s["weights"][0]["shares"].update(a=float("nan")), "weight of 'a' is nan"),
        (
            lambda s: s["weights"].append(copy.deepcopy(s["weights"][0])),
            "pending weights 0 of the state do not follow",
        ),
    ],
)
def test_a_damaged_state_is_refused_and_changes_nothing(root, damage, message):
    with opened(root) as sampler, opened(root) as other:
        run(sampler, {}, 3)
        state = sampler.state_dict()
        damage(state)
        before = other.state_dict()
        with pytest.raises(ConfigError, match=message):
            other.load_state_dict(state)
        assert other.state_dict() == before


def test_memory_of_old_weights_is_let_go(root):
    with opened(root, threads=0) as sampler:
        run(sampler, dict.fromkeys(range(500), WEIGHTS), 500)
        assert len(sampler._mixes) <= 70
        assert sampler.push(WEIGHTS).id == 501
