"""Small models over the slices: one seed fixes initial weights and the rows of every slice, for all arms alike."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.paths.corpus import ROW_TOKENS, VOCABULARY, SlicedText
from velopath.dist import Dist
from velopath.evaluate import evaluate
from velopath.model import Decoder, preset
from velopath.optim import build_optimizer
from velopath.schedule import LrPath
from velopath.stream import open_sampler
from velopath.train_step import TrainStep


@dataclass(frozen=True)
class Scale:
    """Sizes of a study. T = `steps` updates of `rows` x 256 tokens are one slice."""

    name: str
    preset: str = "tiny"
    device: str = "cpu"
    rows: int = 4
    steps: int = 480
    warmup: int = 30
    peak: float = 3e-3
    test_tokens: int = 16_384
    vocabulary: int = VOCABULARY


class Learner:
    """A model and its optimiser at some step. `train` reads rows [start, start + steps) of one slice."""

    def __init__(self, scale: Scale, text: SlicedText, cache: Path, seed: int) -> None:
        self.scale, self.text, self.cache, self.seed = scale, text, cache, seed
        self.dist = Dist(device=torch.device(scale.device))
        self.decoder = Decoder(
            preset(scale.preset, vocab_size=scale.vocabulary), seed=seed, device=scale.device
        )
        self.optimizer = build_optimizer(self.decoder)
        self.step = 0

    def copy(self) -> Learner:
        """Another learner at the same point: weights, moments and step, as a branch takes them."""
        other = Learner(self.scale, self.text, self.cache, self.seed)
        other.decoder.load_state_dict(self.decoder.state_dict())
        other.optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))
        other.step = self.step
        return other

    def train(
        self, path: LrPath, number: int, start: int, steps: int, weights: Mapping[str, float]
    ) -> Learner:
        """`steps` updates on rows of slice `number` from its row `start` on, at the rates of `path`; returns self."""
        step = self._train_step(len(weights))
        with open_sampler(
            self.text.slice(number), rows=self.scale.rows, row_tokens=ROW_TOKENS, seed=self.seed, weights=weights,
            threads=0, cache=self.cache, domain_key_salt=f"slice-{number + 1}",
        ) as sampler:  # fmt: skip
            for _ in range(start):
                sampler.next()
            for _ in range(steps):
                batch = sampler.next()
                step(self._on_device(batch.tokens), self._on_device(batch.domains), path.rate(self.step))
                self.step += 1
        return self

    def losses(self) -> dict[str, float]:
        """Held-out loss by domain, nats per token."""
        return dict(
            evaluate(
                self.decoder, self.text.heldout, tokens_per_domain=self.scale.test_tokens, batch_rows=16,
                dist=self.dist, bf16=self.scale.device != "cpu",
            )
        )  # fmt: skip

    def _train_step(self, n_domains: int) -> Callable[..., Any]:
        cuda = self.dist.device.type == "cuda"
        self.decoder.train()
        return TrainStep(
            self.decoder, self.optimizer, n_domains=n_domains, dist=self.dist, bf16=cuda, compile=cuda
        )

    def _on_device(self, array: Any) -> torch.Tensor:
        return torch.from_numpy(array).to(self.dist.device)
