"""The per-domain cross-entropy as operators of torch: gradient with the loss, chunks of logits.

Operators that torch.compile does not look into (`torch.library.custom_op`, which declares what it overwrites)
inside an `autograd.Function` (loss/autograd.py) give one graph and no copy of the logits. `*settings` are the
fields of `Settings`, flat because operators take nothing else.
"""

# mypy: disable-error-code="untyped-decorator"
# (custom_op with a schema of its own)

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from velopath.loss.batch import RowBatch
from velopath.loss.options import Settings

CPU_CHUNK_BYTES = 1 << 26
GPU_CHUNK_BYTES = 1 << 30
GPU_CHUNK_ROWS = 2048
"""Fewer rows would read the weight, and read and write its gradient, too often."""

SETTINGS = (
    "int n_domains, int ignore_index, float logit_scale, float softcap, float label_smoothing, float z_loss, "
    "str reduction, bool tokens, bool accuracy, str group, str backend"
)
"""The fields of `Settings` as an operator's schema."""


def _operator(name: str, arguments: str, results: str, mutates: tuple[str, ...] = ()) -> Any:
    return torch.library.custom_op(
        f"velopath::{name}", mutates_args=mutates, schema=f"({arguments}, {SETTINGS}) -> ({results})"
    )


@_operator(
    "cross_entropy_",
    "Tensor(a!) logits, Tensor targets, Tensor domains, Tensor? domain_weights",
    "Tensor, Tensor, Tensor",
    mutates=("logits",),
)
def cross_entropy_(
    logits: Tensor, targets: Tensor, domains: Tensor, domain_weights: Tensor | None, *settings: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, sums, tokens; the gradient of the loss (of "none": of each row's) is written over the logits."""
    return _run(logits, targets, domains, domain_weights, settings, gradient=True)


@_operator(
    "cross_entropy",
    "Tensor logits, Tensor targets, Tensor domains, Tensor? domain_weights",
    "Tensor, Tensor, Tensor",
)
def cross_entropy(
    logits: Tensor, targets: Tensor, domains: Tensor, domain_weights: Tensor | None, *settings: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, sums, tokens; the logits stay as they are."""
    return _run(logits, targets, domains, domain_weights, settings, gradient=False)


def _run(
    logits: Tensor,
    targets: Tensor,
    domains: Tensor,
    domain_weights: Tensor | None,
    settings: tuple[Any, ...],
    *,
    gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = RowBatch(logits, logits.shape[1], targets, domains, domain_weights, Settings(*settings))
    rows.write(slice(0, logits.shape[0]), logits, gradient=gradient)
    return rows.results()


@cross_entropy_.register_fake
@cross_entropy.register_fake
def _(
    logits: Tensor, targets: Tensor, domains: Tensor, domain_weights: Tensor | None, *settings: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_results(logits, Settings(*settings))


def _fake_results(like: Tensor, s: Settings) -> tuple[Tensor, Tensor, Tensor]:
    rows, exact = like.shape[0], torch.float64 if like.dtype == torch.float64 else torch.float32
    return (
        like.new_empty((rows,) if s.reduction == "none" else (), dtype=exact),
        like.new_empty((3 if s.accuracy else 2, s.n_domains), dtype=exact),
        like.new_empty((2, rows) if s.tokens else (0,), dtype=exact),
    )


def chunk_rows(rows: int, row_bytes: int, chunk_bytes: int, device_type: str) -> int:
    """Rows per chunk: as many as the budget allows, spread evenly; `chunk_bytes` 0 is the default."""
    if chunk_bytes:
        most = max(chunk_bytes // row_bytes, 1)
    elif device_type == "cuda":
        most = max(GPU_CHUNK_BYTES // row_bytes, GPU_CHUNK_ROWS)
    else:
        most = max(CPU_CHUNK_BYTES // row_bytes, 1)
    if most >= rows:
        return rows
    chunks = -(-rows // most)
    even = -(-rows // chunks)
    return min(-(-even // 128) * 128, most)


def _add_weight_gradient(total: Tensor, logits_gradient: Tensor, hidden: Tensor, first: bool) -> None:
    """total (V, D) fp32 += logits_gradient^T hidden; `first` overwrites what is there."""
    beta = 0.0 if first else 1.0
    if hidden.dtype == total.dtype:
        total.addmm_(logits_gradient.t(), hidden, beta=beta)
    elif hidden.device.type == "cuda":
        # Products of 16 bits, added to fp32 in the matmul itself.
        torch.addmm(total, logits_gradient.t(), hidden, out_dtype=torch.float32, beta=beta, out=total)
    elif first:
        total.copy_(torch.mm(logits_gradient.t(), hidden))
    else:
        total.add_(torch.mm(logits_gradient.t(), hidden))


@_operator(
    "linear_cross_entropy",
    "Tensor hidden, Tensor weight, Tensor targets, Tensor domains, Tensor? domain_weights, Tensor? upstream, "
    "int chunk_bytes, bool hidden_gradient, bool weight_gradient, bool exact_gradient",
    "Tensor, Tensor, Tensor, Tensor, Tensor",
)
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    domains: Tensor,
    domain_weights: Tensor | None,
    upstream: Tensor | None,
    chunk_bytes: int,
    hidden_gradient: bool,
    weight_gradient: bool,
    exact_gradient: bool,
    *settings: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, sums, tokens, gradient of hidden and of weight (empty where not asked for), from chunks of logits.

    `upstream` (N,) multiplies every row's loss and gradient; `exact_gradient` leaves the weight's in the dtype
    of its sum, fp32 (fp64 for fp64 hidden states), instead of the weight's own.
    """
    s = Settings(*settings)
    with torch.autocast(hidden.device.type, enabled=False):
        (n, vocab), compute = (hidden.shape[0], weight.shape[0]), hidden.dtype
        rows = RowBatch(hidden, vocab, targets, domains, domain_weights, s, upstream)
        weight_cast = weight.to(compute)
        padded = s.backend == "triton"
        step = chunk_rows(n, vocab * hidden.element_size(), chunk_bytes, hidden.device.type)
        if padded:
            from velopath.kernels.rows import empty_rows

            buffer = empty_rows(step, vocab, compute, hidden.device)
        else:
            buffer = torch.empty(step, vocab, dtype=compute, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if hidden_gradient else hidden.new_empty(0)
        sum_dtype, result_dtype = _weight_gradient_dtypes(hidden, weight, exact_gradient)
        # One chunk's product needs no sum, unless it would be rounded on its way to a wider result.
        summed = weight_gradient and (step < n or sum_dtype == result_dtype != compute)
        total = torch.empty_like(weight, dtype=sum_dtype) if summed else None
        d_weight = weight.new_empty(0)
        for start in range(0, n, step):
            part = slice(start, min(start + step, n))
            logits = torch.mm(hidden[part], weight_cast.t(), out=buffer[: part.stop - start])
            rows.write(part, logits, gradient=hidden_gradient or weight_gradient, padded=padded)
            if hidden_gradient:
                torch.mm(logits, weight_cast, out=d_hidden[part])
            if total is not None:
                _add_weight_gradient(total, logits, hidden[part], start == 0)
            elif weight_gradient:
                d_weight = torch.mm(logits.t(), hidden).to(result_dtype)
        if total is not None:
            d_weight = total.to(result_dtype)
        if hidden_gradient and rows.shard is not None:
            rows.shard.sum_(d_hidden)
        loss, sums, tokens = rows.results()
    return loss, sums, tokens, d_hidden, d_weight


def _weight_gradient_dtypes(hidden: Tensor, weight: Tensor, exact: bool) -> tuple[torch.dtype, torch.dtype]:
    """What the weight's gradient is summed in and returned in."""
    sum_dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return sum_dtype, sum_dtype if exact else weight.dtype


@linear_cross_entropy.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    domains: Tensor,
    domain_weights: Tensor | None,
    upstream: Tensor | None,
    chunk_bytes: int,
    hidden_gradient: bool,
    weight_gradient: bool,
    exact_gradient: bool,
    *settings: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _, result_dtype = _weight_gradient_dtypes(hidden, weight, exact_gradient)
    d_hidden = torch.empty_like(hidden) if hidden_gradient else hidden.new_empty(0)
    d_weight = torch.empty_like(weight, dtype=result_dtype) if weight_gradient else weight.new_empty(0)
    return *_fake_results(hidden, Settings(*settings)), d_hidden, d_weight
