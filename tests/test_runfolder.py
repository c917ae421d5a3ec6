"""The run folder: records survive crashes and resumes, one writer at a time."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from velopath.errors import ConfigError, DataError
from velopath.runfolder import RunFolder


def step(number: int, loss: float, segment: str = "main") -> dict[str, object]:
    return {"kind": "step", "segment": segment, "step": number, "loss": loss, "tokens": 64}


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run", create=True)


def test_at_the_border_of_two_slices_both_have_their_records(tmp_path: Path) -> None:
    """The old slice's last evaluation and the new one's first stand at the same step."""
    folder = RunFolder(tmp_path)
    for slice in ("one", "two", "two"):
        folder.append_metric({"kind": "eval", "segment": "main", "step": 40, "slice": slice, "loss": {}})
    assert [r["slice"] for r in folder.metrics("eval", "main")] == ["one", "two"]


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere: no such run folder"):
        RunFolder(tmp_path / "nowhere")


def test_metrics_round_trip_and_filter(run: RunFolder) -> None:
    records = [
        step(0, 6.9),
        {"kind": "eval", "segment": "main", "step": 0, "loss": {"ä": 7.0}},
        step(0, 5.0, "v1"),
    ]
    for record in records:
        run.append_metric(record)
    assert run.metrics() == records
    assert run.metrics("step") == [records[0], records[2]]
    assert run.metrics("step", "v1") == [records[2]]


def test_a_number_that_is_not_finite_becomes_null(run: RunFolder) -> None:
    run.append_metric(step(0, float("nan")) | {"extra": [float("inf")]})
    assert run.metrics() == [step(0, None) | {"extra": [None]}]  # type: ignore[arg-type]


def test_a_torn_last_line_is_skipped_and_cut_off_by_the_next_append(run: RunFolder) -> None:
    run.append_metric(step(0, 6.9))
    run.close()
    path = run.path / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + b'{"kind":"step","segm')
    assert run.metrics() == [step(0, 6.9)]
    run.append_metric(step(1, 6.8))
    assert run.metrics() == [step(0, 6.9), step(1, 6.8)]


def test_a_bad_line_in_the_middle_is_an_error_with_its_number(run: RunFolder) -> None:
    (run.path / "metrics.jsonl").write_text('{"kind":"x","segment":"a","step":0}\n{"kind\n{"kind":"x"}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: not JSON"):
        run.metrics()
    (run.path / "metrics.jsonl").write_text("[1]\n")
    with pytest.raises(DataError, match=r":1: expected a JSON object, got list"):
        run.metrics()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": ["step"]}, "field 'kind': expected a text, got "),
        ({"kind": ...}, "field 'kind': expected a text, got nothing"),
        ({"segment": 3}, "field 'segment': expected a text, got '3'"),
        ({"step": -1}, "field 'step': expected a whole number from 0 on, got '-1'"),
        ({"step": True}, "field 'step': expected a whole number from 0 on, got 'True'"),
        ({"slice": {}}, "field 'slice': expected a text or null"),
        ({"loss": ...}, "field 'loss': expected a number or null, got nothing"),
        ({"rate": "1e-3"}, "field 'rate': expected a number or null, got '1e-3'"),
        ({"kind": "eval"}, "field 'loss': expected an object of numbers by domain, got '6.0'"),
        (
            {"kind": "eval", "loss": {}, "tokens": {"a": 1.5}},
            "field 'tokens': expected an object of token counts",
        ),
        (
            {"kind": "control", "weights": {"a": 1}},
            "field 'velocity': expected an object of numbers by domain, or",
        ),
        (
            {"kind": "exposure", "domains": {"a": 1}},
            "field 'domains': expected an object of numbers by domain and",
        ),
        ({"kind": "alarm", "alarms": [1]}, "field 'alarms': expected a list of objects"),
    ],
)
def test_a_record_that_does_not_fit_is_named(
    run: RunFolder, changes: dict[str, object], message: str
) -> None:
    record = {k: v for k, v in (step(1, 6.0) | changes).items() if v is not ...}
    lines = [json.dumps(step(0, 6.0)), json.dumps(record)]
    (run.path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=rf"metrics\.jsonl:2 {message}"):
        run.metrics()


def test_of_records_written_again_after_a_resume_the_last_counts(run: RunFolder) -> None:
    for record in [step(0, 6.0), step(1, 5.0), step(2, 4.0), step(1, 5.5)]:
        run.append_metric(record)
    assert [(r["step"], r["loss"]) for r in run.metrics("step")] == [(0, 6.0), (2, 4.0), (1, 5.5)]
    assert len(list(run.records())) == 4


def test_a_resume_voids_its_segment_beyond_that_step(run: RunFolder) -> None:
    for number in range(4):
        run.append_metric({"kind": "eval", "segment": "main", "step": number, "loss": {}})
        run.append_metric(step(number, 6.0 - number))
    run.append_metric(step(9, 1.0, "v1"))
    run.append_metric({"kind": "resume", "segment": "main", "step": 2})
    assert [r["step"] for r in run.metrics("step", "main")] == [0, 1, 2]  # after 2 updates: still true
    assert [r["step"] for r in run.metrics("eval")] == [0, 1, 2]
    assert [r["step"] for r in run.metrics("step", "v1")] == [9]


def test_events_are_appended_in_order(run: RunFolder) -> None:
    assert run.events() == []
    run.append_event({"event": "a"})
    run.append_event({"event": "b"})
    assert [e["event"] for e in run.events()] == ["a", "b"]


def test_json_is_written_whole_or_not_at_all(run: RunFolder) -> None:
    assert run.read_json("plan.json") is None
    run.write_json("plan.json", {"planned": 1820})
    with pytest.raises(TypeError):
        run.write_json("plan.json", {"planned": object()})
    assert run.read_json("plan.json") == {"planned": 1820}
    assert [p.name for p in run.path.iterdir()] == ["plan.json"]
    (run.path / "plan.json").write_text("{")
    with pytest.raises(DataError, match=r"plan\.json: not JSON"):
        run.read_json("plan.json")


def test_the_second_writer_is_refused_by_pid_and_host(run: RunFolder) -> None:
    with (
        run.lock(),
        pytest.raises(ConfigError, match=f"written by process {os.getpid()} on host {socket.gethostname()}"),
    ):
        run.lock()
    run.lock().close()


def test_the_lock_of_a_dead_process_is_taken_over(run: RunFolder) -> None:
    code = (
        "import sys, os\nfrom velopath.runfolder import RunFolder\nRunFolder(sys.argv[1]).lock()\nos._exit(9)"
    )
    # os._exit stands for kill -9: nothing is cleaned up, so the text of the lock stays behind
    assert subprocess.run([sys.executable, "-c", code, str(run.path)]).returncode == 9
    left = json.loads((run.path / "lock").read_text())
    assert left["host"] == socket.gethostname()
    with run.lock():
        assert json.loads((run.path / "lock").read_text())["pid"] == os.getpid() != left["pid"]


def test_a_reused_pid_does_not_keep_the_lock(run: RunFolder) -> None:
    text = {"pid": os.getpid(), "host": socket.gethostname(), "started": -1}
    (run.path / "lock").write_text(json.dumps(text))
    run.lock().close()


def test_the_lock_of_another_host_is_believed(run: RunFolder) -> None:
    (run.path / "lock").write_text(json.dumps({"pid": 1, "host": "elsewhere", "started": 0}))
    with pytest.raises(ConfigError, match="process 1 on host elsewhere; if that process is gone, delete"):
        run.lock()
