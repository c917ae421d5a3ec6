"""The per-domain loss inside a causal model of Hugging Face, for its Trainer or any other loop."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from velopath.loss import domain_cross_entropy, linear_domain_cross_entropy


class HiddenModel(nn.Module):
    """A causal model as `velopath.evaluate` wants it: tokens (B, T) -> hidden (B, T, D), and `unembed_weight`."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens_BT: Tensor, **inputs: Any) -> Tensor:
        hidden: Tensor = self.model.base_model(input_ids=tokens_BT.long(), **inputs).last_hidden_state
        return hidden

    @property
    def unembed_weight(self) -> Tensor:
        weight: Tensor = self.model.get_output_embeddings().weight
        return weight

    @torch.no_grad()
    def is_exact(self) -> bool:
        """Whether hidden @ weight^T are the model's logits, tried on two tokens: no bias, scale or softcap."""
        if getattr(self.model.config.get_text_config(), "final_logit_softcapping", None):
            return False  # which the small logits of an untrained model would not show
        training, tokens = self.model.training, torch.tensor([[0, 1]], device=self.model.device)
        self.model.eval()
        ours, theirs = nn.functional.linear(self(tokens), self.unembed_weight), self.model(tokens).logits
        self.model.train(training)
        return torch.allclose(ours.float(), theirs.float(), rtol=1e-2, atol=1e-3)


def add_domain_loss(model: PreTrainedModel, n_domains: int) -> None:
    """Let `model(input_ids, domains=..., targets=...)` return `{"loss", "sums"}`; without domains it is as before.

    The logits are never held whole where they are hidden states times the output embedding. A model with a bias,
    scale or softcap there computes them, and the loss writes its gradient over them.
    """
    plain, hidden_model = model.forward, HiddenModel(model)
    exact = hidden_model.is_exact()

    def forward(*args: Any, domains: Any = None, targets: Any = None, **inputs: Any) -> Any:
        if domains is None:
            return plain(*args, **inputs)
        labels = targets.flatten()
        if exact:
            hidden = hidden_model(inputs.pop("input_ids"), **inputs).flatten(0, 1)
            weight = hidden_model.unembed_weight
            loss, sums = linear_domain_cross_entropy(hidden, weight, labels, domains, n_domains=n_domains)
        else:
            logits = plain(**inputs).logits.flatten(0, 1)
            loss, sums = domain_cross_entropy(logits, labels, domains, n_domains=n_domains, inplace=True)
        return {"loss": loss, "sums": sums}

    model.forward = forward
