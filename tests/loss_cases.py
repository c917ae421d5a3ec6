"""Cases of the per-domain cross-entropy with their fp64 answers, shared by test_loss.py and interpreted_kernels.py.

Sizes: odd vocabularies and rows that fill no block; 2049 and 5000 cross the CPU kernels' block of 2048
columns; 130 domains and 150 rows cross the reduction's blocks of 32 and 128.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100


@dataclass(frozen=True)
class Case:
    name: str
    rows: int
    vocab: int
    n_domains: int
    domain_ids: int
    spread: float = 2.0
    ids: torch.dtype = torch.int64
    ignored: tuple[int, ...] = (1,)
    only_domains: tuple[int, ...] | None = None
    dtype: torch.dtype = torch.float32

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.rows * 7919 + self.vocab)
        logits = torch.randn(self.rows, self.vocab, generator=generator) * self.spread
        if self.spread > 100:
            logits = logits.sign() * self.spread + torch.randn(self.rows, self.vocab, generator=generator)
        targets = torch.randint(0, self.vocab, (self.rows,), generator=generator)
        targets[0], targets[-1] = 0, self.vocab - 1
        targets[list(self.ignored)] = IGNORE
        domains = torch.randint(0, self.n_domains, (self.domain_ids,), generator=generator)
        if self.only_domains:
            domains = torch.tensor(self.only_domains)[domains % len(self.only_domains)]
        return logits.to(self.dtype), targets.to(self.ids), domains.to(self.ids)


GRID = [
    Case("domain ids per token", 12, 33, 3, 12),
    Case("domain ids per row", 12, 64, 3, 4),
    Case("int32 ids", 12, 33, 3, 6, ids=torch.int32),
    Case("one domain", 5, 17, 1, 5),
    Case("130 domains", 150, 40, 130, 150),
    Case("empty domains", 12, 33, 5, 12, only_domains=(1, 4)),
    Case("all ignored", 4, 33, 3, 4, ignored=(0, 1, 2, 3)),
    Case("one row", 1, 100, 2, 1, ignored=()),
    Case("one column", 4, 1, 2, 4),
    Case("logits of 1e4", 8, 333, 3, 8, spread=1e4),
    Case("odd vocabulary", 9, 2049, 3, 9),
    Case("several blocks", 6, 5000, 3, 6, spread=8.0),
]


@dataclass(frozen=True)
class Answer:
    """fp64: nats per row, loss, (2, K) sums, gradient of the loss (N, V); `counted` rows."""

    loss: Tensor
    sums: Tensor
    gradient: Tensor
    counted: int


def answer(logits: Tensor, targets: Tensor, domains: Tensor, n_domains: int) -> Answer:
    """Written without velopath: torch's own cross-entropy in fp64."""
    x, t = logits.double(), targets.long()
    counted = t != IGNORE
    n = max(int(counted.sum()), 1)
    nats = F.cross_entropy(x, t, reduction="none", ignore_index=IGNORE)
    gradient = torch.softmax(x, 1)
    gradient[counted, t[counted]] -= 1
    gradient[~counted] = 0
    per_row = domains.long().repeat_interleave(len(t) // len(domains))
    sums = torch.zeros(2, n_domains, dtype=torch.float64)
    for row in counted.nonzero()[:, 0].tolist():
        sums[0, per_row[row]] += nats[row]
        sums[1, per_row[row]] += 1
    return Answer(nats[counted].sum() / n, sums, gradient / n, int(counted.sum()))


def largest_errors(loss: Tensor, sums: Tensor, gradient: Tensor, want: Answer) -> dict[str, float]:
    """Relative errors of loss and nats, absolute of tokens; of the gradient the error times the counted rows."""
    close = {
        "loss": (loss - want.loss).abs() / want.loss.abs().clamp(min=1e-2),
        "nats": ((sums[0] - want.sums[0]).abs() / want.sums[0].abs().clamp(min=1e-2)).max(),
        "tokens": (sums[1] - want.sums[1]).abs().max(),
        "gradient": (gradient.double() - want.gradient).abs().max() * max(want.counted, 1),
    }
    return {name: float(value) for name, value in close.items()}


# Of the gradient times the counted rows, which lies in [-1, 1]; bf16 and fp16 round it to 8 and 11 bits.
GRADIENT_TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 1e-3}


def problems(errors: dict[str, float], gradient_tolerance: float) -> list[str]:
    limits = {"loss": 1e-6, "nats": 1e-6, "tokens": 0.0, "gradient": gradient_tolerance}
    return [
        f"{name} is off by {errors[name]:.3g} > {limit:.3g}"
        for name, limit in limits.items()
        if not errors[name] <= limit
    ]
