"""`train --profile` and the time of each phase, from the step records to the report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from commands import velopath
from small_run import write_config
from velopath.phases import PHASES, Phases
from velopath.report import build_summary, write_report
from velopath.runfolder import RunFolder


def test_a_profiled_run_leaves_trace_table_and_phases(data: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.yaml", data, train__peak_flops=1e12)
    done = velopath("train", config, "--run", tmp_path / "run", "--until", 8, "--profile", 2)
    assert done.code == 0, done.err
    assert "profile of 2 steps" in done.out and "FLOP/s" not in done.out and "% MFU)" in done.out
    trace = json.loads((tmp_path / "run/profile/trace.json").read_text())
    updates = [e for e in trace["traceEvents"] if str(e.get("name", "")).startswith("Optimizer.step")]
    assert len(updates) == 2
    assert "aten::mm" in (tmp_path / "run/profile/operators.txt").read_text()
    records = RunFolder(tmp_path / "run").metrics("step")
    assert len(records) == 8
    for record in records:
        assert set(record["phase_seconds"]) <= set(PHASES)
        assert 0 < sum(record["phase_seconds"].values()) <= record["seconds"]
        assert record["mfu"] == pytest.approx(record["flops_per_second"] / 1e12)
    summary = build_summary(tmp_path / "run")
    assert {"data", "forward", "backward", "optimizer", "evaluate", "control", "save"} == set(
        summary["phase_seconds"]
    )
    assert min(r["mfu"] for r in records) <= summary["mfu"] <= max(r["mfu"] for r in records)
    text = write_report(tmp_path / "run").read_text()
    assert "held-out evaluation" in text and f"MFU {summary['mfu']:.1%}" in text


def test_phases_add_up_and_start_anew() -> None:
    phases = Phases(torch.device("cpu"))
    for _ in range(3):
        phases.begin("forward")
        phases.begin("backward")
        phases.begin(None)
    with phases.host("save"):
        pass
    marks, host = phases.take()
    assert [name for name, _ in marks] == ["forward", "backward", None] * 3
    times = [stamp for _, stamp in marks]
    spent = phases.seconds((marks, host))
    assert list(spent) == ["forward", "backward", "save"]
    between = sum(b - a for a, b in zip(times[2:8:3], times[3:9:3], strict=True))  # type: ignore[operator]
    assert spent["forward"] + spent["backward"] == pytest.approx(times[-1] - times[0] - between)  # type: ignore[operator]
    assert phases.seconds(phases.take()) == {}
