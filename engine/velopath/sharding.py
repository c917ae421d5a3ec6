"""FSDP2: parameters, gradients and optimiser state spread over the ranks (torch's `fully_shard`), and whole again.

Every layer is a unit, gathered when it runs; what lies outside the layers (embedding, final norm, unembedding) is
gathered by the decoder's forward and stays until the backward pass or `reshard`, so that the loss, which comes after
the decoder, finds the unembedding whole. Weights are gathered and gradients summed in fp32.

torch's part takes seconds to import: only `shard` does, and nothing is in parts before.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from velopath.dist import Dist
from velopath.model import Decoder


def shard(decoder: Decoder, dist: Dist, *, compile: bool = False) -> None:
    """Spread `decoder`, the same on all ranks, over them, in place. Make its optimiser afterwards.

    `compile` compiles each layer by itself: a graph cannot reach over the gathering between layers.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(dist.device.type, (dist.world,))
    for layer in decoder.model.layers:
        if compile:
            layer.compile()
        fully_shard(layer, mesh=mesh)
    fully_shard(decoder, mesh=mesh)


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` was called on it."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(model, fsdp.FSDPModule)


def _in_parts(tensor: Tensor) -> bool:
    distributed = sys.modules.get("torch.distributed.tensor")
    return distributed is not None and isinstance(tensor, distributed.DTensor)


def sum_gradients(model: Any, now: bool) -> None:
    """Whether the next backward pass of a sharded `model` sums the gradients over the ranks, or keeps this one's."""
    model.set_requires_gradient_sync(now)


def reshard(model: Any) -> None:
    """Give up what a forward pass without a backward pass left whole; nothing where `model` is not sharded."""
    if is_sharded(model):
        model.reshard()


def whole(tensor: Any) -> Tensor:
    """All of a tensor of which every rank holds a part; others as they are. All ranks must call it."""
    full: Tensor = tensor.full_tensor() if _in_parts(tensor) else tensor
    return full


def gathered(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """`tensors` whole; of those in parts, on the CPU where `keep` and nowhere else. All ranks must call it.

    One tensor at a time is whole on the device.
    """
    found = {}
    for name, tensor in tensors.items():
        if _in_parts(tensor):
            full = whole(tensor.detach())
            found[name] = full.cpu() if keep else full.new_empty(0)
        else:
            found[name] = tensor
    return found


@torch.no_grad()
def fill(target: Tensor, value: Tensor) -> None:
    """Copy the whole `value`, the same on all ranks, into `target` or this rank's part of it."""
    target.copy_(_like(target, value))


def placed(value: Tensor, like: Tensor) -> Tensor:
    """`value` on the device of `like`, and in parts where that is."""
    return _like(like, value.to(like.device, copy=True))


def _like(target: Any, value: Tensor) -> Tensor:
    if not _in_parts(target):
        return value
    from torch.distributed.tensor import distribute_tensor

    # Every rank has read the whole value: it takes its part of it, and nothing is sent.
    return distribute_tensor(
        value.to(target.device), target.device_mesh, target.placements, src_data_rank=None
    )
