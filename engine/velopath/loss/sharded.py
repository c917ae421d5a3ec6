"""A vocabulary sharded over a process group: what the ranks tell each other about a row, and what follows from it.

Every rank holds all rows and V / p columns of the logits. Two all-reduces per block of rows: of three maxima
and, rescaled to the common one, of four sums. Reference: the same loss on one process, tests/test_loss_sharded.py.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor

from velopath.errors import ConfigError
from velopath.loss import backends
from velopath.loss.options import Details, Settings


class Shard:
    """This rank's columns `first` ... `first + columns` of `vocab`."""

    def __init__(self, group_name: str, columns: int, device: torch.device) -> None:
        resolve: Any = torch_dist.distributed_c10d._resolve_process_group  # type: ignore[attr-defined]
        self.group: Any = resolve(group_name)
        # Asked at every call and left on the device: a memory of earlier answers would be right on one rank and
        # wrong on another, one of which would then wait for the other.
        rank = torch_dist.get_rank(self.group)
        sizes = torch.zeros(torch_dist.get_world_size(self.group), dtype=torch.int64, device=device)
        sizes[rank] = columns
        torch_dist.all_reduce(sizes, group=self.group)
        self.columns, self.vocab, self.first = columns, sizes.sum(), sizes[:rank].sum()

    def local_targets(self, targets: Tensor, ignore_index: int) -> Tensor:
        """Targets counted from this shard's first column, as `backends.statistics` takes them."""
        local = (targets.long() - self.first).clamp(-1, self.columns)
        return torch.where(targets == ignore_index, backends.NOT_COUNTED, local)

    def sum_(self, tensor: Tensor) -> None:
        """Add up `tensor` over the ranks, in place."""
        torch_dist.all_reduce(tensor, group=self.group)

    def merged(self, statistics: Tensor) -> Tensor:
        """`backends.statistics` of whole rows from those of this rank's columns, on every rank."""
        maxima, sums = statistics[:3].clone(), statistics[3:].clone()
        torch_dist.all_reduce(maxima, torch_dist.ReduceOp.MAX, group=self.group)
        # A shard without a finite logit has a sum of 0: 0 * exp(-inf - m) stays 0.
        sums[0] *= torch.exp(statistics[0] - maxima[0])
        torch_dist.all_reduce(sums, group=self.group)
        return torch.cat((maxima, sums))


def group_name(process_group: Any) -> str:
    """The name under which operators find the group again; "" for None."""
    if process_group is None:
        return ""
    if not torch_dist.is_available() or not torch_dist.is_initialized():
        raise ConfigError("process_group is given, but torch.distributed is not initialised")
    name = getattr(process_group, "group_name", None)
    if not isinstance(name, str):
        raise ConfigError(
            f"process_group is a {type(process_group).__name__}; expected a torch.distributed.ProcessGroup, "
            "of a device mesh mesh.get_group()"
        )
    return name


def write_rows(
    shard: Shard,
    logits: Tensor,
    targets: Tensor,
    nats: Tensor,
    settings: Settings,
    details: Details,
    *,
    gradient: bool,
    padded: bool,
) -> None:
    """As `backends.write_rows`, from this rank's columns; nats and details come out the same on every rank."""
    options = settings.rows
    local = shard.local_targets(targets, settings.ignore_index)
    own = backends.statistics(settings.backend, logits, local, options, padded=padded)
    m, top, left, d, x_target, given_target, sum_x = shard.merged(own)
    counted = targets != settings.ignore_index
    # A GPU is not waited for: an invalid target makes the row NaN.
    vocab = shard.vocab.double()  # divided into the numbers of rows, which are fp64
    valid = (targets >= 0) & (targets < vocab)
    log_d = torch.where(valid, d.log(), torch.nan)
    row_nats, lse = (m - x_target) + log_d, m + log_d
    e, z = options.label_smoothing, options.z_loss
    losses = row_nats + z * lse.square()
    if e:
        losses = losses + e * (x_target - sum_x / vocab)
    scales = details.scales.double()
    nats.copy_(torch.where(counted, row_nats, 0.0))
    details.lse.copy_(torch.where(counted, lse, 0.0))
    details.losses.copy_(torch.where(counted, losses * scales, 0.0))
    if details.correct is not None:
        details.correct.copy_(counted & (given_target == top) & (left < top) & ~row_nats.isnan())
    if gradient:
        factors = torch.stack((m, scales * (1 + 2 * z * lse) / d, scales * (e / vocab), scales * (1 - e)))
        backends.write_gradient(settings.backend, logits, local, factors, options, padded=padded)
