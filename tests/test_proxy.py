"""The proxy trunk: where it is evaluated, what it fits, and that it goes on where it was killed."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from commands import start, velopath
from small_run import config, in_force, newest, write_config
from velopath.config import ProxyConfig
from velopath.errors import ConfigError, DataError
from velopath.loop import Loop
from velopath.plots import plot_targets
from velopath.proxy import find_targets
from velopath.proxy_points import proxy_points
from velopath.run import Run
from velopath.runfolder import RunFolder
from velopath.runlineage import read_lineage
from velopath.segments import train_main
from velopath.targets import Targets

FITTED = {"control__targets": None, "control__options": {"small_gap": "mean"}}


@pytest.mark.parametrize(
    ("steps", "points", "first", "warmup", "expected"),
    [
        (350, 7, 0.15, 30, [52, 71, 98, 135, 185, 255, 350]),  # the demo's
        (1000, 4, 0.1, 0, [100, 215, 464, 1000]),
        (64, 7, 1e-6, 0, [1, 2, 4, 8, 16, 32, 64]),  # never step 0: there is no loss to the power of log 0
        (1000, 4, 0.1, 125, [125, 250, 500, 1000]),  # not inside the warm-up
        (8, 4, 1e-6, 0, [1, 2, 4, 8]),
        (30, 5, 0.2, 4, [6, 9, 13, 20, 30]),
    ],
)
def test_points_are_spread_evenly_in_log_steps(
    steps: int, points: int, first: float, warmup: int, expected: list[int]
) -> None:
    assert proxy_points(ProxyConfig(steps=steps, points=points, first=first), warmup) == expected


@pytest.mark.parametrize(
    ("steps", "points", "first", "warmup"), [(10, 7, 0.5, 0), (100, 7, 0.1, 100), (5, 7, 1, 0)]
)
def test_too_few_steps_for_the_points_are_refused(steps: int, points: int, first: float, warmup: int) -> None:
    with pytest.raises(
        ConfigError, match=f"proxy.steps {steps} leave no room for {points} points after step"
    ):
        proxy_points(ProxyConfig(steps=steps, points=points, first=first), warmup)


def find(data: Path, folder: Path, force: bool = False, **changes: Any) -> Targets:
    with Run.open(config(data, **FITTED, **changes), folder, command="test") as run:
        return find_targets(run, force=force)


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    find(data, folder)
    return folder


def test_a_proxy_is_the_main_paths_beginning_at_the_original_weights(undisturbed: Path, data: Path) -> None:
    found = Targets.from_json(json.loads((undisturbed / "targets.json").read_text()))
    assert found.proxy_steps == 30 and found.proxy_tokens == 30 * 128
    assert found.shares == {"code": 0.5, "prose": 0.3, "tables": 0.2}
    evaluations = in_force(undisturbed, "eval", "proxy")
    assert [e["step"] for e in evaluations] == [6, 9, 13, 20, 30]
    assert found.evaluation_tokens == sum(sum(e["tokens"].values()) for e in evaluations)
    for name, target in found.domains.items():
        assert [(d, loss) for d, loss in target.points] == [
            (e["step"] * 128, e["loss"][name]) for e in evaluations
        ]
        assert target.tokens == 40 * 128
        assert target.law is not None and target.target <= target.points[-1][1]
    assert [r["rate"] for r in in_force(undisturbed, "step", "proxy")][:6] == [
        2.5e-3,
        5e-3,
        7.5e-3,
        1e-2,
        1e-2,
        1e-2,
    ]
    assert not in_force(undisturbed, "control")
    cost = read_lineage(RunFolder(undisturbed)).cost
    assert (cost.proxy_steps, cost.tokens, cost.main_steps) == (30, 30 * 128, 0)
    assert (undisturbed / "targets.png").read_bytes()[:4] == b"\x89PNG"


def test_a_static_main_path_reads_the_proxys_rows(undisturbed: Path, data: Path, tmp_path: Path) -> None:
    """The proxy shows what the main path would reach at weights that do not move: the same losses, step by step."""
    with Run.open(config(data, control__controller="static"), tmp_path, command="test") as run:
        train_main(run, 30)
    mine = {r["step"]: r["loss"] for r in in_force(tmp_path, "step", "main")}
    assert mine == {r["step"]: r["loss"] for r in in_force(undisturbed, "step", "proxy")}


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        ("uniform", {"code": 1 / 3, "prose": 1 / 3, "tables": 1 / 3}),
        ({"code": 1.0, "prose": 2.0, "tables": 1.0}, {"code": 0.25, "prose": 0.5, "tables": 0.25}),
    ],
)
def test_the_trunk_is_read_at_the_shares_that_targets_assume(
    shares: Any, expected: dict[str, float], data: Path, tmp_path: Path
) -> None:
    with Run.open(config(data, proxy__shares=shares), tmp_path, command="test") as run:
        found = find_targets(run)
    assert found.shares == pytest.approx(expected)
    read = in_force(tmp_path, "exposure", "proxy")[-1]["domains"]
    total = sum(row["tokens"] for row in read.values())
    for name, share in expected.items():
        assert read[name]["tokens"] / total == pytest.approx(share, abs=0.03)
    assert found.cost_share == pytest.approx((30 * 128 + found.evaluation_tokens / 3) / (40 * 128))
    assert "of the run that they are for" in found.cost_note


def test_shares_of_other_domains_are_refused(data: Path, tmp_path: Path) -> None:
    with (
        Run.open(config(data, proxy__shares={"code": 1.0}), tmp_path, command="test") as run,
        pytest.raises(ConfigError, match="no weight for domain 'prose'"),
    ):
        find_targets(run)


def test_targets_are_found_once(undisturbed: Path, data: Path, tmp_path: Path) -> None:
    find(data, tmp_path)
    before = (tmp_path / "metrics.jsonl").read_bytes(), (tmp_path / "targets.json").read_bytes()
    assert before[1] == (undisturbed / "targets.json").read_bytes()
    find(data, tmp_path)
    assert before == ((tmp_path / "metrics.jsonl").read_bytes(), (tmp_path / "targets.json").read_bytes())
    find(data, tmp_path, force=True)
    assert before[1] == (tmp_path / "targets.json").read_bytes()
    assert len((tmp_path / "metrics.jsonl").read_bytes()) > len(before[0])
    spent = [what for what, _ in read_lineage(RunFolder(tmp_path)).spent]
    assert spent == ["proxy", "proxy 2"]  # both trunks were paid for


def test_a_killed_proxy_goes_on_between_its_points(undisturbed: Path, data: Path, tmp_path: Path) -> None:
    path = write_config(tmp_path / "run.yaml", data, **FITTED)
    folder = tmp_path / "run"

    def at(step: int) -> bool:
        return (folder / "metrics.jsonl").exists() and any(
            r["step"] >= step for r in in_force(folder, None, "proxy")
        )

    for step, number, code in ((2, signal.SIGKILL, -9), (10, signal.SIGKILL, -9), (21, signal.SIGTERM, 4)):
        process = start("targets", path, "--run", folder)
        process.until(lambda step=step: at(step))  # type: ignore[misc]
        process.signal(number)
        assert process.wait().code == code
        assert not (folder / "targets.json").exists()
    done = velopath("targets", path, "--run", folder)
    assert done.code == 0, done.err
    assert "Target losses, nats per token" in done.out
    assert (folder / "targets.json").read_bytes() == (undisturbed / "targets.json").read_bytes()
    assert in_force(folder) == in_force(undisturbed)
    expected = {k: json.loads(v)["files"] for k, v in newest(undisturbed).items()}
    found = {k: json.loads(v)["files"] for k, v in newest(folder).items()}
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert found["proxy/step-00000030"][name] == expected["proxy/step-00000030"][name]


@pytest.fixture
def without_evaluation(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Evaluations are made and not recorded: what a run looks like whose log was lost."""
    original = Loop.evaluate

    def evaluate(loop: Loop, *arguments: Any, **options: Any) -> Any:
        log, loop.log = loop.log, lambda record: None
        try:
            return original(loop, *arguments, **options)
        finally:
            loop.log = log

    monkeypatch.setattr(Loop, "evaluate", evaluate)
    yield


def test_a_lost_point_is_an_error_that_says_what_to_do(
    data: Path, tmp_path: Path, without_evaluation: None
) -> None:
    with pytest.raises(
        DataError, match="no evaluation at step 6 of proxy, which is past it; run `velopath targets --force`"
    ):
        find(data, tmp_path)


def test_targets_of_a_later_slice_are_read_at_cumulative_tokens(
    undisturbed: Path, data: Path, tmp_path: Path
) -> None:
    settings = config(data, **{**FITTED, "control__targets": str(undisturbed / "targets.json")})
    with Run.open(settings, tmp_path, command="test") as run:
        train_main(run, 56)
    targets = Targets.from_json(json.loads((undisturbed / "targets.json").read_text()))
    for first_step, slice_end in ((0, 40), (40, 80)):
        # At a slice's border the last update of the slice before has the same step.
        controls = [c for c in in_force(tmp_path, "control", "main") if c["step"] == first_step]
        (control,) = (c for c in controls if c["reason"] == "start")
        expected = targets.at(slice_end * 128, above_last="last").losses
        assert control["target"] == expected
    assert targets.at(80 * 128, above_last="last").losses != targets.losses


def test_targets_are_drawn_from_their_file(undisturbed: Path, tmp_path: Path) -> None:
    targets = Targets.from_json(json.loads((undisturbed / "targets.json").read_text()))
    plot_targets(targets, tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == (undisturbed / "targets.png").read_bytes()
