"""Llama folders against `transformers`: the same logits in both directions; refusals."""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from velopath.errors import ConfigError, DataError
from velopath.hf import load_hf, read_config, save_hf
from velopath.model import Decoder, ModelConfig

# Odd sizes: a vocabulary that no block divides, a head size that is not hidden / heads, 3 query heads per group.
SHAPES = [
    {"vocab_size": 101, "hidden_size": 48, "intermediate_size": 40, "tie_word_embeddings": True},
    {
        "vocab_size": 67,
        "hidden_size": 48,
        "intermediate_size": 56,
        "tie_word_embeddings": False,
        "head_dim": 10,
    },
]
COMMON = {"num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2, "rms_norm_eps": 1e-5}


def decoder_of(shape: dict) -> Decoder:
    config = ModelConfig(**COMMON, **shape, max_position_embeddings=64, rope_theta=500.0)
    decoder = Decoder(config, seed=1)
    with torch.no_grad():  # larger than at the start, so that attention and norms matter
        for i, weight in enumerate(decoder.parameters()):
            noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(i))
            weight.add_(noise * 0.15)
    return decoder


def tokens_of(vocab_size: int) -> torch.Tensor:
    return torch.randint(0, vocab_size, (3, 37), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("shape", SHAPES, ids=["tied", "untied"])
def test_transformers_computes_our_logits_from_our_folder(shape, tmp_path):
    decoder = decoder_of(shape)
    save_hf(
        tmp_path / "export", decoder, eos=3, model_card="# A model\n", extra={"origin.json": {"steps": 7}}
    )
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert isinstance(theirs, LlamaForCausalLM) and theirs.dtype == torch.float32
    tokens = tokens_of(shape["vocab_size"])
    with torch.no_grad():
        ours, reference = decoder.logits(decoder(tokens)), theirs(tokens).logits
    assert reference.abs().max() > 1.0
    assert (ours - reference).abs().max() < 1e-5
    assert theirs.config.eos_token_id == 3 and theirs.generation_config.eos_token_id == 3
    assert json.loads((tmp_path / "export" / "origin.json").read_text()) == {"steps": 7}
    assert (tmp_path / "export" / "README.md").read_text() == "# A model\n"


@pytest.mark.parametrize("shape", SHAPES, ids=["tied", "untied"])
@pytest.mark.parametrize("shard", ["50GB", "20KB"])
def test_we_compute_transformers_logits_from_its_folder(shape, shard, tmp_path):
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 300.0}
    theirs = LlamaForCausalLM(LlamaConfig(**COMMON, **shape, rope_parameters=rope, initializer_range=0.15))
    theirs.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "20KB")
    config, decoder = load_hf(tmp_path)
    assert config.rope_theta == 300.0 and config.max_position_embeddings == 2048
    assert config == read_config(tmp_path)
    tokens = tokens_of(shape["vocab_size"])
    with torch.no_grad():
        ours, reference = decoder.logits(decoder(tokens)), theirs(tokens).logits
    assert reference.abs().max() > 1.0
    assert (ours - reference).abs().max() < 1e-5


def test_round_trip_is_bit_exact_and_dtype_can_be_chosen(tmp_path):
    decoder = decoder_of(SHAPES[1])
    save_hf(tmp_path / "a", decoder)
    config, again = load_hf(tmp_path / "a")
    assert config == decoder.config
    for name, value in decoder.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    save_hf(tmp_path / "a", decoder, dtype=torch.bfloat16)
    stored = load_file(tmp_path / "a" / "model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "a" / "config.json").read_text())["dtype"] == "bfloat16"
    assert load_hf(tmp_path / "a")[1].model.norm.weight.dtype == torch.float32
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]
    with pytest.raises(ConfigError, match="exists already"):
        save_hf(tmp_path / "a", decoder, replace=False)


def make_tokenizer(path: Path, entries: int) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=entries, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog"] * 9, trainer)
    tokenizer.save(str(path))


def test_the_tokenizer_travels_along(tmp_path):
    make_tokenizer(tmp_path / "t.json", 280)
    shape = {"vocab_size": 280, "hidden_size": 24, "intermediate_size": 8}
    decoder = Decoder(ModelConfig(**COMMON, **shape))
    save_hf(tmp_path / "out", decoder, tokenizer_file=tmp_path / "t.json", eos=0)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "the quick fox: ünï 狐"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.eos_token == "<|end|>" and tokenizer.eos_token_id == 0
    small = Decoder(ModelConfig(**COMMON, **{**shape, "vocab_size": 270}))
    with pytest.raises(ConfigError, match="token id 279, the model only ids below vocab_size 270"):
        save_hf(tmp_path / "no", small, tokenizer_file=tmp_path / "t.json")
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_bias": True}, "attention_bias is True; only False"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu'"),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}},
            "rope_type 'default'",
        ),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling is"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is"),
        ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, "model_type 'gpt2'"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"hidden_size": None}, "hidden_size is None; expected a positive whole number"),
        ({"num_key_value_heads": 4}, "not a multiple of num_key_value_heads 4"),
    ],
)
def test_what_the_decoder_does_not_compute_is_refused_by_name(change, message, tmp_path):
    save_hf(tmp_path / "m", decoder_of(SHAPES[0]))
    path = tmp_path / "m" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ConfigError, match=message) as error:
        load_hf(tmp_path / "m")
    assert str(path) in str(error.value)


class Bomb:
    def __reduce__(self):
        return os.mkdir, (os.environ["BOMB"],)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.safetensors", "config.json", "shard.safetensors"]
)
def test_a_pickle_is_never_executed(name, tmp_path, monkeypatch):
    monkeypatch.setenv("BOMB", str(tmp_path / "executed"))
    folder = save_hf(tmp_path / "m", decoder_of(SHAPES[0]))
    if name in ("pytorch_model.bin", "shard.safetensors"):
        (folder / "model.safetensors").unlink()
    if name == "shard.safetensors":
        index = {"weight_map": {"model.norm.weight": name}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises((ConfigError, DataError), match="never loaded" if name.endswith("bin") else name):
        load_hf(folder)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/x.safetensors", "a\\b.safetensors", "x.bin", 7]
)
def test_an_index_cannot_lead_out_of_the_folder(name, tmp_path):
    folder = save_hf(tmp_path / "m", decoder_of(SHAPES[0]))
    os.rename(folder / "model.safetensors", tmp_path / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"model.norm.weight": name}})
    )
    with pytest.raises(DataError, match="expected a .safetensors file beside it"):
        load_hf(folder)


def test_wrong_tensors_are_named(tmp_path):
    folder = save_hf(tmp_path / "m", decoder_of(SHAPES[0]))
    good = load_file(folder / "model.safetensors")
    norm, embedding = good["model.norm.weight"], good["model.embed_tokens.weight"]
    without = {n: t for n, t in good.items() if n != "model.norm.weight"}
    for tensors, message in (
        (without, "'model.norm.weight' is missing"),
        (good | {"model.norm.weight": norm[:5].clone()}, r"shape \(5,\), the model needs \(48,\)"),
        (good | {"model.layers.0.self_attn.q_proj.bias": norm.clone()}, "unknown to the model"),
        (good | {"lm_head.weight": embedding + 1}, "differs from model.embed_tokens"),
    ):
        save_file(tensors, folder / "model.safetensors")
        with pytest.raises(DataError, match=message):
            load_hf(folder)
    save_file(good | {"lm_head.weight": embedding.clone()}, folder / "model.safetensors")
    assert torch.equal(load_hf(folder)[1].unembed_weight, embedding)
    (folder / "config.json").write_text("[" * 100_000)
    with pytest.raises(DataError, match="config.json: not a readable JSON file"):
        load_hf(folder)
