"""Cross-entropy rows on the CPU: the C++ core, or numba where it is missing; and the sums per domain.

Reference: `velopath.loss.reference`; bound to it by tests/test_loss.py. Each row is summed by one thread and
the rows are added in order, so the number of threads changes no bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from velopath.errors import ConfigError

try:
    from velopath import _core

    HAS_CORE = hasattr(_core, "cross_entropy_rows")
except ImportError:
    HAS_CORE = False


def check_values(targets: Tensor, domains: Tensor, vocab: int, n_domains: int, ignore_index: int) -> Tensor:
    """How many rows count; `ConfigError` where one has a target or domain out of range."""
    counted = targets != ignore_index
    bad = counted & ((targets < 0) | (targets >= vocab))
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise ConfigError(
            f"target {int(targets[row])} of row {row} is not in [0, {vocab}) and not "
            f"ignore_index={ignore_index}; check that the tokenizer's vocabulary is the model's"
        )
    repeat = len(targets) // len(domains)
    bad = counted.view(-1, repeat).any(1) & ((domains < 0) | (domains >= n_domains))
    if bool(bad.any()):
        at = int(bad.nonzero()[0])
        raise ConfigError(f"domain {int(domains[at])} at {at} is not in [0, n_domains={n_domains})")
    return counted.sum()


def write_rows(
    logits: Tensor,
    targets: Tensor,
    nats: Tensor,
    counted: Tensor,
    ignore_index: int,
    gradient: bool,
    *,
    use_numba: bool,
) -> None:
    """Write each row's loss in nats and, with `gradient`, (softmax - one hot) / counted over the logits."""
    kernel: Any
    if use_numba:
        from velopath.loss.numba_rows import cross_entropy_rows as kernel
    else:
        kernel = _core.cross_entropy_rows
    bits = logits.view(torch.uint16) if logits.dtype == torch.bfloat16 else logits
    kernel(
        bits.detach().numpy(),
        targets.to(torch.int64).contiguous().numpy(),
        nats.numpy(),
        scale=1.0 / max(int(counted), 1),
        ignore_index=ignore_index,
        gradient=gradient,
        threads=torch.get_num_threads(),
    )


def reduce_rows(
    nats: Tensor, targets: Tensor, domains: Tensor, counted: Tensor, n_domains: int, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """The mean loss over counted rows, fp32 scalar, and the (2, n_domains) fp32 sums of nats and tokens."""
    is_counted = targets != ignore_index
    per_row = domains.long().repeat_interleave(len(targets) // len(domains))[is_counted]
    # index_add of a vector is one serial loop on the CPU: the order is fixed.
    sums = torch.zeros(2, n_domains, dtype=torch.float64)
    sums[0].index_add_(0, per_row, nats[is_counted].double())
    sums[1].index_add_(0, per_row, torch.ones(len(per_row), dtype=torch.float64))
    return (sums[0].sum() / max(int(counted), 1)).float(), sums.float()
