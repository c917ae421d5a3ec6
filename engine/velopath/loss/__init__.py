"""Per-domain cross-entropy: the mean loss of a batch and, from the same pass, the loss of every domain.

`domain_cross_entropy` starts from logits, `linear_domain_cross_entropy` from hidden states and the output
weight, without ever holding all logits. One call, several forms: Triton on a GPU, the C++ core or numba on a
CPU, and plain torch, the reference. Suffixes: N rows (tokens), V vocabulary, D model width, K domains.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from velopath.errors import ConfigError
from velopath.loss import cpu, ops
from velopath.loss.reference import cross_entropy_reference

__all__ = ["BACKENDS", "domain_cross_entropy", "linear_domain_cross_entropy"]

BACKENDS = ("auto", "reference", "triton", "cpu", "numba")
_INTEGERS = (torch.int32, torch.int64)
_DTYPES = {
    "triton": (torch.float32, torch.bfloat16, torch.float16),
    "cpu": (torch.float32, torch.bfloat16),
    "numba": (torch.float32,),
}
_PRESENT = {
    "triton": find_spec("triton") is not None,
    "cpu": cpu.HAS_CORE,
    "numba": find_spec("numba") is not None,
}


def domain_cross_entropy(
    logits_NV: Tensor,
    targets_N: Tensor,
    domains_N: Tensor,
    *,
    n_domains: int,
    ignore_index: int = -100,
    inplace: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The mean cross-entropy and its sums per domain, from logits.

    Returns `(loss, sums)`. loss is a scalar: the mean over counted rows of -log
    softmax(logits_n)[targets_n], in nats; a row counts unless its target is `ignore_index`. sums is (2, K):
    for every domain the nats summed over its counted rows, and their number; not differentiable, exact in
    the number up to 2^24, and meant to be added over micro-batches and ranks and divided once. Both are fp32
    (fp64 for fp64 logits). With no counted row the loss is 0 and so is the gradient.

    `targets_N` and `domains_N` are int32 or int64. `domains_N` holds one id in [0, n_domains) per row, or B
    ids, N a multiple of B, each for N/B consecutive rows. Domains of ignored rows are not looked at.

    `inplace=True` allows the gradient to be written over the logits, even of a leaf: do not read them
    afterwards. It saves a copy of the logits, and backward can then run only once. It has no effect where no
    gradient is needed.

    A target or domain out of range is a `ConfigError` on a CPU. On a GPU, where asking would mean waiting,
    it makes the loss NaN. `ConfigError` also for shapes, dtypes and backends that do not fit.

    `backend`: "auto" takes "triton" on a GPU and on a CPU "cpu" (C++ core), else "numba", else "reference",
    as far as the dtype allows. All give the same numbers up to rounding, and each the same bits in every
    run, with any number of threads. Source: our choice; the formula is the textbook's.
    """
    _check_ids(targets_N, domains_N, n_domains, logits_NV, "logits")
    chosen = _choose(backend, logits_NV.device.type, logits_NV.dtype)
    if chosen == "reference":
        _check_values(targets_N, domains_N, logits_NV.shape[1], n_domains, ignore_index)
        return cross_entropy_reference(logits_NV, targets_N, domains_N, n_domains, ignore_index)
    needs_gradient = torch.is_grad_enabled() and logits_NV.requires_grad
    if logits_NV.shape[1] > 1 and logits_NV.stride(1) != 1:
        if inplace and needs_gradient:
            raise ConfigError(
                f"inplace=True needs logits with contiguous columns, their strides are {logits_NV.stride()}; "
                "pass logits.contiguous() or inplace=False"
            )
        logits_NV = logits_NV.contiguous()
    if needs_gradient:
        return ops.differentiable_cross_entropy(
            logits_NV, targets_N, domains_N, n_domains, ignore_index, inplace, chosen
        )
    loss, sums = ops.cross_entropy(logits_NV.detach(), targets_N, domains_N, n_domains, ignore_index, chosen)
    return loss, sums


def linear_domain_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    domains_N: Tensor,
    *,
    n_domains: int,
    ignore_index: int = -100,
    chunk_bytes: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The mean cross-entropy of logits = hidden @ weight^T and its sums per domain, from chunks of logits.

    Returns `(loss, sums)` as `domain_cross_entropy`, which also says what targets, domains, `ignore_index`
    and `backend` are. Only about `chunk_bytes` of logits exist at a time (None: 1 GiB and at least 2048 rows
    on a GPU, 64 MiB on a CPU). Where a gradient is needed it is computed along with the loss, chunk by
    chunk; backward only multiplies it by the upstream gradient, in place, and can therefore run once per
    call.

    The products are computed in the dtype of `hidden_ND`, under autocast in autocast's; the weight is cast
    to it. The gradient of the weight is summed over the chunks in fp32 and returned in the weight's own
    dtype, so that bf16 hidden states and fp32 master weights go together.

    Extra memory: one chunk of logits, the two gradients, and while they are computed one fp32 weight
    gradient. Raises `ConfigError` as `domain_cross_entropy`. Source: our choice.
    """
    if hidden_ND.ndim != 2 or weight_VD.ndim != 2 or hidden_ND.shape[1] != weight_VD.shape[1]:
        raise ConfigError(
            f"hidden must be (N, D) and weight (V, D), they are {tuple(hidden_ND.shape)} and "
            f"{tuple(weight_VD.shape)}; flatten batch and time with hidden.flatten(0, 1)"
        )
    if chunk_bytes is not None and chunk_bytes < 1:
        raise ConfigError(f"chunk_bytes is {chunk_bytes}; expected 1 or more, or None")
    _check_ids(targets_N, domains_N, n_domains, hidden_ND, "hidden")
    device = hidden_ND.device.type
    if torch.is_autocast_enabled(device):
        hidden_ND = hidden_ND.to(torch.get_autocast_dtype(device))
    chosen = _choose(backend, device, hidden_ND.dtype)
    if chosen == "reference":
        _check_values(targets_N, domains_N, weight_VD.shape[0], n_domains, ignore_index)
        logits_NV = hidden_ND @ weight_VD.to(hidden_ND.dtype).t()
        return cross_entropy_reference(logits_NV, targets_N, domains_N, n_domains, ignore_index)
    budget = chunk_bytes or 0
    if torch.is_grad_enabled() and (hidden_ND.requires_grad or weight_VD.requires_grad):
        return ops.differentiable_linear_cross_entropy(
            hidden_ND, weight_VD, targets_N, domains_N, n_domains, ignore_index, budget, chosen
        )
    loss, sums, _, _ = ops.linear_cross_entropy(
        hidden_ND.detach(),
        weight_VD.detach(),
        targets_N,
        domains_N,
        n_domains,
        ignore_index,
        budget,
        chosen,
        False,
        False,
    )
    return loss, sums


def _choose(backend: str, device_type: str, dtype: torch.dtype) -> str:
    if backend not in BACKENDS:
        raise ConfigError(f"backend is {backend!r}; expected one of {', '.join(BACKENDS)}")
    if backend == "auto":
        order = {"cuda": ("triton",), "cpu": ("cpu", "numba")}.get(device_type, ())
        for name in order:
            if _PRESENT[name] and dtype in _DTYPES[name]:
                return name
        return "reference"
    if backend == "reference":
        return backend
    if not _PRESENT[backend]:
        what = "the C++ core was not built" if backend == "cpu" else f"{backend} is not installed"
        raise ConfigError(f"backend={backend!r} is not available: {what}; install it or use backend='auto'")
    if dtype not in _DTYPES[backend]:
        known = ", ".join(str(d) for d in _DTYPES[backend])
        raise ConfigError(f"backend={backend!r} computes {known}, not {dtype}; use backend='reference'")
    if backend != "triton" and device_type != "cpu":
        raise ConfigError(f"backend={backend!r} needs tensors on the CPU, they are on {device_type!r}")
    return backend


def _check_ids(targets_N: Tensor, domains_N: Tensor, n_domains: int, first: Tensor, name: str) -> None:
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


def _check_values(
    targets_N: Tensor, domains_N: Tensor, vocab: int, n_domains: int, ignore_index: int
) -> None:
    # A compiled graph cannot branch on values; gather then raises for a target, as in any torch code.
    if targets_N.device.type == "cpu" and not torch.compiler.is_compiling():
        cpu.check_values(targets_N, domains_N, vocab, n_domains, ignore_index)
