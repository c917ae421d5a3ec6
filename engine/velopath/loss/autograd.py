"""Backward of the per-domain cross-entropy: the gradient that forward left, times the upstream gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from velopath.errors import ConfigError
from velopath.loss.ops import cross_entropy_, linear_cross_entropy


def _first_derivative_only() -> None:
    """Refuse `create_graph=True`: the gradient is made in forward, and a derivative of it would be silently 0."""
    if not torch.compiler.is_compiling() and torch.is_grad_enabled():
        raise ConfigError(
            "the per-domain cross-entropy can be differentiated once; leave out create_graph=True, or use "
            "backend='reference'"
        )


def _once(ctx: Any) -> None:
    """Refuse a second backward, whose gradient the first has multiplied in place."""
    if ctx.handed_out:
        raise ConfigError(
            "backward ran twice through one per-domain cross-entropy, whose gradient is kept in one buffer; "
            "call it again for the second backward, or use domain_cross_entropy(..., inplace=False)"
        )
    ctx.handed_out = True


def _multiplied(ctx: Any, upstream: Tensor, gradients: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The gradients times the upstream gradient of the loss, in place, without the host waiting for a GPU."""
    if torch.compiler.is_compiling():
        return tuple(
            (g * _per_row(upstream)).to(g.dtype) for g in gradients
        )  # the compiler reuses the buffer
    _once(ctx)
    for g in gradients:
        if upstream.ndim:
            g.mul_(_per_row(upstream))
        elif upstream.device.type == "cpu":
            if upstream.item() != 1.0:
                g.mul_(upstream)
        elif ctx.backend == "triton":
            from velopath.kernels.rows import scale_in_place

            scale_in_place(g, upstream)
        else:
            g.mul_(upstream)
    return gradients


def _per_row(upstream: Tensor) -> Tensor:
    """() or, for the reduction "none", (N, 1)."""
    return upstream[:, None] if upstream.ndim else upstream


class DomainCrossEntropy(torch.autograd.Function):
    """Loss, sums and tokens of logits that need a gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        domains: Tensor,
        domain_weights: Tensor | None,
        inplace: bool,
        *settings: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        # detach shares the storage and the version counter, so that autograd notices a use of the old
        # logits, and a leaf may be overwritten too.
        gradient = logits.detach() if inplace else logits.clone(memory_format=torch.contiguous_format)
        loss, sums, tokens = cross_entropy_(gradient, targets, domains, domain_weights, *settings)
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(sums, tokens)
        ctx.inplace, ctx.backend, ctx.handed_out = inplace, settings[-1], False
        ctx.others = 4 + len(settings)
        return loss, sums, tokens

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> Any:
        _first_derivative_only()
        (gradient,) = ctx.saved_tensors
        if ctx.inplace:
            (gradient,) = _multiplied(ctx, upstream, (gradient,))
        elif (
            upstream.ndim
            or upstream.device.type != "cpu"
            or torch.compiler.is_compiling()
            or upstream.item() != 1.0
        ):
            gradient = (gradient * _per_row(upstream)).to(gradient.dtype)
        return gradient, *(None,) * ctx.others


class LinearDomainCrossEntropy(torch.autograd.Function):
    """Loss, sums and tokens of hidden @ weight^T where hidden or weight needs a gradient.

    With `main_grad` the gradient of the weight is added to it, and autograd gets none.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        domains: Tensor,
        domain_weights: Tensor | None,
        main_grad: Tensor | None,
        chunk_bytes: int,
        *settings: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        of_hidden, of_weight = ctx.needs_input_grad[:2]
        ctx.main_grad = main_grad if of_weight else None
        ctx.settings, ctx.chunk_bytes = settings, chunk_bytes
        ctx.backend, ctx.handed_out, ctx.per_row = settings[-1], False, settings[6] == "none"
        # Losses of rows may be weighted at will afterwards: only backward knows the sum over rows in dW.
        in_forward = not ctx.per_row
        loss, sums, tokens, d_hidden, d_weight = linear_cross_entropy(
            hidden,
            weight,
            targets,
            domains,
            domain_weights,
            None,
            chunk_bytes,
            of_hidden and in_forward,
            of_weight and in_forward,
            ctx.main_grad is not None,
            *settings,
        )
        if in_forward:
            ctx.save_for_backward(d_hidden, d_weight)
        else:
            ctx.save_for_backward(hidden, weight, targets, domains, domain_weights)
        ctx.mark_non_differentiable(sums, tokens)
        return loss, sums, tokens

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> Any:
        _first_derivative_only()
        of_hidden, of_weight = ctx.needs_input_grad[:2]
        main_grad = ctx.main_grad
        if ctx.per_row:
            *_, d_hidden, d_weight = linear_cross_entropy(
                *ctx.saved_tensors,
                upstream,
                ctx.chunk_bytes,
                of_hidden,
                of_weight,
                main_grad is not None,
                *ctx.settings,
            )
            if main_grad is not None:
                main_grad.add_(d_weight)
        elif main_grad is not None:
            d_hidden, d_weight = ctx.saved_tensors
            (d_hidden,) = _multiplied(ctx, upstream, (d_hidden,))
            main_grad.addcmul_(d_weight, upstream.to(d_weight.dtype))
        else:
            d_hidden, d_weight = _multiplied(ctx, upstream, ctx.saved_tensors)
        to_weight = d_weight if of_weight and main_grad is None else None
        return d_hidden if of_hidden else None, to_weight, *(None,) * (5 + len(ctx.settings))


class IntoMainGrad(torch.autograd.Function):
    """The weight itself, whose gradient is added to `main_grad` and ends there."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, main_grad: Tensor) -> Tensor:
        ctx.main_grad = main_grad
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[None, None]:
        _first_derivative_only()
        ctx.main_grad.add_(upstream)
        return None, None


# Typed, because torch leaves `apply` without types.
differentiable_cross_entropy: Callable[..., tuple[Tensor, Tensor, Tensor]] = DomainCrossEntropy.apply
differentiable_linear_cross_entropy: Callable[..., tuple[Tensor, Tensor, Tensor]]
differentiable_linear_cross_entropy = LinearDomainCrossEntropy.apply
into_main_grad: Callable[[Tensor, Tensor], Tensor] = IntoMainGrad.apply
