"""Other sources of the points: the main path's own first steps, short decays from each, a smaller sibling's."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from commands import start, velopath
from small_run import config, in_force, newest, write_config
from velopath.cli.explain import explained
from velopath.errors import ConfigError
from velopath.plots import plot_targets
from velopath.proxy import find_targets
from velopath.report import build_summary
from velopath.retrace import controller_of, read_courses, retrace
from velopath.run import Run
from velopath.runfolder import RunFolder, is_proxy
from velopath.runlineage import read_lineage
from velopath.segments import cut_version, train_main
from velopath.targets import Targets
from velopath.verification import verify_run

FITTED = {"control__targets": None, "control__options": {"small_gap": "mean", "step_size": 2.0}}
MAIN = {**FITTED, "proxy__source": "main", "proxy__steps": 15, "proxy__points": 4, "proxy__first": 0.4}
POINTS = [6, 8, 11, 15]


def targets_of(folder: Path) -> Targets:
    return Targets.from_json(json.loads((folder / "targets.json").read_text()))


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The main path of the first slice, whose first 15 steps give the targets."""
    folder = tmp_path_factory.mktemp("main") / "run"
    with Run.open(config(data, **MAIN), folder, command="test") as run:
        train_main(run, 40)
    return folder


def test_the_main_paths_first_steps_give_the_targets(undisturbed: Path, data: Path, tmp_path: Path) -> None:
    """The same points as a trunk's of its own, bit for bit, and none of its steps to pay."""
    with Run.open(config(data, **MAIN | {"proxy__source": "trunk"}), tmp_path / "t", command="test") as run:
        trunk = find_targets(run)
    mine = targets_of(undisturbed)
    assert {n: d.points for n, d in mine.domains.items()} == {n: d.points for n, d in trunk.domains.items()}
    assert mine.losses == trunk.losses and mine.parameters == trunk.parameters
    assert (mine.proxy_steps, mine.proxy_tokens) == (0, 0)
    assert mine.evaluation_tokens == trunk.evaluation_tokens
    assert mine.cost_share == pytest.approx(mine.evaluation_tokens / 3 / (40 * 128))
    cost = read_lineage(RunFolder(undisturbed)).cost
    assert (cost.proxy_steps, cost.main_steps) == (0, 40)
    # Until then the weights hold. The controller starts from the starting model's losses and moves at once.
    evaluations = {r["step"]: r["loss"] for r in in_force(undisturbed, "eval", "main")}
    assert sorted(evaluations)[:6] == [0, *POINTS, 20]
    controls = in_force(undisturbed, "control", "main")
    assert [(c["step"], c["reason"]) for c in controls[:3]] == [(0, "start"), (15, "update"), (20, "update")]
    first, second = controls[:2]
    assert first["losses"] == evaluations[0] and second["losses"] == evaluations[15]
    assert first["weights"] == {"code": 0.5, "prose": 0.3, "tables": 0.2} != second["weights"]
    assert second["initial"] == pytest.approx(evaluations[0], abs=1e-12)
    assert first["progress"]["step"] == 0 and set(first["progress"]["tokens"].values()) == {0}


def test_such_a_run_is_explained_verified_and_reported(undisturbed: Path) -> None:
    folder = RunFolder(undisturbed)
    (course,) = read_courses(folder)
    updates = retrace(controller_of(folder, course), course)
    assert [dict(u.after.weights) for u in updates] == [u.seen.result for u in updates]
    assert explained(folder, 14)["reason"] == "start" and explained(folder, 15)["made_again"]
    assert not [f for f in verify_run(undisturbed) if f.error]
    assert build_summary(undisturbed)["cost"]["proxy_steps"] == 0


def test_until_inside_the_points(undisturbed: Path, data: Path, tmp_path: Path) -> None:
    """Stopped between two points by `--until`, then by the fit itself: the same run."""
    folder = tmp_path / "run"
    for until in (10, 15, 40):
        with Run.open(config(data, **MAIN), folder, command="test") as run:
            assert train_main(run, until) == until
        assert (folder / "targets.json").exists() == (until > 10)
    for kind in ("step", "control"):
        assert in_force(folder, kind) == in_force(undisturbed, kind)
    assert (folder / "targets.json").read_bytes() == (undisturbed / "targets.json").read_bytes()


def test_a_killed_main_path_goes_on(undisturbed: Path, data: Path, tmp_path: Path) -> None:
    path = write_config(tmp_path / "run.yaml", data, **MAIN)
    folder = tmp_path / "run"

    def at(step: int) -> bool:
        return (folder / "metrics.jsonl").exists() and any(
            r["step"] >= step for r in in_force(folder, "step", "main")
        )

    for step, number, code in ((7, signal.SIGKILL, -9), (12, signal.SIGTERM, 4), (17, signal.SIGKILL, -9)):
        process = start("train", path, "--run", folder, "--until", 40)
        process.until(lambda step=step: at(step))  # type: ignore[misc]
        process.signal(number)
        assert process.wait().code == code
    done = velopath("train", path, "--run", folder, "--until", 40)
    assert done.code == 0, done.err
    assert in_force(folder) == in_force(undisturbed)
    assert newest(folder).keys() == newest(undisturbed).keys()
    assert (folder / "targets.json").read_bytes() == (undisturbed / "targets.json").read_bytes()


def test_short_decays_share_the_trunk(data: Path, tmp_path: Path) -> None:
    changes = {**FITTED, "proxy__decay": 0.25, "control__decay_gain": "measured"}
    with Run.open(config(data, **changes), tmp_path, command="test") as run:
        found = find_targets(run)
    # Points at 6, 9, 13, 20, 30 and decays of a quarter of each, half up: 2, 2, 3, 5, 8 steps.
    ends = [8, 11, 16, 25, 38]
    assert [round(d / 128) for d, _ in found.domains["code"].points] == ends
    assert (found.proxy_steps, found.decay) == (30 + 20, 0.25)
    for start_, end in zip((6, 9, 13, 20, 30), ends, strict=True):
        rates = [r["rate"] for r in in_force(tmp_path, "step", f"proxy-{start_}")]
        assert len(rates) == end - start_ and rates[0] == 1e-2 and rates == sorted(rates, reverse=True)
    (last,) = in_force(tmp_path, "eval", "proxy-30")
    assert found.domains["code"].points[-1][1] == last["loss"]["code"]
    undecayed = Targets.fit(
        {
            n: [(r["step"] * 128, r["loss"][n]) for r in in_force(tmp_path, "eval", "proxy")]
            for n in ("code", "prose", "tables")
        },
        38 * 128,
        above_last="last",
    )
    assert found.decay_gain is not None
    for name, gain in found.decay_gain.items():
        assert gain == pytest.approx(undecayed.losses[name] - last["loss"][name], abs=1e-12)
    assert not [f for f in verify_run(tmp_path) if f.error]
    cost = build_summary(tmp_path)["cost"]
    assert (cost["proxy_steps"], cost["branch_steps"]) == (50, 0)
    with Run.open(config(data, **changes), tmp_path, command="test") as run:
        train_main(run, 5)
        assert find_targets(run) == found
    goal = in_force(tmp_path, "control", "main")[0]["target"]
    assert goal == pytest.approx({n: t + found.decay_gain[n] for n, t in found.losses.items()}, abs=1e-12)


def test_decays_from_the_main_path(data: Path, tmp_path: Path, undisturbed: Path) -> None:
    """They leave it alone: its losses and rows are those of the run without them."""
    folder = tmp_path / "run"
    with Run.open(config(data, **MAIN, proxy__decay=0.2), folder, command="test") as run:
        train_main(run, 16)
        cut_version(run, "v1")
        with pytest.raises(ConfigError, match="'proxy-6'; expected letters, digits"):
            cut_version(run, "proxy-6", at=16)
    found = targets_of(folder)
    assert found.proxy_steps == 1 + 2 + 2 + 3 and found.decay == 0.2
    mine = {r["step"]: (r["loss"], r["stream"]) for r in in_force(folder, "step", "main")}
    theirs = {r["step"]: (r["loss"], r["stream"]) for r in in_force(undisturbed, "step", "main")}
    assert mine == {step: theirs[step] for step in range(1, 17) if step < 16} | {16: mine[16]}
    assert {s for s in (r["segment"] for r in in_force(folder)) if is_proxy(s)} == {
        f"proxy-{p}" for p in POINTS
    }
    assert not [f for f in verify_run(folder) if f.error]
    summary = build_summary(folder)
    assert summary["cost"]["proxy_steps"] == 8 and [v["name"] for v in summary["versions"]] == ["v1"]


def test_a_smaller_siblings_points(data: Path, tmp_path: Path) -> None:
    small = {"model__overrides__hidden_size": 16, "model__overrides__intermediate_size": 24}
    with Run.open(config(data, **FITTED, **small), tmp_path / "small", command="test") as run:
        theirs = find_targets(run)
    place = str(tmp_path / "small" / "targets.json")
    short = {"proxy__steps": 12, "proxy__points": 4, "proxy__first": 0.4}
    with Run.open(
        config(data, **FITTED, **short, proxy__siblings={"small": place}), tmp_path / "run", command="test"
    ) as run:
        mine = find_targets(run)
    assert theirs.parameters is not None and mine.parameters is not None
    assert theirs.parameters < mine.parameters
    law = mine.domains["code"].law
    assert law is not None and law.law == "sized" and law.to_json()["siblings"][0][0] == theirs.parameters
    assert Targets.from_json(json.loads((tmp_path / "run" / "targets.json").read_text())) == mine
    assert "/ N^0.34 + " in law.formula
    plot_targets(mine, tmp_path / "targets.png")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"proxy__source": "main", "proxy__shares": "uniform"},
            "proxy.source main reads the main path's own",
        ),
        ({"proxy__siblings": {"a": "x"}, "proxy__law": "two"}, "proxy.siblings fit a law with a size term"),
        ({"proxy__decay": 0.0}, "proxy.decay"),
        ({"proxy__source": "branch"}, "proxy.source"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes: dict[str, Any], message: str, data: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        config(data, **changes)


def test_what_cannot_be_fitted_is_refused(data: Path, tmp_path: Path, undisturbed: Path) -> None:
    for number, (changes, message) in enumerate(
        (
            (
                {"proxy__siblings": {"a": str(tmp_path / "no.json")}},
                "proxy.siblings.a is .*no.json, which is not",
            ),
            ({**MAIN, "proxy__steps": 41}, "proxy.steps 41 reach beyond the first slice of 40 steps"),
        )
    ):
        with (
            Run.open(config(data, **FITTED | changes), tmp_path / str(number), command="test") as run,
            pytest.raises(ConfigError, match=message),
        ):
            find_targets(run)
    with (
        Run.open(config(data, **MAIN), undisturbed, command="test") as run,
        pytest.raises(ConfigError, match="the points are the main path's own"),
    ):
        find_targets(run, force=True)
    with (
        Run.open(
            config(data, **FITTED, control__decay_gain="measured"), tmp_path / "gain", command="test"
        ) as run,
        pytest.raises(ConfigError, match="decay_gain is 'measured' and the targets are of undecayed points"),
    ):
        find_targets(run)
        train_main(run, 5)
