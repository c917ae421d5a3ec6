"""AdamW as the loop uses it: decay on matrices only, the rate as a tensor, clipping without a host sync."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from velopath.errors import ConfigError
from velopath.sharding import whole


def build_optimizer(
    model: nn.Module,
    *,
    rate: float = 0.0,
    weight_decay: float = 0.1,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    fused: bool | None = None,
) -> torch.optim.AdamW:
    """AdamW over the parameters of `model` that need a gradient, in two groups.

    Decoupled decay p <- p (1 - rate * weight_decay) acts on matrices (two or more axes): projections and the
    embedding, which is also the unembedding when tied (GPT-2's and Hugging Face's habit). Vectors (norms,
    biases) are not decayed. `fused` None takes the fused kernel wherever torch has one for the device.

    With the fused kernel the rate is a 0-dim tensor, fp64 on a CPU (where it is read as a double) and fp32 on a
    GPU, so that a new rate neither recompiles a compiled step nor stops the host; else a plain float. Set it with
    `set_rate`. Raises `ConfigError` on values out of range.
    """
    for name, value, low, high in (
        ("rate", rate, 0.0, float("inf")),
        ("weight_decay", weight_decay, 0.0, float("inf")),
        ("betas[0]", betas[0], 0.0, 1.0),
        ("betas[1]", betas[1], 0.0, 1.0),
        ("eps", eps, 0.0, float("inf")),
    ):
        if not low <= value < high:
            raise ConfigError(f"optimiser {name} is {value!r}; expected {low:g} <= {name} < {high:g}")
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ConfigError("the model has no parameter that needs a gradient; there is nothing to optimise")
    device = trained[0].device
    if fused is None:
        fused = device.type in ("cpu", "cuda")
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    lr: float | Tensor = rate
    if fused:
        lr = torch.tensor(rate, dtype=torch.float64 if device.type == "cpu" else torch.float32, device=device)
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=betas, eps=eps, fused=fused)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Make `rate` the rate of every parameter group, in place where it is a tensor; no host sync."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def current_rate(optimizer: torch.optim.Optimizer) -> float:
    """The rate of the first group; a host sync when it lives on a GPU."""
    return float(optimizer.param_groups[0]["lr"])


def clip_grad_norm(parameters: Iterable[Tensor], max_norm: float | None) -> Tensor:
    """Scale the gradients so that their joint 2-norm is at most `max_norm`; return the norm before, 0-dim.

    g <- g * min(1, max_norm / (norm + 1e-6)), torch's rule. None or 0 only measures. The norm stays on the device (no
    host sync) and is NaN or infinite when a gradient is: the caller decides what then happens to the step.
    """
    grads = [p for p in parameters if p.grad is not None]
    norm = whole(torch.nn.utils.get_total_norm([p.grad for p in grads if p.grad is not None]))
    if max_norm:
        torch.nn.utils.clip_grads_with_norm_(grads, max_norm, norm)
    return norm
