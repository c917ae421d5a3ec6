"""The demo at a twentieth of its steps, on the real corpus: killed twice, finished, looked at, called again."""

from __future__ import annotations

import json
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from commands import Process, start, velopath
from small_run import in_force
from velopath.audit import verify
from velopath.plan import compare_costs
from velopath.runfolder import RunFolder
from velopath.runlineage import read_lineage

DOMAINS = {"cpp", "docs", "python", "tables", "translations", "verse"}
CODE = """
from pathlib import Path
from velopath.cli.progress import console_log
from velopath.demo import run_demo
run_demo(Path("runs/demo"), show=console_log, say=lambda text: print(text, flush=True), scale=0.05)
"""


def demo(place: Path) -> Process:
    """The demo in runs/demo below `place`, named relatively as `velopath demo` does."""
    return start(cwd=place, code=CODE)


def reached(folder: Path, segment: str, step: int) -> bool:
    return (folder / "metrics.jsonl").exists() and any(
        r["step"] >= step for r in in_force(folder, "step", segment)
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory in which the demo was killed in the base model and in a branch, and then finished."""
    place = tmp_path_factory.mktemp("demo")
    run = place / "runs" / "demo"
    for folder, segment, step in ((run / "base", "main", 10), (run, "v1", 20)):
        process = demo(place)
        process.until(lambda f=folder, s=segment, n=step: reached(f, s, n), 120)  # type: ignore[misc]
        process.signal(signal.SIGKILL)
        process.wait()
    done = demo(place).wait(120)
    assert done.code == 0, done.err
    assert "corpus and token shards are there already" in done.out
    return place


@pytest.fixture(scope="module")
def run(place: Path) -> Path:
    return place / "runs" / "demo"


@pytest.fixture(scope="module")
def summary(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return found


def test_the_summary_has_the_fixed_names(summary: dict[str, Any]) -> None:
    assert set(summary) == {
        "seconds",
        "domains",
        "weights",
        "versions",
        "cost",
        "sampler_tokens_per_second",
        "data_wait_share",
        "phase_seconds",
        "flops_per_second",
        "mfu",
    }
    assert set(summary["domains"]) == DOMAINS
    for facts in summary["domains"].values():
        assert set(facts) == {"tokens", "initial", "target", "last_loss"}
        assert facts["tokens"] > 0
    for entry in summary["weights"]:
        assert set(entry) == {"step", "weights"}
        assert set(entry["weights"]) == DOMAINS and sum(entry["weights"].values()) == pytest.approx(1)
    for version in summary["versions"]:
        assert set(version) == {
            "name",
            "parent",
            "branch_step",
            "steps",
            "branch_share",
            "shape",
            "heldout_loss",
            "export",
        }
        assert set(version["heldout_loss"]) == DOMAINS
    assert set(summary["cost"]) == {
        "main_steps",
        "branch_steps",
        "proxy_steps",
        "base_steps",
        "evaluation_tokens",
        "planned_over_ptfs",
        "actual_over_ptfs",
    }
    assert summary["seconds"] > 0 and summary["sampler_tokens_per_second"] > 1e6
    assert 0 <= summary["data_wait_share"] < 1


def test_the_weights_are_watched_and_the_model_learnt(summary: dict[str, Any], run: Path) -> None:
    """From equal weights, updated behind the targets' points. After so few steps hardly any gap counts: none moves."""
    assert summary["weights"][0]["weights"] == pytest.approx(dict.fromkeys(DOMAINS, 1 / 6))
    assert [w["step"] for w in summary["weights"]] == [0, 13, 16, 20, 24, 28, 32, 35, 39, 43, 47]
    updates = [r for r in in_force(run, "control", "main") if r["reason"] == "update"]
    assert len(updates) == 9
    for update in updates:
        assert all(0.05 <= w <= 0.5 for w in update["weights"].values())
        assert all(loss > 0 for loss in update["losses"].values())
        gaps = {n: update["initial"][n] - update["target"][n] for n in DOMAINS}
        assert {n for n, gap in gaps.items() if gap < 0.25} <= set(update["flagged"])
    for before, after in (("initial", "last_loss"), ("initial", "target")):
        assert sum(d[after] for d in summary["domains"].values()) < sum(
            d[before] for d in summary["domains"].values()
        )


def test_the_ledger_is_the_planners(summary: dict[str, Any], run: Path) -> None:
    """T = 35, alpha 0.6: branches of 21 steps at 14 and 49; the steps that the kills lost are in no version."""
    cost = summary["cost"]
    planned = compare_costs([35, 35], 0.6)
    assert planned["switching"] == 49 + 2 * 21
    lineage = read_lineage(RunFolder(run)).cost
    assert (lineage.main_steps, lineage.branch_steps) == (49, 42)
    assert cost["planned_over_ptfs"] == planned["switching"] / planned["ptfs"]
    assert cost["actual_over_ptfs"] == (cost["main_steps"] + cost["branch_steps"]) / planned["ptfs"]
    assert cost["main_steps"] == 49 and cost["branch_steps"] >= 42
    assert (cost["proxy_steps"], cost["base_steps"]) == (0, 25)  # the targets' points are the main path's own


def test_two_versions_are_exported(summary: dict[str, Any], run: Path) -> None:
    assert [(v["name"], v["branch_step"], v["steps"]) for v in summary["versions"]] == [
        ("v1", 14, 21),
        ("v2", 49, 21),
    ]
    for version in summary["versions"]:
        folder = run / version["export"]
        for file in ("config.json", "model.safetensors", "tokenizer.json", "README.md", "velopath.json"):
            assert (folder / file).is_file()
    assert json.loads((run / "exports" / "v1" / "velopath.json").read_text())["steps"] == 25 + 35


def test_the_base_model_knows_three_domains(run: Path) -> None:
    """Its sampler gave nothing of the others, and it hands on no optimiser state."""
    exposure = in_force(run / "base", "exposure", "main")[-1]["domains"]
    assert {name for name, read in exposure.items() if read["tokens"]} == {"docs", "python", "verse"}
    assert not list((run / "base" / "exports").rglob("optimizer*"))


def test_the_report_is_one_page_that_works_offline(run: Path) -> None:
    page = (run / "report.html").read_text()
    assert page.lower().startswith("<!doctype html>")
    for source in re.findall(r'(?:<script|<link|<img|<iframe)[^>]*(?:src|href)="([^"]{0,60})', page):
        assert source.startswith("data:"), source
    assert not re.search(
        r"@import|url\((?!data:|#)", re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    )
    for word in ("v1", "v2", "main", *DOMAINS):
        assert word in page
    assert (run / "report.png").read_bytes()[:4] == b"\x89PNG"


def test_logs_verify(run: Path) -> None:
    logs = [*(run / "audit").iterdir(), *(run / "base" / "audit").iterdir()]
    assert {p.name for p in logs} >= {"main.slice-1.jsonl", "main.slice-2.jsonl", "v1.slice-1.jsonl"}
    for log in logs:
        verify(log)


def test_a_second_call_trains_nothing(place: Path, run: Path, summary: dict[str, Any]) -> None:
    before = len(list(RunFolder(run).records()))
    began = time.monotonic()
    done = demo(place).wait(60)
    assert done.code == 0, done.err
    assert time.monotonic() - began < 30
    added = list(RunFolder(run).records())[before:]
    assert [r["kind"] for r in added] == ["sampler"]
    again = json.loads((run / "summary.json").read_text())
    for key in ("domains", "weights", "versions", "cost"):
        assert again[key] == summary[key]


def test_other_commands_find_the_demos_data_from_anywhere(run: Path, tmp_path: Path) -> None:
    done = velopath("eval", run, "v2", "--tokens", "256", "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    assert set(json.loads(done.out)["v2"]) == DOMAINS
    cut = velopath("branch", run, "quick", "--at", "14", "--steps", "2", cwd=tmp_path)
    assert cut.code == 0, cut.err


def test_only_a_demos_folder_is_deleted_or_written(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    for option, message in ((["--fresh"], "is not a demo's folder"), ([], "holds something else")):
        done = velopath("demo", "--out", tmp_path / "thesis", *option)
        assert done.code == 2 and message in done.err
    assert [p.name for p in (tmp_path / "thesis").iterdir()] == ["chapter.tex"]
