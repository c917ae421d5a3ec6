"""Rows of the per-domain cross-entropy by backend: C++ or numba, Triton, and for shards also plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from velopath.loss import cpu
from velopath.loss.options import Details, RowOptions
from velopath.loss.reference import domain_sums, shaped

NOT_COUNTED = -2
"""In place of a target of a shard: the row is ignored. -1 and V say that an earlier or a later shard has it."""


def write_rows(
    backend: str,
    logits: Tensor,
    targets: Tensor,
    nats: Tensor,
    divisor: Tensor,
    ignore_index: int,
    *,
    gradient: bool,
    padded: bool,
    details: Details | None,
) -> None:
    """Write each row's nats, its `details` and, with `gradient`, its gradient over the logits.

    Without details the gradient is (softmax - one hot) / divisor. `padded`: the logits' rows may be written
    beyond their end, as `kernels.rows.empty_rows` makes them.
    """
    if backend == "triton":
        from velopath.kernels import rows

        more = {} if details is None else details.keywords()
        rows.write_rows(logits, targets, nats, divisor, ignore_index, gradient, padded=padded, **more)
    else:
        cpu.write_rows(
            logits,
            targets,
            nats,
            divisor,
            ignore_index,
            gradient,
            details=details,
            use_numba=backend == "numba",
        )


def reduce_rows(
    backend: str,
    nats: Tensor,
    targets: Tensor,
    domains: Tensor,
    divisor: Tensor,
    n_domains: int,
    ignore_index: int,
    details: Details | None,
) -> tuple[Tensor, Tensor]:
    """The sum of the losses (without details of nats / divisor) and the sums per domain."""
    losses, correct = (None, None) if details is None else (details.losses, details.correct)
    if backend == "triton":
        from velopath.kernels import domain_sums as kernels

        return kernels.reduce_rows(nats, targets, domains, divisor, n_domains, ignore_index, losses, correct)
    if backend == "reference":
        assert losses is not None  # only shards come here
        counted = targets != ignore_index
        return losses.double().sum().to(nats.dtype), domain_sums(nats, counted, domains, n_domains, correct)
    return cpu.reduce_rows(nats, targets, domains, divisor, n_domains, ignore_index, losses, correct)


def statistics(backend: str, logits: Tensor, local: Tensor, options: RowOptions, *, padded: bool) -> Tensor:
    """(7, rows) fp64 of a shard's columns, x being the shaped and r the given logits.

    max x, max r, max of r left of the target; sum exp(x - max x), x and r at the target (0 where it lies
    elsewhere), sum x. `local` are int64 targets counted from the shard's first column, -1 left of it, V right
    of it, or `NOT_COUNTED`: the statistics of such a row mean nothing.
    """
    if backend == "triton":
        from velopath.kernels import sharded_rows

        x = sharded_rows.statistics(logits, local, options.logit_scale, options.softcap, padded=padded)
        return x.double()
    if backend != "reference":
        return cpu.statistics(logits, local, options, use_numba=backend == "numba")
    given = logits.double()
    x = shaped(given, options)
    columns = torch.arange(logits.shape[1], device=logits.device)
    left = torch.where(columns < local[:, None], given, -torch.inf)
    own = columns == local[:, None]
    top = x.amax(1)
    at_target, given_at_target = (torch.where(own, values, 0.0).sum(1) for values in (x, given))
    base = torch.where(top == -torch.inf, 0.0, top)
    sum_exp = torch.exp(x - base[:, None]).sum(1)
    return torch.stack((top, given.amax(1), left.amax(1), sum_exp, at_target, given_at_target, x.sum(1)))


def write_gradient(
    backend: str, logits: Tensor, local: Tensor, factors: Tensor, options: RowOptions, *, padded: bool
) -> None:
    """Write (exp(x - m) a - b - [column = target] t) dx/dr over a shard's logits; 0 where `NOT_COUNTED`.

    `factors` is (4, rows) fp64: m, a, b, t.
    """
    if backend == "triton":
        from velopath.kernels import sharded_rows

        s, c = options.logit_scale, options.softcap
        sharded_rows.write_gradient(logits, local, factors.float(), s, c, padded=padded)
        return
    if backend != "reference":
        cpu.write_gradient(logits, local, factors, options, use_numba=backend == "numba")
        return
    m, a, b, t = factors[:, :, None]
    x = shaped(logits.double(), options)
    own = torch.arange(logits.shape[1], device=logits.device) == local[:, None]
    gradient = torch.exp(x - m) * a - b - torch.where(own, t, 0.0)
    gradient *= options.logit_scale
    if options.softcap:
        gradient *= 1 - (x / options.softcap) ** 2
    logits.copy_(torch.where((local == NOT_COUNTED)[:, None], 0.0, gradient))
