"""The operators behind the per-domain cross-entropy, and their derivatives.

The gradient is computed with the loss, over the logits, while they are at hand; backward only multiplies it
by the upstream gradient. Operators that torch.compile does not look into (`torch.library.custom_op`, which
declares what it overwrites) inside an `autograd.Function` give one graph and no copy of the logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from velopath.errors import ConfigError
from velopath.loss import cpu

CPU_CHUNK_BYTES = 1 << 26
GPU_CHUNK_BYTES = 1 << 30
GPU_CHUNK_ROWS = 2048
"""Fewer rows would read the weight, and read and write its gradient, too often."""


class RowBackend(Protocol):
    """What a backend provides: rows in place, and the sums over rows."""

    def write_rows(
        self, logits: Tensor, targets: Tensor, nats: Tensor, counted: Tensor, gradient: bool, padded: bool
    ) -> None: ...

    def reduce_rows(
        self, nats: Tensor, targets: Tensor, domains: Tensor, counted: Tensor, n_domains: int
    ) -> tuple[Tensor, Tensor]: ...


class CpuRows:
    """C++ or numba rows on the CPU."""

    def __init__(self, ignore_index: int, use_numba: bool) -> None:
        self.ignore_index, self.use_numba = ignore_index, use_numba

    def write_rows(
        self, logits: Tensor, targets: Tensor, nats: Tensor, counted: Tensor, gradient: bool, padded: bool
    ) -> None:
        cpu.write_rows(logits, targets, nats, counted, self.ignore_index, gradient, use_numba=self.use_numba)

    def reduce_rows(
        self, nats: Tensor, targets: Tensor, domains: Tensor, counted: Tensor, n_domains: int
    ) -> tuple[Tensor, Tensor]:
        return cpu.reduce_rows(nats, targets, domains, counted, n_domains, self.ignore_index)


class TritonRows:
    """Triton rows on a GPU, or on CPU tensors under the interpreter."""

    def __init__(self, ignore_index: int) -> None:
        self.ignore_index = ignore_index

    def write_rows(
        self, logits: Tensor, targets: Tensor, nats: Tensor, counted: Tensor, gradient: bool, padded: bool
    ) -> None:
        from velopath.kernels import rows

        rows.write_rows(logits, targets, nats, counted, self.ignore_index, gradient, padded=padded)

    def reduce_rows(
        self, nats: Tensor, targets: Tensor, domains: Tensor, counted: Tensor, n_domains: int
    ) -> tuple[Tensor, Tensor]:
        from velopath.kernels import domain_sums

        return domain_sums.reduce_rows(nats, targets, domains, counted, n_domains, self.ignore_index)


def _rows_of(backend: str, ignore_index: int) -> RowBackend:
    return TritonRows(ignore_index) if backend == "triton" else CpuRows(ignore_index, backend == "numba")


def _count(targets: Tensor, domains: Tensor, vocab: int, n_domains: int, ignore_index: int) -> Tensor:
    """Rows counted, an int64 scalar on the device. A GPU is not waited for: there a bad id gives NaN."""
    if targets.device.type == "cpu":
        return cpu.check_values(targets, domains, vocab, n_domains, ignore_index)
    return (targets != ignore_index).sum()


def _run(
    logits: Tensor,
    targets: Tensor,
    domains: Tensor,
    n_domains: int,
    ignore_index: int,
    backend: str,
    gradient: bool,
) -> tuple[Tensor, Tensor]:
    targets, domains = targets.contiguous(), domains.contiguous()
    rows = _rows_of(backend, ignore_index)
    counted = _count(targets, domains, logits.shape[1], n_domains, ignore_index)
    nats = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    rows.write_rows(logits, targets, nats, counted, gradient, False)
    return rows.reduce_rows(nats, targets, domains, counted, n_domains)


def _fake_result(like: Tensor, n_domains: int) -> tuple[Tensor, Tensor]:
    return like.new_empty((), dtype=torch.float32), like.new_empty((2, n_domains), dtype=torch.float32)


@torch.library.custom_op("velopath::cross_entropy_", mutates_args=("logits",))
def cross_entropy_(
    logits: Tensor, targets: Tensor, domains: Tensor, n_domains: int, ignore_index: int, backend: str
) -> tuple[Tensor, Tensor]:
    """Loss and sums; the gradient of the loss is written over the logits."""
    return _run(logits, targets, domains, n_domains, ignore_index, backend, True)


@torch.library.custom_op("velopath::cross_entropy", mutates_args=())
def cross_entropy(
    logits: Tensor, targets: Tensor, domains: Tensor, n_domains: int, ignore_index: int, backend: str
) -> tuple[Tensor, Tensor]:
    """Loss and sums; the logits stay as they are."""
    return _run(logits, targets, domains, n_domains, ignore_index, backend, False)


@cross_entropy_.register_fake
@cross_entropy.register_fake
def _(
    logits: Tensor, targets: Tensor, domains: Tensor, n_domains: int, ignore_index: int, backend: str
) -> tuple[Tensor, Tensor]:
    return _fake_result(logits, n_domains)


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
    if hidden.dtype == torch.float32:
        total.addmm_(logits_gradient.t(), hidden, beta=beta)
    elif hidden.device.type == "cuda":
        # Products of 16 bits, added to fp32 in the matmul itself.
        torch.addmm(total, logits_gradient.t(), hidden, out_dtype=torch.float32, beta=beta, out=total)
    elif first:
        total.copy_(torch.mm(logits_gradient.t(), hidden))
    else:
        total.add_(torch.mm(logits_gradient.t(), hidden))


@torch.library.custom_op("velopath::linear_cross_entropy", mutates_args=())
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    domains: Tensor,
    n_domains: int,
    ignore_index: int,
    chunk_bytes: int,
    backend: str,
    hidden_gradient: bool,
    weight_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, sums, gradient of hidden and of weight (empty where not asked for), from chunks of logits."""
    with torch.autocast(hidden.device.type, enabled=False):
        targets, domains = targets.contiguous(), domains.contiguous()
        backend_rows = _rows_of(backend, ignore_index)
        (n, vocab), compute = (hidden.shape[0], weight.shape[0]), hidden.dtype
        counted = _count(targets, domains, vocab, n_domains, ignore_index)
        weight_cast = weight.to(compute)
        padded = backend == "triton"
        step = chunk_rows(n, vocab * hidden.element_size(), chunk_bytes, hidden.device.type)
        if padded:
            from velopath.kernels.rows import empty_rows

            buffer = empty_rows(step, vocab, compute, hidden.device)
        else:
            buffer = torch.empty(step, vocab, dtype=compute, device=hidden.device)
        nats = torch.empty(n, dtype=torch.float32, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if hidden_gradient else hidden.new_empty(0)
        total = torch.empty_like(weight, dtype=torch.float32) if weight_gradient and step < n else None
        d_weight = weight.new_empty(0)
        for start in range(0, n, step):
            part = slice(start, min(start + step, n))
            logits = torch.mm(hidden[part], weight_cast.t(), out=buffer[: part.stop - start])
            backend_rows.write_rows(
                logits, targets[part], nats[part], counted, hidden_gradient or weight_gradient, padded
            )
            if hidden_gradient:
                torch.mm(logits, weight_cast, out=d_hidden[part])
            if total is not None:
                _add_weight_gradient(total, logits, hidden[part], start == 0)
            elif weight_gradient:
                d_weight = torch.mm(logits.t(), hidden).to(weight.dtype)
        if total is not None:
            d_weight = total.to(weight.dtype)
        loss, sums = backend_rows.reduce_rows(nats, targets, domains, counted, n_domains)
    return loss, sums, d_hidden, d_weight


@linear_cross_entropy.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    domains: Tensor,
    n_domains: int,
    ignore_index: int,
    chunk_bytes: int,
    backend: str,
    hidden_gradient: bool,
    weight_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_hidden = torch.empty_like(hidden) if hidden_gradient else hidden.new_empty(0)
    d_weight = torch.empty_like(weight) if weight_gradient else weight.new_empty(0)
    return *_fake_result(hidden, n_domains), d_hidden, d_weight


def _multiplied(ctx: Any, upstream: Tensor, gradients: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The gradients times the upstream gradient of the loss, in place, without the host waiting for a GPU."""
    if torch.compiler.is_compiling():
        return tuple(g * upstream for g in gradients)  # the compiler reuses the buffer by itself
    if ctx.handed_out:
        raise ConfigError(
            "backward ran twice through one per-domain cross-entropy, whose gradient is kept in one buffer; "
            "call it again for the second backward, or use domain_cross_entropy(..., inplace=False)"
        )
    ctx.handed_out = True
    for g in gradients:
        if upstream.device.type == "cpu":
            if upstream.item() != 1.0:
                g.mul_(upstream)
        elif ctx.backend == "triton":
            from velopath.kernels.rows import scale_in_place

            scale_in_place(g, upstream)
        else:
            g.mul_(upstream)
    return gradients


class DomainCrossEntropy(torch.autograd.Function):
    """Loss and sums of logits that need a gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        domains: Tensor,
        n_domains: int,
        ignore_index: int,
        inplace: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        # detach shares the storage and the version counter, so that autograd notices a use of the old
        # logits, and a leaf may be overwritten too.
        gradient = logits.detach() if inplace else logits.clone(memory_format=torch.contiguous_format)
        loss, sums = cross_entropy_(gradient, targets, domains, n_domains, ignore_index, backend)
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(sums)
        ctx.inplace, ctx.backend, ctx.handed_out = inplace, backend, False
        return loss, sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        if ctx.inplace:
            (gradient,) = _multiplied(ctx, upstream, (gradient,))
        elif upstream.device.type != "cpu" or torch.compiler.is_compiling() or upstream.item() != 1.0:
            gradient = gradient * upstream
        return gradient, None, None, None, None, None, None


class LinearDomainCrossEntropy(torch.autograd.Function):
    """Loss and sums of hidden @ weight^T where hidden or weight needs a gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        domains: Tensor,
        n_domains: int,
        ignore_index: int,
        chunk_bytes: int,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        of_hidden, of_weight = ctx.needs_input_grad[:2]
        loss, sums, d_hidden, d_weight = linear_cross_entropy(
            hidden,
            weight,
            targets,
            domains,
            n_domains,
            ignore_index,
            chunk_bytes,
            backend,
            of_hidden,
            of_weight,
        )
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.mark_non_differentiable(sums)
        ctx.backend, ctx.handed_out = backend, False
        return loss, sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> Any:
        gradients = _multiplied(ctx, upstream, ctx.saved_tensors)
        d_hidden, d_weight = (
            g if needed else None for g, needed in zip(gradients, ctx.needs_input_grad, strict=False)
        )
        return d_hidden, d_weight, None, None, None, None, None, None


# Typed, because torch leaves `apply` without types.
differentiable_cross_entropy: Callable[[Tensor, Tensor, Tensor, int, int, bool, str], tuple[Tensor, Tensor]]
differentiable_cross_entropy = DomainCrossEntropy.apply
differentiable_linear_cross_entropy: Callable[
    [Tensor, Tensor, Tensor, Tensor, int, int, int, str], tuple[Tensor, Tensor]
]
differentiable_linear_cross_entropy = LinearDomainCrossEntropy.apply
