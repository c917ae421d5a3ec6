"""Versions cut from the main path: equal to training from scratch on the joined path, whenever they are cut."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from small_run import config, in_force, newest
from velopath.checkpoint import load_checkpoint, step_folder
from velopath.config import RunConfig
from velopath.dist import Dist
from velopath.errors import ConfigError, StoppedError
from velopath.loop import Loop
from velopath.model import Decoder, preset
from velopath.optim import build_optimizer
from velopath.plan import compare_costs
from velopath.report import build_summary
from velopath.run import Run
from velopath.runfolder import RunFolder
from velopath.runlineage import read_lineage
from velopath.schedule import LrPath
from velopath.segments import cut_version, train_main
from velopath.session import Session
from velopath.stream import TokenBatch, open_sampler
from velopath.train_step import TrainStep


def opened(settings: RunConfig, folder: Path) -> Run:
    return Run.open(settings, folder, command="test")


def run_all(settings: RunConfig, folder: Path) -> Path:
    """Main path and versions in the plan's order."""
    with opened(settings, folder) as run:
        for segment in run.plan.segments:
            if segment.kind == "main":
                train_main(run, segment.end_step)
            else:
                cut_version(run, segment.name)
    return folder


TENSORS = ("model.safetensors", "optimizer.safetensors", "rng.safetensors")


def of_segment(folder: Path, segment: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What a segment left: the hashes of its last checkpoint, and its records but for the evaluations at which one
    call of `train_main` happened to end."""
    manifest = next(v for k, v in newest(folder).items() if k.startswith(f"{segment}/"))
    files: dict[str, Any] = json.loads(manifest)["files"]
    kinds = ("step", "control", "version", *(("eval",) if segment != "main" else ()))
    return files, [r for r in in_force(folder, segment=segment) if r["kind"] in kinds]


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two slices with both versions, weights held in the branches."""
    return run_all(config(data), tmp_path_factory.mktemp("finished"))


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, int], str]:
    """(segment, step) -> digest of the tokens and domains that were read there."""
    read: dict[tuple[str, int], str] = {}
    original = Session.next_batch

    def spy(session: Session) -> TokenBatch:
        batch = original(session)
        content = batch.tokens.tobytes() + batch.domains.tobytes()
        read[session.segment, batch.step] = hashlib.sha256(content).hexdigest()
        return batch

    monkeypatch.setattr(Session, "next_batch", spy)
    return read


@pytest.mark.parametrize("shape", ["cosine", "linear", "knee"])
def test_a_version_is_training_from_scratch_with_constant_then_decay(
    data: Path, tmp_path: Path, shape: str
) -> None:
    """The claim of path switching, in bits: main path to 16 and branch to 40, against a plain loop of 40 steps."""
    settings = config(data, control__controller="static", path__shape=shape, path__floor=1e-4)
    with opened(settings, tmp_path / "run") as run:
        train_main(run, 16)
        cut_version(run, "v1")

    entry, train = settings.data.slices["one"], settings.train
    decoder = Decoder(preset("tiny", vocab_size=64, **settings.model.overrides), seed=settings.seed)
    optimizer = build_optimizer(decoder, weight_decay=train.weight_decay, betas=train.betas)
    path = LrPath.main(peak=1e-2, warmup_steps=4).branch(at_step=16, steps=24, shape=shape, floor=1e-4)
    step = TrainStep(decoder, optimizer, n_domains=3, dist=Dist(), clip=train.clip)
    sampler = open_sampler(entry.root, rows=4, row_tokens=32, weights=entry.weights, domain_key_salt="one")
    for _ in range(40):
        batch = next(sampler)
        step(torch.from_numpy(batch.tokens), torch.from_numpy(batch.domains), path.rate(batch.step))
    saved = load_file(step_folder(tmp_path / "run" / "checkpoints" / "v1", 40) / "model.safetensors")
    scratch = decoder.state_dict()
    for name, tensor in saved.items():
        assert torch.equal(tensor, scratch[name]), name


def test_a_version_is_the_same_whenever_it_is_cut(finished: Path, data: Path, tmp_path: Path) -> None:
    """Cut at once, or after the main path has run on, or after a later version, or in a run that got its second
    slice later."""
    late = tmp_path / "late"
    with opened(config(data), late) as run:
        train_main(run)
        cut_version(run, "v2")
        cut_version(run, "v1")
    grown = tmp_path / "grown"
    slices = config(data).model_dump(mode="json")["data"]["slices"]
    run_all(config(data, data__slices={"one": slices["one"]}), grown)
    run_all(config(data), grown)
    for segment in ("main", "v1", "v2"):
        files, records = of_segment(finished, segment)
        assert of_segment(late, segment) == (files, records)
        more_files, more_records = of_segment(grown, segment)  # its state names another configuration
        assert {f: files[f] for f in TENSORS} == {f: more_files[f] for f in TENSORS}
        assert more_records == records


def test_the_weights_of_a_branch_are_held(finished: Path) -> None:
    begun = load_checkpoint(step_folder(finished / "checkpoints" / "main", 16)).state["session"]["sampler"]
    ended = load_checkpoint(step_folder(finished / "checkpoints" / "v1", 40)).state["session"]["sampler"]
    assert begun["weights"] == ended["weights"]
    assert begun["weights"][0]["id"] == 3  # pushes at 5, 10 and 15
    assert not [r for r in in_force(finished, "control") if r["segment"] != "main"]
    assert {r["step"] for r in in_force(finished, "eval", "v1")} == {20, 25, 30, 35, 40}
    assert {r["step"] for r in in_force(finished, "version", "v1")} == {16, 40}


def test_a_live_branch_goes_on_with_the_main_paths_controller(data: Path, tmp_path: Path) -> None:
    run_all(config(data, control__in_branch="live"), tmp_path)
    controls = in_force(tmp_path, "control", "v1")
    assert [(c["step"], c["reason"]) for c in controls] == [(s, "update") for s in (20, 25, 30, 35, 40)]
    last = [c for c in in_force(tmp_path, "control", "main") if c["step"] == 15][0]
    assert controls[0]["initial"] == last["initial"]
    assert controls[0]["id"] == last["id"] + 1
    assert controls[-1]["weights"] != controls[0]["weights"] != last["weights"]


def test_a_replayed_branch_reads_what_the_main_path_read(
    data: Path, tmp_path: Path, batches: dict[tuple[str, int], str]
) -> None:
    with opened(config(data, control__in_branch="replay"), tmp_path) as run:
        train_main(run, 30)
        with pytest.raises(
            ConfigError, match="replay needs the main path's weights up to step 40, it is at 30"
        ):
            cut_version(run, "v1")
        train_main(run, 40)
        cut_version(run, "v1")
    main = [batches["main", s] for s in range(16, 40)]
    assert [batches["v1", s] for s in range(16, 40)] == main
    assert len(set(main)) == 24
    audit = [json.loads(line) for line in (tmp_path / "audit" / "v1.one.jsonl").read_text().splitlines()]
    assert [r["step"] for r in audit if r["kind"] == "push"] == [20, 25, 30, 35]


def test_a_held_branch_does_not_read_what_the_main_path_read(
    data: Path, tmp_path: Path, batches: dict[tuple[str, int], str]
) -> None:
    run_all(config(data), tmp_path)
    assert batches["v1", 16] == batches["main", 16]  # weights move at 20 only
    assert [batches["v1", s] for s in range(20, 40)] != [batches["main", s] for s in range(20, 40)]


def test_rates_are_the_paths_in_the_record_and_in_the_optimiser(finished: Path) -> None:
    main = LrPath.main(peak=1e-2, warmup_steps=4)
    paths = {
        "main": main,
        "v1": main.branch(at_step=16, steps=24, shape="cosine", floor=0.0),
        "v2": main.branch(at_step=56, steps=24, shape="cosine", floor=0.0),
    }
    for segment, path in paths.items():
        steps = in_force(finished, "step", segment)
        assert [r["rate"] for r in steps] == [path.rate(r["step"] - 1) for r in steps]
        folder = finished / "checkpoints" / segment
        for saved in folder.glob("step-*"):
            step = int(saved.name[-8:])
            for group in json.loads((saved / "optimizer.json").read_text())["groups"]:
                assert group["options"]["lr"] == pytest.approx(path.rate(step - 1), rel=1e-12)


def test_the_ledger_is_the_planners(finished: Path) -> None:
    lineage = read_lineage(RunFolder(finished))
    assert [(n.name, n.parent, n.branch_step, n.steps, n.slice, n.tokens) for n in lineage.main] == [
        ("main@16", None, 0, 16, "one", 16 * 128),
        ("main@40", "main@16", 16, 24, "one", 24 * 128),
        ("main@56", "main@40", 40, 16, "two", 16 * 128),
    ]
    assert [(n.name, n.parent, n.branch_step, n.steps, n.slice, n.tokens) for n in lineage.versions] == [
        ("v1", "main@16", 16, 24, "one", 24 * 128),
        ("v2", "main@56", 56, 24, "two", 24 * 128),
    ]
    costs = compare_costs([40, 40], 0.6)
    assert costs == {"ptfs": 120, "cpt": 80, "switching": 104}
    cost = build_summary(finished)["cost"]
    assert (cost["main_steps"], cost["branch_steps"]) == (56, 48)
    assert cost["planned_over_ptfs"] == cost["actual_over_ptfs"] == 104 / 120
    assert (cost["proxy_steps"], cost["base_steps"]) == (0, 0)
    # Read on the main path at 0, 5 ... 55, at its ends 16 and 56, and at 40 twice (end of a slice, start of one); in
    # the branches at 20 ... 40 and 60 ... 80; for each version before and after. Rounded up to rows of 32.
    small, large = 3 * 224, 3 * 416
    assert sum(v.evaluation_tokens for v in lineage.versions) == 4 * large
    assert cost["evaluation_tokens"] == (13 + 2 + 10) * small + 4 * large
    for version, node in zip(build_summary(finished)["versions"], lineage.versions, strict=True):
        assert version["heldout_loss"] == node.heldout_loss
        assert set(node.heldout_loss) == {"code", "prose", "tables"}
        assert all(node.heldout_loss[n] < node.notes["before"][n] for n in ("code", "prose", "tables"))


def test_main_checkpoints_stay_at_branch_points_and_slice_ends(finished: Path) -> None:
    kept = sorted(p.name for p in (finished / "checkpoints" / "main").iterdir())
    assert kept == [f"step-{n:08d}" for n in (16, 40, 49, 56)]


def test_a_branch_from_a_step_that_was_not_kept_names_those_that_were(finished: Path, data: Path) -> None:
    with opened(config(data), finished) as run:
        message = r"no main checkpoint at step 20 to branch 'v3' from; kept are 16, 40, 49, 56: choose one with --at"
        with pytest.raises(ConfigError, match=message):
            cut_version(run, "v3", at=20)
        with pytest.raises(ConfigError, match="step 81 lies outside the slices, which end at step 80"):
            cut_version(run, "v3", at=81)
        with pytest.raises(ConfigError, match=r"no version 'v3' \(it names v1, v2\); give --at STEP"):
            cut_version(run, "v3")
        with pytest.raises(ConfigError, match="a branch of 0 steps; expected 1 or more"):
            cut_version(run, "v3", at=16, steps=0)
        for name in ("main", "proxy", "base", "../v1", "a/b", "", ".", "..", "-"):
            with pytest.raises(ConfigError, match=f"version name {name!r}"):
                cut_version(run, name, at=16)


def test_a_version_is_cut_once(finished: Path, data: Path) -> None:
    before = (newest(finished), RunFolder(finished).events())
    with opened(config(data), finished) as run:
        again = cut_version(run, "v1")
        assert again == cut_version(run, "v1", at=16, steps=24, shape="cosine")
        assert again == read_lineage(run.folder).find("v1")
        for options, message in (
            (
                {"at": 56},
                "version 'v1' exists: it left the main path at step 16, not 56; choose another name",
            ),
            ({"steps": 9}, "version 'v1' exists: it has 24 steps, not 9; choose another name"),
            ({"shape": "knee"}, "version 'v1' exists: it decays by cosine, not knee; choose another name"),
        ):
            with pytest.raises(ConfigError, match=message):
                cut_version(run, "v1", **options)
    assert (newest(finished), RunFolder(finished).events()) == before


@pytest.fixture
def stops_at(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """Ask the loop to stop after a step of a segment: {"v3": 20}."""
    wanted: dict[str, int] = {}
    original = Loop.control

    def control(loop: Loop, session: Session, *rest: Any) -> None:
        original(loop, session, *rest)
        if session.step == wanted.get(session.segment):
            loop.stop.requested = True

    monkeypatch.setattr(Loop, "control", control)
    return wanted


def test_a_branch_begun_otherwise_is_not_continued(
    finished: Path, data: Path, stops_at: dict[str, int]
) -> None:
    stops_at["v3"] = 18
    with opened(config(data), finished) as run, pytest.raises(StoppedError, match="stopped at step 19 of 26"):
        cut_version(run, "v3", at=16, steps=10, shape="linear")
    stops_at.clear()
    with opened(config(data), finished) as run:
        for options in ({"at": 49, "steps": 10}, {"steps": 12}, {"shape": "knee", "steps": 10}):
            with pytest.raises(ConfigError, match="branch 'v3' was begun on another path") as error:
                cut_version(run, "v3", **{"at": 16, "shape": "linear", **options})
            assert "16" in str(error.value) and "linear" in str(error.value)
        version = cut_version(run, "v3", at=16, steps=10, shape="linear")
    assert (version.branch_step, version.steps, version.step) == (16, 10, 26)


def test_a_branch_at_step_0_is_refused_before_training(data: Path, tmp_path: Path) -> None:
    with opened(config(data, path__branch_share=1, path__warmup_steps=0), tmp_path) as run:
        message = "version 'v1' would leave the main path at step 0, before its first update: lower"
        with pytest.raises(ConfigError, match=message):
            train_main(run)
        with pytest.raises(ConfigError, match=message):
            cut_version(run, "v1")
