"""The decoder against a plain fp64 reference, its init, its counts and its compiled form."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from velopath.errors import ConfigError
from velopath.model import INIT_STD, PRESETS, Decoder, ModelConfig, bare, preset

# Odd on purpose: 3 query heads per key/value head, a head size that is not hidden / heads, nothing a power of 2.
ODD = ModelConfig(53, 36, 44, 3, 6, 2, 10, 40, rope_theta=70.0, rms_norm_eps=1e-4, tie_word_embeddings=False)


def tokens_of(config: ModelConfig, rows: int = 2, length: int = 19) -> torch.Tensor:
    return torch.randint(0, config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(3))


def loud(config: ModelConfig) -> Decoder:
    """A decoder whose weights are large enough for attention, norms and RoPE to matter."""
    decoder = Decoder(config, seed=2)
    with torch.no_grad():
        for i, weight in enumerate(decoder.parameters()):
            weight.add_(0.2 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(i)))
    return decoder


def reference_logits(decoder: Decoder, tokens: torch.Tensor) -> torch.Tensor:
    """The same function in fp64, one head and one position pair at a time, RoPE as complex multiplication."""
    c = decoder.config
    w = {name: value.double() for name, value in decoder.state_dict().items()}

    def norm(x, weight):
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + c.rms_norm_eps) * weight

    def turn(x):
        half = c.head_size // 2
        angle = torch.tensor(
            [[p * c.rope_theta ** (-2 * i / c.head_size) for i in range(half)] for p in range(x.shape[1])],
            dtype=torch.float64,
        )
        turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat((turned.real, turned.imag), -1)

    x = w["model.embed_tokens.weight"][tokens]
    length = tokens.shape[1]
    for i in range(c.num_hidden_layers):
        p = f"model.layers.{i}."
        h = norm(x, w[p + "input_layernorm.weight"])
        heads = []
        for head in range(c.num_attention_heads):
            group = head * c.kv_heads // c.num_attention_heads
            q, k, v = (
                h @ w[p + f"self_attn.{n}_proj.weight"].unflatten(0, (-1, c.head_size))[g].T
                for n, g in (("q", head), ("k", group), ("v", group))
            )
            scores = turn(q) @ turn(k).mT / math.sqrt(c.head_size)
            mask = torch.ones(length, length).triu(1).bool()
            heads.append(scores.masked_fill(mask, -math.inf).softmax(-1) @ v)
        x = x + torch.cat(heads, -1) @ w[p + "self_attn.o_proj.weight"].T
        h = norm(x, w[p + "post_attention_layernorm.weight"])
        gate, up = h @ w[p + "mlp.gate_proj.weight"].T, h @ w[p + "mlp.up_proj.weight"].T
        x = x + (gate * torch.sigmoid(gate) * up) @ w[p + "mlp.down_proj.weight"].T
    head = "model.embed_tokens.weight" if c.tie_word_embeddings else "lm_head.weight"
    return norm(x, w["model.norm.weight"]) @ w[head].T


@pytest.mark.parametrize("tied", [False, True])
def test_logits_against_fp64(tied):
    decoder = loud(ModelConfig(**{**vars(ODD), "tie_word_embeddings": tied}))
    tokens = tokens_of(ODD)
    with torch.no_grad():
        ours = decoder.logits(decoder(tokens))
    expected = reference_logits(decoder, tokens)
    assert expected.abs().max() > 3.0
    assert ours.dtype == torch.float32
    assert (ours - expected).abs().max() < 2e-5 * expected.abs().max()


def test_gradients_against_fp64():
    decoder = loud(ODD)
    exact = loud(ODD).double()
    tokens = tokens_of(ODD)
    for model in (decoder, exact):
        logits = model.logits(model(tokens[:, :-1]))
        F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    for (name, ours), theirs in zip(decoder.named_parameters(), exact.parameters(), strict=True):
        error = (ours.grad - theirs.grad).norm() / theirs.grad.norm()
        assert error < 1e-5, (name, float(error))


def test_no_position_sees_a_later_token():
    decoder = loud(ODD)
    tokens = tokens_of(ODD)
    changed = tokens.clone()
    changed[:, 11:] = (changed[:, 11:] + 1) % ODD.vocab_size
    with torch.no_grad():
        before, after = decoder(tokens), decoder(changed)
    assert torch.allclose(before[:, :11], after[:, :11], atol=1e-6)
    assert not torch.allclose(before[:, 11:], after[:, 11:], atol=1e-2)


def test_positions_move_nothing_when_all_move_alike():
    decoder = loud(ODD)
    tokens = tokens_of(ODD)
    place = torch.arange(19)
    with torch.no_grad():
        plain = decoder(tokens)
        assert torch.equal(decoder(tokens, place), plain)
        each_row = decoder(tokens, torch.stack((place, place + 21)))
        swapped = decoder(tokens, place.flip(0))
    assert torch.allclose(each_row, plain, atol=2e-5)  # RoPE knows differences only
    assert not torch.allclose(swapped, plain, atol=1e-2)


def test_init_is_the_documented_one_and_leaves_torch_alone():
    config = preset("tiny")
    state = torch.get_rng_state()
    decoder = Decoder(config, seed=7)
    assert torch.equal(torch.get_rng_state(), state)
    for name, weight in decoder.named_parameters():
        if weight.ndim == 1:
            assert torch.equal(weight, torch.ones_like(weight))
            continue
        residual = name.endswith(("o_proj.weight", "down_proj.weight"))
        std = INIT_STD / (2.0 if residual else 1.0)  # sqrt(2 L) = 2 with two layers
        assert abs(weight.std().item() / std - 1) < 0.05, name
        assert abs(weight.mean().item()) < 5 * std / math.sqrt(weight.numel()), name
    same, other = Decoder(config, seed=7), Decoder(config, seed=8)
    assert torch.equal(decoder.unembed_weight, same.unembed_weight)
    assert not torch.equal(decoder.unembed_weight, other.unembed_weight)
    tokens = tokens_of(config)
    with torch.no_grad():
        logits = decoder.logits(decoder(tokens[:, :-1]))
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert abs(float(loss) - math.log(1024)) < 0.2


def test_names_are_those_of_transformers():
    from transformers import LlamaConfig, LlamaForCausalLM

    for tied in (True, False):
        config = ModelConfig(**{**vars(ODD), "tie_word_embeddings": tied})
        shape = {k: v for k, v in vars(config).items() if k != "rope_theta"}
        with torch.device("meta"):
            theirs = dict(LlamaForCausalLM(LlamaConfig(**shape)).named_parameters())
        ours = Decoder(config, device="meta").state_dict()
        assert {n: p.shape for n, p in ours.items()} == {n: p.shape for n, p in theirs.items()}


@pytest.mark.parametrize(
    ("name", "millions"),
    [("tiny", 0.158016), ("160m", 162.2208), ("1b", 1235.814400), ("3b", 3212.749824), ("8b", 8030.261248)],
)
def test_parameter_counts(name, millions):
    # 1b, 3b and 8b are the published sizes of Llama 3.2 1B and 3B and Llama 3.1 8B.
    assert PRESETS[name].n_params == round(millions * 1e6)
    assert Decoder(PRESETS[name], seed=None, device="meta").n_params == PRESETS[name].n_params


def test_flops_are_what_torch_counts():
    decoder = loud(ODD)
    tokens = tokens_of(ODD)
    with (
        FlopCounterMode(display=False) as counter,
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        decoder.logits(decoder(tokens)).sum().backward()
    counted = counter.get_total_flops() / tokens.numel()
    assert counted == decoder.flops_per_token(tokens.shape[1])


def test_one_graph_and_the_same_numbers_compiled():
    decoder = loud(ODD)
    tokens = tokens_of(ODD)

    def step(model):
        decoder.zero_grad()
        loss = F.cross_entropy(decoder.logits(model(tokens[:, :-1])).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        return loss.detach(), decoder.model.norm.weight.grad.clone()

    compiled = torch.compile(decoder, fullgraph=True, backend="aot_eager")
    for ours, eager in zip(step(compiled), step(decoder), strict=True):
        assert torch.allclose(ours, eager, rtol=1e-5, atol=1e-7)
    assert bare(compiled) is decoder and bare(decoder) is decoder


def test_16_bit_models_keep_exact_rope_tables():
    decoder = loud(ODD)
    tokens = tokens_of(ODD)
    with torch.no_grad():
        exact = decoder.logits(decoder(tokens))
        with torch.autocast("cpu", torch.bfloat16):
            mixed = decoder.logits(decoder(tokens))
        cos = decoder.rope_cos.clone()
        decoder.to(torch.bfloat16)
        assert decoder.rope_cos.dtype == torch.float32 and torch.equal(decoder.rope_cos, cos)
        half = decoder.logits(decoder(tokens))
    assert mixed.dtype == half.dtype == torch.bfloat16
    for got in (mixed, half):
        assert (got - exact).norm() / exact.norm() < 0.03
    empty = Decoder(ODD, seed=None, device="meta").to_empty(device="cpu")
    assert torch.equal(empty.rope_cos, cos)
    assert not any("rope" in name for name in decoder.state_dict())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 37}, "hidden_size 37 is not a multiple of num_attention_heads 4"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"head_dim": 5}, "head_dim is 5; RoPE turns pairs"),
        ({"vocab_size": 0}, "vocab_size is 0; expected a positive whole number"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers is 2.5"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps is nan; expected a positive number"),
        ({"layers": 3}, "unknown model field 'layers'"),
    ],
)
def test_impossible_shapes_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        preset("tiny", **{"head_dim": None, **changes})


def test_unknown_preset_and_too_long_rows():
    with pytest.raises(ConfigError, match="unknown model preset 'huge'; the presets are tiny, small"):
        preset("huge")
    with pytest.raises(ConfigError, match="a row has 41 tokens, the model max_position_embeddings = 40"):
        Decoder(ODD)(tokens_of(ODD, 1, 41))
