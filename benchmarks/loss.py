"""The per-domain cross-entropy on a CPU beside eager torch and torch.compile: milliseconds and extra memory.

Forward and backward apart; velopath computes the gradient in the forward pass, so compare the sum. The same on a
GPU: `benchmarks.gpu_loss`.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from benchmarks.losses import (
    DOMAINS,
    EAGER,
    Arena,
    Contender,
    copy_of,
    matmuls,
    measure,
    ours,
    ours_linear,
    plain,
    random_ids,
    table_shapes,
    then,
    with_domains,
)
from benchmarks.timing import paired_ratio, take_turns


def run(quick: bool = False) -> dict[str, Any]:
    """{"threads", "logits": part, "linear": part}: from logits, and from hidden states and the output weight.

    A part is a shape and what `benchmarks.losses.measure` returns, in fp32.
    """
    rows, vocab, width, rounds = (1024, 8000, 128, 5) if quick else (4096, 32000, 512, 9)
    device = torch.device("cpu")
    logits = torch.randn(rows, vocab)
    ids = random_ids(device, rows, vocab)
    from_logits: dict[str, Contender] = {
        "copy of the logits": copy_of(logits),
        "eager, plain": plain,
        EAGER: with_domains,
        "torch.compile, with domains": torch.compile(with_domains),
        "velopath numba, in place": ours(backend="numba", inplace=True),
        "velopath C++, in place": ours(backend="cpu", inplace=True),
        "velopath C++": ours(backend="cpu"),
    }
    shape = {"rows": rows, "vocab": vocab, "itemsize": logits.element_size()}
    arena = Arena(device, (logits,), ids, overwritten=True)
    result: dict[str, Any] = {"threads": torch.get_num_threads()}
    result["logits"] = shape | measure(arena, from_logits, rounds=rounds)
    result["options"] = option_costs(arena, rounds)
    del logits, from_logits, arena
    gc.collect()
    hidden, weight = torch.randn(rows, width), torch.randn(vocab, width) * width**-0.5
    linear: dict[str, Contender] = {
        "three matmuls": matmuls(rows, vocab, hidden),
        EAGER: then(with_domains),
        "velopath C++, chunks of 64 MiB": ours_linear(),
    }
    arena = Arena(device, (hidden, weight), ids, overwritten=False)
    result["linear"] = shape | {"width": width} | measure(arena, linear, rounds=5)
    return result


def option_costs(arena: Arena, rounds: int) -> dict[str, dict[str, float]]:
    """{backend: {option: time with it / time without any}}, in place; paired within a round, median over rounds."""
    options: dict[str, dict[str, Any]] = {
        "no option": {},
        "z_loss": {"z_loss": 1e-4},
        "domain_weights": {"domain_weights": torch.ones(DOMAINS)},
        "return_tokens": {"return_tokens": True},
        "return_accuracy": {"return_accuracy": True},
        "label_smoothing": {"label_smoothing": 0.1},
        "logit_scale": {"logit_scale": 0.5},
        "softcap": {"softcap": 30.0},
        "reduction none": {"reduction": "none"},
    }
    costs: dict[str, dict[str, float]] = {}
    for backend in ("cpu", "numba"):
        contenders = {}
        for name, given in options.items():
            contender = _summed(ours(backend=backend, inplace=True, **given))
            arena.sample(contender)  # warm
            contenders[name] = partial(arena.sample, contender)
        samples = {n: [sum(s) for s in each] for n, each in take_turns(contenders, rounds).items()}
        plain_seconds = samples["no option"]
        costs[backend] = {name: paired_ratio(each, plain_seconds) for name, each in samples.items()}
    return costs


def _summed(contender: Contender) -> Contender:
    return lambda *tensors: contender(*tensors)[0].sum()


def table(result: Mapping[str, Any]) -> str:
    """The result of `run` as Markdown."""
    parts = {"shapes": [result["logits"], result["linear"]], "left_out": []}
    lines = [
        "Time with an option / without any, from logits, in place:",
        "",
        "| option | C++ | numba |",
        "|---|--:|--:|",
    ]
    core, numba = result["options"]["cpu"], result["options"]["numba"]
    lines += [f"| {name} | {core[name]:.2f} | {numba[name]:.2f} |" for name in core]
    return f"Threads of torch: {result['threads']}.\n\n{table_shapes(parts)}\n" + "\n".join(lines) + "\n"
