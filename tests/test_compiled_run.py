"""A whole run on one compiled graph: main path, branch, a second slice of fewer domains, controls between them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch._dynamo as dynamo

from conftest import write_data
from small_run import config, in_force
from velopath.run import Run
from velopath.runfolder import RunFolder
from velopath.segments import cut_version, train_main


def test_segments_slices_and_weights_share_one_graph(data: Path, tmp_path: Path) -> None:
    """A step made for each segment, or sums as wide as each slice, would compile again: an error here."""
    fewer = write_data(tmp_path / "two", names=("prose", "tables"), documents=60)
    slices = {"one": {"root": str(data), "steps": 4}, "two": {"root": str(fewer), "steps": 4}}
    changes = {
        "data__packing": "best_fit",
        "train__document_mask": True,
        "train__micro_rows": 2,
        "path__branch_share": 0.5,
        "path__warmup_steps": 1,
        "control__every": 2,
        "data__slices": slices,
    }

    def work(folder: Path, compile: bool) -> None:
        settings = config(data, train__compile=compile, **changes)
        with Run.open(settings, folder, "test") as run:
            train_main(run, 4)
            cut_version(run, "v1")
            train_main(run, 6)
            cut_version(run, "v2")

    dynamo.reset()
    dynamo.utils.counters.clear()
    with dynamo.config.patch(error_on_recompile=True):
        work(tmp_path / "run", compile=True)
    assert dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not dynamo.utils.counters["graph_break"]
    dynamo.reset()
    records = in_force(tmp_path / "run", "step")
    assert [(r["segment"], r["step"]) for r in records] == [
        *(("main", n) for n in range(1, 7)), *(("v1", n) for n in (3, 4)), *(("v2", n) for n in (7, 8))
    ]  # fmt: skip
    assert {r["rate"] for r in records} == {1e-2, 5e-3}
    weights = [tuple(r["weights"]) for r in in_force(tmp_path / "run", "control")]
    assert set(weights) == {("code", "prose", "tables"), ("prose", "tables")}
    timed = RunFolder(tmp_path / "run").metrics("step")
    assert all({"data", "forward", "backward", "optimizer"} <= set(r["phase_seconds"]) for r in timed)
    assert any("save" in r["phase_seconds"] for r in timed) and any(
        "evaluate" in r["phase_seconds"] for r in timed
    )
    work(tmp_path / "eager", compile=False)
    for ours, theirs in zip(in_force(tmp_path / "eager", "step"), records, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["stream"] == theirs["stream"]
