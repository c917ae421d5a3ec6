"""One optimiser step against plain torch: loss, sums, update, micro-batches, skipped gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from velopath.dist import Dist
from velopath.model import Decoder, ModelConfig
from velopath.optim import build_optimizer, current_rate
from velopath.train_step import StepResult, TrainStep

DOMAINS = 3
# 61 entries and 19 positions: no power of two, so that no kernel runs without a remainder; 6 rows: 1, 2 and 3 divide.
SHAPE = ModelConfig(61, 24, 20, 2, 4, 2, max_position_embeddings=32)
RATES = (1e-2, 2e-2, 5e-3)


def batch(seed: int, rows: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, SHAPE.vocab_size, (rows, 20), generator=generator, dtype=torch.int32)
    return tokens, torch.randint(0, DOMAINS, (rows,), generator=generator, dtype=torch.int32)


def make(shape: ModelConfig = SHAPE, **options: Any) -> tuple[Decoder, torch.optim.Optimizer, TrainStep]:
    decoder = Decoder(shape, seed=2)
    optimizer = build_optimizer(decoder, weight_decay=0.1)
    return decoder, optimizer, TrainStep(decoder, optimizer, n_domains=DOMAINS, dist=Dist(), **options)


def moments(optimizer: torch.optim.Optimizer) -> list[dict[str, Tensor]]:
    return [dict(optimizer.state[p]) for group in optimizer.param_groups for p in group["params"]]


class Plain:
    """The same training in plain torch, in fp64: cross_entropy, index_add, clip_grad_norm_ and an unfused AdamW."""

    def __init__(self, clip: float | None = 1.0) -> None:
        self.model = Decoder(SHAPE, seed=2).double()
        matrices = [p for p in self.model.parameters() if p.ndim >= 2]
        vectors = [p for p in self.model.parameters() if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), foreach=False)
        self.clip = clip

    def step(self, tokens: Tensor, domains: Tensor, rate: float) -> StepResult:
        logits = self.model.logits(self.model(tokens[:, :-1].long()))
        targets = tokens[:, 1:].long()
        nats = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        which = domains.long().repeat_interleave(targets.shape[1])
        sums = torch.zeros(2, DOMAINS, dtype=torch.float64)
        sums[0].index_add_(0, which, nats.detach())
        sums[1].index_add_(0, which, torch.ones_like(nats))
        self.optimizer.zero_grad()
        nats.mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip or float("inf"))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        return StepResult(nats.mean().detach(), sums, norm)


@pytest.mark.parametrize("clip", [0.0, 0.5, 100.0])
def test_three_steps_equal_plain_torch(clip: float) -> None:
    """Clipping off, always and never in force. AdamW divides by the gradient's size: rounding is amplified where
    that is tiny, hence 1e-5 on updates of 1e-2."""
    decoder, optimizer, step = make(clip=clip)
    plain = Plain(clip)
    for i, rate in enumerate(RATES):
        ours, theirs = step(*batch(i), rate), plain.step(*batch(i), rate)
        assert ours.loss.item() == pytest.approx(theirs.loss.item(), rel=2e-6)
        assert ours.grad_norm.item() == pytest.approx(theirs.grad_norm.item(), rel=1e-4)
        assert ours.grad_norm.item() > 0.5  # so that a clip of 0.5 does something
        torch.testing.assert_close(ours.sums.double(), theirs.sums, rtol=2e-6, atol=0)
        assert ours.sums[1].tolist() == theirs.sums[1].tolist()
        assert current_rate(optimizer) == rate
    before = Decoder(SHAPE, seed=2)
    for name, mine, reference, old in zip(
        dict(decoder.named_parameters()),
        decoder.parameters(),
        plain.model.parameters(),
        before.parameters(),
        strict=True,
    ):
        assert (mine - old).abs().max() > 5e-3, name
        torch.testing.assert_close(mine.double(), reference, rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("micro_rows", [1, 2, 3])
def test_micro_batches_give_the_same_update(micro_rows: int) -> None:
    whole, _, whole_step = make()
    parts, _, parts_step = make(micro_rows=micro_rows)
    for i, rate in enumerate(RATES):
        one, many = whole_step(*batch(i), rate), parts_step(*batch(i), rate)
        assert many.loss.item() == pytest.approx(one.loss.item(), rel=1e-6)
        assert many.grad_norm.item() == pytest.approx(one.grad_norm.item(), rel=1e-5)
        torch.testing.assert_close(many.sums, one.sums, rtol=1e-6, atol=0)
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("micro_rows", [None, 2])
def test_a_gradient_that_is_not_finite_changes_nothing(value: float, micro_rows: int | None) -> None:
    decoder, optimizer, step = make(micro_rows=micro_rows)
    step(*batch(0), RATES[0])
    parameters = [p.detach().clone() for p in decoder.parameters()]
    state = copy.deepcopy(moments(optimizer))
    hook = decoder.model.norm.weight.register_hook(lambda grad: grad.index_fill(0, torch.tensor([3]), value))
    result = step(*batch(1), 0.5)
    hook.remove()
    assert not torch.isfinite(result.grad_norm)
    for p, old in zip(decoder.parameters(), parameters, strict=True):
        assert torch.equal(p, old)
        assert p.grad is None
    for now, old in zip(moments(optimizer), state, strict=True):
        assert set(now) == set(old) == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(now[k], old[k]) for k in old)
    # ... and the next step is what it would have been without it.
    other, _, other_step = make(micro_rows=micro_rows)
    other_step(*batch(0), RATES[0])
    other_step(*batch(2), RATES[1])
    step(*batch(2), RATES[1])
    for a, b in zip(decoder.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_bf16_autocast_keeps_masters_and_sums_in_fp32() -> None:
    decoder, _, step = make(bf16=True)
    plain = Plain()
    ours, theirs = step(*batch(0), 1e-2), plain.step(*batch(0), 1e-2)
    assert {p.dtype for p in decoder.parameters()} == {torch.float32} == {ours.sums.dtype, ours.loss.dtype}
    assert ours.loss.item() == pytest.approx(theirs.loss.item(), rel=5e-3)
    assert ours.sums[1].tolist() == theirs.sums[1].tolist()
