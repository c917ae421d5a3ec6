"""The per-domain cross-entropy in plain torch: what every fast path is tested against.

Any device, any floating dtype; fp64 in gives fp64 out. Ordinary autograd, so it can be differentiated twice;
it keeps several copies of the logits. Suffixes: N rows (tokens), V vocabulary, K domains.
"""

from __future__ import annotations

import torch
from torch import Tensor


def cross_entropy_reference(
    logits_NV: Tensor, targets_N: Tensor, domains_N: Tensor, n_domains: int, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Mean loss over counted rows and (2, K) sums of nats and tokens; arguments as `domain_cross_entropy`.

    nats_n = log sum_v exp(x_nv - m_n) - (x_nt - m_n), with m_n the row's maximum and t its target.
    """
    exact = torch.float64 if logits_NV.dtype == torch.float64 else torch.float32
    counted_N = targets_N != ignore_index
    # Ignored rows are replaced, not multiplied by 0, so that a NaN in them reaches neither loss nor gradient.
    x_NV = torch.where(counted_N[:, None], logits_NV.to(exact), 0.0)
    x_NV = x_NV - x_NV.detach().amax(1, keepdim=True)
    at_target_N = x_NV.gather(1, torch.where(counted_N, targets_N, 0).long()[:, None])[:, 0]
    nats_N = torch.where(counted_N, torch.logsumexp(x_NV, 1) - at_target_N, 0.0)
    loss = nats_N.to(torch.float64).sum() / counted_N.sum().clamp(min=1)
    per_row_N = domains_N[:, None].expand(-1, len(targets_N) // len(domains_N)).reshape(-1)
    # Dense instead of index_add, which is a float atomic on a GPU.
    hit_NK = (per_row_N[:, None] == torch.arange(n_domains, device=domains_N.device)) & counted_N[:, None]
    nats_K = torch.where(hit_NK, nats_N.detach().to(torch.float64)[:, None], 0.0).sum(0)
    return loss.to(exact), torch.stack((nats_K, hit_NK.sum(0).to(torch.float64))).to(exact)
