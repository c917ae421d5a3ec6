"""FSDP2 on two processes against one: the same losses and model, clipped alike; saved whole, resumed on any number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo as dynamo
import torch.distributed as torch_dist
from safetensors.torch import load_file

from commands import Finished, start_ranks, velopath
from small_run import in_force, newest, write_config
from velopath.checkpoint import latest_checkpoint
from velopath.dist import Dist
from velopath.model import Decoder, ModelConfig
from velopath.optim import build_optimizer
from velopath.sharding import shard
from velopath.train_step import TrainStep

# Rows with padding in micro-batches: shares, gradients kept between them; 0.5: the norm is clipped at every step.
OPTIONS: dict[str, Any] = {
    "data__packing": "best_fit",
    "train__document_mask": True,
    "train__micro_rows": 1,
    "train__clip": 0.5,
}


def on_two_ranks(*arguments: object) -> None:
    for done in [process.wait(120) for process in start_ranks(2, *arguments)]:
        assert done.code == 0, done.err


def alone(*arguments: object) -> Finished:
    done = velopath(*arguments)
    assert done.code == 0, done.err
    return done


@pytest.fixture(scope="module")
def folders(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """12 steps in one process; and 5 sharded over two, 5 in one, 2 sharded again, layers recomputed."""
    root = tmp_path_factory.mktemp("fsdp")
    one, two = root / "one", root / "two"
    single = write_config(root / "one.yaml", data, **OPTIONS)
    sharded = {"train__parallel": "fsdp2", "train__activation_checkpointing": "full"}
    both = write_config(root / "two.yaml", data, **OPTIONS, **sharded, train__rows=2)
    alone("train", single, "--run", one, "--until", 12)
    on_two_ranks("train", both, "--run", two, "--until", 5)
    alone("train", single, "--run", two, "--until", 10)
    on_two_ranks("train", both, "--run", two, "--until", 12)
    return one, two


def test_sharded_steps_are_those_of_one_process(folders: tuple[Path, Path]) -> None:
    ones, twos = (in_force(folder) for folder in folders)
    assert min(r["grad_norm"] for r in ones if r["kind"] == "step") > OPTIONS["train__clip"]
    for kind in ("step", "eval"):
        pairs = [[r for r in records if r["kind"] == kind] for records in (ones, twos)]
        for theirs, mine in zip(*pairs, strict=True):
            assert mine["step"] == theirs["step"]
            assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-5), (kind, mine["step"])
            if kind == "step":
                assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
                assert mine["stream"] == theirs["stream"]


def test_checkpoints_are_whole(folders: tuple[Path, Path]) -> None:
    assert [list(newest(folder)) for folder in folders] == [["main/step-00000012"]] * 2
    for file in ("model.safetensors", "optimizer.safetensors"):
        one, two = (load_file(_last(folder) / file) for folder in folders)
        assert set(one) == set(two)
        for name, tensor in one.items():  # of updates of 1e-2
            torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-5, msg=name)


def _last(folder: Path) -> Path:
    found = latest_checkpoint(folder / "checkpoints" / "main")
    assert found is not None
    return found


def test_a_sharded_run_cuts_and_exports_versions(data: Path, tmp_path: Path) -> None:
    """A branch starts from a checkpoint on the same sharded tensors."""
    changes: dict[str, Any] = {"train__parallel": "fsdp2", "train__rows": 2}
    changes["path__warmup_steps"] = 1
    changes |= {f"data__slices__{name}__steps": 5 for name in ("one", "two")}
    path = write_config(tmp_path / "run.yaml", data, **changes)
    on_two_ranks("train", path, "--run", tmp_path / "run", "--versions")
    exported = load_file(tmp_path / "run" / "exports" / "v2" / "model.safetensors")
    assert all(torch.isfinite(t).all() for t in exported.values())
    said = alone("eval", tmp_path / "run", "v2")
    assert "v2" in said.out


def test_layers_of_a_sharded_decoder_are_compiled(tmp_path: Path) -> None:
    """In a group of one: the same losses as without sharding, and one graph for the layers, which are alike."""
    shape = ModelConfig(61, 24, 20, 2, 4, 2, max_position_embeddings=32)
    tokens = torch.randint(0, 61, (2, 20), generator=torch.Generator().manual_seed(1))
    losses = []
    dynamo.reset()
    dynamo.utils.counters.clear()
    torch_dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        for sharded in (False, True):
            decoder = Decoder(shape, seed=2)
            if sharded:
                shard(decoder, Dist(), compile=True)
            step = TrainStep(decoder, build_optimizer(decoder), n_domains=2, dist=Dist(), compile=sharded)
            losses.append([float(step(tokens, torch.tensor([0, 1]), 1e-2).loss) for _ in range(3)])
    finally:
        torch_dist.destroy_process_group()
    assert dynamo.utils.counters["stats"]["unique_graphs"] == 1
    dynamo.reset()
    assert losses[1] == pytest.approx(losses[0], abs=1e-5) and losses[0][0] > losses[0][2]
