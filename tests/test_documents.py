"""Rows of several documents: attention and positions inside each, padding that does not count, in step and run."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from small_run import config, in_force
from test_train_step import SHAPE, batch, make
from velopath.errors import ConfigError
from velopath.evaluate import HeldOut, evaluate
from velopath.model import Decoder
from velopath.run import Run
from velopath.segments import cut_version, train_main


def test_a_document_knows_nothing_of_its_neighbours() -> None:
    """Three documents of 5, 9 and 5 tokens in one row give what each gives alone."""
    decoder = Decoder(SHAPE, seed=2)
    tokens = batch(0, rows=1)[0][:, :19]
    cuts = (0, 5, 14, 19)
    documents = torch.tensor([[0] * 5 + [1] * 9 + [-1] * 5])
    positions = torch.cat([torch.arange(b - a) for a, b in zip(cuts, cuts[1:], strict=False)])[None]
    together = decoder(tokens, positions, documents)
    for a, b in zip(cuts, cuts[1:], strict=False):
        torch.testing.assert_close(together[:, a:b], decoder(tokens[:, a:b]), rtol=0, atol=1e-6)
    apart = (together - decoder(tokens)).abs().amax(-1)[0]
    assert apart[:5].max() < 1e-6 < 1e-3 < apart[5:].min()


@pytest.mark.parametrize("micro_rows", [1, 2, 3])
def test_micro_batches_of_unequal_tokens_give_the_same_update(micro_rows: int) -> None:
    whole, _, whole_step = make()
    parts, _, parts_step = make(micro_rows=micro_rows)
    counts = torch.tensor([19, 1, 0, 7, 12, 3])  # a micro-batch of one row may count nothing
    for i, rate in enumerate((1e-2, 2e-2)):
        tokens, domains = batch(i)
        targets = torch.where(torch.arange(19) < counts[:, None], tokens[:, 1:], -100)
        one = whole_step(tokens, domains, rate, targets=targets)
        many = parts_step(tokens, domains, rate, targets=targets)
        assert many.loss.item() == pytest.approx(one.loss.item(), rel=1e-6)
        assert one.loss.item() == pytest.approx((one.sums[0].sum() / 42).item(), rel=1e-6)
        assert many.grad_norm.item() == pytest.approx(one.grad_norm.item(), rel=1e-5)
        assert one.sums[1].sum().item() == many.sums[1].sum().item() == 42
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):  # of updates of 1e-2
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_recomputing_changes_no_bit_and_costs_what_it_says() -> None:
    spent, updated = {}, {}
    for kind in ("none", "selective", "full"):
        decoder, _, step = make()
        decoder.recompute = kind  # type: ignore[assignment]
        with FlopCounterMode(display=False) as counter:
            step(*batch(0), 1e-2)
        spent[kind] = counter.get_total_flops()
        updated[kind] = torch.cat([p.detach().flatten() for p in decoder.parameters()])
    assert torch.equal(updated["none"], updated["full"])
    assert torch.equal(updated["none"], updated["selective"])
    layers = spent["full"] - spent["none"]  # the layers' forward pass once more
    assert 0.2 * layers < spent["selective"] - spent["none"] < 0.6 * layers


def test_held_out_documents_are_apart_as_well(data: Path) -> None:
    heldout = HeldOut.open(data, row_tokens=32)
    sample = heldout.sample(None)
    ends = (sample.inputs == 0) & (sample.documents >= 0)  # end-of-text
    begins = np.diff(sample.documents, axis=1) > 0
    assert begins.sum() > 50
    assert (ends[:, :-1] | (sample.documents[:, 1:] < 0) == begins | (sample.documents[:, 1:] < 0)).all()
    assert (sample.positions[:, 1:][begins] == 0).all() and (sample.positions[:, 0] == 0).all()
    decoder = Decoder(dataclasses.replace(SHAPE, vocab_size=64), seed=1)
    plain = evaluate(decoder, heldout, batch_rows=7)
    masked = evaluate(decoder, heldout, batch_rows=7, document_mask=True)
    assert plain.tokens == masked.tokens
    assert dict(plain) != dict(masked)


@pytest.mark.parametrize("order", ["full", "windowed"])
def test_a_run_on_packed_rows_resumes_exactly_and_refuses_a_change(
    data: Path, tmp_path: Path, order: str
) -> None:
    options = {"data__packing": "best_fit", "train__document_mask": True, "train__micro_rows": 2}
    options["data__order"] = order
    settings = config(data, **options)
    for name, stops in (("whole", (20,)), ("parts", (9, 20))):
        for until in stops:
            with Run.open(settings, tmp_path / name, "test") as run:
                train_main(run, until)
                if until == 20:
                    cut_version(run, "v1")
    whole, parts = (in_force(tmp_path / n, "step") for n in ("whole", "parts"))
    assert whole == parts
    losses = [r["loss"] for r in whole if r["segment"] == "main"]
    assert losses[-1] < losses[0] - 0.5
    for change in ({"data__packing": "concat"}, {"train__document_mask": False}, {"data__window": 4}):
        with pytest.raises(ConfigError, match=next(iter(change)).replace("__", ".")):
            Run.open(config(data, **options | change), tmp_path / "whole", "test")
