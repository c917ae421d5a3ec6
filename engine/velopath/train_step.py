"""One optimiser step: forward with per-domain loss, backward, clip, AdamW at the path's rate. No host sync.

Shapes: B rows of this rank, T tokens a row, V vocabulary, K domains.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from velopath.dist import Dist
from velopath.loss import linear_domain_cross_entropy
from velopath.model import Decoder
from velopath.optim import clip_grad_norm, set_rate
from velopath.phases import Phases
from velopath.sharding import is_sharded, sum_gradients

IGNORED = -100
"""Target of a position that does not count: padding."""


class LossModel(nn.Module):
    """Decoder and per-domain loss as one module, so that DDP and torch.compile see both."""

    def __init__(self, decoder: Decoder, n_domains: int) -> None:
        super().__init__()
        self.decoder = decoder
        self.n_domains = n_domains

    def forward(
        self,
        tokens_BT1: Tensor,
        domains_B: Tensor,
        *,
        targets: Tensor | None = None,
        documents: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Mean loss in nats per counted token and (2, K) sums of nats and tokens; see `TrainStep`."""
        hidden_BTD = self.decoder(tokens_BT1[:, :-1], positions, documents)
        targets_N = (tokens_BT1[:, 1:] if targets is None else targets).reshape(-1).long()
        return linear_domain_cross_entropy(
            hidden_BTD.flatten(0, 1),
            self.decoder.unembed_weight,
            targets_N,
            domains_B,
            n_domains=self.n_domains,
        )


@dataclass(frozen=True)
class StepResult:
    """What a step leaves on the device: `loss` () nats per token of this rank, `sums` (2, K), `grad_norm` ().

    Where the gradient norm is not finite, the update was skipped.
    """

    loss: Tensor
    sums: Tensor
    grad_norm: Tensor


class TrainStep:
    """Callable (tokens (B, T+1), domains (B,), rate) -> StepResult, updating model and optimiser.

    `targets` (B, T) are -100 where a position does not count; without them they are the tokens after each. With
    `documents` and `positions` (B, T), attention stays inside documents.

    Rows are cut into micro-batches of `micro_rows`. Without `targets` every row counts T tokens, so the mean over
    micro-batches (and over ranks, by DDP) is the mean over tokens; with them a micro-batch of n tokens weighs n over
    the mean n of all micro-batches of all ranks, computed on the device. A `decoder` that `velopath.sharding.shard` has
    spread over the ranks stays so, any other is wrapped by DDP. A gradient norm that is not finite skips the
    update on the device, on all ranks alike; the caller sees the norm and decides.

    With `compile` one graph serves as long as this object lives: rates, weights, checkpoints restored into `decoder`
    and other data change nothing that it was compiled for. `n_domains` is the most that a batch may know. The graph is
    that of a micro-batch. One of a whole accumulated step would keep the activations of all its parts, which is what
    micro-batches are there to avoid, and compile 1.8 times as long for four of them, to be 11 % faster with 0.16M
    parameters on a CPU (our measurement). `phases` times the parts of a step; whoever gives it takes what it counts.
    """

    def __init__(
        self,
        decoder: Decoder,
        optimizer: torch.optim.Optimizer,
        *,
        n_domains: int,
        dist: Dist,
        micro_rows: int | None = None,
        clip: float = 1.0,
        bf16: bool = False,
        compile: bool = False,
        phases: Phases | None = None,
    ) -> None:
        self.decoder, self.optimizer, self.device = decoder, optimizer, dist.device
        self.phases = phases
        self._parameters = [p for p in decoder.parameters() if p.requires_grad]
        self._micro_rows, self._clip, self._bf16, self._dist = micro_rows, clip, bf16, dist
        module: nn.Module = LossModel(decoder, n_domains)
        self._sharded = is_sharded(decoder)
        if dist.world > 1 and not self._sharded:
            ids = [dist.device.index] if dist.device.type == "cuda" else None
            # The RoPE tables are buffers, equal on all ranks: nothing to send.
            module = DistributedDataParallel(module, device_ids=ids, broadcast_buffers=False)
        self._ddp = module if isinstance(module, DistributedDataParallel) else None
        # The layers of a sharded decoder are compiled one by one, by `shard`.
        self._module = cast(nn.Module, torch.compile(module)) if compile and not self._sharded else module

    def __call__(self, tokens: Tensor, domains: Tensor, rate: float, **padded: Tensor) -> StepResult:
        rows = self._micro_rows or len(tokens)
        parts = list(zip(torch.split(tokens, rows), torch.split(domains, rows), strict=True))
        within = {name: torch.split(field, rows) for name, field in padded.items()}
        shares = self._shares(within["targets"]) if "targets" in within else None
        loss = sums = None
        for i, (tokens_BT1, domains_B) in enumerate(parts):
            if self._ddp is not None:
                self._ddp.require_backward_grad_sync = i == len(parts) - 1
            elif self._sharded:
                sum_gradients(self.decoder, i == len(parts) - 1)
            self._begin("forward")
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self._bf16):
                part_loss, part_sums = self._module(
                    tokens_BT1, domains_B, **{name: field[i] for name, field in within.items()}
                )
                part_loss = part_loss / len(parts) if shares is None else part_loss * shares[i]
            self._begin("backward")
            part_loss.backward()
            part_loss = part_loss.detach()
            loss = part_loss if loss is None else loss + part_loss
            sums = part_sums if sums is None else sums + part_sums
        self._begin("optimizer")
        assert loss is not None and sums is not None
        grad_norm = clip_grad_norm(self._parameters, self._clip or None)
        set_rate(self.optimizer, rate)
        # Fused AdamW leaves parameters, moments and step count alone where found_inf is 1 (torch.amp's contract).
        self.optimizer.found_inf = (~torch.isfinite(grad_norm)).float()  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._begin(None)
        return StepResult(loss, sums, grad_norm)

    def _shares(self, targets: Sequence[Tensor]) -> Tensor:
        """What each part's mean loss weighs in the step's, times the ranks that DDP divides by."""
        counted = torch.stack([(part != IGNORED).sum() for part in targets]).double()
        total = self._dist.all_reduce_sum(counted.sum())
        return (counted * self._dist.world / total.clamp(min=1)).float()

    def _begin(self, phase: str | None) -> None:
        if self.phases is not None:
            self.phases.begin(phase)
