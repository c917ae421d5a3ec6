"""The mixing study: its parts against known values, and the whole of it end to end, small."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks is no installed package

from benchmarks.__main__ import main  # noqa: E402
from benchmarks.mixing.corpus import KNOWN, TRAIN_BYTES, part_of  # noqa: E402
from benchmarks.mixing.headroom import (  # noqa: E402
    LEAST,
    METRICS,
    Metrics,
    Surface,
    given_weights,
    random_mixtures,
)
from benchmarks.mixing.rules import PredictedCurve  # noqa: E402
from benchmarks.mixing.trainer import Results, RunSettings, Scale  # noqa: E402

from velopath.domains import Progress  # noqa: E402

NATURAL = {"a": 0.6, "b": 0.3, "c": 0.1}


def test_parts_share_no_document_and_have_their_sizes() -> None:
    parts = [part_of(f"cpp/{k}") for k in range(4000)]
    assert parts == [part_of(f"cpp/{k}") for k in range(4000)]
    assert 0.06 < parts.count("test") / 4000 < 0.10
    assert 0.05 < parts.count("control") / 4000 < 0.09


def test_metrics_by_hand() -> None:
    given = given_weights(("a", "b", "c"), ("a",))
    assert given == pytest.approx({"a": 0.2, "b": 0.4, "c": 0.4})
    found = Metrics(NATURAL, given).all({"a": 1.0, "b": 2.0, "c": 6.0})
    # natural 0.6 + 0.6 + 0.6, given 0.2 + 0.8 + 2.4
    assert found == pytest.approx({"mean": 3.0, "worst": 6.0, "natural": 1.8, "given": 3.4})
    assert tuple(found) == METRICS


def test_search_finds_the_best_mixture_of_a_known_surface() -> None:
    """L = c - s ln(w + 0.02): the mean is lowest near w ~ s, the worst where the losses are equal."""
    slopes, levels = {"a": 0.2, "b": 0.4, "c": 0.4}, {"a": 3.0, "b": 3.0, "c": 3.5}

    def losses(shares: dict[str, float]) -> dict[str, float]:
        return {n: levels[n] - slopes[n] * float(np.log(shares[n] + 0.02)) for n in shares}

    mixtures = [NATURAL, dict.fromkeys(NATURAL, 1 / 3), *random_mixtures(NATURAL, 20)]
    assert all(min(m.values()) >= LEAST - 1e-4 and abs(sum(m.values()) - 1) < 1e-3 for m in mixtures)
    surface = Surface.fit(mixtures, [losses(m) for m in mixtures])
    assert surface.error.max() < 0.01
    metrics = Metrics(NATURAL, given_weights(tuple(NATURAL), ()))
    best = surface.best("mean", metrics)
    assert best == pytest.approx({"a": 0.192, "b": 0.404, "c": 0.404}, abs=0.03)
    ends = losses(surface.best("worst", metrics))
    assert ends["c"] == pytest.approx(max(ends.values()), abs=0.02)
    assert max(ends.values()) < min(max(losses(m).values()) for m in mixtures)


def test_proxies_and_evaluations_come_off_the_steps() -> None:
    """600 steps of 1024 tokens; 12 evaluations of 6 * 2048 tokens at a third are 48 steps, the proxy 50."""
    static = RunSettings(0, {})
    assert static.train_steps(6) == 600
    moving = replace(static, controller="velocitune", heldout_tokens=2048)
    steps = moving.train_steps(6)
    spent = steps * 1024 + moving.evaluation_tokens(steps, 6) / 3
    assert spent <= 600 * 1024 < spent + 1024 + 6 * 2048 / 3
    assert moving.evaluation_tokens(551, 6) == 12 * 6 * 2048  # before steps 0, 50 ... 550
    assert replace(moving, signal="training").evaluation_tokens(551, 6) == 6 * 2048
    assert replace(static, other_tokens=50 * 1024).train_steps(6) == 550


def test_a_result_is_found_again_by_its_settings(tmp_path: Path) -> None:
    settings = RunSettings(3, {"a": 1.0}, Scale(steps=7), watch=(1, 2))
    file = tmp_path / "runs.jsonl"
    kept = {"settings": json.loads(json.dumps(settings.__dict__ | {"scale": settings.scale.__dict__}))}
    file.write_text(json.dumps(kept) + "\n")
    results = Results(file)
    assert settings in results
    assert replace(settings, every=49, signal="training") in results  # static: looks at no loss
    for other in (
        replace(settings, seed=4),
        replace(settings, scale=Scale(steps=8)),
        replace(settings, watch=()),
    ):
        assert other not in results


def test_predicted_curve_by_hand() -> None:
    """L = 2 + 10 / D^0.5: 3 at 100 tokens, 2.1 at 10,000; V = 1 on the curve, (3.9 - 2.1) / 0.9 = 2 for the other."""
    rule = PredictedCurve({"a": (2.0, 10.0, 0.5), "b": (2.0, 10.0, 0.5)}, 10_000.0, leak=0.0, cap=1.0)
    state = rule.start({"a": 5.0, "b": 5.0}, {"a": 0.5, "b": 0.5})
    progress = Progress(5, tokens={"a": 60, "b": 40})
    state, weights = rule.observe(state, {"a": 3.0, "b": 3.9}, progress)
    assert weights["b"] / weights["a"] == pytest.approx(np.exp(0.5))
    assert rule.state_from_json(json.loads(json.dumps(state.to_json()))) == state


def test_smoke(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mixing", "--smoke", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "## Headroom" in printed and "## Target error" in printed
    assert "## Sensitivity" in printed
    files = {path.suffix: path for path in tmp_path.iterdir()}
    assert set(files) == {".json", ".md", ".png"} and len(list(tmp_path.glob("*.png"))) == 2
    found = json.loads(files[".json"].read_text())["result"]
    assert found["complete"]
    assert set(found["natural"]) == set(TRAIN_BYTES) > set(KNOWN)
    for name, runs in found["arms"].items():
        for run in runs.values():
            assert set(run["test"]) == set(TRAIN_BYTES), name
            assert run["worst"] == max(run["test"].values())
            spent = 512 * run["steps"] + run["other_tokens"] + run["evaluation_tokens"] / 3
            assert spent <= 512 * found["scale"]["steps"], name
    assert found["arms"]["Velocitune, faithful"]["1"]["steps"] < found["scale"]["steps"]
    assert len(found["arms"]["marginal gain, worst"]["1"]["weights"]) > 10
    rows = {name: row for name, row in found["targets"].items() if "short decays" in name}
    assert set(rows) == {"natural, short decays, seed 1", "uniform, short decays, seed 1"}
    # 40 steps: 8 points at 2, 3, 3, 4 ... of which 5 differ (2, 3, 4, 5, 6), each with a decay of one step.
    assert {row["points"] for row in rows.values()} == {5}
    assert len(found["sensitivity"]) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scale", "large"], "invalid choice: 'large'"),
        (["--minutes", "-1"], "--minutes is -1; expected 0 or more"),
    ],
)
def test_wrong_arguments(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["mixing", *arguments, "--out", str(tmp_path)])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
