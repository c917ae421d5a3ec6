"""Cross-entropy rows on the CPU: the C++ core, or numba where it is missing; and the sums per domain.

Reference: `velopath.loss.reference`; bound to it by tests/test_loss.py. Each row is summed by one thread and
the rows are added in order, so the number of threads changes no bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from velopath.errors import ConfigError
from velopath.loss.options import Details, RowOptions

try:
    from velopath import _core

    HAS_CORE = hasattr(_core, "cross_entropy_rows")
except ImportError:
    HAS_CORE = False

COPY_BYTES = 1 << 22
"""Of fp32 at a time where a kernel does not know the dtype: small enough to stay in a cache."""


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
    divisor: Tensor,
    ignore_index: int,
    gradient: bool,
    *,
    details: Details | None = None,
    use_numba: bool,
) -> None:
    """Write each row's nats, its `details` and, with `gradient`, its gradient over the logits.

    Without details the gradient is (softmax - one hot) / divisor.
    """
    more = {} if details is None else details.keywords()
    scale = 1.0 / max(int(divisor), 1)
    targets = targets.to(torch.int64).contiguous()
    kernel = _kernels(use_numba).cross_entropy_rows
    for part, bits in _readable(logits, use_numba, written=gradient):
        kernel(
            bits,
            targets[part].numpy(),
            nats[part].numpy(),
            scale=scale,
            ignore_index=ignore_index,
            gradient=gradient,
            threads=torch.get_num_threads(),
            **{k: v[part].numpy() if isinstance(v, Tensor) else v for k, v in more.items()},
        )


def statistics(logits: Tensor, local: Tensor, options: RowOptions, *, use_numba: bool) -> Tensor:
    """As `backends.statistics`."""
    out = torch.empty(7, len(local), dtype=torch.float64)
    for part, bits in _readable(logits, use_numba, written=False):
        of_part = torch.empty(7, len(bits), dtype=torch.float64)
        _kernels(use_numba).shard_statistics(
            bits,
            local[part].numpy(),
            of_part.numpy(),
            logit_scale=options.logit_scale,
            softcap=options.softcap,
            threads=torch.get_num_threads(),
        )
        out[:, part] = of_part
    return out


def write_gradient(
    logits: Tensor, local: Tensor, factors: Tensor, options: RowOptions, *, use_numba: bool
) -> None:
    """As `backends.write_gradient`."""
    for part, bits in _readable(logits, use_numba, written=True):
        _kernels(use_numba).shard_gradient(
            bits,
            local[part].numpy(),
            factors[:, part].contiguous().numpy(),
            logit_scale=options.logit_scale,
            softcap=options.softcap,
            threads=torch.get_num_threads(),
        )


def reduce_rows(
    nats: Tensor,
    targets: Tensor,
    domains: Tensor,
    divisor: Tensor,
    n_domains: int,
    ignore_index: int,
    losses: Tensor | None = None,
    correct: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The sum of `losses`, without them of nats / divisor, and the (2 or 3, n_domains) fp32 sums per domain.

    The sums are of nats, of tokens and, where `correct` is given, of it.
    """
    is_counted = targets != ignore_index
    per_row = domains.long().repeat_interleave(len(targets) // len(domains))[is_counted]
    # index_add of a vector is one serial loop on the CPU: the order is fixed.
    sums = torch.zeros(2 if correct is None else 3, n_domains, dtype=torch.float64)
    sums[0].index_add_(0, per_row, nats[is_counted].double())
    sums[1].index_add_(0, per_row, torch.ones(len(per_row), dtype=torch.float64))
    if correct is not None:
        sums[2].index_add_(0, per_row, correct[is_counted].double())
    if losses is not None:
        return losses.double().sum().float(), sums.float()
    return (sums[0].sum() / max(int(divisor), 1)).float(), sums.float()


def _kernels(use_numba: bool) -> Any:
    if use_numba:
        from velopath.loss import numba_rows

        return numba_rows
    return _core


def _readable(logits: Tensor, use_numba: bool, *, written: bool) -> Iterator[tuple[slice, Any]]:
    """The logits as arrays that the kernels know: themselves, or block by block as fp32 and, if `written`, back.

    C++ knows fp32 and bf16, numba fp32.
    """
    logits = logits.detach()
    if logits.dtype == torch.float32:
        yield slice(0, len(logits)), logits.numpy()
    elif logits.dtype == torch.bfloat16 and not use_numba:
        yield slice(0, len(logits)), logits.view(torch.uint16).numpy()
    else:
        step = max(COPY_BYTES // (4 * logits.shape[1]), torch.get_num_threads())
        for start in range(0, len(logits), step):
            part = slice(start, min(start + step, len(logits)))
            block = logits[part].float()
            yield part, block.numpy()
            if written:
                logits[part] = block
