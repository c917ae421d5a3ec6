"""Mistral, Qwen2 and Qwen3 against the models of `transformers`: the same logits in both directions; refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from velopath.errors import ConfigError
from velopath.hf import load_hf, read_config, save_hf
from velopath.model import PRESETS, Decoder, ModelConfig

# As in test_hf: odd sizes; 37 tokens in a window of 5.
SHAPE = {
    "vocab_size": 67, "hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "max_position_embeddings": 64, "head_dim": 10,
}  # fmt: skip
TOKENS = torch.randint(0, 67, (3, 37), generator=torch.Generator().manual_seed(5))
FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": None}),
    "mistral, window": (MistralForCausalLM, MistralConfig, {"sliding_window": 5}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {"head_dim": 8, "tie_word_embeddings": True}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {}),
}


def saved(kind: str, folder: Path) -> Any:
    """A model of transformers with random weights, norms and biases among them, in `folder`."""
    model, config, changes = FAMILIES[kind]
    torch.manual_seed(0)
    theirs = model(config(**SHAPE | changes))
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.add_(0.15 * torch.randn_like(weight))
    theirs.save_pretrained(folder)
    return theirs.eval()


@pytest.mark.parametrize("kind", FAMILIES)
def test_logits_in_both_directions(kind: str, tmp_path: Path) -> None:
    theirs = saved(kind, tmp_path / "theirs")
    config, decoder = load_hf(tmp_path / "theirs")
    assert config.family == kind.split(",")[0]
    save_hf(tmp_path / "ours", decoder, eos=3)
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert type(back) is type(theirs)
    assert read_config(tmp_path / "ours") == config
    with torch.no_grad():
        expected = theirs(TOKENS).logits
        assert expected.abs().max() > 1
        for logits in (decoder.logits(decoder(TOKENS)), back(TOKENS).logits):
            assert (logits - expected).abs().max() < 1e-4
        # ... and what makes the family is in the numbers.
        for name, weight in decoder.named_parameters():
            if name.endswith((".bias", "_norm.weight")) and "layernorm" not in name:
                weight.zero_()
        changed = (decoder.logits(decoder(TOKENS)) - expected).abs().max()
        assert (changed > 0.1) == kind.startswith("qwen")


def test_a_window_is_seen() -> None:
    """A token 5 positions back is behind the window of one layer, 4 back is not."""
    shape: dict[str, Any] = SHAPE | {"num_hidden_layers": 1, "family": "mistral", "sliding_window": 5}
    decoder = Decoder(ModelConfig(**shape), seed=1)
    other = TOKENS.clone()
    other[:, 10] = (other[:, 10] + 1) % 67
    moved = (decoder(TOKENS) - decoder(other)).abs().amax((0, 2))
    assert (moved[:10] == 0).all() and (moved[10:15] > 0).all() and (moved[15:] == 0).all()


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("qwen3", {"attention_bias": True}, "attention_bias is True; only False"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window is True; only False"),
        ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "only mistral may have a window"),
        ("mistral", {"model_type": "ministral"}, "model_type 'ministral'.*expected one of LlamaForCausalLM"),
        ("qwen3", {"architectures": ["Qwen3ForSequenceClassification"]}, "Qwen3ForSequenceClassification"),
        ("mistral", {"sliding_window": 0}, "sliding_window is 0; expected a positive whole number"),
    ],
)
def test_what_is_not_computed_is_refused(
    kind: str, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    saved(kind, tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ConfigError, match=message):
        load_hf(tmp_path)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("mistral-7b", 7_248_023_552),
        ("qwen2-0.5b", 494_032_768),
        ("qwen2-7b", 7_615_616_512),
        ("qwen3-0.6b", 596_049_920),
        ("qwen3-8b", 8_190_735_360),
    ],
)
def test_presets_have_the_published_sizes(name: str, parameters: int) -> None:
    assert PRESETS[name].n_params == parameters
    assert Decoder(PRESETS[name], seed=None, device="meta").n_params == parameters
