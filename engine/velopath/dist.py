"""The processes of one run: who am I, sums over ranks, small JSON values from rank 0.

Used by velopath's own loop, started by `torchrun`. Embedded in another stack, velopath never touches process
groups: there the caller hands in its own reduction. Nothing here pickles, unlike `broadcast_object_list`.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor

from velopath.errors import ConfigError

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Dist:
    """This process among `world`: its rank, its rank on this machine, its device and its backend.

    `backend` is "gloo", "nccl" or, for a single process, None; then every method works without a process group.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    device: torch.device = torch.device("cpu")
    backend: str | None = None

    @property
    def is_main(self) -> bool:
        """True on rank 0, the one that writes files."""
        return self.rank == 0

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """`tensor` summed over all ranks, in place and returned; every rank gets the same bits."""
        if self.backend is not None:
            torch_dist.all_reduce(tensor)
        return tensor

    def broadcast_json(self, value: Any, src: int = 0) -> Any:
        """The JSON-able `value` of rank `src`, on every rank (others may pass None). Sent as JSON text.

        The value of `src` takes the same trip, so that all ranks hold the same (a tuple is a list everywhere).
        """
        if not 0 <= src < self.world:
            raise ConfigError(f"broadcast source is rank {src}; expected 0 to {self.world - 1}")
        if self.backend is None:
            return json.loads(json.dumps(value))
        text = json.dumps(value).encode() if self.rank == src else b""
        size = torch.tensor([len(text)], dtype=torch.int64, device=self.device)
        torch_dist.broadcast(size, src)
        data = torch.empty(int(size), dtype=torch.uint8, device=self.device)
        if self.rank == src:
            data.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
        torch_dist.broadcast(data, src)
        return json.loads(data.cpu().numpy().tobytes())

    def barrier(self) -> None:
        """Return when every rank has come here."""
        if self.backend is not None:
            torch_dist.barrier()

    def close(self) -> None:
        """Leave the process group; the value is of no use for collectives after this."""
        if self.backend is not None and torch_dist.is_initialized():
            torch_dist.destroy_process_group()


def init_from_env(device: str = "auto", *, timeout_seconds: float = 1800.0) -> Dist:
    """The `Dist` of this process from the variables that `torchrun` sets; joins the process group if world > 1.

    Without any of them: one process, no group. `device` is "auto" (a GPU when there is one), "cpu", "cuda" or
    "cuda:N"; under torchrun a GPU process takes the GPU of its local rank. Raises `ConfigError` when only some
    variables are set, when they contradict each other or the machine, or when somebody else has already made a
    process group (then velopath is embedded and must be given its reduction).
    """
    present = [name for name in _VARIABLES if os.environ.get(name)]
    # MASTER_ADDR and MASTER_PORT alone are often exported for other programs.
    if not any(name in present for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")):
        return Dist(device=_device(device, local_rank=None))
    missing = [name for name in _VARIABLES if name not in present]
    if missing:
        raise ConfigError(
            f"{', '.join(missing)} not set, but {', '.join(present)} are; start with torchrun, which sets all of "
            "them, or unset them all for one process"
        )
    rank, world, local_rank = (_number(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    _number("MASTER_PORT")
    if world < 1 or rank >= world or local_rank >= world:
        raise ConfigError(
            f"RANK={rank}, LOCAL_RANK={local_rank}, WORLD_SIZE={world}: both ranks must be below it"
        )
    where = _device(device, local_rank)
    if world == 1:
        return Dist(device=where)
    if torch_dist.is_initialized():
        raise ConfigError(
            "a process group exists already: velopath is embedded; pass its all-reduce instead of init_from_env"
        )
    backend = "nccl" if where.type == "cuda" else "gloo"
    if where.type == "cuda":
        torch.cuda.set_device(where)
    torch_dist.init_process_group(
        backend,
        timeout=timedelta(seconds=timeout_seconds),
        device_id=where if where.type == "cuda" else None,
    )
    # A rank that refuses and ends at once would else break the connections that others are still making.
    torch_dist.barrier()
    return Dist(rank, world, local_rank, where, backend)


def _number(name: str) -> int:
    text = os.environ[name]
    if not (text.isascii() and text.isdigit()):
        raise ConfigError(f"{name}={text!r} in the environment; expected a whole number, 0 or more")
    return int(text)


def _device(name: str, local_rank: int | None) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device is {name!r}; expected auto, cpu, cuda or cuda:N")
    if device.type == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = local_rank if local_rank is not None else device.index or 0
    if local_rank is not None and device.index not in (None, local_rank):
        raise ConfigError(f"device is {name!r} but LOCAL_RANK={local_rank}; under torchrun say cuda or auto")
    if index >= count:
        raise ConfigError(
            f"GPU {index} is asked for, this machine has {count}; start fewer processes or use cpu"
        )
    return torch.device("cuda", index)
