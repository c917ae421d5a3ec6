"""The compiled training step on the GPU: `benchmarks.step` there, for a 160M and a 1B model, with MFU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from benchmarks import step
from benchmarks.bench import Bench
from benchmarks.gpu_loss import matmul_flops_per_second
from benchmarks.trainers import Setup
from velopath.model import preset

PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}
"""Dense bf16 by the vendor's data sheet (SXM), for the first name found in the device's."""

FEW = ("velopath, F.cross_entropy", "plain loop, compiled", "plain loop, torchtitan's Llama")
"""What is trained beside ours at 1B: 16 bytes a parameter each, so not all fit together."""


def setup_of(bench: Bench, *, size: str = "160m") -> Setup:
    """bf16, compiled, 32k (160m) or 8k (1b) tokens a step; "check" is a 7M model, smoke takes a tiny one for all."""
    if bench.smoke:
        # Compiling for the CPU takes longer than everything else here together.
        return Setup(bench.device, preset("tiny", vocab_size=333), rows=2, row_tokens=32)
    name, rows, row_tokens = {"check": ("small", 4, 256), "160m": ("160m", 16, 2048), "1b": ("1b", 4, 2048)}[
        size
    ]
    return Setup(bench.device, preset(name), rows, row_tokens, bf16=True, compile=True)


def run(bench: Bench) -> dict[str, Any]:
    """The 160M model beside every other loop; see `measure`."""
    return measure(bench, setup_of(bench), share=0.5)


def run_1b(bench: Bench) -> dict[str, Any]:
    """The 1B model beside `FEW`. Raises `TimeoutError` where too little time is left to compile it."""
    if bench.seconds_left < 200 and not bench.smoke:
        raise TimeoutError(
            f"{bench.seconds_left:.0f} s are left and compiling takes about 200: run it with --only step_1b"
        )
    return measure(bench, setup_of(bench, size="1b"), share=0.6, only=FEW)


def measure(bench: Bench, setup: Setup, *, share: float, only: Sequence[str] = ()) -> dict[str, Any]:
    """`step.measure` within `share` of the time left, and "mfu": of the measured matmul rate, of the data sheet's."""
    steps, pushed = (2, 10) if bench.smoke else (10, 60)
    seconds = max(bench.seconds_left * share, 10)
    result = step.measure(
        setup, rounds=bench.rounds(15), steps=steps, push_steps=pushed, seconds=seconds, only=only
    )
    ceiling, name = matmul_flops_per_second(bench), _device_name(bench)
    peak = next((flops for key, flops in PEAK_FLOPS.items() if key in name), None)
    flops = setup.model.flops_per_token(setup.row_tokens)
    mfu = {}
    for contender, found in result["contenders"].items():
        rate = flops * found["tokens_per_second"]["median"]
        mfu[contender] = {"of_measured": rate / ceiling, "of_data_sheet": rate / peak if peak else None}
    return {**result, "mfu": mfu, "matmul_flops_per_second": ceiling}


def table(result: Mapping[str, Any]) -> str:
    lines = [
        step.table(result),
        f"| MFU | of the matmul rate measured here ({result['matmul_flops_per_second'] / 1e12:.3g} TFLOP/s) "
        "| of the data sheet's |",
        "|---|--:|--:|",
    ]
    for name, found in result["mfu"].items():
        sheet = "" if found["of_data_sheet"] is None else f"{found['of_data_sheet']:.1%}"
        lines.append(f"| {name} | {found['of_measured']:.1%} | {sheet} |")
    return "\n".join(lines) + "\n"


def _device_name(bench: Bench) -> str:
    return torch.cuda.get_device_name(bench.device) if bench.device.type == "cuda" else "CPU"
