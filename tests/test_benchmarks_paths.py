"""The paths study: its arms cost what the planner says, equal schedules are equal runs, and its tables are right."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks is no installed package

from benchmarks.__main__ import main  # noqa: E402
from benchmarks.paths import study, tables  # noqa: E402
from benchmarks.paths.corpus import NAMES, SlicedText  # noqa: E402
from benchmarks.paths.smoke import made_up_text  # noqa: E402
from benchmarks.paths.trainer import Learner, Scale  # noqa: E402

from velopath.plan import compare_costs  # noqa: E402
from velopath.schedule import LrPath  # noqa: E402

SCALE = Scale("test", rows=2, steps=5, warmup=1, test_tokens=256, vocabulary=300)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> SlicedText:
    return made_up_text(tmp_path_factory.mktemp("paths") / "text", SCALE.vocabulary)


def test_costs_are_the_planner_s(text: SlicedText, tmp_path: Path) -> None:
    arms: dict[str, list[int]] = {}
    for kind in ("switching", "ptfs", "cpt", "cpt-equal-cost"):
        result = study.run(study.Job(kind, "iid", 0, SCALE), text, tmp_path)
        arms |= {arm: [v["cost"] for v in versions] for arm, versions in result["arms"].items()}
    planned = compare_costs([SCALE.steps] * 4, 0.6)
    assert arms["switching 0.6, cosine"][-1] == planned["switching"] == 29  # 5.8 T
    assert arms["PTFS"][-1] == planned["ptfs"] == 50
    assert arms["CPT, re-warmed"][-1] == planned["cpt"] == 20
    assert arms["switching 0.6, cosine"] == [5, 13, 21, 29]
    assert arms["PTFS"] == [5, 15, 30, 50]
    assert arms["CPT, re-warmed, 1.45 passes"] == [7, 14, 21, 28]


def test_a_branch_is_the_run_from_scratch_on_its_schedule(text: SlicedText, tmp_path: Path) -> None:
    weights = study.weights_of("drift", 0), study.weights_of("drift", 1)
    main_path = LrPath.main(SCALE.peak, SCALE.warmup)
    main_learner = Learner(SCALE, text, tmp_path, seed=3)
    main_learner.train(main_path, 0, 0, 5, weights[0]).train(main_path, 1, 0, 2, weights[1])
    path = main_path.branch(7, 3, "cosine")
    branch = main_learner.copy().train(path, 1, 2, 3, weights[1])
    main_learner.train(main_path, 1, 2, 3, weights[1])  # the main path going on does not touch the branch
    scratch = Learner(SCALE, text, tmp_path, seed=3).train(path, 0, 0, 5, weights[0])
    scratch.train(path, 1, 0, 5, weights[1])
    assert scratch.step == branch.step == 10
    for name, value in scratch.decoder.state_dict().items():
        assert torch.equal(value, branch.decoder.state_dict()[name]), name
    assert branch.losses() == scratch.losses() != main_learner.losses()


def test_weights_of_drifting_slices() -> None:
    assert study.weights_of("iid", 2) == dict.fromkeys(NAMES, 1 / 6)
    third = study.weights_of("drift", 2)
    assert third == {
        "cpp": 0.125,
        "docs": 0.125,
        "python": 0.125,
        "verse": 0.125,
        "tables": 0.5,
        "translations": 0,
    }
    assert all(sum(study.weights_of("drift", k).values()) == pytest.approx(1) for k in range(4))
    assert study.arrived("drift", 1) == ("cpp", "docs", "python", "verse")


def test_paired_differences() -> None:
    # 0.1, 0.2, 0.3: mean 0.2, standard deviation 0.1, t(0.975, 2) = 4.3027: 0.2 +- 4.3027 * 0.1 / sqrt(3).
    found = tables.paired({0: 1.1, 1: 2.2, 2: 3.3, 9: 5.0}, {0: 1.0, 1: 2.0, 2: 3.0})
    assert found is not None
    assert found["n"] == 3
    assert found["mean"] == pytest.approx(0.2)
    assert (found["low"], found["high"]) == (
        pytest.approx(-0.04842, abs=1e-4),
        pytest.approx(0.44842, abs=1e-4),
    )
    assert tables.paired({0: 1.5}, {0: 1.0}) == {"n": 1, "mean": 0.5, "low": None, "high": None}
    assert tables.paired({0: 1.0}, {1: 1.0}) is None


def test_smoke_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["paths", "--smoke", "--regimes", "drift", "--steps", "5", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*-paths-smoke.json")
    result = json.loads(path.read_text())["result"]
    assert len(result["jobs"]) == result["wanted"] == len(study.KINDS)
    arms = result["summary"]["drift"]["arms"]
    assert len(arms) == 11
    assert all(len(arm["loss"]) == 4 and 0 < arm["loss"][-1] < 8 for arm in arms.values())
    assert "switching 0.6, cosine" in capsys.readouterr().out
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_a_study_goes_on(tmp_path: Path) -> None:
    results = study.Results(tmp_path / "small.jsonl")
    results.keep({"key": "a", "arms": {}})
    results.file.write_text(results.file.read_text() + '{"key": "b", "ar')  # torn by a kill
    assert set(study.Results(results.file).found) == {"a"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--regimes", "iid,drifting"], "--regimes has 'drifting'; expected iid or drift"),
        (["--seeds", "0"], "--seeds is 0; expected more than 0"),
        (["--scale", "large"], "invalid choice: 'large'"),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["paths", *arguments])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
