"""The planner's prices: methods side by side, hours, money, what-if, break-even, storage, planned beside real."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from commands import velopath
from small_run import write_config
from velopath.errors import ConfigError
from velopath.plan import cost_table
from velopath.plan_price import Price, break_even, method_rows, plan_json, storage, what_if

SLICES = [1000] * 4


def test_both_sides_of_the_published_share() -> None:
    value = plan_json(SLICES, 0.6, Price())
    totals = {method: facts["steps"] for method, facts in value["totals"].items()}
    assert totals == {"ptfs": 10000, "cpt": 4000, "wsd_s": 4000, "switching": 5800}
    row = next(r for r in value["what_if"] if r["alpha"] == 0.6)
    assert (row["of_ptfs"], row["of_cpt"]) == (0.58, 1.45)
    assert value["totals"]["switching"]["gpu_hours"] is None  # nobody said how fast a step is


def test_what_if_and_break_even() -> None:
    rows = what_if(SLICES, (0.1, 0.6, 1.0))
    assert [r["steps"] for r in rows] == [4300, 5800, 7000]
    assert [r["alpha"] for r in what_if([3] * 2, (0.1, 0.5))] == [0.5]  # a tenth of 3 steps is no branch
    assert break_even(cost_table(SLICES, 0.6)) == {
        "cheaper_than_ptfs_from": "v2",
        "half_of_ptfs_from": None,
        "cpt_passes": 1.45,
        "extra_steps_over_cpt": 1800,
    }
    assert break_even(cost_table([1000] * 6, 0.6))["half_of_ptfs_from"] == "v5"
    assert break_even(cost_table([1000], 0.6))["cheaper_than_ptfs_from"] is None


def test_shares_of_their_own() -> None:
    # r = 600, 400, 200, 100: switching 4000 + 600 + 400 + 200; what-if takes one share for all
    value = plan_json(SLICES, [0.6, 0.4, 0.2, 0.1], Price())
    assert {m: t["steps"] for m, t in value["totals"].items()} == {
        "ptfs": 10000,
        "cpt": 4000,
        "wsd_s": 4000,
        "switching": 5200,
    }
    assert value["branch_share"] is None and value["break_even"]["cpt_passes"] == 1.3
    assert value["what_if"] == plan_json(SLICES, 0.6, Price())["what_if"]
    rows = [r for r in value["rows"] if r["method"] == "switching"]
    assert [(r["steps"], r["branch_share"], r["branch_steps"]) for r in rows] == [
        (1000, 0.6, 600),
        (1600, 0.4, 400),
        (1400, 0.2, 200),
        (1200, 0.1, 100),
    ]
    assert all(r["branch_share"] is None for r in value["rows"] if r["method"] != "switching")


def test_the_command_with_shares_of_their_own(tmp_path: Path) -> None:
    shares = ("--alpha", 0.6, "--alpha", 0.4, "--alpha", 0.2)
    files = {kind: tmp_path / f"plan.{kind}" for kind in ("csv", "html", "png")}
    done = velopath("plan", *shares, *(part for kind, path in files.items() for part in (f"--{kind}", path)))
    assert done.code == 0, done.err
    text = " ".join(done.out.split())
    # three slices of 1000: 3000 + 600 + 400 of 6000
    assert "branch shares 0.2 to 0.6" in text and "as planned │ 4,000 │ 66.7%" in text
    with files["csv"].open() as file:
        rows = [r for r in csv.DictReader(file) if r["method"] == "switching"]
    assert [(r["branch_share"], r["branch_steps"]) for r in rows] == [
        ("0.6", "600"),
        ("0.4", "400"),
        ("0.2", "200"),
    ]
    assert "<td>400 (0.4)</td>" in files["html"].read_text() and files["png"].stat().st_size > 1000
    value = json.loads(velopath("plan", *shares, "--json").out)
    assert value["costs"]["branch_share"] is None and value["plan"]["branch_shares"] == [0.6, 0.4, 0.2]
    assert value["totals"]["switching"]["steps"] == value["costs"]["totals"]["switching"] == 4000
    assert json.loads(velopath("plan", "-n", 3, *shares, "-t", 10, "-t", 20, "-t", 30, "--json").out)[
        "costs"
    ]["totals"] == {"ptfs": 100, "cpt": 60, "switching": 60 + 6 + 8}


def test_lengths_in_tokens(tmp_path: Path) -> None:
    # 2e9 / 131072 = 15258.8 -> 15259 steps, 5e8 / 131072 = 3814.7 -> 3815
    batch = ("--tokens-per-step", 131072)
    value = json.loads(velopath("plan", "--tokens", "2e9", "--tokens", "500_000_000", *batch, "--json").out)
    assert value["plan"]["slices"] == [["slice-1", 15259], ["slice-2", 3815]]
    one, two = (row for row in value["lengths"] if row["kind"] == "slice")
    assert (one["asked_tokens"], one["steps"], one["tokens"]) == (2 * 10**9, 15259, 15259 * 131072)
    assert (two["asked_tokens"], two["tokens"]) == (5 * 10**8, 3815 * 131072)
    page = tmp_path / "plan.html"
    text = " ".join(velopath("plan", "-n", 3, "--tokens", "2e9", *batch, "--html", page).out.split())
    assert (
        "Lengths at 131,072 tokens a step" in text
        and "slice-3 │ 2,000,000,000 │ 15,259 │ 2,000,027,648" in text
    )
    assert "<td>2,000,027,648</td>" in page.read_text()
    assert json.loads(velopath("plan", "--json").out)["lengths"] == []
    for arguments, message in (
        (
            ("--tokens", "2e9"),
            "--tokens need the tokens of a step: give --tokens-per-step, or --measured RUN",
        ),
        (("--tokens", "2e9", "--steps", 5, *batch), "--steps and --tokens exclude each other"),
        (("--tokens", "2.5", *batch), "'2.5' is no number of tokens; expected a whole one, such as 2e9"),
        (("--tokens", "many", *batch), "'many' is no number of tokens"),
        (("--tokens", "0", *batch), "tokens is 0; expected 1 or more"),
        (("--tokens", "5", "--tokens", "6", "-n", 3, *batch), "--tokens for 2, --versions for 3"),
    ):
        done = velopath("plan", *arguments)
        assert done.code == 2 and message in " ".join(done.err.split()), (arguments, done.err)


def test_the_proxy_of_a_config_is_counted_beside(data: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.yaml", data, control__targets=None)
    for overrides in ((), ("path.warmup_steps=null", "path.warmup_tokens=500")):
        done = velopath("plan", config, *overrides, "--json")
        assert done.code == 0, done.err
        assert json.loads(done.out)["proxy"]["steps"] == 30


def test_options_that_contradict_each_other_are_refused(data: Path, tmp_path: Path) -> None:
    two = ("--alpha", 0.6, "--alpha", 0.4)
    for arguments in (
        ("-n", 4, *two),
        ("-t", 5, "-t", 6, "-t", 7, *two),
        ("-n", 2, "-t", 5, "-t", 6, "-t", 7),
    ):
        done = velopath("plan", *arguments)
        assert done.code == 2 and "different numbers of versions" in done.err, done.err
        assert "give a length and --alpha once, or once per version" in " ".join(done.err.split())
    config = write_config(tmp_path / "run.yaml", data)
    for arguments in (two, ("-n", 4), ("-t", 5)):
        done = velopath("plan", config, *arguments)
        assert done.code == 2 and "give overrides instead, such as path.branch_share=0.5" in " ".join(
            done.err.split()
        )
    done = velopath("plan", "--alpha", 0.6, "--alpha", 0)
    assert done.code == 2 and "slice 'slice-2': branch_share is 0" in done.err


def test_hours_money_and_overheads() -> None:
    # 1000 steps of 3600 tokens at 1000 tokens/s are 3600 s on 8 GPUs: 8 GPU hours
    price = Price(tokens_per_step=3600, tokens_per_second=1000, gpus=8, gpu_hour=2.5)
    assert (price.hours(1000), price.money(1000)) == (8.0, 20.0)
    rows = method_rows(cost_table(SLICES, 0.6), price)
    hours = {m: sum(r.gpu_hours or 0 for r in rows if r.method == m) for m in ("ptfs", "cpt", "switching")}
    assert hours == pytest.approx({"ptfs": 80, "cpt": 32, "switching": 46.4})
    assert sum(r.steps for r in rows if r.method == "switching") == 5800
    # 5400 tokens every 100 steps and 10800 twice a version, forward only: (10 * 5400 + 2 * 10800) / 3 / 3600 steps
    more = Price(tokens_per_step=3600, evaluation_tokens=5400, version_tokens=10800, every=100)
    assert more.overhead(1000, 1) == pytest.approx(7.0)
    with pytest.raises(ConfigError, match="gpu_hour is -1"):
        Price(gpu_hour=-1)


def test_storage() -> None:
    kept = storage(cost_table(SLICES, 0.6), Price(parameters=1e9))
    assert kept["ptfs"] == {"versions": 4, "resumable": 0, "bytes": 16e9}
    assert kept["cpt"]["bytes"] == 28e9
    assert kept["switching"] == {"versions": 4, "resumable": 5, "bytes": 76e9}


def test_the_command_and_its_files(tmp_path: Path) -> None:
    arguments = (
        "plan",
        "-n",
        4,
        "-t",
        1000,
        "--tokens-per-step",
        3600,
        "--tokens-per-second",
        1000,
        "--price",
        2,
    )
    names = {kind: tmp_path / f"plan.{kind}" for kind in ("csv", "html", "png")}
    done = velopath(*arguments, *(part for kind, path in names.items() for part in (f"--{kind}", path)))
    assert done.code == 0, done.err
    text = " ".join(done.out.split())
    assert "58.0%" in text and "145.0%" in text and "could read every slice 1.45 times" in text
    with names["csv"].open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 16 and {r["method"] for r in rows} == {"ptfs", "cpt", "wsd_s", "switching"}
    assert sum(float(r["money"]) for r in rows if r["method"] == "cpt") == pytest.approx(8.0)
    page = names["html"].read_text()
    assert "<svg" in page and "WSD-S" in page and names["png"].stat().st_size > 1000
    value = json.loads(velopath(*arguments, "--json").out)
    assert value["costs"]["totals"]["switching"] == value["totals"]["switching"]["steps"] == 5800


def test_planned_beside_real_and_a_measured_price(data: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.yaml", data, control__controller="static")
    run = tmp_path / "run"
    assert velopath("train", config, "--run", run, "--versions").code == 0
    value = json.loads(velopath("plan", "--actual", run, "--json").out)
    assert value["planned"] == value["actual"] and value["actual"]["steps"] == 104
    rows = {r["segment"]: r for r in value["rows"]}
    assert {n: (r["planned_steps"], r["actual_steps"]) for n, r in rows.items()} == {
        "main": (56, 56),
        "v1": (24, 24),
        "v2": (24, 24),
    }
    assert all(r["seconds"] > 0 and r["tokens"] == r["actual_steps"] * 128 for r in rows.values())
    assert "of PTFS" in velopath("plan", "--actual", run).out
    measured = json.loads(velopath("plan", config, "--measured", run, "--json").out)
    assert measured["price"]["tokens_per_step"] == 128 and measured["price"]["tokens_per_second"] > 0
    assert measured["price"]["evaluation_tokens"] == 3 * 200 and measured["price"]["every"] == 5
    assert measured["totals"]["switching"]["gpu_hours"] > 0
    refused = velopath("plan", "--measured", tmp_path)
    assert refused.code == 2 and "no step with a throughput" in refused.err
    assert velopath("plan", "--actual", tmp_path).code == 3
