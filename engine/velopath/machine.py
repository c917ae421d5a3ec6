"""What a run trains with, from its configuration: the starting model, and the step around it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from velopath.config import RunConfig
from velopath.dist import Dist
from velopath.errors import ConfigError
from velopath.hf import load_hf
from velopath.model import Decoder, preset
from velopath.optim import build_optimizer
from velopath.phases import Phases
from velopath.sharding import fill, shard
from velopath.tensor_files import named_tensors
from velopath.train_step import TrainStep


def starting_model(config: RunConfig, prepared: Mapping[str, Any], device: torch.device) -> Decoder:
    """The Hugging Face folder of the config, or its preset with seeded random weights.

    `prepared` is the data's domains.json. Raises `ConfigError` where its tokenizer has more entries than the model.
    """
    choice, vocabulary = config.model, prepared.get("tokenizer", {}).get("vocab_size")
    if choice.hf is not None:
        shape, decoder = load_hf(choice.hf, device=device)
    else:
        changes = dict(choice.overrides)
        if vocabulary is not None:
            changes.setdefault("vocab_size", vocabulary)
        shape = preset(choice.preset, **changes)
        decoder = Decoder(shape, seed=config.seed, device=device)
    if vocabulary is not None and vocabulary > shape.vocab_size:
        raise ConfigError(
            f"the data's tokenizer has {vocabulary} entries, the model {choice.hf or choice.preset} only "
            f"{shape.vocab_size}; prepare the data with the model's own tokenizer, or make the model's larger"
        )
    return decoder


def make_step(
    config: RunConfig, decoder: Decoder, *, n_domains: int, dist: Dist, phases: Phases
) -> TrainStep:
    """The step of the config on `decoder`, which FSDP2 may spread over the ranks; AdamW at rate 0 until the first."""
    train = config.train
    decoder.recompute = train.activation_checkpointing
    compile = dist.device.type == "cuda" if train.compile is None else train.compile
    if train.parallel == "fsdp2" and dist.world > 1:
        shard(decoder, dist, compile=compile)
    return TrainStep(
        decoder,
        build_optimizer(decoder, weight_decay=train.weight_decay, betas=train.betas),
        n_domains=n_domains,
        dist=dist,
        micro_rows=train.micro_rows,
        clip=train.clip,
        bf16=train.precision == "bf16",
        compile=compile,
        phases=phases,
    )


def restart(decoder: Decoder, start: Decoder) -> None:
    """Give `decoder`, sharded or not, the values of `start` again."""
    values = named_tensors(start)
    for name, tensor in named_tensors(decoder).items():
        fill(tensor, values[name])
