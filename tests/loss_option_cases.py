"""Options of the per-domain cross-entropy with their fp64 answers, for test_loss_options.py and interpreted_kernels.py.

OPTIONS is an orthogonal array: every pair of values of softcap, smoothing, z-loss and reduction occurs once, each
with both scales and with and without weights somewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from loss_cases import IGNORE, Case

_CAPS, _SMOOTH, _Z, _REDUCTIONS = (
    (None, 5.0, 30.0),
    (0.0, 0.1, 1.0),
    (0.0, 1e-3, 1e-2),
    ("mean", "sum", "none"),
)
_ROWS = ("0000", "0111", "0222", "1012", "1120", "1201", "2021", "2102", "2210")
OPTIONS: dict[str, dict[str, Any]] = {}
for _i, _row in enumerate(_ROWS):
    _c, _s, _z, _r = (int(digit) for digit in _row)
    OPTIONS[f"options {_row}"] = {
        "softcap": _CAPS[_c],
        "label_smoothing": _SMOOTH[_s],
        "z_loss": _Z[_z],
        "reduction": _REDUCTIONS[_r],
        "logit_scale": (1.0, 0.3)[_i % 2],
        "domain_weights": _i % 3 != 0,  # replaced by weights of the case's number of domains
    }


def given_options(name: str, n_domains: int) -> dict[str, Any]:
    """Keywords of both functions."""
    weights = 0.25 + torch.arange(n_domains) % 7 if OPTIONS[name]["domain_weights"] else None
    return OPTIONS[name] | {"domain_weights": weights, "return_tokens": True, "return_accuracy": True}


def upstream_of(loss: Tensor) -> Tensor:
    """A gradient from above: 1.5, and for losses of rows another one for each."""
    return (
        torch.linspace(-1.5, 2.0, loss.numel(), dtype=loss.dtype) if loss.ndim else torch.full_like(loss, 1.5)
    )


def exact(
    logits: Tensor, targets: Tensor, domains: Tensor, n_domains: int, options: Mapping[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, (3, K) sums and (2, N) tokens in fp64 with torch's own parts; differentiable by `logits`."""
    t, counted = targets.long(), targets != IGNORE
    given = torch.where(counted[:, None], logits, 0.0) * options["logit_scale"]
    cap = options["softcap"]
    x = cap * torch.tanh(given / cap) if cap else given
    lse = torch.where(counted, x.logsumexp(1), 0.0)
    nats = F.cross_entropy(x, t, reduction="none", ignore_index=IGNORE)
    smoothed = {"ignore_index": IGNORE, "label_smoothing": options["label_smoothing"]}
    losses = F.cross_entropy(x, t, reduction="none", **smoothed) + options["z_loss"] * lse**2
    per_row = domains.long().repeat_interleave(len(t) // len(domains))
    if options["domain_weights"] is not None:
        losses = losses * options["domain_weights"].double()[per_row]
    loss = {"none": losses, "sum": losses.sum(), "mean": losses.sum() / counted.sum().clamp(min=1)}
    correct = counted & (logits.argmax(1) == t)
    sums = torch.zeros(3, n_domains, dtype=torch.float64)
    for i, values in enumerate((nats.detach(), counted.double(), correct.double())):
        sums[i].index_add_(0, per_row[counted], values[counted])
    return loss[options["reduction"]], sums, torch.stack((nats, lse)).detach()


def wrong(
    got: tuple[Tensor, Tensor, Tensor],
    gradients: list[Tensor],
    want: tuple[Tensor, Tensor, Tensor],
    true_gradients: list[Tensor],
    tolerance: float,
    unit: float = 1e-30,
) -> list[str]:
    """What is off: losses, nats and lse by more than 1e-6 of the largest, counts at all, gradients by `tolerance`.

    Gradients are measured by their largest, or by `unit` where that is more.
    """
    (loss, sums, tokens), (true_loss, true_sums, true_tokens) = got, want
    pairs = {
        "loss": (loss, true_loss, 1e-6),
        "nats": (sums[0], true_sums[0], 1e-6),
        "counts": (sums[1:], true_sums[1:], 0.0),
        "tokens": (tokens, true_tokens, 1e-6),
    }
    for i, (mine, true) in enumerate(zip(gradients, true_gradients, strict=True)):
        pairs[f"gradient {i}"] = (mine, true, tolerance)
    found = []
    for name, (mine, true, limit) in pairs.items():
        floor = unit if name.startswith("gradient") else 1e-2
        error = float(
            (mine.detach().double() - true.detach()).abs().max() / true.detach().abs().max().clamp(min=floor)
        )
        if mine.shape != true.shape or not error <= limit:
            found.append(f"{name} {tuple(mine.shape)} is off by {error:.3g} > {limit:.3g}")
    return found


def differences(case: Case, name: str, function: Any, tolerance: float, **more: Any) -> list[str]:
    """What `function` (`domain_cross_entropy`) gets wrong for a case with the options `name`."""
    logits, targets, domains = case.tensors()
    options = given_options(name, case.n_domains)
    if case.spread > 100:
        options["logit_scale"] = 0.5  # exact: 0.3 * 1e4 in fp32 would already be off by 1e-4
    leaf, true_leaf = logits.clone().requires_grad_(), logits.double().requires_grad_()
    want = exact(true_leaf, targets, domains, case.n_domains, options)
    want[0].backward(upstream_of(want[0]))
    got = function(leaf, targets, domains, n_domains=case.n_domains, **options, **more)
    got[0].backward(upstream_of(got[0]))
    assert leaf.grad is not None and true_leaf.grad is not None
    unit = 1 / max(int((targets != IGNORE).sum()), 1) if options["reduction"] == "mean" else 1.0
    return wrong(got, [leaf.grad], want, [true_leaf.grad], tolerance, unit)
