"""torchtitan's Llama 3 (torchtitan 0.1 or 0.2) in the plain loop, where it can be imported: same shape, same loss.

Only the model is taken, not torchtitan's trainer: what differs from `PlainLoss` is then its code for the layers.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from velopath.model import ModelConfig

_MODEL = "torchtitan.models.llama3.model"


class TitanLoss(nn.Module):
    """`PlainLoss` around torchtitan's model of the same shape; raises `ImportError` without torchtitan.

    Raises `ValueError` for a shape that its rule for the width of the feed-forward layer cannot make.
    """

    def __init__(self, config: ModelConfig, row_tokens: int, device: torch.device) -> None:
        super().__init__()
        arguments = import_module(f"{_MODEL}.args").TransformerModelArgs(**_arguments(config, row_tokens))
        self.model: Any = import_module(f"{_MODEL}.model").Transformer(arguments).to(device)
        if config.tie_word_embeddings:
            self.model.output.weight = self.model.tok_embeddings.weight
        made = sum(p.numel() for p in self.model.parameters())
        if made != config.n_params:
            raise ValueError(f"torchtitan's model has {made} parameters, ours {config.n_params}")
        with torch.device(device), torch.no_grad():
            self.model.init_weights(buffer_device=device)

    def forward(self, tokens_BT1: Tensor, domains_B: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.model(tokens_BT1[:, :-1]).flatten(0, 1)
        return F.cross_entropy(logits, tokens_BT1[:, 1:].reshape(-1).long()), domains_B.new_zeros(())


def _arguments(config: ModelConfig, row_tokens: int) -> dict[str, Any]:
    """torchtitan takes 2/3 of 4 D, times a factor, rounded up to a multiple: the factor that gives our width."""
    plain = int(2 * 4 * config.hidden_size / 3)
    return {
        "dim": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "vocab_size": config.vocab_size,
        "multiple_of": 16,
        "ffn_dim_multiplier": config.intermediate_size / plain,
        "norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "max_seq_len": row_tokens,
    }
