"""Per-domain cross-entropy: the loss of a batch and, from the same pass, the loss of every domain.

`domain_cross_entropy` starts from logits, `linear_domain_cross_entropy` from hidden states and the output
weight, without ever holding all logits. One call, several forms: Triton on a GPU, the C++ core or numba on a
CPU, and plain torch, the reference. Formulas: loss/options.py; a table of the options: docs/loss.md. Suffixes:
N rows (tokens), V vocabulary, D model width, K domains.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Required, TypedDict, Unpack, overload

import torch
from torch import Tensor

from velopath.errors import ConfigError
from velopath.loss import arguments, autograd, ops, sharded
from velopath.loss.options import Settings
from velopath.loss.reference import losses_reference

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["BACKENDS", "domain_cross_entropy", "linear_domain_cross_entropy"]

BACKENDS = arguments.BACKENDS


class _Common(TypedDict, total=False):
    """Keywords of both functions, for type checkers: `return_tokens` decides how many tensors are returned."""

    n_domains: Required[int]
    ignore_index: int
    reduction: str
    label_smoothing: float
    z_loss: float
    softcap: float | None
    logit_scale: float
    domain_weights: Tensor | None
    return_accuracy: bool
    process_group: ProcessGroup | None
    backend: str


class _OfLogits(_Common, total=False):
    inplace: bool


class _OfHidden(_Common, total=False):
    main_grad: Tensor | None
    chunk_bytes: int | None


@overload
def domain_cross_entropy(
    logits_NV: Tensor,
    targets_N: Tensor,
    domains_N: Tensor,
    *,
    return_tokens: Literal[True],
    **options: Unpack[_OfLogits],
) -> tuple[Tensor, Tensor, Tensor]: ...


@overload
def domain_cross_entropy(
    logits_NV: Tensor,
    targets_N: Tensor,
    domains_N: Tensor,
    *,
    return_tokens: Literal[False] = False,
    **options: Unpack[_OfLogits],
) -> tuple[Tensor, Tensor]: ...


def domain_cross_entropy(
    logits_NV: Tensor,
    targets_N: Tensor,
    domains_N: Tensor,
    *,
    n_domains: int,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    domain_weights: Tensor | None = None,
    return_tokens: bool = False,
    return_accuracy: bool = False,
    process_group: ProcessGroup | None = None,
    inplace: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, ...]:
    """The cross-entropy of a batch and its sums per domain, from logits.

    Returns `(loss, sums)`. loss is a scalar: the mean over counted rows of -log
    softmax(logits_n)[targets_n], in nats; a row counts unless its target is `ignore_index`. sums is (2, K):
    for every domain the nats summed over its counted rows, and their number; not differentiable, exact in
    the number up to 2^24, and meant to be added over micro-batches and ranks and divided once. Both are fp32
    (fp64 for fp64 logits). With no counted row the loss is 0 and so is the gradient.

    `targets_N` and `domains_N` are int32 or int64. `domains_N` holds one id in [0, n_domains) per row, or B
    ids, N a multiple of B, each for N/B consecutive rows. Domains of ignored rows are not looked at.

    Options of the loss; the sums always hold the plain negative log-likelihood of x, without smoothing,
    z-loss and weights:
    - `logit_scale` s and `softcap` c: x = c tanh(s logits / c), without softcap x = s logits;
    - `label_smoothing` e: a row's loss becomes (1 - e) nats + e (lse - mean_v x_v), as in torch, with
      lse = log sum_v exp(x_v);
    - `z_loss` z: z lse^2 is added to it;
    - `domain_weights` (K,): it is multiplied by its domain's weight. The mean is still divided by the number
      of counted rows, not by the sum of their weights (as torch does with weights of classes), so that means
      of equal micro-batches add up whatever their mixture;
    - `reduction`: "mean", "sum" over counted rows, or "none": (N,), 0 where ignored. Backward of "none" takes
      any upstream gradient.

    `return_tokens=True` appends (2, N): plain nats and lse of every row, 0 where ignored, not differentiable.
    `return_accuracy=True` makes the sums (3, K): the last row counts the rows whose target is the first of
    the largest logits. Neither costs a second pass.

    `process_group`: the vocabulary is sharded, `logits_NV` holds this rank's V/p columns in the order of the
    ranks, all other arguments are whole and the same on every rank, targets are ids of the whole
    vocabulary. loss, sums and tokens come out whole; the gradient is that of this rank's columns.

    `inplace=True` allows the gradient to be written over the logits, even of a leaf: do not read them
    afterwards. It saves a copy of the logits, and backward can then run only once. It has no effect where no
    gradient is needed.

    A target or domain out of range is a `ConfigError` on a CPU. On a GPU, where asking would mean waiting,
    it makes the loss NaN. `ConfigError` also for shapes, dtypes and backends that do not fit.

    `backend`: "auto" takes "triton" on a GPU and on a CPU "cpu" (C++ core), else "numba", else "reference",
    as far as the dtype allows. All give the same numbers up to rounding, and each the same bits in every
    run, with any number of threads. Source: our choice; label smoothing as in torch, z-loss as in PaLM,
    softcap as in Gemma 2, logit scale as in Cohere's and Granite's models.
    """
    arguments.check_ids(targets_N, domains_N, n_domains, logits_NV, "logits")
    settings = arguments.settings_of(
        n_domains,
        ignore_index,
        logit_scale,
        softcap,
        label_smoothing,
        z_loss,
        reduction,
        return_tokens,
        return_accuracy,
        sharded.group_name(process_group),
        arguments.choose(backend, logits_NV.device.type, logits_NV.dtype),
    )
    arguments.check_domain_weights(domain_weights, n_domains, logits_NV)
    if settings.backend == "reference" and not settings.group:
        return _reference(logits_NV, targets_N, domains_N, domain_weights, settings)
    needs_gradient = torch.is_grad_enabled() and logits_NV.requires_grad
    if logits_NV.shape[1] > 1 and logits_NV.stride(1) != 1:
        if inplace and needs_gradient:
            raise ConfigError(
                f"inplace=True needs logits with contiguous columns, their strides are {logits_NV.stride()}; "
                "pass logits.contiguous() or inplace=False"
            )
        logits_NV = logits_NV.contiguous()
    flat = tuple(settings)
    if needs_gradient:
        results = autograd.differentiable_cross_entropy(
            logits_NV, targets_N, domains_N, domain_weights, inplace, *flat
        )
    else:
        results = ops.cross_entropy(logits_NV.detach(), targets_N, domains_N, domain_weights, *flat)
    return _asked(results, settings)


@overload
def linear_domain_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    domains_N: Tensor,
    *,
    return_tokens: Literal[True],
    **options: Unpack[_OfHidden],
) -> tuple[Tensor, Tensor, Tensor]: ...


@overload
def linear_domain_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    domains_N: Tensor,
    *,
    return_tokens: Literal[False] = False,
    **options: Unpack[_OfHidden],
) -> tuple[Tensor, Tensor]: ...


def linear_domain_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    domains_N: Tensor,
    *,
    n_domains: int,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    domain_weights: Tensor | None = None,
    return_tokens: bool = False,
    return_accuracy: bool = False,
    process_group: ProcessGroup | None = None,
    main_grad: Tensor | None = None,
    chunk_bytes: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, ...]:
    """The cross-entropy of logits = hidden @ weight^T and its sums per domain, from chunks of logits.

    Returns `(loss, sums)` as `domain_cross_entropy`, which also says what targets, domains, `ignore_index`,
    `backend` and the options of the loss are. Only about `chunk_bytes` of logits exist at a time (None: 1 GiB
    and at least 2048 rows on a GPU, 64 MiB on a CPU). Where a gradient is needed it is computed along with
    the loss, chunk by chunk; backward only multiplies it by the upstream gradient, in place, and can
    therefore run once per call. With `reduction="none"` backward computes the logits again (one matmul more),
    because the weight's gradient is a sum over rows that the upstream gradient weighs.

    The products are computed in the dtype of `hidden_ND`, under autocast in autocast's; the weight is cast
    to it. The gradient of the weight is summed over the chunks in fp32 and returned in the weight's own
    dtype, so that bf16 hidden states and fp32 master weights go together. `main_grad` (V, D) fp32: backward
    adds the weight's gradient to it, never rounded to less than fp32, and autograd gets none for the weight;
    a wrapper that waits for that one (DDP, FSDP2) must not own the weight.

    `process_group`: `weight_VD` holds this rank's V/p rows; hidden states are whole on every rank, and so is
    their gradient, already summed over the ranks. The weight's gradient is that of this rank's rows.

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
    arguments.check_ids(targets_N, domains_N, n_domains, hidden_ND, "hidden")
    device = hidden_ND.device.type
    if torch.is_autocast_enabled(device):
        hidden_ND = hidden_ND.to(torch.get_autocast_dtype(device))
    settings = arguments.settings_of(
        n_domains,
        ignore_index,
        logit_scale,
        softcap,
        label_smoothing,
        z_loss,
        reduction,
        return_tokens,
        return_accuracy,
        sharded.group_name(process_group),
        arguments.choose(backend, device, hidden_ND.dtype),
    )
    arguments.check_domain_weights(domain_weights, n_domains, hidden_ND)
    arguments.check_main_grad(main_grad, hidden_ND, weight_VD)
    if settings.backend == "reference" and not settings.group:
        if main_grad is not None:
            weight_VD = autograd.into_main_grad(weight_VD, main_grad)
        logits_NV = hidden_ND @ weight_VD.to(hidden_ND.dtype).t()
        return _reference(logits_NV, targets_N, domains_N, domain_weights, settings)
    budget, flat = chunk_bytes or 0, tuple(settings)
    if torch.is_grad_enabled() and (hidden_ND.requires_grad or weight_VD.requires_grad):
        results = autograd.differentiable_linear_cross_entropy(
            hidden_ND, weight_VD, targets_N, domains_N, domain_weights, main_grad, budget, *flat
        )
    else:
        hidden_ND, weight_VD = hidden_ND.detach(), weight_VD.detach()
        asked = (None, budget, False, False, False)
        results = ops.linear_cross_entropy(
            hidden_ND, weight_VD, targets_N, domains_N, domain_weights, *asked, *flat
        )[:3]
    return _asked(results, settings)


def _reference(
    logits_NV: Tensor,
    targets_N: Tensor,
    domains_N: Tensor,
    domain_weights: Tensor | None,
    s: Settings,
) -> tuple[Tensor, ...]:
    arguments.check_values(targets_N, domains_N, logits_NV.shape[1], s.n_domains, s.ignore_index)
    results = losses_reference(
        logits_NV,
        targets_N,
        domains_N,
        s.n_domains,
        s.ignore_index,
        s.rows,
        domain_weights,
        s.reduction,
        s.accuracy,
    )
    return _asked(results, s)


def _asked(results: tuple[Tensor, Tensor, Tensor], settings: Settings) -> tuple[Tensor, ...]:
    return results if settings.tokens else results[:2]
