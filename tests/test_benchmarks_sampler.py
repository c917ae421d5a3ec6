"""The sampler's suite: its bars, the choice among a peer's settings, missing peers, the processes of its limits."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks is no installed package

from benchmarks import bars, sampler, sampler_data, sampler_limits, sampler_peers, scale, synthetic  # noqa: E402


def test_bars_of_the_sampler() -> None:
    limits = {
        "documents": 10_000_000, "domains": 4, "shard_mib": 2.0, "first_batch_seconds": [0.2, 0.09, 0.05],
        "private_mib": [70.0, 73.0, 99.0], "push": {"push-none": [1.0], "push": [1.01, 1.2, 1.04], "push-audit": [1.1]},
    }  # fmt: skip
    ratios = {
        "raw-thread": {"memmap": 4.0, "memcpy": 0.24, "libzstd": 9.0, "mosaic-documents": 90.0},
        "zstd-thread": {"memmap": 4.0, "memcpy": 0.24, "libzstd": 0.5, "mosaic-documents": 90.0},
        "zstd-epoch": {"memmap": 4.0, "memcpy": 0.24, "libzstd": 0.2},
    }
    found = [(b.value, b.met) for b in bars.sampler_bars({"ratios": ratios, "limits": limits})]
    assert found == [
        (90.0, False), (90.0, True), (0.24, False), (4.0, True), (0.5, True), (0.2, False), (0.09, True),
        (73.0, False), (1.04, True), (1.1, False),
    ]  # fmt: skip
    for found_here in ratios.values():
        found_here.pop("mosaic-documents", None)
    assert [b.met for b in bars.sampler_bars({"ratios": ratios, "limits": limits})][:3] == [None, None, False]


def test_best_setting_of_a_peer_counts() -> None:
    """Its fastest one; ratios are taken within a round, so that drift cancels."""
    samples = {
        "raw-thread": [100.0, 10.0, 30.0], "memmap": [50.0, 5.0, 15.0], "memcpy": [200.0, 20.0, 60.0],
        "libzstd": [1.0] * 3, "litdata": [10.0, 1.0, 3.0], "litdata-workers": [20.0, 2.0, 6.0],
        "grain-records": [5.0, 0.5, 1.5],
    }  # fmt: skip
    found = {
        name: {"samples": values, "median": sorted(values)[1], "per_cpu_second": values}
        for name, values in samples.items()
    }
    best = sampler._best(found)
    assert best == {"memmap": "memmap", "litdata": "litdata-workers", "grain": "grain-records"}
    ratios = sampler._ratios(found, best, "samples")
    assert ratios == {"raw-thread": {"memmap": 2, "litdata": 5, "grain": 20, "memcpy": 0.5, "libzstd": 30}}


def test_peers_are_named_where_they_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No environment; one whose interpreter has not the library: the last line of its message is the reason."""
    monkeypatch.setenv("VELOPATH_MOSAIC_PYTHON", str(tmp_path / "no python"))
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho some >&2\necho \"No module named 'x'\" >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setenv("VELOPATH_PEERS_PYTHON", str(python))
    with ExitStack() as stack:
        found, missing = sampler_peers.start(tmp_path, stack)
    assert not found
    assert set(missing) == set(sampler_peers.PEERS)
    assert "`make peers` makes it" in missing["mosaic-rows"]
    assert "No module named" in missing["litdata"]


def test_processes_of_the_limits(tmp_path: Path) -> None:
    """First batch, memory and pushes, each in a process, small."""
    for k, name in enumerate(sampler_data.SHARES):
        file = tmp_path / f"{k}.mds"
        synthetic.write_shard(file, 200, 90, seed=k)
        synthetic.write_folder(tmp_path / "raw" / name, [file], 200)
    found = sampler_limits.run(tmp_path, documents=8000, rounds=1, steps=10)
    assert 0 < found["first_batch_seconds"][0] < 30
    assert 0 <= found["private_mib"][0] < 64
    assert all(values[0] >= 1 for values in found["push"].values())
    assert "First batch of 0.008M documents" in sampler_limits.describe(found)


def test_scale_suite(tmp_path: Path) -> None:
    """Its two processes, small: the second goes on from the state of the first."""
    data, state = tmp_path / "data", tmp_path / "state.json"
    synthetic.write_domains(data, domains=3, shards=2, documents=3000, tokens=100, files=2)
    first = scale._process(data, state, "start")
    second = scale._process(data, state, "resume")
    assert first["state_bytes"] == state.stat().st_size < 1 << 20
    assert set(first) | set(second) == set(scale.LABELS)
    index = {"domains": 3, "shards": 6, "documents": 18_000, "tokens": 1, "stored_bytes": 1, "named_bytes": 1}
    samples = {name: [value] for name, value in (first | second).items()}
    result = {"index": index, "shape": [1, 1, 1], "rounds": 1, "samples": samples}
    assert "18,000 documents" in scale.table(result)
    assert [bar.met for bar in bars.scale_bars(result)] == [True] * 4


def test_report_of_the_sampler(tmp_path: Path) -> None:
    """Every contender stands in the table; the missing ones with the reason; the picture is one."""
    names = [n for n in sampler.LABELS if not n.startswith(("litdata", "grain"))]
    found = {
        name: {"samples": [float(k + 1)] * 5, "median": float(k + 1), "per_cpu_second": [2.0 * k + 2] * 5}
        for k, name in enumerate(names)
    }
    best = sampler._best(found)
    limits = {
        "rounds": 5, "steps": 60, "documents": 10_000_000, "shard_mib": 7.1, "first_batch_seconds": [0.05],
        "private_mib": [2.0], "push": {"push-none": [1.01], "push": [1.02], "push-audit": [1.04]},
        "after_push": {"push": [1.001], "push-audit": [1.03]},
    }  # fmt: skip
    result = {
        "shape": [8, 2048], "rounds": 5, "seconds": 1.0, "tokens_per_domain": 1_000_000, "open_ms": {"raw-inline": 5.0},
        "contenders": found, "best": best, "missing": {"litdata": "not installed", "grain": "no reason"},
        "ratios": sampler._ratios(found, best, "samples"), "costs": {"windows of shards": 0.25},
        "cpu_ratios": sampler._ratios(found, best, "per_cpu_second"), "limits": limits,
    }  # fmt: skip
    page = sampler.table(result)
    assert all(sampler.LABELS[name] in page for name in names)
    assert (
        "Megatron-core GPTDataset, positions reset per document (its best)" in page
    )  # the last one is the fastest
    assert "- litdata: not installed\n- grain: no reason\n" in page
    assert "windows of shards 25%" in page
    sampler.plot(result, tmp_path / "sampler.png")
    assert (tmp_path / "sampler.png").read_bytes().startswith(b"\x89PNG")
