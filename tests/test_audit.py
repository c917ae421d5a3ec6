"""The audit log: a chain of hashes that shows every change."""

import hashlib
import json
from dataclasses import replace

import pytest

from sampler_reference import write_domain
from velopath import open_sampler
from velopath.audit import FIRST_HASH, AuditLog, Push, verify, weights_log
from velopath.errors import ConfigError, DataError, WriteError
from velopath.stream_order import Order

ORDER = Order(tokens={"a": 150, "b": 150}, seed=3, global_rows=2, row_tokens=8)


@pytest.fixture
def log(tmp_path):
    path = tmp_path / "audit.jsonl"
    audit = AuditLog(path)
    audit.begin(ORDER, {"a": 0.5, "b": 0.5})
    for i in (1, 2, 3):
        audit.append(
            "push",
            step=10 * i,
            new={"a": i / 4, "b": 1 - i / 4},
            reason=f"push {i}",
            details={"weights_id": i},
        )
    audit.close()
    return path


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def live(path):
    return [(push.id, push.step) for push in weights_log(path).pushes]


def test_records_form_a_chain(log):
    found = verify(log)
    assert (found.records, found.pushes, found.last_step) == (4, 3, 30)
    chain = records(log)
    assert [r["previous"] for r in chain] == [FIRST_HASH, *(r["hash"] for r in chain[:-1])]
    assert found.last_hash == chain[-1]["hash"]
    assert [r["id"] for r in chain] == [0, 1, 2, 3]
    known = weights_log(log)
    assert known.order == ORDER and known.first == {"a": 0.5, "b": 0.5}
    assert known.pushes[1] == Push(2, 20, {"a": 0.5, "b": 0.5})


def test_what_is_in_force_follows_rewinds_and_new_starts(log):
    audit = AuditLog(log)
    audit.begin(ORDER, {"a": 0.5, "b": 0.5})
    assert live(log) == []  # begins anew, unless a state is loaded
    audit.rewind(step=15, weights_id=1, weights={"a": 0.25, "b": 0.75})
    assert live(log) == [(1, 10)]
    audit.append("push", step=18, new={"a": 1, "b": 0}, details={"weights_id": 2})
    assert live(log) == [(1, 10), (2, 18)]
    audit.rewind(step=12, weights_id=2, weights={"a": 0.25, "b": 0.75})  # with a push still to come
    assert live(log) == [(1, 10), (2, 18)]
    audit.close()
    assert verify(log).records == 8


def test_a_branch_forks_from_its_parent(log, tmp_path):
    path = tmp_path / "branch.jsonl"
    fork = AuditLog(path, parent=log)
    fork.begin(ORDER, {"a": 0.5, "b": 0.5})
    fork.rewind(step=25, weights_id=2, weights={"a": 0.5, "b": 0.5})
    fork.append("push", step=26, new={"a": 1, "b": 0}, details={"weights_id": 3})
    first = records(path)[0]
    assert (first["kind"], first["details"]["parent"]) == ("fork", "audit.jsonl")
    assert first["details"]["parent_hash"] == verify(log).last_hash
    with_parent = [(1, 10), (2, 20), (3, 26)]
    assert live(path) == with_parent
    parent = AuditLog(log)  # what the parent does later is not the branch's
    parent.rewind(step=5, weights_id=0, weights={"a": 0.5, "b": 0.5})
    parent.close()
    assert live(log) == [] and live(path) == with_parent
    fork.close()
    for source in (None, log):  # resumed; cut anew
        again = AuditLog(path, parent=source)
        again.begin(ORDER, {"a": 0.5, "b": 0.5})
        again.close()
        assert live(path) == []
    assert records(path)[-1]["details"]["parent_hash"] == verify(log).last_hash
    log.write_text(log.read_text().splitlines(True)[0])
    with pytest.raises(DataError, match=r"branch\.jsonl:1 .*audit\.jsonl has no record of the named hash"):
        weights_log(path)


@pytest.mark.parametrize(
    ("append", "message"),
    [
        (lambda a: a.rewind(step=9, weights_id=4, weights={}), "a rewind to weights 4"),
        (
            lambda a: a.append("push", step=50, new={}, details={"weights_id": 5}),
            "weights 5 for step 50 do not",
        ),
        (lambda a: a.append("push", step=30, new={}, details={"weights_id": 4}), "do not follow 3"),
        (lambda a: a.begin(replace(ORDER, seed=4), {}), "another one than above"),
        (lambda a: a.append("fork", step=0, details={"parent": "../x.jsonl"}), "expected a log beside"),
        (lambda a: a.append("fork", step=0, details={"parent": "audit.jsonl"}), "expected a log beside"),
        (lambda a: a.append("start", step=0, details={"seed": 1}), "not an order of rows"),
    ],
)
def test_records_that_do_not_follow_are_named(log, append, message):
    audit = AuditLog(log)
    append(audit)
    audit.close()
    verify(log)  # the chain is whole
    with pytest.raises(DataError, match=message) as caught:
        weights_log(log)
    assert caught.value.line == 5


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda t: t.replace("push 2", "push 9"), 3),
        (lambda t: t.replace('"step":20', '"step":21'), 3),
        (lambda t: "".join(t.splitlines(True)[:1] + t.splitlines(True)[2:]), 2),  # dropped
        (lambda t: "".join(t.splitlines(True)[:2] + t.splitlines(True)[1:]), 3),  # doubled
        (lambda t: "".join(t.splitlines(True)[i] for i in (0, 2, 1, 3)), 2),  # out of order
        (
            lambda t: t.replace('"reason":"push 3"', '"reason":"x","reason":"push 3"'),
            4,
        ),  # a hidden second value
        (lambda t: t.replace("\n", "\n\n", 1), 2),
        (lambda t: "[1]\n" + t, 1),
        (lambda t: t[: len(t) - 30], 4),  # cut
    ],
)
def test_tampering_is_found_with_its_line(log, change, line):
    text = log.read_text()
    changed = change(text)
    assert changed != text
    log.write_text(changed)
    with pytest.raises(DataError, match=rf"audit\.jsonl:{line}") as caught:
        verify(log)
    assert caught.value.line == line


def test_a_record_written_anew_with_its_own_hash_is_found(log):
    """Only the next record knows: it names the hash of the one that was there."""
    lines = records(log)
    lines[2]["new"] = {"a": 0.9, "b": 0.1}
    rest = {k: v for k, v in lines[2].items() if k != "hash"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    lines[2]["hash"] = hashlib.sha256(text.encode()).hexdigest()
    log.write_text("".join(json.dumps(r, sort_keys=True, separators=(",", ":")) + "\n" for r in lines))
    with pytest.raises(DataError, match=r"audit\.jsonl:4 field 'previous': the record names"):
        verify(log)


def test_every_flipped_byte_is_found(log):
    content = log.read_bytes()
    for at in range(0, len(content), 7):
        damaged = bytearray(content)
        damaged[at] ^= 0x01
        log.write_bytes(damaged)
        with pytest.raises(DataError, match="audit"):
            verify(log)


def test_an_unfinished_last_line_is_dropped_on_opening(log):
    with open(log, "ab") as file:
        file.write(b'{"id":4,"kind":"pu')
    with pytest.raises(DataError, match="unfinished"):
        verify(log)
    audit = AuditLog(log)
    audit.append("push", step=40, new={"a": 0.5, "b": 0.5}, details={"weights_id": 4})
    audit.close()
    assert live(log) == [(1, 10), (2, 20), (3, 30), (4, 40)]


def test_a_broken_chain_is_not_continued(log):
    log.write_text(log.read_text().replace("push 1", "push 0"))
    with pytest.raises(DataError, match="does not fit"):
        AuditLog(log)


def test_a_second_writer_is_refused(log):
    first = AuditLog(log)
    with pytest.raises(ConfigError, match=r"audit\.jsonl is being written by another sampler"):
        AuditLog(log)
    first.close()
    AuditLog(log).close()
    del first
    left_open = AuditLog(log)
    del left_open  # not closed: collected
    AuditLog(log).close()


def test_a_log_that_cannot_be_opened_is_named(tmp_path):
    with pytest.raises(WriteError, match=f"{tmp_path}: cannot be written .Is a directory."):
        AuditLog(tmp_path)


@pytest.fixture
def data(tmp_path):
    for seed, name in enumerate(("a", "b")):
        write_domain(tmp_path / "data" / name, [40, 50, 60], seed=seed)
    return tmp_path / "data"


def open_audited(data, path, **options):
    return open_sampler(data, rows=2, row_tokens=8, weights={"a": 1, "b": 1}, audit=path, **options)


def test_the_sampler_records_pushes_and_rewinds(data, tmp_path):
    path = tmp_path / "audit.jsonl"
    with open_audited(data, path) as sampler:
        for _ in range(3):
            next(sampler)
        state = sampler.state_dict()
        sampler.push({"a": 3, "b": 1}, reason="controller", digest="d1")
        next(sampler)
        sampler.push({"a": 1, "b": 3}, at_step=6)
        sampler.load_state_dict(state)
        sampler.push({"a": 1, "b": 7})
    chain = records(path)
    assert [r["kind"] for r in chain] == ["start", "push", "push", "rewind", "push"]
    assert chain[1]["old"] == {"a": 0.5, "b": 0.5}
    assert chain[1]["new"] == {"a": 0.75, "b": 0.25}
    assert (chain[1]["reason"], chain[1]["digest"], chain[1]["step"]) == ("controller", "d1", 3)
    assert (chain[3]["step"], chain[3]["details"]) == (3, {"weights_id": 0})
    assert chain[4]["new"] == {"a": 0.125, "b": 0.875}
    assert live(path) == [(1, 3)]
    assert weights_log(path).order == sampler.order == Order.from_json(sampler.order.to_json())


def test_a_new_process_that_loads_an_older_state_rewinds(data, tmp_path):
    path = tmp_path / "audit.jsonl"
    with open_audited(data, path) as sampler:
        next(sampler)
        sampler.push({"a": 3, "b": 1})
        state = sampler.state_dict()
        next(sampler)
        sampler.push({"a": 1, "b": 3})
    with open_audited(data, path) as sampler:
        sampler.load_state_dict(state)
    with open_audited(data, path) as sampler:  # begins anew without a state
        sampler.push({"a": 1, "b": 9})
    assert [r["kind"] for r in records(path)] == [
        "start", "push", "push", "start", "rewind", "start", "push"
    ]  # fmt: skip
    assert [push.weights for push in weights_log(path).pushes] == [{"a": 0.1, "b": 0.9}]


def test_a_rejected_push_is_not_recorded_and_other_ranks_write_nothing(data, tmp_path):
    path = tmp_path / "audit.jsonl"
    with open_audited(data, path, world=2) as sampler, open_audited(data, path, rank=1, world=2) as other:
        with pytest.raises(ValueError, match="unknown domain"):
            sampler.push({"a": 1, "b": 1, "c": 1})
        next(sampler)
        with pytest.raises(ValueError, match="late"):
            sampler.push({"a": 1, "b": 1}, at_step=0)
        next(other)
        other.push({"a": 1, "b": 2})
    assert [r["kind"] for r in records(path)] == ["start"]


def test_a_push_that_cannot_be_recorded_has_no_effect(data, tmp_path):
    with open_audited(data, tmp_path / "audit.jsonl") as sampler:
        next(sampler)
        with pytest.raises(ValueError, match="JSON compliant"):
            sampler.push({"a": 3, "b": 1}, reason=float("nan"))
        assert dict(sampler.weights) == {"a": 0.5, "b": 0.5}
        assert sampler.push({"a": 3, "b": 1}).id == 1  # the gate is open again
        assert next(sampler).weights_id == 1
