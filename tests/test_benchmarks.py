"""The benchmarks' runner: arguments, dated files, bars; the step suite and the GPU suite end to end, small."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks is no installed package

from benchmarks import bars, gpu, gpu_profile, losses, report, timing  # noqa: E402
from benchmarks.__main__ import main  # noqa: E402

FIELDS = {
    "suite", "date", "time", "command", "quick", "seconds", "versions", "hardware", "load", "commit", "dirty",
    "bars", "result",
}  # fmt: skip


def numbers(tree: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """Every number of a JSON tree with its place."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from numbers(value, f"{path}/{key}")
    elif isinstance(tree, list):
        for i, value in enumerate(tree):
            yield from numbers(value, f"{path}/{i}")
    elif isinstance(tree, int | float):
        yield path, float(tree)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: NAME"),
        (["speed"], "invalid choice: 'speed'"),
        (["step", "--smoke"], "--smoke, --only and --minutes belong to gpu"),
        (["gpu", "--smoke", "--only", "checks,speed"], "gpu has no part 'speed'; the parts are checks, "),
        (["gpu", "--smoke", "--minutes", "0"], "--minutes is 0; expected more than 0"),
    ],
)
def test_wrong_arguments(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--out", str(tmp_path)])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_gpu_suite_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["gpu"])
    assert ended.value.code == 2
    assert "gpu needs a CUDA device and torch sees none" in capsys.readouterr().err


def test_contenders_take_turns() -> None:
    seen: list[str] = []
    samples = timing.take_turns({n: lambda n=n: seen.append(n) for n in "abc"}, 4)
    assert "".join(seen) == "abccbabcaacb"
    assert {name: len(s) for name, s in samples.items()} == {"a": 4, "b": 4, "c": 4}
    assert len(timing.take_turns({"a": lambda: 0}, 100, seconds=0.0, least=3)["a"]) == 3


def test_ratios_are_paired() -> None:
    # The machine became ten times slower half-way: medians apart would say 5.5 / 11.
    assert timing.paired_ratio([1.0, 1.0, 10.0, 10.0], [2.0, 2.0, 20.0, 20.0]) == 0.5
    found = timing.summary([4.0, 1.0, 2.0, 3.0, 5.0])
    assert (found["low"], found["median"], found["high"]) == (2.0, 3.0, 4.0)
    assert timing.summary([7.0])["high"] == 7.0


def test_timed_and_memory_on_a_cpu() -> None:
    cpu = torch.device("cpu")
    slow, fast = timing.timed(cpu, lambda: sum(range(300_000)), lambda: None)
    assert slow > 10 * fast > 0
    mib = timing.extra_mib(cpu, lambda: torch.ones(16 << 20))
    assert math.isnan(mib) or 60 < mib < 80  # 64 MiB, where the system tells


def test_time_limit() -> None:
    with pytest.raises(TimeoutError, match="not ready after 0.05 s"), timing.time_limit(0.05):
        time.sleep(5)
    with timing.time_limit(0.05):
        pass
    time.sleep(0.1)  # the alarm is off again


@pytest.mark.parametrize(
    ("bar", "met"),
    [
        (bars.Bar("ratio", ">=", 2.0, 2.0), True),
        (bars.Bar("ratio", ">=", 2.0, 1.99), False),
        (bars.Bar("ratio", "<=", 2.0, 2.01), False),
        (bars.Bar("ratio", "<=", 2.0, None), None),
        (bars.Bar("ratio", "<=", 2.0, math.nan), None),
    ],
)
def test_bar(bar: bars.Bar, met: bool | None) -> None:
    assert bar.met is met
    assert bar.to_json()["met"] is met


def test_bars_of_the_loss() -> None:
    def found(ms: float, mib: float) -> dict[str, Any]:
        return {"ms": {"median": ms}, "extra_mib": mib}

    logits = {
        "eager, with domains": found(900, 1500), "torch.compile, with domains": found(300, 500),
        "velopath numba, in place": found(300, 0), "velopath C++, in place": found(160, 0),
    }  # fmt: skip
    linear = {
        "eager, with domains": found(3000, 1500),
        "velopath C++, chunks of 64 MiB": found(3200, 140),
    }
    result = {"logits": {"contenders": logits}, "linear": {"contenders": linear}}
    assert [bar.met for bar in bars.loss_bars(result)] == [True, False, True, True, True, True]
    del logits["torch.compile, with domains"]  # left out, where no compiler is found
    assert bars.loss_bars(result)[1].met is None


def gpu_part(ms: float, **more: Any) -> dict[str, Any]:
    return {"ms": {"median": ms}, "extra_mib": 1000.0, **more}


def test_bars_of_the_gpu() -> None:
    shape = {"rows": 8192, "vocab": 128256, "itemsize": 2}
    traffic_ms = 2 * 8192 * 128256 * 2 / 4e12 * 1e3  # 1.05 ms at 4 TB/s
    parts = {
        "ceilings": {"copy_bytes_per_second": 4e12},
        "checks": {"repeats": {"ok": True, "detail": ""}, "fp64": {"ok": False, "detail": "off by 1"}},
        "logits": {
            "shapes": [{**shape, "contenders": {"velopath, in place": gpu_part(traffic_ms / 0.8)}}],
            "left_out": [],
        },
        "linear": {
            "shapes": [
                {
                    **shape, "width": 4096, "allowed_mib": 990.0,
                    "contenders": {
                        "three matmuls": gpu_part(32.0), "velopath": gpu_part(1.1 * (32.0 + traffic_ms)),
                        "Liger, without domains": gpu_part(141.0), "QuACK, without domains": gpu_part(30.0),
                    },
                }
            ],
            "left_out": [],
        },
    }  # fmt: skip
    found = {bar.name: bar for bar in bars.gpu_bars(parts)}
    values = {name.split(":")[-1].strip(): (bar.value, bar.met) for name, bar in found.items()}
    assert values["repeats"] == (0.0, True)
    assert values["fp64"] == (1.0, False)
    assert values["bytes/s over the copy's"] == (pytest.approx(0.8), True)
    assert values["time / (three matmuls + logits' traffic)"] == (pytest.approx(1.1), True)
    memory = values["extra memory / (chunk + gradient of hidden + fp32 gradient of the weight)"]
    assert memory == (pytest.approx(1000 / 990), True)
    assert values["times as fast as Liger"][1] is True
    assert values["time / QuACK"][1] is False


def test_dated_files(tmp_path: Path) -> None:
    found = report.document(
        "loss",
        {"ms": 1.5, "share": float("nan")},
        [bars.Bar("fast", ">=", 2.0, 3.0), bars.Bar("small", "<=", 1.0, 2.0), bars.Bar("new", "<=", 1, None)],
        command=report.command_line(["loss", "--out", "a b"]),
        seconds=1.0,
        quick=True,
    )
    json_path, markdown_path = report.write(tmp_path / "deep", found, "| table |\n")
    assert json_path.name == f"{found['date']}-loss-quick.json"
    read = json.loads(json_path.read_text())
    assert set(read) == FIELDS
    assert read["result"] == {"ms": 1.5, "share": None}
    assert read["command"] == "python -m benchmarks loss --out 'a b'"
    assert read["versions"]["torch"] == torch.__version__
    page = markdown_path.read_text()
    for text in (
        "| fast | >= 2 | 3 | met |",
        "| small | <= 1 | 2 | **missed** |",
        "| new | <= 1 |  | not measured |",
    ):
        assert text in page
    assert "| table |" in page


def test_step_suite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["step", "--quick", "--json", "--out", str(tmp_path)]) == 0
    printed = json.loads(capsys.readouterr().out)
    (path,) = tmp_path.glob("*-step-quick.json")
    found = json.loads(path.read_text())
    assert found == printed
    assert set(found) == FIELDS
    result = found["result"]
    assert all(math.isfinite(value) for _, value in numbers(result))
    assert {bar["met"] for bar in found["bars"]} <= {True, False}
    assert result["ratios"]["speed over plain loop"] > 0
    assert 0 < result["log"]["share"] < 0.5
    assert set(result["contenders"]) == {
        "velopath", "velopath, again", "velopath, no log", "velopath, F.cross_entropy", "velopath, index_add",
        "plain loop",
    }  # fmt: skip
    for contender in result["contenders"].values():
        assert contender["tokens_per_second"]["median"] > 0
        assert 0 <= contender["wait_share"]["median"] <= 1
    assert result["push"]["pushes"] == 3
    assert "plain loop (the best) / velopath" in path.with_suffix(".md").read_text()


def test_gpu_suite_on_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gpu", "--smoke", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*-gpu-smoke.json")
    found = json.loads(path.read_text())
    assert set(found) == FIELDS
    result = found["result"]
    assert result["failed"] == {}
    assert result["left_out"] == []
    assert set(result["parts"]) == set(gpu.PARTS)
    assert all(check["ok"] for check in result["parts"]["checks"].values()), result["parts"]["checks"]
    for name in ("logits", "linear"):
        for shape in result["parts"][name]["shapes"]:
            assert shape["left_out"] == []
            assert all(c["ms"]["median"] > 0 for c in shape["contenders"].values())
    assert all(math.isfinite(value) for _, value in numbers(result["parts"]))
    page = capsys.readouterr().out
    assert all(f"## {name}" in page for name in gpu.PARTS)
    assert set(result["parts"]["step_1b"]["contenders"]) == {"velopath", "velopath, F.cross_entropy"}
    shapes = result["parts"]["profile"]["shapes"]
    assert any("velopath::linear_cross_entropy" in shape["kernels"] for shape in shapes)
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert f"]({path.stem}.png)" in page
    assert "numbers and bars mean nothing" in page


def test_counters_of_the_profiler() -> None:
    """The table that `ncu --csv` prints, units and thousands' separators resolved."""
    printed = (
        "==PROF== Connected to process 1\n"
        '"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"\n'
        '"0","cross_entropy_rows","dram__bytes_read.sum","Gbyte","1.05"\n'
        '"0","cross_entropy_rows","dram__bytes_write.sum","Mbyte","524.25"\n'
        '"0","cross_entropy_rows","gpu__time_duration.sum","us","1,312.5"\n'
        '"0","cross_entropy_rows","lts__t_sector_hit_rate.pct","%","48.5"\n'
    )
    assert gpu_profile.read_counters(printed) == {
        "GB read": 1.05, "GB written": pytest.approx(0.52425), "ms": pytest.approx(1.3125), "L2 hits, %": 48.5,
    }  # fmt: skip
    with pytest.raises(ValueError, match="no table: ==ERROR== no permission"):
        gpu_profile.read_counters("==ERROR== no permission")


def test_peers_that_fail_are_left_out() -> None:
    """A wrong number, an error: named, and the others go on; ours may not fail."""
    logits = torch.randn(8, 11)
    arena = losses.Arena(
        torch.device("cpu"), (logits,), losses.random_ids(torch.device("cpu"), 8, 11), overwritten=True
    )

    def broken(logits: torch.Tensor, targets: torch.Tensor, domains: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no kernel image")

    peers = {
        losses.EAGER: losses.with_domains,
        "broken": broken,
        "wrong": lambda x, t, d: 1.01 * losses.plain(x, t, d),
        "velopath, in place": losses.ours(inplace=True),
    }
    found = losses.measure(arena, peers, rounds=3)
    assert list(found["contenders"]) == [losses.EAGER, "velopath, in place"]
    assert found["left_out"][0] == "broken: RuntimeError: no kernel image"
    assert found["left_out"][1].startswith("wrong: AssertionError: wrong: loss ")
    assert torch.equal(arena.leaves[0], logits)
    with pytest.raises(RuntimeError, match="no kernel image"):
        losses.measure(arena, {losses.EAGER: losses.with_domains, "velopath": broken}, rounds=3)


def test_gpu_suite_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Parts are kept from call to call of a day; one that fails is named and stops no other."""

    def broken(bench: object) -> dict[str, Any]:
        raise RuntimeError("out of memory")

    call = ["gpu", "--smoke", "--out", str(tmp_path)]
    assert main([*call, "--only", "ceilings"]) == 0
    monkeypatch.setitem(gpu.PARTS, "logits", (broken, gpu.PARTS["logits"][1]))
    assert main([*call, "--only", "domains,logits"]) == 1
    (path,) = tmp_path.glob("*-gpu-smoke.json")
    result = json.loads(path.read_text())["result"]
    assert set(result["parts"]) == {"ceilings", "domains"}
    assert result["failed"] == {"logits": "RuntimeError: out of memory"}
    assert "Failed: RuntimeError: out of memory" in path.with_suffix(".md").read_text()
    assert main([*call, "--only", "checks", "--minutes", "1e-9"]) == 0
    assert "Not begun: no time was left." in capsys.readouterr().out
