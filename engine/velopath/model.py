"""A Llama-layout decoder whose state dict is the Hugging Face layout: RMSNorm, RoPE, SwiGLU, grouped KV heads.

Llama, Mistral (sliding window), Qwen2 (biases of query, key and value) and Qwen3 (norms of query and key) alike.

Shape suffixes: B rows, T positions, D hidden size, V vocabulary, H query heads, G key/value heads, E head size.
Checked against `transformers` in tests/test_hf.py and against fp64 in tests/test_model.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from velopath.errors import ConfigError
from velopath.model_shape import PRESETS, ModelConfig, preset
from velopath.recompute import Recompute, run_layer

__all__ = ["PRESETS", "Decoder", "ModelConfig", "bare", "document_mask", "preset", "rotate"]

INIT_STD = 0.02


class RMSNorm(nn.Module):
    """weight * x / sqrt(mean(x^2) + eps) over the last axis; the mean is taken in fp32 for 16-bit inputs."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rotate(x_BHTE: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
    """RoPE in Hugging Face's rotate-half convention: element e pairs with e + E/2, not with its neighbour."""
    first, second = x_BHTE.chunk(2, dim=-1)
    return x_BHTE * cos_TE + torch.cat((-second, first), dim=-1) * sin_TE


def causal_mask(length: int, device: torch.device, window: int | None = None) -> Tensor:
    """(T, T), True where query t may see key s: s <= t, and t - s < `window`."""
    mask = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return mask if window is None else mask.triu(1 - window)


def document_mask(documents_BT: Tensor) -> Tensor:
    """(B, 1, T, T), True where query t may see key s: s <= t, and both of one document."""
    causal = causal_mask(documents_BT.shape[1], documents_BT.device)
    return (causal & (documents_BT[:, :, None] == documents_BT[:, None, :])).unsqueeze(1)


class Attention(nn.Module):
    """Causal self-attention with H query heads in G groups that share a key/value head each."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_size = (
            config.num_attention_heads,
            config.kv_heads,
            config.head_size,
        )
        bias = config.family == "qwen2"
        self.q_proj = nn.Linear(config.hidden_size, self.heads * self.head_size, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, self.kv_heads * self.head_size, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, self.kv_heads * self.head_size, bias=bias)
        self.o_proj = nn.Linear(self.heads * self.head_size, config.hidden_size, bias=False)
        self.q_norm: nn.Module | None = None
        self.k_norm: nn.Module | None = None
        if config.family == "qwen3":
            self.q_norm = RMSNorm(self.head_size, config.rms_norm_eps)
            self.k_norm = RMSNorm(self.head_size, config.rms_norm_eps)

    def forward(self, x_BTD: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        rows, length, _ = x_BTD.shape
        query = self.q_proj(x_BTD).view(rows, length, self.heads, self.head_size).transpose(1, 2)
        key = self.k_proj(x_BTD).view(rows, length, self.kv_heads, self.head_size).transpose(1, 2)
        value = self.v_proj(x_BTD).view(rows, length, self.kv_heads, self.head_size).transpose(1, 2)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        # The tables are fp32, so the turn is too; attention wants one dtype (bf16 under autocast).
        query = rotate(query, cos, sin).to(value.dtype)
        key = rotate(key, cos, sin).to(value.dtype)
        mixed = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=self.heads != self.kv_heads
        )
        out: Tensor = self.o_proj(mixed.transpose(1, 2).reshape(rows, length, -1))
        return out


class Mlp(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))
        return out


class Layer(nn.Module):
    """One pre-norm block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = Mlp(config)

    def forward(self, x_BTD: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), cos, sin, mask)
        out: Tensor = x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))
        return out


class Trunk(nn.Module):
    """Embedding, layers and final norm: the part that Hugging Face calls `model`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Decoder(nn.Module):
    """The decoder; `state_dict()` has exactly the names and shapes of Hugging Face's model of the family.

    Weights are drawn from N(0, 0.02^2), the projections back into the residual stream (`o_proj`, `down_proj`)
    from N(0, (0.02 / sqrt(2 L))^2) with L layers (GPT-2's rule), norms are 1, biases 0. One CPU generator seeded with
    `seed` is read in parameter order: the weights depend neither on the device nor on torch's global generator.
    `seed=None` leaves them uninitialised for a loader to fill.
    """

    rope_cos: Tensor
    rope_sin: Tensor

    def __init__(
        self, config: ModelConfig, *, seed: int | None = 0, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.recompute: Recompute = "none"
        """What of each layer's activations a backward pass computes again; see `velopath.recompute`."""
        device = torch.device(device) if device is not None else torch.get_default_device()
        # Built on meta first: nn.Linear's own init would cost time and move torch's global generator.
        with torch.device("meta"):
            self.model = Trunk(config)
            if not config.tie_word_embeddings:
                self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for name in ("rope_cos", "rope_sin"):
            self.register_buffer(name, torch.empty(0, device="meta"), persistent=False)
        self.to_empty(device=device)
        if seed is not None and device.type != "meta":
            self.init_weights(seed)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Draw all weights anew from `seed`, as the class says."""
        generator = torch.Generator(device="cpu").manual_seed(seed)
        scaled = INIT_STD / math.sqrt(2 * self.config.num_hidden_layers)
        for name, weight in self.named_parameters():
            if weight.ndim == 1:
                weight.fill_(0.0 if name.endswith(".bias") else 1.0)
                continue
            std = scaled if name.endswith(("o_proj.weight", "down_proj.weight")) else INIT_STD
            weight.copy_(torch.empty(weight.shape, device="cpu").normal_(0.0, std, generator=generator))

    def reset_rope(self, device: torch.device) -> None:
        """Compute the RoPE tables, (positions, E) fp32 each: cos and sin of p * theta^(-2 i / E)."""
        config = self.config
        if device.type == "meta":
            return
        half = torch.arange(0, config.head_size, 2, device="cpu").float() / config.head_size
        frequency = 1.0 / (config.rope_theta**half)
        angle = torch.outer(torch.arange(config.max_position_embeddings, device="cpu").float(), frequency)
        angle = torch.cat((angle, angle), dim=-1)
        self.rope_cos, self.rope_sin = angle.cos().to(device), angle.sin().to(device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Decoder:
        # `.to(bfloat16)` would round the tables and `.to_empty()` lose them; they are cheap, so they are remade.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.reset_rope(self.model.embed_tokens.weight.device)
        return self

    def forward(
        self, tokens_BT: Tensor, positions: Tensor | None = None, documents: Tensor | None = None
    ) -> Tensor:
        """hidden_BTD after the final norm. `positions`, (T,) or (B, T), default to 0 ... T-1.

        With `documents` (B, T), any numbers, a position attends to those before it of its own document only. The
        mask is dense, (B, 1, T, T) booleans made once for all layers: torch's attention then leaves its flash kernel.
        """
        length = tokens_BT.shape[1]
        if positions is None:
            if length > self.config.max_position_embeddings:
                raise ConfigError(
                    f"a row has {length} tokens, the model max_position_embeddings = "
                    f"{self.config.max_position_embeddings}; shorten the rows or raise it"
                )
            cos, sin = self.rope_cos[:length], self.rope_sin[:length]
        else:
            cos, sin = self.rope_cos[positions], self.rope_sin[positions]
            if positions.ndim == 2:
                cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        x_BTD = self.model.embed_tokens(tokens_BT)
        window = self.config.sliding_window
        mask = None if documents is None else document_mask(documents)
        if window is not None and length > window:
            seen = causal_mask(length, tokens_BT.device, window)
            mask = seen if mask is None else mask & seen
        for layer in self.model.layers:
            x_BTD = run_layer(layer, self.recompute if self.training else "none", x_BTD, cos, sin, mask)
        hidden_BTD: Tensor = self.model.norm(x_BTD)
        return hidden_BTD

    @property
    def unembed_weight(self) -> Tensor:
        """(V, D): the weight that turns hidden states into logits; the embedding itself when tied."""
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """Unnormalised log-probabilities (..., V) of hidden states (..., D)."""
        return F.linear(hidden, self.unembed_weight)

    @property
    def n_params(self) -> int:
        """Parameters, a tied embedding counted once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, row_tokens: int) -> int:
        """See `ModelConfig.flops_per_token`."""
        return self.config.flops_per_token(row_tokens)


def bare(model: nn.Module) -> nn.Module:
    """The module inside any wrappings of `torch.compile` and DistributedDataParallel."""
    while True:
        if hasattr(model, "_orig_mod"):
            inner = model._orig_mod
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            inner = model.module
        else:
            return model
        assert isinstance(inner, nn.Module)
        model = inner
