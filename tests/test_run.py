"""Opening, training and leaving a run folder: what is refused, what a stop and a numerical failure leave behind."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from commands import start, velopath
from conftest import write_data
from small_run import config, in_force, newest, write_config
from velopath.checkpoint import latest_checkpoint, load_checkpoint
from velopath.errors import ConfigError, DataError, NumericalError
from velopath.model import Decoder
from velopath.run import Run
from velopath.runfolder import RunFolder
from velopath.segments import train_main


def train(settings: object, folder: Path, until: int) -> Path:
    with Run.open(settings, folder, command="test") as run:  # type: ignore[arg-type]
        train_main(run, until)
    return folder


# -- opening ----------------------------------------------------------------------------------------------------


def test_a_new_run_says_what_it_is(data: Path, tmp_path: Path) -> None:
    settings = config(data)
    train(settings, tmp_path, 3)
    about = json.loads((tmp_path / "run.json").read_text())
    assert {k: about[k] for k in ("name", "command", "state", "seed", "world")} == {
        "name": "small",
        "command": "test",
        "state": "done",
        "seed": 0,
        "world": 1,
    }
    assert about["versions"]["torch"] == torch.__version__ and about["seconds"] > 0
    assert json.loads((tmp_path / "data.json").read_text())["two"]["domains"]["code"]["licence"] == "CC0-1.0"
    assert json.loads((tmp_path / "plan.json").read_text())["segments"][0]["end_step"] == 16
    assert (tmp_path / "lock").read_text() == ""
    with Run.reopen(tmp_path, command="other") as run:
        assert run.config == settings
    assert json.loads((tmp_path / "run.json").read_text())["seconds"] > about["seconds"]


def test_another_configuration_is_refused_once_something_was_trained(data: Path, tmp_path: Path) -> None:
    train(config(data), tmp_path, 3)
    with pytest.raises(ConfigError, match=r"(?s)differs from the one .*\n  path\.peak: 0\.01 -> 0\.02\n"):
        Run.open(config(data, path__peak=0.02), tmp_path, command="test")
    train(config(data, train__log_every=2, title="renamed"), tmp_path, 5)
    assert RunFolder(tmp_path).read_json("run.json")["name"] == "renamed"


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"data__slices__two__root": "/nowhere"}, DataError, "/nowhere: no domains: expected sub-folders"),
        ({"model__preset": "huge"}, ConfigError, "unknown model preset 'huge'"),
        ({"model__overrides__hidden": 3}, ConfigError, "unknown model field 'hidden'"),
        (
            {"model__overrides__vocab_size": 63},
            ConfigError,
            "tokenizer has 64 entries, the model tiny only 63",
        ),
        ({"model__hf": "/nowhere"}, ConfigError, "/nowhere/config.json does not exist"),
        (
            {"control__targets": None},
            ConfigError,
            "no target for domain 'code' of slice 'one' .*; run `velopath targets`",
        ),
        ({"control__targets": {"code": 1.0}}, ConfigError, "prose"),
        ({"control__controller": "mine"}, ConfigError, "unknown controller 'mine'; registered are"),
        ({"control__options": {"speed": 1}}, ConfigError, "has no option 'speed'; its options are"),
        ({"data__slices__one__weights": {"code": 1}}, ConfigError, "prose"),
        ({"train__row_tokens": 9000}, DataError, "'code' has .* tokens, fewer than one row of 9000"),
        ({"train__betas": [0.9, 1.0]}, ConfigError, r"betas\[1\] is 1.0"),
        ({"data__heldout": "/nowhere"}, DataError, "/nowhere"),
    ],
)
def test_a_wrong_setting_that_only_the_data_show_can_be_mended(
    data: Path, tmp_path: Path, wrong: dict[str, object], error: type[Exception], message: str
) -> None:
    """It is refused before the first step, and does not bind the run folder to itself."""
    with pytest.raises(error, match=message):
        train(config(data, **wrong), tmp_path, 3)
    assert not in_force(tmp_path, "step")
    train(config(data), tmp_path, 3)
    assert len(in_force(tmp_path, "step")) == 3


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a run folder: it has no config.yaml"):
        Run.reopen(tmp_path, command="test")
    with pytest.raises(DataError, match="no such run folder"):
        Run.reopen(tmp_path / "nowhere", command="test")


def test_data_that_changed_are_not_resumed_on(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", documents=60)
    train(config(data), tmp_path / "run", 3)
    shutil.rmtree(data)
    write_data(data, documents=61)
    with pytest.raises(ConfigError, match="the data of domain 'code' differ: .* of the state is"):
        train(config(data), tmp_path / "run", 5)


def test_a_step_beyond_the_last_slice_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="step 81 lies beyond the last slice, which ends at step 80; add a"):
        train(config(data), tmp_path, 81)
    assert not in_force(tmp_path)


def test_data_that_end_early(data: Path, tmp_path: Path) -> None:
    settings = config(data, data__exhaustion="stop", train__rows=64, data__slices__one__steps=40)
    with pytest.raises(
        DataError, match=r"the data ended at step \d+ of 40 \(exhaustion 'stop'\); prepare more"
    ):
        train(settings, tmp_path, 40)


def test_training_twice_to_the_same_step_does_nothing(data: Path, tmp_path: Path) -> None:
    train(config(data), tmp_path, 10)
    before = newest(tmp_path), (tmp_path / "metrics.jsonl").read_bytes()
    train(config(data), tmp_path, 10)
    train(config(data), tmp_path, 4)
    assert before == (newest(tmp_path), (tmp_path / "metrics.jsonl").read_bytes())


def test_a_damaged_last_checkpoint_is_an_error_and_the_one_before_resumes(data: Path, tmp_path: Path) -> None:
    folder = train(config(data), tmp_path, 10)
    last = latest_checkpoint(folder / "checkpoints" / "main")
    assert last is not None and last.name == "step-00000010"
    tensors = last / "model.safetensors"
    content = bytearray(tensors.read_bytes())
    content[-1] ^= 1
    tensors.write_bytes(content)
    with pytest.raises(DataError, match=r"step-00000010/model\.safetensors: .*does not match the sha256"):
        train(config(data), tmp_path, 12)
    tensors.write_bytes(content[:-1])  # by its size it is left out at once
    train(config(data), folder, 12)
    assert [r["step"] for r in RunFolder(folder).records() if r["kind"] == "resume"][-1] == 7


# -- numerical failure ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("log_every", [1, 10])
def test_three_gradients_in_a_row_that_are_not_finite_end_the_run(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log_every: int
) -> None:
    """A fault in the backward pass from step 12 on. Steps are skipped whole; what was saved meanwhile is sound."""
    original, backwards = Run.new_model, 0

    def with_fault(run: Run) -> Decoder:
        def spoil(grad: Tensor) -> Tensor:
            nonlocal backwards
            backwards += 1
            return grad * float("nan") if backwards > 12 else grad

        decoder = original(run)
        decoder.model.norm.weight.register_hook(spoil)
        return decoder

    settings = config(data, train__log_every=log_every)
    monkeypatch.setattr(Run, "new_model", with_fault)
    with pytest.raises(
        NumericalError, match="3 steps in a row up to step .* had no finite gradient; .*path.peak"
    ):
        train(settings, tmp_path, 40)
    monkeypatch.undo()
    assert RunFolder(tmp_path).read_json("run.json")["state"] == "failed"
    last = latest_checkpoint(tmp_path / "checkpoints" / "main")
    assert last is not None
    sound = train(settings, tmp_path / "sound", 12)
    reference = latest_checkpoint(sound / "checkpoints" / "main")
    assert reference is not None
    load_checkpoint(last)
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (last / name).read_bytes() == (reference / name).read_bytes()
    assert load_checkpoint(last).state["step"] in (
        14,
        16,
    )  # 16 is a branch point: saved before the log was due
    if log_every == 1:
        steps = {r["step"]: r for r in in_force(tmp_path, "step")}
        assert steps[12]["skipped"] == 0 and steps[12]["grad_norm"] > 0
        assert [steps[s]["skipped"] for s in (13, 14)] == [1, 1]
        assert [steps[s]["loss"] for s in (13, 14)] == [None, None]
    train(settings, tmp_path, 40)
    assert all(r["loss"] is not None for r in in_force(tmp_path, "step") if r["step"] > 20)


def test_two_in_a_row_are_survived(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, backwards = Run.new_model, 0

    def with_fault(run: Run) -> Decoder:
        def spoil(grad: Tensor) -> Tensor:
            nonlocal backwards
            backwards += 1
            return grad * float("inf") if backwards in (5, 6, 8, 9) else grad

        decoder = original(run)
        decoder.model.norm.weight.register_hook(spoil)
        return decoder

    monkeypatch.setattr(Run, "new_model", with_fault)
    train(config(data, train__log_every=4), tmp_path, 16)
    assert [r["skipped"] for r in in_force(tmp_path, "step")] == [0, 3, 1, 0]


def test_a_diverged_run_ends_with_exit_code_5(data: Path, tmp_path: Path) -> None:
    path = write_config(tmp_path / "run.yaml", data, path__peak=1e30, path__warmup_steps=0)
    done = velopath("train", path, "--run", tmp_path / "run")
    assert done.code == 5, done.err
    assert done.err.count("\n") == 1 and done.err.startswith("velopath: NumericalError: ")


# -- stop and lock ----------------------------------------------------------------------------------------------


@pytest.fixture
def slow(data: Path, tmp_path: Path) -> Path:
    """A config whose steps take about a second."""
    shape = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4}
    changes = {f"model__overrides__{k}": v for k, v in shape.items()}
    return write_config(tmp_path / "slow.yaml", data, train__rows=256, train__row_tokens=128, **changes)


def test_a_second_signal_acts_at_once(slow: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = start("train", slow, "--run", folder)
    process.until(lambda: bool((folder / "metrics.jsonl").exists() and in_force(folder, "control")))
    process.signal(signal.SIGTERM)
    time.sleep(0.1)
    assert process.running
    process.signal(signal.SIGTERM)
    assert process.wait().code == -signal.SIGTERM
    assert latest_checkpoint(folder / "checkpoints" / "main") is None
    assert (
        json.loads((folder / "lock").read_text())["pid"] == process.pid
    )  # stale: the next run takes it over
    again = start("train", slow, "--run", folder)
    again.until(lambda: json.loads((folder / "lock").read_text() or "{}").get("pid") == again.pid)
    again.signal(signal.SIGKILL)
    again.wait()


def test_a_second_writer_is_refused(slow: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first = start("train", slow, "--run", folder)
    first.until(lambda: (folder / "metrics.jsonl").exists())
    before = (folder / "run.json").read_bytes()
    for command in (
        ("train", slow, "--run", folder),
        ("targets", slow, "--run", folder),
        ("branch", folder, "v1"),
    ):
        second = velopath(*command)
        assert second.code == 2
        assert second.err == (
            f"velopath: ConfigError: run folder {folder} is being written by process {first.pid} on host "
            f"{socket.gethostname()}; wait for it or stop it\n"
        )
    assert velopath("log", folder).code == 0  # reading needs no lock
    assert velopath("report", folder).code == 0
    assert (folder / "run.json").read_bytes() == before
    assert first.running
    first.signal(signal.SIGKILL)
    first.wait()


def test_the_signal_handlers_are_given_back(data: Path, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    train(config(data), tmp_path, 2)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_the_time_of_a_killed_command_counts(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """run.json is written while training: what a process that never ends in order has spent stands there."""
    monkeypatch.setattr("velopath.run.HEARTBEAT_SECONDS", 0.0)
    with Run.open(config(data), tmp_path, command="test") as run:
        train_main(run, 5)
        about = json.loads((tmp_path / "run.json").read_text())  # as a kill here would leave it
        logged = sum(r["seconds"] for r in run.folder.metrics("step"))
    assert about["state"] == "running"
    assert 0 < logged <= about["seconds"]
