"""Held-out samples: every token once, seeded, rotated; losses and standard errors against fp64."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from velopath.errors import ConfigError, DataError
from velopath.evaluate import IGNORED, HeldOut, evaluate
from velopath.mds import MdsWriter
from velopath.model import Decoder, ModelConfig

CONFIG = ModelConfig(61, 24, 20, 2, 4, 2, max_position_embeddings=32)
# 2 is the least; 12 = one full chunk of 11; 13 leaves one token over; 400 is many chunks.
SIZES = {"a": 400, "b": 2, "c": 12, "d": 13, "e": 111}


def held_out(seed: int = 3, row_tokens: int = 11) -> HeldOut:
    generator = np.random.default_rng(1)
    streams = tuple(generator.integers(0, 61, n).astype(np.uint16) for n in SIZES.values())
    return HeldOut(tuple(SIZES), streams, row_tokens, seed)


def model() -> Decoder:
    decoder = Decoder(CONFIG, seed=1)
    with torch.no_grad():
        for i, weight in enumerate(decoder.parameters()):
            weight.add_(0.2 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(i)))
    return decoder


def test_a_full_sample_predicts_every_token_but_the_first_once():
    heldout = held_out()
    sample = heldout.sample()
    for k, stream in enumerate(heldout.streams):
        mine = sample.domains == k
        assert mine.sum() == heldout.chunks(heldout.names[k]) == math.ceil((len(stream) - 1) / 11)
        pairs = [
            (int(i), int(t))
            for inputs, targets in zip(sample.inputs[mine], sample.targets[mine], strict=True)
            for i, t in zip(inputs, targets, strict=True)
            if t != IGNORED
        ]
        assert sorted(pairs) == sorted(zip(stream[:-1].tolist(), stream[1:].tolist(), strict=True))


def test_samples_are_seeded_nested_and_rotated():
    heldout = held_out()
    first = heldout.sample(55)
    for again in (heldout.sample(55), held_out().sample(55, rotation=0)):
        assert np.array_equal(first.inputs, again.inputs) and np.array_equal(first.targets, again.targets)
    assert [int((first.domains == k).sum()) for k in range(5)] == [5, 1, 1, 2, 5]
    smaller = heldout.sample(23)
    assert np.array_equal(smaller.inputs[smaller.domains == 0], first.inputs[first.domains == 0][:3])
    for other in (heldout.sample(55, rotation=1), held_out(seed=4).sample(55)):
        assert not np.array_equal(first.inputs[first.domains == 0], other.inputs[other.domains == 0])
    # A sample is drawn over the whole hold-out: over many rotations every chunk comes about equally often.
    stream = np.arange(400, dtype=np.uint16)
    ordered = HeldOut(("a",), (stream,), 11, 0)
    counts = np.zeros(37)
    for rotation in range(740):
        counts[ordered.sample(55, rotation).inputs[:, 0] // 11] += 1
    expected = 740 * 5 / 37
    assert np.abs(counts - expected).max() < 5 * math.sqrt(expected)


@pytest.mark.parametrize("batch_rows", [1, 4, 64])
def test_losses_and_errors_against_fp64(batch_rows):
    decoder, heldout = model(), held_out()
    decoder.train()
    loss = evaluate(decoder, heldout, tokens_per_domain=90, batch_rows=batch_rows)
    assert decoder.training
    sample = heldout.sample(90)
    exact = model().double()
    with torch.no_grad():
        logits = exact.logits(exact(torch.from_numpy(sample.inputs)))
        nats = F.cross_entropy(
            logits.flatten(0, 1),
            torch.from_numpy(sample.targets).flatten(),
            ignore_index=IGNORED,
            reduction="none",
        ).view(len(sample.inputs), -1)
    for k, name in enumerate(heldout.names):
        mine = torch.from_numpy(sample.domains == k)
        x = nats[mine].sum(1).numpy()
        t = (sample.targets[mine.numpy()] != IGNORED).sum(1)
        assert loss.tokens[k] == t.sum()
        assert loss[name] == pytest.approx(x.sum() / t.sum(), rel=2e-6)
        n = len(x)
        if n == 1:
            assert loss.stderr_of(name) == 0.0
        else:
            residual = ((x - x.sum() / t.sum() * t) ** 2).sum()
            assert loss.stderr_of(name) == pytest.approx(
                math.sqrt(residual * n / (n - 1)) / t.sum(), rel=1e-4
            )
    again = evaluate(decoder, heldout, tokens_per_domain=90, batch_rows=batch_rows)
    assert again == loss


def test_the_standard_error_is_the_spread_of_samples():
    decoder, heldout = model(), held_out()
    whole = evaluate(decoder, heldout)
    draws = [evaluate(decoder, heldout, tokens_per_domain=33, rotation=r, batch_rows=32) for r in range(150)]
    spread = np.std([d["a"] for d in draws])
    claimed = math.sqrt(np.mean([d.stderr_of("a") ** 2 for d in draws]))
    assert 0.75 < claimed / spread < 1.35
    assert abs(np.mean([d["a"] for d in draws]) - whole["a"]) < 4 * spread / math.sqrt(150)


def test_16_bit_and_compiled_models():
    decoder, heldout = model(), held_out()
    exact = evaluate(decoder, heldout)
    mixed = evaluate(decoder, heldout, bf16=True)
    compiled = evaluate(torch.compile(decoder, backend="aot_eager"), heldout)
    for name in heldout.names:
        assert mixed[name] == pytest.approx(exact[name], abs=0.1)
        assert compiled[name] == pytest.approx(exact[name], rel=1e-5)


@pytest.fixture
def prepared(tmp_path):
    """A prepared folder with two domains; document d of a domain is d+1 tokens long."""
    generator = np.random.default_rng(7)
    documents = {}
    for name, count in (("prose", 9), ("code", 5)):
        documents[name] = [generator.integers(1, 61, d + 1).astype(np.uint16) for d in range(count)]
        folder = tmp_path / "heldout" / name
        folder.mkdir(parents=True)
        with MdsWriter(folder) as writer:
            for document in documents[name]:
                writer.write(document)
    (tmp_path / "domains.json").write_text(json.dumps({"version": 1, "eos": 0}))
    return tmp_path, documents


def test_a_prepared_folder_is_read_with_end_of_text_between_documents(prepared):
    root, documents = prepared
    heldout = HeldOut.open(root, row_tokens=7)
    assert heldout.names == ("code", "prose") and heldout.largest_token < 61
    for name, stream in zip(heldout.names, heldout.streams, strict=True):
        assert stream.tolist() == [t for d in documents[name] for t in (*d.tolist(), 0)]
        assert stream.dtype == np.uint16
    assert HeldOut.open(root, row_tokens=7, names=["prose"]).names == ("prose",)
    (root / "domains.json").write_text(json.dumps({"eos": None}))
    assert 0 not in HeldOut.open(root, row_tokens=7).streams[0]
    (root / "domains.json").unlink()
    plain = HeldOut.open(root, row_tokens=7)
    assert plain.streams[0].tolist() == [t for d in documents["code"] for t in d.tolist()]
    assert set(evaluate(model(), plain)) == {"code", "prose"}


def test_what_cannot_be_evaluated_is_refused(prepared):
    root, _ = prepared
    with pytest.raises(DataError, match="no hold-out for domain 'verse'; there are code, prose"):
        HeldOut.open(root, row_tokens=7, names=["code", "verse"])
    with pytest.raises(DataError, match="holds no domain with an index.json"):
        HeldOut.open(root / "heldout", row_tokens=7)
    with pytest.raises(ConfigError, match="row_tokens is 0"):
        HeldOut.open(root, row_tokens=0)
    (root / "domains.json").write_text(json.dumps({"eos": "</s>"}))
    with pytest.raises(
        DataError, match="domains.json field 'eos': eos is '</s>'; expected a token id or null"
    ):
        HeldOut.open(root, row_tokens=7)
    with pytest.raises(DataError, match="the hold-out of domain 'x' has 1 tokens; expected 2 or more"):
        HeldOut(("x",), (np.zeros(1, np.uint16),), 7)
    small = Decoder(ModelConfig(50, 24, 20, 1, 4))
    with pytest.raises(DataError, match="has token id 60, the model's vocabulary 50 entries"):
        evaluate(small, held_out())
    with pytest.raises(ConfigError, match="batch_rows is 0"):
        evaluate(model(), held_out(), batch_rows=0)
    with pytest.raises(ConfigError, match="tokens_per_domain is 0"):
        held_out().sample(0)
