"""The training step beside a hand-written torch loop: tokens/s, waiting for data, what domains, log and push cost.

Same model, same batch shape, same machine, in turns. "velopath" puts together what `velopath.loop` does: sampler,
`Session`, `TrainStep`, `Meter`, a JSON record every ten steps. The plain loop is what a sceptic writes: batches
from numpy memmaps as in nanoGPT, `F.cross_entropy`, clipping, fused AdamW, `loss.item()` every ten steps.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.timing import paired_ratio, summary, take_turns
from benchmarks.titan import TitanLoss
from benchmarks.trainers import (
    LOG_EVERY,
    HandMadeDomains,
    PlainLoop,
    PlainLoss,
    Record,
    Sample,
    Setup,
    Trainer,
    Velopath,
    record_to,
    write_data,
)
from velopath.model import preset


def run(quick: bool = False) -> dict[str, Any]:
    """Measure on the CPU with the tiny model of the demo, 4 rows of 256 tokens; see `measure`.

    One thread of torch: at this size more of them mostly wait for each other, the more so beside other work.
    """
    setup = Setup(torch.device("cpu"), preset("tiny"), rows=4, row_tokens=256)
    rounds, steps, pushed = (3, 4, 15) if quick else (15, 20, 300)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return measure(setup, rounds=rounds, steps=steps, push_steps=pushed)
    finally:
        torch.set_num_threads(threads)


def measure(
    setup: Setup,
    *,
    rounds: int,
    steps: int,
    push_steps: int,
    seconds: float = float("inf"),
    only: Sequence[str] = (),
) -> dict[str, Any]:
    """{"setup", "rounds", "contenders", "left_out", "ratios", "push"} of blocks of `steps` steps, in turns.

    A contender holds tokens/s, milliseconds of a step and the share of it spent waiting for data. Ratios of step
    times are medians over pairs of blocks of one round. No further round is begun after `seconds`. `only` names
    the contenders to take beside "velopath": each holds a model and its optimiser, so a large one has room for few.
    """
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="velopath-bench-")))
        write_data(root, setup)
        record = record_to(stack, root / "metrics.jsonl")
        kinds = _kinds(setup, root, stack, record)
        contenders: dict[str, Trainer] = {"velopath": (ours := Velopath(setup, root, stack, record=record))}
        left_out = []
        for name, make in kinds.items():
            if only and name not in only:
                continue
            try:
                contenders[name] = make()
            except (ImportError, ValueError) as error:
                left_out.append(f"{name}: {type(error).__name__}: {error}")
        for trainer in contenders.values():
            trainer.block(3)
        blocks = take_turns(
            {name: partial(trainer.block, steps) for name, trainer in contenders.items()},
            rounds,
            seconds=seconds,
        )
        push = ours.pushes(push_steps, every=5)
        log = ours.log_calls(push_steps)
    found = {name: _summary(samples, setup) for name, samples in blocks.items()}
    step_ms = found["velopath"]["step_ms"]["median"]
    return {
        "setup": {
            "parameters": setup.model.n_params,
            "vocab": setup.model.vocab_size,
            "rows": setup.rows,
            "row_tokens": setup.row_tokens,
            "dtype": "bf16 autocast" if setup.bf16 else "fp32",
            "threads": torch.get_num_threads(),
            "compiled": setup.compile,
            "flops_per_token": setup.model.flops_per_token(setup.row_tokens),
        },
        "rounds": len(blocks["velopath"]),
        "steps_per_block": steps,
        "contenders": found,
        "left_out": left_out,
        "ratios": _ratios({name: [s["seconds"] for s in samples] for name, samples in blocks.items()}),
        "push": push,
        "log": log | {"share": log["ms_per_step"] / step_ms},
    }


def table(result: Mapping[str, Any]) -> str:
    """The result of `measure` as Markdown."""
    setup, push, ratios = result["setup"], result["push"], result["ratios"]
    lines = [
        "| | tokens/s | quartiles | ms a step | waiting for data |",
        "|---|--:|--:|--:|--:|",
    ]
    for name, found in result["contenders"].items():
        speed = found["tokens_per_second"]
        lines.append(
            f"| {name} | {speed['median']:,.0f} | {speed['low']:,.0f} to {speed['high']:,.0f} "
            f"| {found['step_ms']['median']:.3g} | {found['wait_share']['median']:.3%} |"
        )
    compiled = ", compiled" if setup["compiled"] else ""
    lines += [
        "",
        *(f"Left out: {why}." for why in result.get("left_out", ())),
        f"{setup['parameters'] / 1e6:.3g}M parameters, V={setup['vocab']}, {setup['rows']} x {setup['row_tokens']} "
        f"tokens a step, {setup['dtype']}{compiled}, torch threads on the CPU: {setup['threads']}; {result['rounds']} "
        f"rounds of {result['steps_per_block']} steps each, in turns.",
        "",
        "| step time, median of paired rounds | ratio |",
        "|---|--:|",
        *(f"| {RATIOS[name][0]} | {ratio:.3f} |" for name, ratio in ratios.items()),
        f"| step right after a push / other steps ({push['pushes']} pushes) | {push['ratio']:.3f} |",
        "",
        f"A push takes {push['call_ms']['median']:.3g} ms; the step after it "
        f"{push['pushed_step_ms']['median']:.4g} ms, other steps {push['other_step_ms']['median']:.4g} ms. "
        f"The log's own calls take {result['log']['ms_per_step']:.3g} ms a step, {result['log']['share']:.2%} of it.",
        "",
    ]
    return "\n".join(lines)


def _summary(samples: list[Sample], setup: Setup) -> dict[str, Any]:
    return {
        "tokens_per_second": summary([s["steps"] * setup.tokens / s["seconds"] for s in samples]),
        "step_ms": summary([1e3 * s["seconds"] / s["steps"] for s in samples]),
        "wait_share": summary([s["wait_seconds"] / s["seconds"] for s in samples]),
    }


def _kinds(setup: Setup, root: Path, stack: ExitStack, record: Record) -> dict[str, Callable[[], Trainer]]:
    """The contenders beside "velopath", by name, not made yet."""

    def loop(compile: bool, model: Callable[[], nn.Module] | None = None) -> Trainer:
        return PlainLoop(setup, root, record, compile=compile, model=model() if model else None)

    kinds: dict[str, Callable[[], Trainer]] = {
        "velopath, again": lambda: Velopath(setup, root, stack, record=record),
        "velopath, no log": lambda: Velopath(setup, root, stack, record=None),
        "velopath, F.cross_entropy": lambda: Velopath(setup, root, stack, record=record, loss=PlainLoss),
        "velopath, index_add": lambda: Velopath(setup, root, stack, record=record, loss=HandMadeDomains),
        "plain loop": lambda: loop(False),
    }
    if setup.compile:
        kinds["plain loop, compiled"] = lambda: loop(True)
    if setup.device.type == "cuda" or find_spec("torchtitan"):

        def titan() -> nn.Module:
            return TitanLoss(setup.model, setup.row_tokens, setup.device)

        kinds["plain loop, torchtitan's Llama"] = lambda: loop(setup.compile, titan)
    return kinds


RATIOS = {
    "speed over plain loop": ("plain loop (the best) / velopath", None, "velopath"),
    "speed over torchtitan's Llama": (
        "plain loop with torchtitan's Llama / velopath", "plain loop, torchtitan's Llama", "velopath",
    ),
    "domain losses": ("domain losses / `F.cross_entropy`", "velopath", "velopath, F.cross_entropy"),
    "index_add by hand": (
        "`index_add` by hand / `F.cross_entropy`", "velopath, index_add", "velopath, F.cross_entropy",
    ),
    "logging": (f"with a log record every {LOG_EVERY} steps / without", "velopath", "velopath, no log"),
    "same thing twice": ("the same thing twice, velopath again / velopath", "velopath, again", "velopath"),
}  # fmt: skip
"""Name -> (how the table calls it, contender above, contender below); None: the fastest plain loop."""


def _ratios(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    """The ratios whose contenders were measured."""
    found = {}
    for name, (_, above, below) in RATIOS.items():
        loops = [n for n in ("plain loop", "plain loop, compiled") if n in seconds]
        uppers = [n for n in ([above] if above else loops) if n in seconds]
        if uppers and below in seconds:
            found[name] = min(paired_ratio(seconds[upper], seconds[below]) for upper in uppers)
    return found
