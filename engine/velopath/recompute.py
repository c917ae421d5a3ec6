"""Activation checkpointing of a decoder's layers: memory for a second forward pass, of all or of the cheap half.

"full" keeps a layer's input and computes the layer again in the backward pass: about a third more FLOPs. "selective"
keeps the results of attention and of every second matrix product and computes the rest again, torchtitan's rule
(reported by them; the choice of operators for our layer is ours). Neither changes a bit of the gradient on a CPU.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

Recompute = Literal["none", "full", "selective"]

_aten = torch.ops.aten
_PRODUCTS = {_aten.mm.default, _aten.addmm.default}
_ATTENTION = {
    op.default
    for name in (
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_attention_math",
    )
    if (op := getattr(_aten, name, None)) is not None
}


def run_layer(layer: nn.Module, recompute: Recompute, *inputs: Tensor | None) -> Tensor:
    """`layer(*inputs)`, keeping for the backward pass what `recompute` says."""
    out: Tensor
    if recompute == "none" or not torch.is_grad_enabled():
        out = layer(*inputs)
    elif recompute == "full":
        out = checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False)
    else:
        out = checkpoint(
            layer, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=_selective_contexts
        )
    return out


def _selective_contexts() -> Any:
    products = {"forward": 0, "recompute": 0}  # counted apart: both passes meet the same operators in order
    return create_selective_checkpoint_contexts(partial(_policy, products))  # type: ignore[no-untyped-call]


def _policy(products: dict[str, int], context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    if op in _ATTENTION:
        return CheckpointPolicy.MUST_SAVE
    if op in _PRODUCTS:
        when = "recompute" if context.is_recompute else "forward"
        products[when] += 1
        if products[when] % 2:
            return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
