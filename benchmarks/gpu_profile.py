"""What limits our kernels: time by kernel, share of the machine's ceilings, registers and occupancy.

torch's profiler gives each kernel's time; bytes and FLOPs that must move are counted from the shapes, so a share
of the copy rate far below 1 says that the kernel waits for something else or moves more than it must. Which of
the two, Nsight Compute tells where `ncu` is installed and may read the counters: bytes that really came from
memory, hits in the L2 cache, warps at work.
"""

from __future__ import annotations

import csv
import io
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.bench import Bench
from benchmarks.losses import DOMAINS, random_ids
from velopath.loss import domain_cross_entropy, linear_domain_cross_entropy

CALLS = 5
LOGITS = ((8192, 32000), (8192, 128256))
LINEAR = ((8192, 4096, 128256), (8192, 4096, 32000))
ROW_KERNEL = "cross_entropy_rows"
METRICS = {
    "gpu__time_duration.sum": "ms",
    "dram__bytes_read.sum": "GB read",
    "dram__bytes_write.sum": "GB written",
    "lts__t_sector_hit_rate.pct": "L2 hits, %",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "warps active, %",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "compute, % of peak",
    "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed": "memory, % of peak",
}
"""Nsight Compute's names -> ours."""


def run(bench: Bench) -> dict[str, Any]:
    """{"shapes": [{"rows", "width" (linear only), "vocab", "kernels", "share_of_copy"}], "row_kernels", "ncu"}."""
    copy = _copy_bytes_per_second(bench)
    shapes = []
    for rows, vocab in bench.choose(LOGITS, ((96, 333),)):
        logits = torch.randn(rows, vocab, device=bench.device, dtype=bench.dtype).requires_grad_()
        targets, domains = random_ids(bench.device, rows, vocab)

        def from_logits(x: Tensor = logits, t: Tensor = targets, d: Tensor = domains) -> None:
            x.grad = None
            domain_cross_entropy(x, t, d, n_domains=DOMAINS, inplace=True)[0].backward()

        kernels = _kernel_times(bench, from_logits)
        shapes.append(
            {"rows": rows, "vocab": vocab, "kernels": kernels, **_share(bench, rows, vocab, kernels, copy)}
        )
        del logits, targets, domains, from_logits
    for rows, width, vocab in bench.choose(LINEAR, ((96, 32, 333),)):
        hidden = torch.randn(rows, width, device=bench.device, dtype=bench.dtype).requires_grad_()
        weight = (
            torch.randn(vocab, width, device=bench.device, dtype=bench.dtype)
            .mul_(width**-0.5)
            .requires_grad_()
        )
        targets, domains = random_ids(bench.device, rows, vocab)

        def from_hidden(
            h: Tensor = hidden, w: Tensor = weight, t: Tensor = targets, d: Tensor = domains
        ) -> None:
            h.grad = w.grad = None
            linear_domain_cross_entropy(h, w, t, d, n_domains=DOMAINS)[0].backward()

        kernels = _kernel_times(bench, from_hidden)
        found = {"rows": rows, "width": width, "vocab": vocab, "kernels": kernels}
        shapes.append(found | _share(bench, rows, vocab, kernels, copy))
        del hidden, weight, targets, domains, from_hidden
    return {"shapes": shapes, "row_kernels": _row_kernels(bench), "ncu": _counters(bench)}


def table(result: Mapping[str, Any]) -> str:
    lines = []
    for shape in result["shapes"]:
        width = f" D={shape['width']}" if "width" in shape else ""
        share = shape["share_of_copy"]
        note = "" if share is None else f"; row kernel at {share:.0%} of the copy rate"
        lines += [
            f"N={shape['rows']}{width} V={shape['vocab']}{note}",
            "",
            "| kernel | ms a call | share |",
            "|---|--:|--:|",
        ]
        total = sum(shape["kernels"].values())
        lines += [
            f"| {name} | {ms:.4g} | {ms / total:.1%} |" for name, ms in list(shape["kernels"].items())[:8]
        ]
        lines.append("")
    if result["row_kernels"]:
        lines += [
            "| row kernel | registers | spills | shared bytes | warps | occupancy |",
            "|---|--:|--:|--:|--:|--:|",
        ]
        lines += [
            f"| {k['name']} | {k['registers']} | {k['spills']} | {k['shared']} | {k['warps']} | {k['occupancy']:.0%} |"
            for k in result["row_kernels"]
        ]
        lines.append("")
    for name, counters in result["ncu"].items():
        numbers = ", ".join(f"{key} {value:.4g}" for key, value in counters.items() if key != "error")
        lines.append(f"Nsight Compute, {name}: {counters.get('error', numbers)}.")
    return "\n".join(lines) + "\n"


def _copy_bytes_per_second(bench: Bench) -> float:
    from benchmarks.gpu_loss import run_ceilings

    return run_ceilings(bench)["copy_bytes_per_second"]


def _kernel_times(bench: Bench, work: Callable[[], None]) -> dict[str, float]:
    """Milliseconds of each kernel (on a CPU: operator) in one call of `work`, the longest first."""
    from torch.profiler import ProfilerActivity, profile

    cuda = bench.device.type == "cuda"
    work()
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as trace:
        for _ in range(CALLS):
            work()
        if cuda:
            torch.cuda.synchronize(bench.device)
    times: dict[str, float] = {}
    for event in trace.key_averages():
        microseconds = event.self_device_time_total if cuda else event.self_cpu_time_total
        if microseconds > 0:
            name = event.key[:60]
            times[name] = times.get(name, 0.0) + microseconds / 1e3 / CALLS
    return dict(sorted(times.items(), key=lambda item: -item[1]))


def _share(bench: Bench, rows: int, vocab: int, kernels: Mapping[str, float], copy: float) -> dict[str, Any]:
    """The row kernel's bytes that must move, each logit read and written once, over its time and the copy rate."""
    size = torch.empty(0, dtype=bench.dtype).element_size()
    ms = sum(ms for name, ms in kernels.items() if ROW_KERNEL in name)
    return {"share_of_copy": 2 * rows * vocab * size / (ms / 1e3) / copy if ms else None}


def _row_kernels(bench: Bench) -> list[dict[str, Any]]:
    """Registers, spills, shared memory and occupancy of the row kernel's compiled variants in this process."""
    if bench.device.type != "cuda":
        return []
    from velopath.kernels.rows import cross_entropy_rows

    device = torch.cuda.get_device_properties(bench.device)
    cache: Any = cross_entropy_rows.device_caches[bench.device.index or 0][0]
    found = []
    for kernel in cache.values():
        warps, registers = kernel.metadata.num_warps, kernel.n_regs
        # Registers are handed out in units of 256 a warp; a multiprocessor runs up to 2048 threads here.
        by_registers = device.regs_per_multiprocessor // (-(-registers * 32 // 256) * 256 * warps)
        by_threads = device.max_threads_per_multi_processor // (32 * warps)
        by_shared = device.shared_memory_per_multiprocessor // max(kernel.metadata.shared + 1024, 1)
        programs = min(by_registers, by_threads, by_shared, 32)
        found.append(
            {
                "name": f"{kernel.metadata.name}, {warps} warps",
                "registers": registers,
                "spills": kernel.n_spills,
                "shared": kernel.metadata.shared,
                "warps": warps,
                "occupancy": programs * warps * 32 / device.max_threads_per_multi_processor,
            }
        )
    return found


def _counters(bench: Bench) -> dict[str, dict[str, Any]]:
    """The row kernel's counters by shape, from Nsight Compute; {"error": why} where it cannot be had."""
    if bench.device.type != "cuda":
        return {}
    found: dict[str, dict[str, Any]] = {}
    for rows, vocab in LOGITS:
        name = f"N={rows} V={vocab}"
        ncu = shutil.which("ncu")
        if ncu is None:
            found[name] = {"error": "ncu is not on the PATH"}
            continue
        command = [
            ncu, "--csv", "--clock-control", "none", "--metrics", ",".join(METRICS), "--kernel-name",
            f"regex:{ROW_KERNEL}", "--launch-skip", "2", "--launch-count", "1",
            sys.executable, "-m", "benchmarks.gpu_profile", str(rows), str(vocab),
        ]  # fmt: skip
        try:
            limit = min(90.0, max(bench.seconds_left, 1.0))
            ended = subprocess.run(
                command, capture_output=True, text=True, timeout=limit, cwd=Path(__file__).parents[1]
            )
            found[name] = read_counters(ended.stdout)
        except (OSError, subprocess.SubprocessError, ValueError) as error:
            found[name] = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
    return found


def read_counters(text: str) -> dict[str, Any]:
    """Nsight Compute's CSV -> {our name: value} in ms, GB and percent. Raises `ValueError` where it holds none."""
    start = text.find('"ID"')
    if start < 0:
        raise ValueError(f"ncu printed no table: {' '.join(text.split())[-200:]}")
    scale = {
        "byte": 1e-9,
        "Kbyte": 1e-6,
        "Mbyte": 1e-3,
        "Gbyte": 1.0,
        "ns": 1e-6,
        "us": 1e-3,
        "ms": 1.0,
        "s": 1e3,
    }
    found = {}
    for row in csv.DictReader(io.StringIO(text[start:])):
        if row.get("Metric Name") in METRICS:
            value = float(row["Metric Value"].replace(",", ""))
            found[METRICS[row["Metric Name"]]] = value * scale.get(row["Metric Unit"], 1.0)
    if not found:
        raise ValueError("ncu's table holds none of the metrics")
    return found


def _target(rows: int, vocab: int) -> None:
    """What ncu looks at: the row kernel on logits that are new each time, so that no cache is warm."""
    device = torch.device("cuda")
    targets, domains = random_ids(device, rows, vocab)
    for _ in range(4):
        logits = torch.randn(rows, vocab, device=device, dtype=torch.bfloat16).requires_grad_()
        domain_cross_entropy(logits, targets, domains, n_domains=DOMAINS, inplace=True)[0].backward()
    torch.cuda.synchronize()


if __name__ == "__main__":
    _target(int(sys.argv[1]), int(sys.argv[2]))
