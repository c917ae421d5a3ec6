"""The report: its numbers are those of the files, foreign names stay text, missing parts become sentences."""

from __future__ import annotations

import functools
import html
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from velopath.cli.log import log
from velopath.errors import ConfigError, DataError
from velopath.lineage import Lineage, Version
from velopath.plan import make_plan
from velopath.report import build_summary, write_report
from velopath.report.figure import INK, MOST_POINTS, epochs_text, label, smooth, thin, tokens_text
from velopath.report.picture import DOMAINS, write_png
from velopath.report.record import read_run
from velopath.runfolder import RunFolder
from velopath.schedule import LrPath
from velopath.targets import Targets

HOSTILE = "<script>alert('1')</script> 50% %{x} & co"
NAMES = (HOSTILE, "code")
TOKENS = 1000  # per step


def losses(step: int, shift: float = 0.0) -> dict[str, float]:
    return {HOSTILE: 6.0 - step / 100 - shift, "code": 4.0 - step / 200 - shift}


def steps(run: RunFolder, segment: str, start: int, end: int, rate: float) -> None:
    for step in range(start + 10, end + 1, 10):
        record = {"kind": "step", "segment": segment, "step": step, "loss": 5.0 - step / 100, "rate": rate}
        record |= {
            "tokens": TOKENS,
            "tokens_per_second": 2000.0 if step % 20 else 1000.0,
            "data_wait_share": 0.1,
        }
        run.append_metric(record)


def heldout(
    run: RunFolder, segment: str, step: int, shift: float = 0.0, kind: str = "eval", count: int = 500
) -> None:
    record = {"kind": kind, "segment": segment, "step": step, "slice": "new", "loss": losses(step, shift)}
    run.append_metric(record | {"tokens": dict.fromkeys(NAMES, count)})


def control(run: RunFolder, step: int, share: float, target: float, velocity: float | None) -> None:
    record: dict[str, Any] = {"kind": "control", "segment": "main", "step": step, "reason": "update"}
    record |= {
        "weights": {HOSTILE: share, "code": 1 - share},
        "initial": losses(0),
        "flagged": [],
        "clipped": [],
    }
    record |= {"target": {HOSTILE: target, "code": 3.0}}
    record["velocity"] = None if velocity is None else {HOSTILE: velocity, "code": 0.5}
    run.append_metric(record)


@functools.cache
def targets() -> dict[str, Any]:
    curves = {n: [(1000.0 * 2**i, 2 + 3 / 2**i) for i in range(7)] for n in NAMES}
    return Targets.fit(curves, 100_000.0, shares=dict.fromkeys(NAMES, 0.5), proxy_steps=30).to_json()


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """Two slices of 50 steps, branch share 0.6: main to 70, v1 from 20, v2 from 70."""
    run = RunFolder(tmp_path / "run", create=True)
    run.write_text("config.yaml", f"title: {json.dumps(HOSTILE)}\nseed: 3\n")
    run.write_json("plan.json", make_plan({"old": 50, "new": 50}, 0.6).to_json())
    about = {"name": HOSTILE, "command": "velopath train", "state": "done", "seconds": 125.0}
    run.write_json("run.json", about | {"hardware": {"cpu": HOSTILE}, "versions": {"velopath": "9.9"}})
    entry = {"tokens": 70000, "documents": 12, "bytes": 3_000_000, "licence": "CC0-1.0", "source": HOSTILE}
    run.write_json("data.json", {s: {"domains": dict.fromkeys(NAMES, entry)} for s in ("old", "new")})
    run.write_json("targets.json", targets())
    steps(run, "proxy", 0, 30, 0.1)
    heldout(run, "main", 0)
    control(run, 0, 0.5, 4.0, None)
    steps(run, "main", 0, 50, 0.1)
    heldout(run, "main", 50)
    control(run, 50, 0.75, 3.5, 0.9)
    run.append_metric(exposure("old", 50, 30000, 0.4))
    steps(run, "main", 50, 70, 0.1)
    run.append_metric(exposure("new", 70, 15000, 0.2))
    for name, start in (("v1", 20), ("v2", 70)):
        heldout(run, name, start, kind="version", count=4000)
        steps(run, name, start, start + 30, 0.05)
        heldout(run, name, start + 30, shift=0.25, kind="version", count=4000)
    run.append_metric({"kind": "sampler", "segment": "main", "step": 70, "tokens_per_second": 5e6})
    (run.path / "exports" / "v1").mkdir(parents=True)
    run.close()
    return run


def exposure(slice_name: str, step: int, tokens: int, epochs: float) -> dict[str, Any]:
    row = {"rows": 10, "tokens": tokens, "epochs": epochs, "unique_tokens": tokens}
    record = {"kind": "exposure", "segment": "main", "step": step, "slice": slice_name}
    return record | {"domains": dict.fromkeys(NAMES, row)}


def figures(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="figures">(.*?)</script>', page, re.DOTALL)
    assert found
    return {f["id"]: f for f in json.loads(found[1])}


def test_summary_has_the_fixed_keys_and_the_numbers_of_the_files(run: RunFolder) -> None:
    summary = build_summary(run.path)
    assert summary == json.loads((run.path / "summary.json").read_text())
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
    assert summary["seconds"] == 125.0
    assert summary["domains"]["code"] == {"tokens": 45000, "initial": 4.0, "target": 3.0, "last_loss": 3.75}
    assert summary["weights"][1] == {"step": 50, "weights": {HOSTILE: 0.75, "code": 0.25}}
    v1, v2 = summary["versions"]
    assert v1 == {
        "name": "v1",
        "parent": "main@20",
        "branch_step": 20,
        "steps": 30,
        "branch_share": 0.6,
        "shape": None,
        "heldout_loss": losses(50, 0.25),
        "export": "exports/v1",
    }
    assert (v2["branch_step"], v2["steps"], v2["export"]) == (70, 30, None)
    assert summary["cost"] == {
        "main_steps": 70,
        "branch_steps": 60,
        "proxy_steps": 30,
        "base_steps": 0,
        "evaluation_tokens": 2 * 2 * 500 + 4 * 2 * 4000,
        "planned_over_ptfs": 130 / 150,
        "actual_over_ptfs": 130 / 150,
    }
    assert summary["sampler_tokens_per_second"] == 5e6
    assert summary["data_wait_share"] == pytest.approx(0.1)


def test_page_and_files_agree(run: RunFolder) -> None:
    path = write_report(run.path)
    page = path.read_text(encoding="utf-8")
    drawn = figures(page)
    main, v1 = (next(t for t in drawn["paths"]["data"] if t.get("name") == n) for n in ("main", "v1"))
    assert (main["x"], set(main["y"])) == (list(range(10, 71, 10)), {0.1})
    assert (v1["x"][0], v1["y"][0]) == (20, 0.1)  # leaves the main path where and at the rate it was
    code = drawn["loss-1"]["data"]
    assert (code[0]["x"], code[0]["y"]) == ([0, 100, None], [3.0, 3.0, None])  # one target in force all along
    assert (code[1]["x"], code[1]["y"]) == ([0, 50], [4.0, 3.75])
    assert drawn["loss-0"]["data"][0]["y"] == [4.0, 4.0, None, 3.5, 3.5, None]
    assert drawn["weights"]["data"][0]["x"] == [0, 50, 70]
    assert drawn["weights"]["data"][0]["y"] == [0.5, 0.75, 0.75]
    assert drawn["velocity"]["data"][0]["y"] == [0.9]
    assert drawn["exposure"]["data"][0]["x"] == [45000, 45000]
    assert "45.0 k tokens · 0.40 + 0.20 epochs" in drawn["exposure"]["data"][0]["text"][0]
    for text in (
        "86.7%",
        "130 steps; 130% of continuing",
        "2:05 min",
        "5.00 M tokens/s",
        "velopath 9.9",
        "CC0-1.0",
    ):
        assert text in page, text
    assert "3.500<small><span class='good'>−0.400</span></small>" in page  # code in v1: 3.9 at 20, 3.5 at 50


def test_the_page_needs_no_other_file(run: RunFolder) -> None:
    page = write_report(run.path).read_text(encoding="utf-8")
    ours = page[: page.index("</script><script>")]  # plotly.js follows
    assert not re.search(r'(?:src|href)="(?!#)|@import|url\(', ours)
    assert page.count("<script>") == 2
    assert len(page) > 3_000_000
    for id in figures(page):
        assert page.count(f'id="plot-{id}"') == 1


def test_foreign_names_stay_text(run: RunFolder) -> None:
    page = write_report(run.path).read_text(encoding="utf-8")
    assert "<script>alert" not in page
    assert html.escape(HOSTILE) in page
    assert label(HOSTILE) == "&lt;script&gt;alert('1')&lt;/script&gt; 50&#37; &#37;&#123;x} &amp; co"
    assert INK not in label(f"{INK}ink\n")
    names = {t.get("name") for f in figures(page).values() for t in f["data"]}
    assert label(HOSTILE) in names and HOSTILE not in names


def test_a_version_is_compared_only_on_the_same_held_out_sample(run: RunFolder) -> None:
    assert read_run(run).versions[0].undecayed is None  # main was measured at 50, but on 500 tokens
    heldout(run, "main", 50, kind="version", count=4000)
    assert read_run(run).versions[0].undecayed == losses(50)
    assert "mean, against undecayed" in write_report(run.path).read_text(encoding="utf-8")


def test_steps_repeated_after_a_resume_are_drawn_once_and_paid_twice(run: RunFolder) -> None:
    run.append_metric({"kind": "resume", "segment": "main", "step": 40})
    steps(run, "main", 40, 70, 0.2)
    summary = build_summary(run.path)
    assert summary["cost"]["main_steps"] == 100
    assert summary["cost"]["actual_over_ptfs"] == 160 / 150
    assert summary["cost"]["planned_over_ptfs"] == 130 / 150
    main = read_run(run).main
    assert main is not None
    assert main.curve("rate") == ([10, 20, 30, 40, 50, 60, 70], [0.1] * 4 + [0.2] * 3)
    assert (main.end, main.losses("code")[0]) == (70, [0])  # the evaluation at 50 lies beyond the resume


def test_a_run_that_is_still_going(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run", create=True)
    with pytest.raises(DataError, match="not a run folder"):
        write_report(run.path)
    run.write_json("run.json", {"state": "running"})
    page = write_report(run.path).read_text(encoding="utf-8")
    assert "No training step has been recorded yet." in page
    assert "What this scale can and cannot show" in page
    run.write_json("run.json", {"name": "half", "state": "running"})
    steps(run, "main", 0, 20, 0.1)
    run.close()
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"kind":"step","segment":"main","st')
    page = write_report(run.path).read_text(encoding="utf-8")
    for sentence in (
        "The run is still going",
        "No version has been cut yet.",
        "No weights have been recorded yet.",
        "no targets.json",
        "no plan to compare with",
    ):
        assert sentence in page
    summary = build_summary(run.path)
    assert (summary["versions"], summary["cost"]["main_steps"]) == ([], 20)
    assert summary["cost"]["planned_over_ptfs"] is None


def test_static_weights_and_uncounted_exposure_say_so(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run", create=True)
    control(run, 0, 0.75, 4.0, None)
    steps(run, "main", 0, 20, 0.1)
    page = write_report(run.path).read_text(encoding="utf-8")
    assert "The weights did not move" in page
    assert "the sampler&#x27;s own count is not" in page or "the sampler's own count is not" in page
    assert build_summary(run.path)["domains"][HOSTILE]["tokens"] == 15000
    assert "velocity" not in figures(page)


def test_the_lineage_names_versions_beyond_the_plan(run: RunFolder) -> None:
    lineage = Lineage().with_main(20, "old").with_main(40, "old").with_main(70, "new")
    path = LrPath.main(0.1).branch(40, 25, "knee")
    extra = Version(
        "extra", "main@40", 40, 25, "old", path=path, heldout_loss={"code": 3.25}, export="elsewhere"
    )
    lineage = lineage.add(Version("v1", "main@20", 20, 30, "old", heldout_loss=losses(50, 0.25))).add(extra)
    for event in lineage.to_json()["events"]:
        run.append_event(event)
    heldout(run, "late", 70, kind="version", count=4000)  # begun and not finished: no version yet
    versions = {v["name"]: v for v in build_summary(run.path)["versions"]}
    assert list(versions) == ["v1", "extra", "v2"]
    assert versions["v1"]["export"] == "exports/v1"
    facts = {"parent": "main@40", "branch_step": 40, "steps": 25, "heldout_loss": {"code": 3.25}}
    facts |= {"branch_share": 0.5, "shape": "knee"}
    assert versions["extra"] == {"name": "extra", **facts, "export": "elsewhere"}
    page = write_report(run.path).read_text(encoding="utf-8")
    assert "extra" in page and "25<small>50.0% of its slice, knee</small>" in page


def test_the_log_speaks_three_languages(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    lineage = Lineage().with_main(20, HOSTILE)
    lineage = lineage.add(Version('v"1', "main@20", 20, 30, "old", heldout_loss={"code": 3.25}))
    for event in lineage.to_json()["events"]:
        run.append_event(event)
    log(run.path)
    assert "main@20" in capsys.readouterr().out
    log(run.path, as_json=True)
    assert Lineage.from_json(json.loads(capsys.readouterr().out)) == lineage
    log(run.path, as_mermaid=True)
    drawn = capsys.readouterr().out
    assert drawn.startswith("flowchart LR\n") and "<script>" not in drawn
    assert 'n1(["v#34;1<br/>3.250 nats"])' in drawn and 'n0 -->|"30 steps, old"| n1' in drawn
    with pytest.raises(ConfigError, match="--json and --mermaid were both given"):
        log(run.path, as_json=True, as_mermaid=True)


def test_a_damaged_file_is_named(run: RunFolder) -> None:
    (run.path / "plan.json").write_text("[1]")
    with pytest.raises(DataError, match=r"plan\.json: expected a JSON object, got list"):
        build_summary(run.path)


def test_steps_of_a_base_run_count_beside_the_comparison(run: RunFolder) -> None:
    base = RunFolder(run.path / "base", create=True)
    steps(base, "main", 0, 20, 0.1)
    heldout(base, "main", 20)
    heldout(base, "v1", 20, kind="version")
    steps(base, "v1", 20, 50, 0.1)
    cost = build_summary(run.path)["cost"]
    assert (cost["base_steps"], cost["main_steps"]) == (50, 70)
    assert cost["evaluation_tokens"] == 2 * 2 * 500 + 4 * 2 * 4000 + 2 * 2 * 500
    run.append_event({"event": "spend", "what": "base", "cost": {"base_steps": 500}})
    assert build_summary(run.path)["cost"]["base_steps"] == 500


def test_the_picture_is_drawn_also_of_an_empty_run(run: RunFolder, tmp_path: Path) -> None:
    for folder in (run.path, RunFolder(tmp_path / "empty", create=True).path):
        path = write_png(folder, tmp_path / "pictures" / f"{folder.name}.png")
        assert path.read_bytes().startswith(b"\x89PNG")


def test_page_and_picture_share_their_colours() -> None:
    sheet = (Path(__file__).parents[1] / "engine/velopath/report/page.css").read_text()
    light = sheet[: sheet.index('[data-theme="dark"]')]
    assert tuple(re.findall(r"--d\d+: (#[0-9a-f]{6})", light)) == DOMAINS


def test_long_curves_are_thinned_to_means() -> None:
    x, y = thin(range(1, 4001), [float(v) for v in range(1, 4001)])
    assert len(x) <= MOST_POINTS and (x[0], y[0]) == (3, 2.0) and x[-1] == 4000
    assert thin([1, 2], [0.5, 0.25]) == ([1, 2], [0.5, 0.25])
    assert smooth([0.0, 3.0, 6.0, 0.0], 3) == [1.5, 3.0, 3.0, 3.0]
    counts = [999, 1024, 1_864_000, 358_400, 2e10]
    assert [tokens_text(n) for n in counts] == ["999", "1.02 k", "1.86 M", "358 k", "20.0 G"]
    assert (epochs_text([]), epochs_text([0.5, 1.25])) == (None, "0.50 + 1.25")


def test_a_report_needs_no_torch(run: RunFolder) -> None:
    code = "import sys; from velopath.report import write_report; write_report(sys.argv[1])"
    code += "; assert not {'torch', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code, str(run.path)], check=True)
