"""Session: the seam that trainers embed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from velopath import LrPath, Session, Velocitune, open_sampler
from velopath.domains import DomainLoss
from velopath.errors import ConfigError

NAMES = ("code", "prose", "tables")
START = {"code": 2.0, "prose": 3.0, "tables": 4.0}
TARGETS = {"code": 1.0, "prose": 2.0, "tables": 3.0}
PATH = LrPath.main(peak=1e-3, warmup_steps=4)


def make(data: Path, **options: Any) -> Session:
    sampler = open_sampler(data, rows=4, row_tokens=16, seed=3)
    options.setdefault("controller", Velocitune(TARGETS))
    return Session(sampler, PATH, every=5, **options)


def losses(step: int) -> dict[str, float]:
    """Losses that fall at different speeds, a pure function of the step."""
    return {
        n: TARGETS[n] + (START[n] - TARGETS[n]) * f ** (step / 10)
        for n, f in zip(NAMES, (0.2, 0.5, 0.9), strict=True)
    }


def walk(session: Session, until: int) -> list[bytes]:
    """Drive the session as a trainer would; returns what was read."""
    read = []
    if session.control_due:
        session.on_eval(losses(session.step))
    while session.step < until:
        batch = session.next_batch()
        read.append(batch.tokens.tobytes() + batch.domains.tobytes())
        session.on_step(np.array([[16.0, 32.0, 8.0], [16, 32, 16]]))
        if session.control_due:
            session.on_eval(losses(session.step))
    return read


def test_pushes_by_the_update_rule(data: Path) -> None:
    records: list[dict[str, Any]] = []
    session = make(data, record=records.append)
    before = dict(session.weights)
    walk(session, 5)
    fraction = {n: losses(5)[n] - TARGETS[n] for n in NAMES}  # every gap is 1 nat
    raised = {n: before[n] * np.exp(fraction[n]) for n in NAMES}
    for name in NAMES:
        assert session.weights[name] == pytest.approx(raised[name] / sum(raised.values()), rel=1e-12)
    assert session.weights.from_step == 5
    assert [(r["kind"], r["step"], r["reason"]) for r in records] == [
        ("control", 0, "start"),
        ("control", 5, "update"),
    ]


def test_weights_reach_the_very_next_batch(data: Path) -> None:
    session = make(data)
    walk(session, 5)
    assert session.next_batch().weights_id == session.weights.id == 1


def test_rate_is_the_paths(data: Path) -> None:
    session = make(data, controller=None)
    rates = []
    for _ in range(6):
        session.next_batch()
        rates.append(session.rate)
        session.on_step()
    assert rates == [PATH.rate(s) for s in range(6)] == [0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3, 1e-3]


@pytest.mark.parametrize("stop", [3, 5, 12])
def test_resumes_bit_identically(data: Path, stop: int) -> None:
    whole = walk(make(data), 20)
    first = make(data)
    begun = walk(first, stop)
    state = json.loads(json.dumps(first.state_dict()))
    second = make(data)
    second.load_state_dict(state)
    assert second.state_dict() == first.state_dict()
    assert begun + walk(second, 20) == whole


def test_a_batch_in_flight_is_not_part_of_the_state(data: Path) -> None:
    session = make(data)
    walk(session, 7)
    state = session.state_dict()
    session.next_batch()
    assert session.state_dict() == state
    assert state["sampler"]["step"] == 7


def test_training_loss_adds_over_steps_ranks_and_a_resume(data: Path) -> None:
    session = make(data, reduce=lambda sums: sums * 2)  # two ranks with equal sums
    walk(session, 3)
    resumed = make(data, reduce=lambda sums: sums * 2)
    resumed.load_state_dict(json.loads(json.dumps(session.state_dict())))
    walk(resumed, 4)
    assert resumed.training_loss() == DomainLoss(NAMES, (128.0, 256.0, 64.0), (128, 256, 128))
    assert list(resumed.training_loss()) == []


def test_misuse_is_refused(data: Path) -> None:
    session = make(data)
    with pytest.raises(ConfigError, match="on_step without a batch"):
        session.on_step()
    session.next_batch()
    with pytest.raises(ConfigError, match="on_step was not called for step 0"):
        session.next_batch()
    with pytest.raises(ConfigError, match="session state of version None"):
        session.load_state_dict({})
    with pytest.raises(ConfigError, match="every is 0"):
        Session(session.sampler, PATH, every=0)


def test_without_controller_nothing_moves(data: Path) -> None:
    session = make(data, controller=None)
    before = dict(session.weights)
    walk(session, 12)
    assert not session.control_due
    assert dict(session.on_eval(losses(12))) == before == dict(session.weights)
