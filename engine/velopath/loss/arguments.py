"""Checks of what callers of the per-domain cross-entropy pass, before any kernel sees it."""

from __future__ import annotations

import math
from importlib.util import find_spec

import torch
from torch import Tensor

from velopath.errors import ConfigError
from velopath.loss import cpu
from velopath.loss.options import REDUCTIONS, Settings

BACKENDS = ("auto", "reference", "triton", "cpu", "numba")
_INTEGERS = (torch.int32, torch.int64)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What the fast backends compute; "reference" takes any floating dtype."""
_PRESENT = {
    "triton": find_spec("triton") is not None,
    "cpu": cpu.HAS_CORE,
    "numba": find_spec("numba") is not None,
}


def choose(backend: str, device_type: str, dtype: torch.dtype) -> str:
    """The backend to use: the one named, or for "auto" the fastest there is for device and dtype."""
    if backend not in BACKENDS:
        raise ConfigError(f"backend is {backend!r}; expected one of {', '.join(BACKENDS)}")
    if backend == "auto":
        order = {"cuda": ("triton",), "cpu": ("cpu", "numba")}.get(device_type, ())
        for name in order:
            if _PRESENT[name] and dtype in _DTYPES:
                return name
        return "reference"
    if backend == "reference":
        return backend
    if not _PRESENT[backend]:
        what = "the C++ core was not built" if backend == "cpu" else f"{backend} is not installed"
        raise ConfigError(f"backend={backend!r} is not available: {what}; install it or use backend='auto'")
    if dtype not in _DTYPES:
        known = ", ".join(str(d) for d in _DTYPES)
        raise ConfigError(f"backend={backend!r} computes {known}, not {dtype}; use backend='reference'")
    if backend != "triton" and device_type != "cpu":
        raise ConfigError(f"backend={backend!r} needs tensors on the CPU, they are on {device_type!r}")
    return backend


def check_ids(targets_N: Tensor, domains_N: Tensor, n_domains: int, first: Tensor, name: str) -> None:
    """Shapes, dtypes and devices; `first` is the (N, ...) tensor that the ids belong to."""
    if first.ndim != 2 or not first.is_floating_point() or first.shape[0] < 1 or first.shape[1] < 1:
        raise ConfigError(
            f"{name} must be a floating (N, columns) tensor, neither 0; it is {first.dtype} "
            f"{tuple(first.shape)}"
        )
    rows = first.shape[0]
    if targets_N.ndim != 1 or targets_N.shape[0] != rows:
        raise ConfigError(
            f"targets must be ({rows},) like the rows of {name}, they are {tuple(targets_N.shape)}"
        )
    if domains_N.ndim != 1 or domains_N.shape[0] < 1 or rows % domains_N.shape[0]:
        raise ConfigError(
            f"domains must be (N,) or (B,) with N={rows} a multiple of B, they are {tuple(domains_N.shape)}"
        )
    for ids, what in ((targets_N, "targets"), (domains_N, "domains")):
        if ids.dtype not in _INTEGERS:
            raise ConfigError(f"{what} must be int32 or int64, they are {ids.dtype}")
        if ids.device != first.device:
            raise ConfigError(f"{what} are on {ids.device}, {name} on {first.device}; move them together")
    if n_domains < 1:
        raise ConfigError(f"n_domains is {n_domains}; expected 1 or more")


def check_values(targets_N: Tensor, domains_N: Tensor, vocab: int, n_domains: int, ignore_index: int) -> None:
    """Targets and domains in their ranges, where asking costs nothing."""
    # A compiled graph cannot branch on values; gather then raises for a target, as in any torch code.
    if targets_N.device.type == "cpu" and not torch.compiler.is_compiling():
        cpu.check_values(targets_N, domains_N, vocab, n_domains, ignore_index)


def settings_of(
    n_domains: int,
    ignore_index: int,
    logit_scale: float,
    softcap: float | None,
    label_smoothing: float,
    z_loss: float,
    reduction: str,
    tokens: bool,
    accuracy: bool,
    group: str,
    backend: str,
) -> Settings:
    """The options in one value; `ConfigError` for one out of its range."""
    if reduction not in REDUCTIONS:
        raise ConfigError(f"reduction is {reduction!r}; expected one of {', '.join(REDUCTIONS)}")
    for name, value, least, most in (
        ("label_smoothing", label_smoothing, 0.0, 1.0),
        ("z_loss", z_loss, 0.0, math.inf),
    ):
        if not (least <= value <= most and math.isfinite(value)):
            raise ConfigError(f"{name} is {value}; expected a finite number from {least:g} to {most:g}")
    for name, positive in (("logit_scale", logit_scale), ("softcap", softcap)):
        if positive is not None and not (positive > 0 and math.isfinite(positive)):
            or_none = " or None" if name == "softcap" else ""
            raise ConfigError(f"{name} is {positive}; expected a finite number above 0{or_none}")
    return Settings(
        n_domains,
        ignore_index,
        float(logit_scale),
        float(softcap or 0.0),
        float(label_smoothing),
        float(z_loss),
        reduction,
        tokens,
        accuracy,
        group,
        backend,
    )


def check_domain_weights(weights_K: Tensor | None, n_domains: int, first: Tensor) -> None:
    """Shape, dtype, device; on a CPU also that no weight is negative or not finite."""
    if weights_K is None:
        return
    if weights_K.shape != (n_domains,) or not weights_K.is_floating_point():
        raise ConfigError(
            f"domain_weights must be a floating ({n_domains},) tensor, one weight per domain; they are "
            f"{weights_K.dtype} {tuple(weights_K.shape)}"
        )
    if weights_K.device != first.device:
        raise ConfigError(f"domain_weights are on {weights_K.device}, the rest on {first.device}")
    if weights_K.requires_grad:
        raise ConfigError("domain_weights get no gradient; pass domain_weights.detach()")
    if weights_K.device.type == "cpu" and not torch.compiler.is_compiling():
        bad = ~(weights_K.isfinite() & (weights_K >= 0))
        if bool(bad.any()):
            at = int(bad.nonzero()[0])
            raise ConfigError(
                f"domain_weights[{at}] is {float(weights_K[at])}; expected finite numbers, 0 or more"
            )


def check_main_grad(main_grad: Tensor | None, hidden: Tensor, weight: Tensor) -> None:
    """Shape, dtype and device of the tensor that takes the weight's gradient."""
    if main_grad is None:
        return
    wanted = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    if (
        main_grad.shape != weight.shape
        or main_grad.dtype != wanted
        or main_grad.device != weight.device
        or main_grad.requires_grad
    ):
        raise ConfigError(
            f"main_grad must be {wanted} {tuple(weight.shape)} on {weight.device} without a gradient of its own; "
            f"it is {main_grad.dtype} {tuple(main_grad.shape)} on {main_grad.device}"
            f"{', requiring a gradient' if main_grad.requires_grad else ''}"
        )
