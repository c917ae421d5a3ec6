"""The per-domain cross-entropy in plain torch: what every fast path is tested against.

Any device, any floating dtype; fp64 in gives fp64 out. Ordinary autograd, so it can be differentiated twice;
it keeps several copies of the logits. Suffixes: N rows (tokens), V vocabulary, K domains.
"""

from __future__ import annotations

import torch
from torch import Tensor

from velopath.loss.options import PLAIN, RowOptions


def cross_entropy_reference(
    logits_NV: Tensor, targets_N: Tensor, domains_N: Tensor, n_domains: int, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Mean loss over counted rows and (2, K) sums of nats and tokens; arguments as `domain_cross_entropy`."""
    loss, sums, _ = losses_reference(logits_NV, targets_N, domains_N, n_domains, ignore_index)
    return loss, sums


def losses_reference(
    logits_NV: Tensor,
    targets_N: Tensor,
    domains_N: Tensor,
    n_domains: int,
    ignore_index: int,
    options: RowOptions = PLAIN,
    domain_weights_K: Tensor | None = None,
    reduction: str = "mean",
    accuracy: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, (2 or, with `accuracy`, 3, K) sums, (2, N) nats and logsumexp; arguments as `domain_cross_entropy`.

    nats_n = log sum_v exp(x_nv - m_n) - (x_nt - m_n), with m_n the row's maximum and t its target.
    """
    exact = torch.float64 if logits_NV.dtype == torch.float64 else torch.float32
    counted_N = targets_N != ignore_index
    # Ignored rows are replaced, not multiplied by 0, so that a NaN in them reaches neither loss nor gradient.
    given_NV = torch.where(counted_N[:, None], logits_NV.to(exact), 0.0)
    x_NV = shaped(given_NV, options)
    top_N = x_NV.detach().amax(1)
    x_NV = x_NV - top_N[:, None]
    columns_N = torch.where(counted_N, targets_N, 0).long()
    at_target_N = x_NV.gather(1, columns_N[:, None])[:, 0]
    log_sum_N = torch.logsumexp(x_NV, 1)
    nats_N = torch.where(counted_N, log_sum_N - at_target_N, 0.0)
    losses_N = nats_N
    if options.label_smoothing:
        smooth_N = torch.where(counted_N, log_sum_N - x_NV.mean(1), 0.0)
        losses_N = torch.lerp(nats_N, smooth_N, options.label_smoothing)
    lse_N = torch.where(counted_N, top_N + log_sum_N, 0.0)
    if options.z_loss:
        losses_N = losses_N + options.z_loss * lse_N.square()
    if domain_weights_K is not None:
        per_row_N = domains_N[:, None].expand(-1, len(targets_N) // len(domains_N)).reshape(-1)
        # The domain of an ignored row may be anything.
        known_N = torch.where(counted_N, per_row_N, 0).long()
        losses_N = losses_N * domain_weights_K.to(exact)[known_N]
    loss = losses_N if reduction == "none" else losses_N.to(torch.float64).sum()
    if reduction == "mean":
        loss = loss / counted_N.sum().clamp(min=1)
    correct_N = None
    if accuracy:
        correct_N = counted_N & (given_NV.detach().argmax(1) == columns_N) & ~nats_N.isnan()
    sums = domain_sums(nats_N.detach(), counted_N, domains_N, n_domains, correct_N)
    return loss.to(exact), sums, torch.stack((nats_N, lse_N)).detach()


def domain_sums(
    nats_N: Tensor, counted_N: Tensor, domains_N: Tensor, n_domains: int, correct_N: Tensor | None = None
) -> Tensor:
    """(2, K) nats and tokens of counted rows, with `correct_N` (3, K), in the dtype of the nats."""
    per_row_N = domains_N[:, None].expand(-1, len(nats_N) // len(domains_N)).reshape(-1)
    # Dense instead of index_add, which is a float atomic on a GPU.
    hit_NK = (per_row_N[:, None] == torch.arange(n_domains, device=domains_N.device)) & counted_N[:, None]
    nats_K = torch.where(hit_NK, nats_N.to(torch.float64)[:, None], 0.0).sum(0)
    sums = [nats_K, hit_NK.sum(0).to(torch.float64)]
    if correct_N is not None:
        sums.append((hit_NK & (correct_N != 0)[:, None]).sum(0).to(torch.float64))
    return torch.stack(sums).to(nats_N.dtype)


def shaped(logits: Tensor, options: RowOptions) -> Tensor:
    """softcap * tanh(logit_scale * logits / softcap), or the scaled logits without a softcap."""
    if options.logit_scale != 1.0:
        logits = logits * options.logit_scale
    return torch.tanh(logits / options.softcap) * options.softcap if options.softcap else logits
