"""The compiled training step of a 160M model on the GPU: `benchmarks.step` there, with MFU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from benchmarks import step
from benchmarks.bench import Bench
from benchmarks.gpu_loss import matmul_flops_per_second
from benchmarks.trainers import Setup
from velopath.model import preset

PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}
"""Dense bf16 by the vendor's data sheet (SXM), for the first name found in the device's."""


def setup_of(bench: Bench, *, checking: bool = False) -> Setup:
    """160M parameters, 16 rows of 2048 tokens, bf16, compiled; `checking` takes a 7M model, smoke a tiny one."""
    if bench.smoke:
        # Compiling for the CPU takes longer than everything else here together.
        return Setup(bench.device, preset("tiny", vocab_size=333), rows=2, row_tokens=32)
    model, rows, row_tokens = (preset("small"), 4, 256) if checking else (preset("160m"), 16, 2048)
    return Setup(bench.device, model, rows, row_tokens, bf16=True, compile=True)


def run(bench: Bench) -> dict[str, Any]:
    """`step.measure` and "mfu": each contender's share of the measured matmul rate and of the data sheet's."""
    setup = setup_of(bench)
    steps, pushed = (2, 10) if bench.smoke else (10, 60)
    seconds = max(bench.seconds_left / 2, 10)
    result = step.measure(setup, rounds=bench.rounds(15), steps=steps, push_steps=pushed, seconds=seconds)
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
