"""The adapter for Hugging Face: its own Trainer trains, pushes weights, stops and resumes exactly on a session."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    TrainerCallback,
    TrainingArguments,
)

from velopath import LrPath, Session, Velocitune, open_sampler
from velopath.adapters.hf import HiddenModel, SessionTrainer, add_domain_loss
from velopath.errors import ConfigError, DataError
from velopath.evaluate import HeldOut, evaluate
from velopath.schedule_tokens import BatchRamp, TokenPath

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
PATH = LrPath.main(peak=1e-2, warmup_steps=3).branch(at_step=6, steps=6, shape="linear")


def llama() -> LlamaForCausalLM:
    torch.manual_seed(1)
    return LlamaForCausalLM(LlamaConfig(**SHAPE))


class StopAt(TrainerCallback):
    """What a preemption handler does: ask the Trainer to save and stop."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save = control.should_training_stop = state.global_step == self.step


@contextmanager
def trainer(
    data: Path,
    out: Path,
    *,
    micro_rows: int = 2,
    held_out: bool = True,
    callbacks: Any = None,
    path: LrPath | TokenPath = PATH,
    **options: Any,
) -> Iterator[SessionTrainer]:
    """12 steps of 4 rows on three domains, a control every 4 steps."""
    arguments = TrainingArguments(
        output_dir=str(out), max_steps=12, per_device_train_batch_size=micro_rows,
        gradient_accumulation_steps=4 // micro_rows, logging_steps=1, save_strategy="no", report_to=[], use_cpu=True,
        disable_tqdm=True, seed=3,
    )  # fmt: skip
    with open_sampler(data, rows=4, row_tokens=32, seed=5, **options) as sampler:
        controller = Velocitune(dict.fromkeys(sampler.names, 0.5))
        session = Session(sampler, path, controller=controller, every=4)
        model, heldout = llama(), HeldOut.open(data, row_tokens=32)
        yield SessionTrainer(
            model,
            arguments,
            session=session,
            evaluate=(lambda: evaluate(HiddenModel(model), heldout, tokens_per_domain=200))
            if held_out
            else None,
            callbacks=callbacks,
        )


def history(done: SessionTrainer, key: str) -> list[float]:
    return [entry[key] for entry in done.state.log_history if key in entry]


def test_trains_pushes_stops_and_resumes_exactly(data: Path, tmp_path: Path) -> None:
    with trainer(data, tmp_path / "whole") as whole:
        whole.train()
        session = whole.session
        assert session.step == 12
        assert session.weights.id == 3  # pushed at steps 4, 8 and 12
        assert dict(session.weights) != dict(session.sampler.table.prior)
        assert history(whole, "learning_rate") == [PATH.rate(n) for n in range(12)]
        losses = history(whole, "loss")
        assert losses[0] == pytest.approx(np.log(64), abs=0.2)
        assert min(losses) < losses[0] - 0.4
    with trainer(data, tmp_path / "parts", callbacks=[StopAt(6)]) as first:  # between two controls
        first.train()
        assert first.session.step == 6
    with trainer(data, tmp_path / "parts") as second:
        second.train(resume_from_checkpoint=True)
        assert history(second, "loss") == losses
        assert history(second, "learning_rate") == history(whole, "learning_rate")
        assert second.session.stream_hash == session.stream_hash  # the same rows
        assert second.session.state_dict() == session.state_dict()
        for ours, theirs in zip(second.model.parameters(), whole.model.parameters(), strict=True):
            assert torch.equal(ours, theirs)


def test_a_path_in_tokens_stops_and_resumes(data: Path, tmp_path: Path) -> None:
    """128 tokens an update: the lengths of PATH times 128 are the same path. A session's batch does not grow."""
    tokens = TokenPath(LrPath.main(1e-2, 3 * 128), BatchRamp.constant(128)).branch(6, 6 * 128, "linear")
    with trainer(data, tmp_path, path=tokens, held_out=False, callbacks=[StopAt(7)]) as first:
        first.train()
    with trainer(data, tmp_path, path=tokens, held_out=False) as second:
        second.train(resume_from_checkpoint=True)
        assert history(second, "learning_rate") == pytest.approx([PATH.rate(n) for n in range(12)], rel=1e-12)
    grown = TokenPath(LrPath.main(1e-2), BatchRamp(((0, 128), (5, 256))))
    message = (
        "counts 256 tokens an update from step 5 on, the sampler's steps have 128; a session's batch does not"
    )
    with pytest.raises(ConfigError, match=message), trainer(data, tmp_path, path=grown):
        pass


def test_micro_batches_weigh_by_their_tokens(data: Path, tmp_path: Path) -> None:
    """Rows of whole documents have unequal paddings: the mean is over tokens, however the step is cut."""
    done = []
    for micro_rows in (4, 1):
        options = {"packing": "best_fit", "boundaries": True, "held_out": False}
        with trainer(data, tmp_path / str(micro_rows), micro_rows=micro_rows, **options) as run:
            run.train()
            assert run.session.weights.id == 2  # the losses of steps 1 to 4 are the first
            done.append(run)
    whole, parts = done
    counts = whole.session.sampler.exposure().values()
    assert sum(c["tokens"] for c in counts) < 12 * 4 * 32  # there is padding
    for ours, theirs in zip(parts.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-4)


@pytest.mark.parametrize("kind", ["llama", "granite", "gemma"])
def test_the_loss_is_that_of_transformers(kind: str) -> None:
    """Granite scales its logits and Gemma caps them, so that they are not hidden states times the embedding."""
    torch.manual_seed(0)
    model = {
        "llama": llama,
        "granite": lambda: GraniteForCausalLM(GraniteConfig(**SHAPE, logits_scaling=3.0)),
        "gemma": lambda: Gemma2ForCausalLM(Gemma2Config(**SHAPE, num_key_value_heads=2, head_dim=16)),
    }[kind]()
    assert HiddenModel(model).is_exact() == (kind == "llama")
    tokens, domains = torch.randint(64, (4, 33)), torch.tensor([0, 2, 2, 0])
    labels = tokens.clone()
    labels[1, 20:] = -100
    theirs = model(input_ids=tokens, labels=labels).loss
    theirs.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    add_domain_loss(model, 3)
    ours = model(input_ids=tokens[:, :-1], targets=labels[:, 1:], domains=domains)
    ours["loss"].backward()
    assert ours["loss"].item() == pytest.approx(theirs.item(), rel=1e-6)
    assert ours["sums"][1].tolist() == [64, 0, 32 + 19]
    assert ours["sums"][0].sum().item() == pytest.approx(theirs.item() * 115, rel=1e-6)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-6)
    assert model(input_ids=tokens).logits.shape == (4, 33, 64)  # as it was


def test_refuses_what_does_not_fit(data: Path, tmp_path: Path) -> None:
    with (
        pytest.raises(ConfigError, match="the sampler has 4 rows .* the Trainer takes 3 "),
        trainer(data, tmp_path, micro_rows=3),
    ):
        pass
    weights = {"code": 1.0, "prose": 0.0, "tables": 0.0}
    with (
        trainer(data, tmp_path, exhaustion="stop", weights=weights, held_out=False) as run,
        pytest.raises(DataError, match="the data ended at step"),
    ):
        run.args.max_steps = 1000
        run.session.controller = None
        run.train()
