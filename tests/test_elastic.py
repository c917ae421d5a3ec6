"""Elastic and exact: ranks, threads and resumes never change what is read; logs survive kills (R1, R3, R4, R5)."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sampler_reference import write_domain
from velopath import LrPath, Session, open_sampler
from velopath.audit import read_log, verify, weights_log
from velopath.errors import PushRejectedError, VelopathError
from velopath.replay import steps

NAMES = ("a", "b", "c", "d")
WEIGHTS = {"a": 0.4, "b": 0.3, "c": 0.2, "d": 0.1}
PATH = LrPath.main(peak=1e-3, warmup_steps=4)
PUSHES: dict[int, dict[str, float]] = {
    4: {"a": 1, "b": 2, "c": 3, "d": 4},
    11: {"a": 0, "b": 0, "c": 1, "d": 1},
    13: {"a": 1, "b": 1, "c": 1, "d": 1},
    21: {"a": 5, "b": 1, "c": 1, "d": 0},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("domains")
    for k, name in enumerate(NAMES):
        write_domain(root / name, [50 + 7 * k] * (6 + 3 * k), seed=k)
    return root


class Ranks:
    """The sessions of all ranks of a run of 12 rows a step, in one process; rank 0 writes the audit log."""

    def __init__(self, root: Path, world: int, log: Path, state: Any = None, **options: Any) -> None:
        given = {"rows": 12 // world, "row_tokens": 8, "weights": WEIGHTS, "world": world} | options
        self.samplers = [open_sampler(root, rank=r, audit=log, **given) for r in range(world)]
        self.sessions = [Session(s, PATH) for s in self.samplers]
        if state is not None:
            for session in self.sessions:
                session.load_state_dict(json.loads(json.dumps(state)))

    def walk(self, until: int) -> list[tuple[list[int], list[int]]]:
        """Domains and ids of the global rows, step by step; the pushes of `PUSHES` on every rank."""
        found = []
        while self.sessions[0].step < until:
            step = self.sessions[0].step
            pending = {w["from_step"] for w in self.samplers[0].state_dict()["weights"]}
            if step in PUSHES and step not in pending:
                for sampler in self.samplers:
                    sampler.push(PUSHES[step], reason="test")
            try:
                batches = [session.next_batch() for session in self.sessions]
            except StopIteration:
                break
            for session in self.sessions:
                session.on_step()
            found.append(
                tuple(
                    sum((getattr(b, part).tolist() for b in batches), []) for part in ("domains", "row_ids")
                )
            )
        return found  # type: ignore[return-value]

    def close(self) -> dict[str, Any]:
        states = [session.state_dict() for session in self.sessions]
        for state in states:
            state["sampler"].pop("rows"), state["sampler"].pop("world")
        assert all(state == states[0] for state in states)
        state = self.sessions[-1].state_dict()
        for sampler in self.samplers:
            sampler.close()
        return state


@pytest.mark.parametrize("exhaustion", ["repeat", "renormalise", "stop"])
@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_ranks_come_and_go_and_the_rows_stay(
    root: Path, tmp_path: Path, exhaustion: str, packing: str
) -> None:
    """1 -> 2 -> 4 -> 3 -> 1 ranks with pushes in between and other threads: rows, hash, exposure and log agree."""
    options = {"exhaustion": exhaustion, "packing": packing, "threads": 0}
    alone = Ranks(root, 1, tmp_path / "alone.jsonl", **options)
    whole = alone.walk(30)
    exposure = alone.samplers[0].exposure()
    last = alone.close()
    assert (len(whole) == 30) == (exhaustion == "repeat")  # 4 domains hold some 200 rows, 360 are asked for
    found, state = [], None
    for world, until in ((1, 3), (2, 6), (4, 12), (3, 16), (1, 30)):
        ranks = Ranks(root, world, tmp_path / "many.jsonl", state, **(options | {"threads": world % 3}))
        found += ranks.walk(until)
        counted = ranks.samplers[0].exposure()
        state = ranks.close()
    assert found == whole
    assert state == last
    assert counted == exposure
    for k, name in enumerate(NAMES):
        assert counted[name]["rows"] == sum(domains.count(k) for domains, _ in found)
    for log in ("alone.jsonl", "many.jsonl"):
        assert verify(tmp_path / log).records
        replayed = [(s.domains.tolist(), s.row_ids.tolist()) for s in steps(weights_log(tmp_path / log), 30)]
        assert replayed == whole
    assert list(steps(weights_log(tmp_path / "many.jsonl"), 30))[-1].hash == state["stream"]
    kinds = [r["kind"] for r in read_log(tmp_path / "many.jsonl")]
    assert kinds.count("rewind") == 4


@pytest.mark.parametrize("threads", [0, 1, 4])
def test_a_windowed_order_is_shared_by_ranks_too(tmp_path: Path, threads: int) -> None:
    """Four shards a domain, windows of two: ranks agree with one process, and the log alone with both."""
    for k, name in enumerate(NAMES):
        write_domain(tmp_path / "data" / name, [60] * 12, seed=k, size_limit=600)
    assert len(list((tmp_path / "data/a").glob("shard.*"))) > 2
    options = {"order": "windowed", "window": 2, "threads": threads}
    found = []
    for world in (1, 3):
        log = tmp_path / f"{world}.jsonl"
        ranks = Ranks(tmp_path / "data", world, log, **options)
        found.append(ranks.walk(25))
        last = ranks.close()["stream"]
        assert [(s.domains.tolist(), s.row_ids.tolist()) for s in steps(weights_log(log), 25)] == found[0]
        assert list(steps(weights_log(log), 25))[-1].hash == last
    assert found[0] == found[1]


def test_ranks_that_were_pushed_differently_are_told(root: Path, tmp_path: Path) -> None:
    ranks = Ranks(root, 2, tmp_path / "audit.jsonl")
    ranks.walk(2)
    ranks.samplers[1].push({"a": 1, "b": 1, "c": 1, "d": 1})
    for session in ranks.sessions:
        session.next_batch()
        session.on_step()
    assert ranks.sessions[0].stream_hash != ranks.sessions[1].stream_hash
    ranks.sessions[1]._batch = ranks.samplers[1].next()._replace(step=2)  # rows of another step
    with pytest.raises(VelopathError, match="rank 1 read rows .* at step 2, its part of the plan is"):
        ranks.sessions[1].on_step()


def test_a_state_of_1000_domains_is_small(root: Path) -> None:
    """Less than 1 MB of JSON, two pushes to come among it, and the resume is exact."""
    folders = {f"domain-{k:04d}-with-a-longer-name": root / "d" for k in range(1000)}
    rng = np.random.default_rng(0)
    weights = [dict(zip(folders, rng.dirichlet(np.ones(1000)).tolist(), strict=True)) for _ in range(3)]

    def opened(world: int, rank: int) -> Any:
        return open_sampler(
            folders, rows=64 // world, world=world, rank=rank, row_tokens=8, weights=weights[0], threads=0
        )

    with opened(1, 0) as sampler:
        first = [next(sampler) for _ in range(3)]
        sampler.push(weights[1], at_step=5)
        sampler.push(weights[2], at_step=9)
        text = json.dumps(sampler.state_dict())
        assert len(text) < 1_000_000
        rest = [next(sampler).row_ids.tolist() for _ in range(9)]
    assert len({int(d) for b in first for d in b.domains}) > 60
    ranks = [opened(2, r) for r in range(2)]
    for sampler in ranks:
        sampler.load_state_dict(json.loads(text))
    assert [sum((next(s).row_ids.tolist() for s in ranks), []) for _ in range(9)] == rest


@pytest.mark.parametrize("k", [2, 3, 10, 100])
def test_shares_come_out_within_a_row_or_two(root: Path, k: int) -> None:
    """R5: cumulative rows within 1 of the asked share until the first push, within 2 after any pushes."""
    names = [f"{i:03d}" for i in range(k)]
    rng = np.random.default_rng(k)
    with open_sampler(
        dict.fromkeys(names, root / "d"), rows=4, row_tokens=8, weights=dict.fromkeys(names, 1), threads=0
    ) as sampler:
        asked, worst = np.zeros(k), {False: 0.0, True: 0.0}
        for step in range(300):
            pushed = step >= 100
            if pushed:  # equal ones again at every step for a while, then others
                weights = (
                    rng.dirichlet(np.full(k, 0.3))
                    if step % 50 == 0 or step > 200
                    else list(sampler.weights.values())
                )
                sampler.push(dict(zip(names, map(float, weights), strict=True)))
            asked += 4 * np.array(list(sampler.weights.values()))
            next(sampler)
            given = np.array([e["rows"] for e in sampler.exposure().values()])
            worst[pushed] = max(worst[pushed], float(np.abs(asked - given).max()))
    assert worst[False] < 1 and worst[True] < 2, worst


BAD_PUSHES: dict[str, tuple[Any, int | None, str]] = {
    "late": (WEIGHTS, 2, "late"),
    "duplicate": (WEIGHTS, 12, "duplicate"),
    "out of order": (WEIGHTS, 9, "out of order"),
    "nan": (WEIGHTS | {"a": float("nan")}, 15, "finite"),
    "negative": (WEIGHTS | {"a": -1.0}, 15, "0 or more"),
    "zero sum": (dict.fromkeys(NAMES, 0.0), 15, "all weights are 0"),
    "unknown domain": (WEIGHTS | {"x": 1.0}, 15, "unknown domain 'x'"),
    "missing domain": ({"a": 1.0}, 15, "no weight for domain 'b'"),
}


@pytest.mark.parametrize("case", BAD_PUSHES)
def test_a_bad_push_changes_nothing_on_any_rank(root: Path, tmp_path: Path, case: str) -> None:
    """R4: refused on both ranks, not in the log, and the rows are those of a run that was never asked."""
    weights, at_step, message = BAD_PUSHES[case]
    plain = Ranks(root, 1, tmp_path / "plain.jsonl")
    asked = Ranks(root, 2, tmp_path / "asked.jsonl")
    for ranks in (plain, asked):
        ranks.walk(5)
        for sampler in ranks.samplers:
            sampler.push(PUSHES[11], at_step=12)
    before = (tmp_path / "asked.jsonl").read_bytes()
    for sampler in asked.samplers:
        with pytest.raises(PushRejectedError, match=message):
            sampler.push(weights, at_step=at_step)
    assert (tmp_path / "asked.jsonl").read_bytes() == before
    for ranks in (plain, asked):
        ranks.sessions[0].sampler.state_dict()
    expected = [plain.sessions[0].next_batch().row_ids.tolist()]
    found = [sum((s.next_batch().row_ids.tolist() for s in asked.sessions), [])]
    for session in (*plain.sessions, *asked.sessions):
        session.on_step()
    for _ in range(10):
        expected.append(plain.samplers[0].next().row_ids.tolist())
        found.append(sum((s.next().row_ids.tolist() for s in asked.samplers), []))
    assert found == expected


def test_a_push_that_was_recorded_and_then_killed_is_undone(root: Path, tmp_path: Path) -> None:
    """R4: the log is ahead of the state; the resume rewinds it, pushes once more, and the replay is the stream."""
    log = tmp_path / "audit.jsonl"
    whole = Ranks(root, 1, tmp_path / "whole.jsonl").walk(20)
    ranks = Ranks(root, 1, log)
    ranks.walk(10)
    state = ranks.sessions[0].state_dict()
    ranks.walk(11)
    commit = ranks.samplers[0]._core
    ranks.samplers[0]._core = _Dying(commit)  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        ranks.samplers[0].push(PUSHES[11])
    ranks.samplers[0]._core = commit
    ranks.close()
    assert [p.step for p in weights_log(log).pushes] == [4, 11]
    resumed = Ranks(root, 1, log, state)
    assert [p.step for p in weights_log(log).pushes] == [4]
    assert resumed.walk(20) == whole[10:]
    assert [(s.domains.tolist(), s.row_ids.tolist()) for s in steps(weights_log(log), 20)] == whole
    assert [r["id"] for r in read_log(log)] == list(range(len(read_log(log))))


class _Dying:
    """A core whose process ends between the record of a push and its effect."""

    def __init__(self, core: Any) -> None:
        self._core = core

    def commit_push(self, shares: list[int]) -> None:
        self._core.abort_push()
        raise KeyboardInterrupt

    def __getattr__(self, name: str) -> Any:
        return getattr(self._core, name)


# A process that reads, pushes every third step and saves its state every seventh, until it is killed or done.
WORKER = """
import json, os, sys
from velopath import open_sampler
from velopath.durable import write_durably
from velopath.stream_order import next_hash
from pathlib import Path
root, folder = Path(sys.argv[1]), Path(sys.argv[2])
state = folder / "state.json"
while os.read(0, 1):  # one life a byte; each in a child of its own
    if (child := os.fork()):
        print(child, flush=True)
        print(os.waitpid(child, 0)[1], flush=True)
        continue
    sampler = open_sampler(root, rows=4, row_tokens=8, audit=folder / "audit.jsonl", weights=dict.fromkeys("abcd", 1))
    hash = sampler.order.first_hash()
    if state.exists():
        saved = json.loads(state.read_bytes())
        sampler.load_state_dict(saved["sampler"])
        hash = saved["hash"]
    while sampler.step < 400:
        step = sampler.step
        if step % 3 == 0 and sampler.weights.from_step != step:
            sampler.push({name: 1 + (step * k) % 7 for k, name in enumerate("abcd")})
        batch = next(sampler)
        hash = next_hash(hash, step, batch.domains, batch.row_ids)
        if sampler.step % 7 == 0 or sampler.step == 400:
            write_durably(state, json.dumps({"sampler": sampler.state_dict(), "hash": hash}).encode())
    os._exit(0)
"""


def _live(worker: subprocess.Popen[str]) -> int:
    """Begin the next life; its pid."""
    assert worker.stdin is not None and worker.stdout is not None
    worker.stdin.write("x")
    worker.stdin.flush()
    return int(worker.stdout.readline())


def test_killed_while_pushing(root: Path, tmp_path: Path) -> None:
    """R1: kill -9 at random points. VELOPATH_KILL_ROUNDS=10 in the environment makes it 200, in about a minute."""
    kills = 20 * int(os.environ.get("VELOPATH_KILL_ROUNDS", "1"))
    rng = random.Random(7)
    outcomes = []
    for name, wanted in (("whole", 0), *((f"killed-{i}", 20) for i in range(kills // 20))):
        folder = tmp_path / name
        folder.mkdir()
        worker = subprocess.Popen(
            [sys.executable, "-c", WORKER, str(root), str(folder)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert worker.stdin is not None and worker.stdout is not None
        log, done = folder / "audit.jsonl", 0
        for _ in range(wanted):
            goal = (log.stat().st_size if log.exists() else 0) + rng.randint(0, 6000)
            child = _live(worker)
            while (log.stat().st_size if log.exists() else 0) < goal:
                time.sleep(0.0003)
            os.kill(child, signal.SIGKILL)
            done += os.WIFSIGNALED(int(worker.stdout.readline()))
        _live(worker)
        assert int(worker.stdout.readline()) == 0
        worker.stdin.close()
        worker.wait()
        assert done >= wanted * 0.5
        last = json.loads((folder / "state.json").read_bytes())
        replayed = list(steps(weights_log(log), 400))
        assert len(replayed) == 400 and replayed[-1].hash == last["hash"]
        outcomes.append(last)
    assert all(outcome == outcomes[0] for outcome in outcomes)
