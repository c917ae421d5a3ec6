"""The rows of one call: what their losses are multiplied by, where they go, and how they are summed."""

from __future__ import annotations

import torch
from torch import Tensor

from velopath.loss import backends, cpu, sharded
from velopath.loss.options import PLAIN, Details, Settings


class RowBatch:
    """N rows of logits with `columns` columns, which may come in parts; their results are of the logits' device.

    `upstream` (N,) multiplies each row's loss and gradient, beside the weight of its domain.
    """

    def __init__(
        self,
        like: Tensor,
        columns: int,
        targets: Tensor,
        domains: Tensor,
        domain_weights: Tensor | None,
        settings: Settings,
        upstream: Tensor | None = None,
    ) -> None:
        self.settings = settings
        self.targets, self.domains = targets.contiguous(), domains.contiguous()
        self.shard = sharded.Shard(settings.group, columns, like.device) if settings.group else None
        vocab = self.shard.vocab if self.shard else columns
        counted = _count(self.targets, self.domains, vocab, settings)
        self.divisor = counted if settings.reduction == "mean" else torch.ones_like(counted)
        exact = torch.float64 if like.dtype == torch.float64 else torch.float32
        self.nats = torch.empty(targets.shape[0], dtype=exact, device=like.device)
        plain = settings.rows == PLAIN and not (settings.tokens or settings.accuracy or self.shard)
        self.details = None
        if not plain or domain_weights is not None or upstream is not None:
            lse, losses, correct = torch.empty(3, *self.nats.shape, dtype=exact, device=like.device)
            scales = self._scales(domain_weights, upstream)
            self.details = Details(settings.rows, scales, lse, losses, correct if settings.accuracy else None)

    def _scales(self, domain_weights: Tensor | None, upstream: Tensor | None) -> Tensor:
        scales = (1.0 / self.divisor.clamp(min=1).double()).expand_as(self.nats)
        if domain_weights is not None:
            # A bad id cannot be refused on a GPU: there the sums per domain make the loss NaN.
            known = self.domains.long().clamp(0, self.settings.n_domains - 1)
            scales = scales * domain_weights.double()[known].repeat_interleave(
                len(self.targets) // len(known)
            )
        if upstream is not None:
            scales = scales * upstream.double()
        return scales.to(self.nats.dtype).contiguous()

    def write(self, part: slice, logits: Tensor, *, gradient: bool, padded: bool = False) -> None:
        """Compute the rows `part`; with `gradient`, theirs is written over `logits`."""
        details = None if self.details is None else self.details[part]
        if self.shard is not None:
            assert details is not None
            sharded.write_rows(
                self.shard,
                logits,
                self.targets[part],
                self.nats[part],
                self.settings,
                details,
                gradient=gradient,
                padded=padded,
            )
            return
        backends.write_rows(
            self.settings.backend,
            logits,
            self.targets[part],
            self.nats[part],
            self.divisor,
            self.settings.ignore_index,
            gradient=gradient,
            padded=padded,
            details=details,
        )

    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        """The loss, () or for "none" (N,), the sums, and nats and logsumexp (2, N) or an empty tensor."""
        s, details = self.settings, self.details
        loss, sums = backends.reduce_rows(
            s.backend,
            self.nats,
            self.targets,
            self.domains,
            self.divisor,
            s.n_domains,
            s.ignore_index,
            details,
        )
        if s.reduction == "none":
            loss = self.nats.clone() if details is None else details.losses.clone()
        if not s.tokens:
            return loss, sums, self.nats.new_empty(0)
        assert details is not None
        return loss, sums, torch.stack((self.nats, details.lse))


def _count(targets: Tensor, domains: Tensor, vocab: int | Tensor, settings: Settings) -> Tensor:
    """Rows counted, an int64 scalar on the device. A GPU is not waited for: there a bad id gives NaN."""
    if targets.device.type == "cpu":
        return cpu.check_values(targets, domains, int(vocab), settings.n_domains, settings.ignore_index)
    return (targets != settings.ignore_index).sum()
