"""Shapes of decoders: families, presets, parameters and FLOPs. No tensor is made here."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from velopath.errors import ConfigError

Family = Literal["llama", "mistral", "qwen2", "qwen3"]
"""Hugging Face's `model_type`. Over Llama, mistral may have a sliding window, qwen2 has biases on query, key and
value, qwen3 an RMSNorm over each head of query and key."""


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a `Decoder`; fields carry the names of Hugging Face's `LlamaConfig`.

    `head_dim` None means hidden_size / num_attention_heads, `num_key_value_heads` None as many as query heads.
    Both are filled in, so that two equal models compare equal. Raises `ConfigError` on a shape that cannot be.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    family: Family = "llama"
    sliding_window: int | None = None
    """Positions that a query sees, itself included; None: all before it. Only mistral has one."""

    def __post_init__(self) -> None:
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            optional = field.name in ("head_dim", "sliding_window")
            if field.name in ("tie_word_embeddings", "family") or (optional and value is None):
                continue
            whole = field.name not in ("rope_theta", "rms_norm_eps")
            kind = int if whole else (int, float)
            if isinstance(value, bool) or not isinstance(value, kind) or not 0 < value < math.inf:
                what = "a positive whole number" if whole else "a positive number"
                raise ConfigError(f"model.{field.name} is {value!r}; expected {what}")
        if self.family not in get_args(Family):
            raise ConfigError(f"model family {self.family!r}; expected one of {', '.join(get_args(Family))}")
        if self.sliding_window is not None and self.family != "mistral":
            raise ConfigError(f"model.sliding_window is {self.sliding_window}; only mistral has a window")
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ConfigError(
                    f"model.hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                    f"{self.num_attention_heads}; choose one that is, or give head_dim"
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        if self.num_attention_heads % self.kv_heads:
            raise ConfigError(
                f"model.num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.kv_heads}; each key/value head serves a whole group of query heads"
            )
        if self.head_size % 2:
            raise ConfigError(f"model.head_dim is {self.head_size}; RoPE turns pairs, so it must be even")

    @property
    def head_size(self) -> int:
        """E: `head_dim`, known to be filled in."""
        assert self.head_dim is not None
        return self.head_dim

    @property
    def kv_heads(self) -> int:
        """G: `num_key_value_heads`, known to be filled in."""
        assert self.num_key_value_heads is not None
        return self.num_key_value_heads

    @property
    def matrix_params(self) -> int:
        """Parameters that take part in a matrix product for every token: all but norms and the embedding
        look-up; the unembedding counts, tied or not."""
        attention = 2 * self.hidden_size * self.head_size * (self.num_attention_heads + self.kv_heads)
        mlp = 3 * self.hidden_size * self.intermediate_size
        return self.num_hidden_layers * (attention + mlp) + self.vocab_size * self.hidden_size

    @property
    def n_params(self) -> int:
        """Parameters of the model, a tied embedding counted once."""
        norms = (2 * self.num_hidden_layers + 1) * self.hidden_size
        if self.family == "qwen2":  # biases
            norms += self.num_hidden_layers * (self.num_attention_heads + 2 * self.kv_heads) * self.head_size
        if self.family == "qwen3":
            norms += self.num_hidden_layers * 2 * self.head_size
        lookup = 0 if self.tie_word_embeddings else self.vocab_size * self.hidden_size
        return self.matrix_params + norms + lookup

    def flops_per_token(self, row_tokens: int) -> int:
        """FLOPs of forward and backward per token in rows of T = `row_tokens`: 6 M + 12 L H E T.

        M is `matrix_params`, L layers. Attention is counted in full although half of it is masked, the
        convention of PaLM's appendix B, so that MFU compares with other people's; with a sliding window T is at most
        that. Norms, biases, RoPE and the optimiser are left out, as there.
        """
        seen = min(row_tokens, self.sliding_window or row_tokens)
        attention = 12 * self.num_hidden_layers * self.num_attention_heads * self.head_size * seen
        return 6 * self.matrix_params + attention


PRESETS: dict[str, ModelConfig] = {
    # vocab, hidden, intermediate, layers, heads, kv heads, head size, positions, theta
    "tiny": ModelConfig(1024, 64, 176, 2, 4, 2, 16, 2048, 10_000.0, tie_word_embeddings=True),  # 0.16M
    "small": ModelConfig(4096, 256, 704, 8, 8, 4, 32, 2048, 10_000.0, tie_word_embeddings=True),  # 7M
    "40m": ModelConfig(32000, 512, 1408, 8, 8, 8, 64, 2048, 10_000.0, tie_word_embeddings=True),  # 42M
    "160m": ModelConfig(50304, 768, 2048, 12, 12, 12, 64, 2048, 10_000.0),  # 162M
    "1b": ModelConfig(128256, 2048, 8192, 16, 32, 8, 64, 8192, 500_000.0, tie_word_embeddings=True),
    "3b": ModelConfig(128256, 3072, 8192, 28, 24, 8, 128, 8192, 500_000.0, tie_word_embeddings=True),
    "8b": ModelConfig(128256, 4096, 14336, 32, 32, 8, 128, 8192, 500_000.0),
    "mistral-7b": ModelConfig(32768, 4096, 14336, 32, 32, 8, 128, 32768, 1e6, family="mistral"),
    "qwen2-0.5b": ModelConfig(151936, 896, 4864, 24, 14, 2, 64, 32768, 1e6, 1e-6, True, "qwen2"),
    "qwen2-7b": ModelConfig(152064, 3584, 18944, 28, 28, 4, 128, 32768, 1e6, 1e-6, False, "qwen2"),
    "qwen3-0.6b": ModelConfig(151936, 1024, 3072, 28, 16, 8, 128, 40960, 1e6, 1e-6, True, "qwen3"),
    "qwen3-8b": ModelConfig(151936, 4096, 12288, 36, 32, 8, 128, 40960, 1e6, 1e-6, False, "qwen3"),
}
"""Named shapes; 1b, 3b and 8b are those of Llama 3 without its RoPE scaling, mistral-7b that of its third version,
which has no window. A run's vocabulary is its tokenizer's."""


def preset(name: str, **changes: Any) -> ModelConfig:
    """The named shape of `PRESETS` with fields replaced, for example `preset("tiny", vocab_size=2000)`."""
    if name not in PRESETS:
        raise ConfigError(f"unknown model preset {name!r}; the presets are {', '.join(PRESETS)}")
    known = {f.name for f in dataclasses.fields(ModelConfig)}
    unknown = sorted(set(changes) - known)
    if unknown:
        raise ConfigError(f"unknown model field {unknown[0]!r}; the fields are {', '.join(sorted(known))}")
    return dataclasses.replace(PRESETS[name], **changes)
