"""Two gloo processes: sums, JSON, gradients, evaluation; and what a broken environment says."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from velopath.dist import Dist, init_from_env
from velopath.errors import ConfigError
from velopath.evaluate import HeldOut, evaluate
from velopath.model import Decoder, ModelConfig

CONFIG = ModelConfig(61, 24, 20, 2, 4, 2, max_position_embeddings=32)
VALUE = {"step": 2**60, "names": ["ünï", "狐"], "share": 0.1 + 0.2, "none": None, "long": "x" * 100_000}
TORCHRUN = {
    "RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_RANK": "0",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}


def rows() -> torch.Tensor:
    return torch.randint(0, CONFIG.vocab_size, (6, 18), generator=torch.Generator().manual_seed(4))


def gradients(model: torch.nn.Module, decoder: Decoder, tokens: torch.Tensor) -> list[torch.Tensor]:
    logits = decoder.logits(model(tokens[:, :-1]))
    F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    return [p.grad for p in decoder.parameters()]


def held_out() -> HeldOut:
    generator = np.random.default_rng(1)
    streams = [generator.integers(0, CONFIG.vocab_size, n).astype(np.uint16) for n in (100, 317, 40)]
    return HeldOut(("a", "b", "c"), tuple(streams), row_tokens=11, seed=5)


def in_each_process(out: str) -> None:
    torch.set_num_threads(1)
    dist = init_from_env("cpu")
    summed = dist.all_reduce_sum(torch.tensor([1.5, 10.0**dist.rank], dtype=torch.float64))
    from_last = dist.broadcast_json(VALUE if dist.rank == 1 else None, src=1)
    decoder = Decoder(CONFIG, seed=dist.rank)  # DDP hands rank 0's weights to all
    model = torch.nn.parallel.DistributedDataParallel(decoder, broadcast_buffers=False)
    grads = gradients(model, decoder, rows()[dist.rank :: dist.world])
    loss = evaluate(model, held_out(), tokens_per_domain=60, batch_rows=4, dist=dist)
    dist.barrier()
    result = {
        "dist": [dist.rank, dist.world, dist.local_rank, str(dist.device), dist.backend],
        "summed": summed.tolist(),
        "json": from_last == VALUE,
        "nats": loss.nats,
        "tokens": loss.tokens,
        "stderr": loss.stderr,
        "gradients": [g.flatten().tolist() for g in grads],
    }
    Path(out, f"{dist.rank}.json").write_text(json.dumps(result))
    dist.close()


def test_two_processes_agree_with_one(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_dist; "
    code += f"test_dist.in_each_process({str(tmp_path)!r})"
    workers = []
    for rank in ("0", "1"):
        env = {
            **os.environ,
            **TORCHRUN,
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": "2",
            "MASTER_PORT": str(port),
        }
        workers.append(
            subprocess.Popen([sys.executable, "-c", code], env=env, stderr=subprocess.PIPE, text=True)
        )
    for worker in workers:
        assert worker.wait(timeout=100) == 0, worker.stderr.read()
        worker.stderr.close()
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first["dist"] == [0, 2, 0, "cpu", "gloo"] and second["dist"] == [1, 2, 1, "cpu", "gloo"]
    assert first["summed"] == second["summed"] == [3.0, 11.0]
    assert first["json"] and second["json"]
    assert first["gradients"] == second["gradients"]
    decoder = Decoder(CONFIG, seed=0)
    for ours, one in zip(first["gradients"], gradients(decoder, decoder, rows()), strict=True):
        assert (torch.tensor(ours) - one.flatten()).abs().max() < 1e-6 * max(1.0, float(one.abs().max()))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the workers: matrix products may round by thread count
    alone = evaluate(Decoder(CONFIG, seed=0), held_out(), tokens_per_domain=60, batch_rows=4)
    torch.set_num_threads(threads)
    for result in (first, second):
        assert tuple(result["tokens"]) == alone.tokens == (66, 66, 39)
        assert tuple(result["nats"]) == alone.nats  # the same bits, whatever the world size
        assert tuple(result["stderr"]) == alone.stderr


def test_one_process_needs_no_group():
    dist = Dist()
    tensor = torch.tensor([2.0])
    assert dist.all_reduce_sum(tensor) is tensor and tensor.item() == 2.0
    assert dist.broadcast_json({"a": (1, 2)}) == {"a": [1, 2]}
    assert dist.is_main
    dist.barrier()
    dist.close()
    with pytest.raises(ConfigError, match="broadcast source is rank 1; expected 0 to 0"):
        dist.broadcast_json({}, src=1)
    with pytest.raises(TypeError):
        dist.broadcast_json({"a": torch.zeros(1)})


@pytest.fixture
def environment(monkeypatch):
    def set_to(values: dict[str, str]) -> None:
        for name in TORCHRUN:
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return set_to


@pytest.mark.parametrize("values", [{}, {"MASTER_ADDR": "h", "MASTER_PORT": "1"}, TORCHRUN])
def test_a_single_process_environment(values, environment):
    environment(values)
    assert init_from_env("cpu") == Dist()
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"WORLD_SIZE": None},
            "WORLD_SIZE not set, but RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT are; start with",
        ),
        ({"MASTER_ADDR": None, "MASTER_PORT": None}, "MASTER_ADDR, MASTER_PORT not set"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2, LOCAL_RANK=0, WORLD_SIZE=2"),
        ({"LOCAL_RANK": "1"}, "RANK=0, LOCAL_RANK=1, WORLD_SIZE=1"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0"),
        ({"RANK": "-1"}, "RANK='-1' in the environment; expected a whole number"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT='http'"),
    ],
)
def test_a_partial_or_contradictory_environment_is_refused(changes, message, environment):
    environment({k: v for k, v in (TORCHRUN | changes).items() if v is not None})
    with pytest.raises(ConfigError, match=message):
        init_from_env("cpu")


@pytest.mark.parametrize(
    ("device", "message"),
    [("tpu", "device is 'tpu'; expected auto, cpu"), ("cuda:97", "GPU 97 is asked for")],
)
def test_an_impossible_device_is_refused(device, message, environment):
    environment({})
    with pytest.raises(ConfigError, match=message):
        init_from_env(device)
