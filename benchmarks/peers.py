"""Other people's loss kernels, as far as they can be imported here: none of them returns losses per domain."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Peer = Callable[..., Tensor]


def logits_peers(device: torch.device) -> dict[str, Peer]:
    """Losses from (logits, targets, domains)."""
    peers: dict[str, Peer] = {}
    if device.type != "cuda":
        return peers
    if find_spec("liger_kernel"):
        from liger_kernel.transformers import LigerCrossEntropyLoss

        liger = LigerCrossEntropyLoss()
        peers["Liger, without domains"] = lambda x, t, d: liger(x, t)
    if find_spec("quack"):
        from quack.cross_entropy import cross_entropy

        peers["QuACK, without domains"] = lambda x, t, d: cross_entropy(x, t, inplace_backward=True)
    return peers


def linear_peers(device: torch.device) -> dict[str, Peer]:
    """Losses from (hidden, weight, targets, domains)."""
    peers: dict[str, Peer] = {}
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):  # torch 2.13
        options: Any = torch.nn.LinearCrossEntropyOptions()
        fused: Any = F.linear_cross_entropy
        peers["torch chunked, without domains"] = lambda h, w, t, d: fused(h, w, t, options=options)
    if device.type != "cuda":
        return peers
    if find_spec("liger_kernel"):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss()
        peers["Liger, without domains"] = lambda h, w, t, d: liger(w, h, t)
    if find_spec("cut_cross_entropy"):
        from cut_cross_entropy import linear_cross_entropy

        peers["Apple CCE, without domains"] = lambda h, w, t, d: linear_cross_entropy(h, w, t)
    if find_spec("quack"):
        from quack.linear_cross_entropy import chunked_linear_cross_entropy

        peers["QuACK, without domains"] = lambda h, w, t, d: chunked_linear_cross_entropy(h, w, t)
    return peers
