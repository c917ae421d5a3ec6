"""The per-domain cross-entropy beside eager torch and torch.compile: milliseconds and extra memory, forward and
backward together, in the same run.

`run` measures a CPU, `run_gpu` a GPU (or, with `smoke`, the same code with tiny shapes on the CPU). Contenders take
turns in rotated order, warm; medians. Every contender's loss and gradient are compared before it is timed. N rows,
V vocabulary, D width, K domains.
"""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from velopath.loss import domain_cross_entropy, linear_domain_cross_entropy

DOMAINS = 8
Inputs = tuple[Tensor, ...]
Contender = Callable[..., tuple[Tensor, Tensor | None]]
"""Forward and backward over the leaves; returns the loss and, where it makes them, the sums."""


def run(quick: bool = False) -> dict[str, Any]:
    """Measure on the CPU; returns {"threads", "logits": part, "linear": part}.

    A part holds "shape" and, by contender, "ms" (median), "samples_ms" and "extra_mib": the peak of resident memory
    over what the inputs and their gradients take; of "logits" the gradient is new memory and counts.
    """
    rows, vocab, width, rounds = (1024, 8000, 128, 5) if quick else (4096, 32000, 512, 5)
    logits = torch.randn(rows, vocab)
    targets, domains = torch.randint(0, vocab, (rows,)), torch.randint(0, DOMAINS, (rows,))
    compiled = torch.compile(_with_domains)
    from_logits: dict[str, Contender] = {
        "copy of the logits": _copy(torch.empty_like(logits)),
        "eager, plain": _backward(_plain),
        "eager, with domains": _backward(_with_domains),
        "torch.compile, with domains": _backward(compiled),
        "velopath numba, in place": _backward(_ours("numba", inplace=True)),
        "velopath C++, in place": _backward(_ours("cpu", inplace=True)),
        "velopath C++": _backward(_ours("cpu", inplace=False)),
    }
    result: dict[str, Any] = {"threads": torch.get_num_threads()}
    result["logits"] = {
        "shape": {"rows": rows, "vocab": vocab, "dtype": "fp32"},
        "contenders": _measure(from_logits, (logits,), (targets, domains), rounds, _cpu_time),
    }
    del logits, from_logits
    gc.collect()
    leaves = (torch.randn(rows, width), torch.randn(vocab, width) * width**-0.5)
    linear: dict[str, Contender] = {
        "eager, with domains": _backward(_linear_then(_with_domains)),
        "velopath C++, chunks of 64 MiB": _backward(_linear_ours("auto")),
    }
    result["linear"] = {
        "shape": {"rows": rows, "width": width, "vocab": vocab, "dtype": "fp32"},
        "contenders": _measure(linear, leaves, (targets, domains), 3, _cpu_time),
    }
    return result


def run_gpu(quick: bool = False, smoke: bool = False) -> dict[str, Any]:
    """Measure on the GPU in bf16; returns {"device", "parts": [part]} with parts as `run` has them.

    Correctness first: against fp64, bitwise equal repeats, and no host synchronisation. Contenders: eager,
    torch.compile, Liger where it is installed. `quick` takes one shape; `smoke` tiny shapes on the CPU in fp32.
    """
    device = torch.device("cpu" if smoke else "cuda")
    dtype = torch.float32 if smoke else torch.bfloat16
    _check_device(device)
    shapes = [(8192, 4096, 32000), (8192, 4096, 128256), (16384, 2048, 50304)]
    shapes = [(96, 32, 333)] if smoke else shapes[:1] if quick else shapes
    measure_time, rounds = (_cpu_time, 2) if smoke else (_gpu_time, 10 if quick else 50)
    parts = []
    for rows, width, vocab in shapes:
        torch._dynamo.reset()
        ids = (
            torch.randint(0, vocab, (rows,), device=device),
            torch.randint(0, DOMAINS, (rows,), device=device),
        )
        logits = torch.randn(rows, vocab, device=device, dtype=dtype)
        from_logits: dict[str, Contender] = {
            "copy of the logits": _copy(torch.empty_like(logits)),
            "eager, with domains": _backward(_with_domains),
            "torch.compile, with domains": _backward(torch.compile(_with_domains)),
            "velopath, in place": _backward(_ours("auto", inplace=True)),
        }
        contenders = _measure(from_logits, (logits,), ids, rounds, measure_time)
        parts.append({"shape": {"rows": rows, "vocab": vocab, "dtype": str(dtype)}, "contenders": contenders})
        del logits, from_logits
        gc.collect()
        leaves = (
            torch.randn(rows, width, device=device, dtype=dtype),
            torch.randn(vocab, width, device=device, dtype=dtype) * width**-0.5,
        )
        linear: dict[str, Contender] = {
            "three matmuls": _matmuls(rows, vocab, leaves),
            "eager, with domains": _backward(_linear_then(_with_domains)),
            "torch.compile, with domains": _backward(torch.compile(_linear_then(_with_domains))),
            "velopath": _backward(_linear_ours("auto")),
        }
        liger = None if smoke else _liger()
        if liger is not None:
            linear["Liger, without domains"] = _backward(liger)
        contenders = _measure(linear, leaves, ids, rounds, measure_time)
        shape = {"rows": rows, "width": width, "vocab": vocab, "dtype": str(dtype)}
        parts.append({"shape": shape, "contenders": contenders})
    name = "cpu" if smoke else torch.cuda.get_device_name()
    return {"device": name, "parts": parts}


def table(result: Mapping[str, Any]) -> str:
    """Markdown: one table per part of `run` or `run_gpu`, with the ratio to eager with domains."""
    parts = result["parts"] if "parts" in result else [result["logits"], result["linear"]]
    where = result.get("device") or f"CPU, {result['threads']} threads"
    lines = []
    for part in parts:
        shape = ", ".join(f"{key}={value}" for key, value in part["shape"].items())
        lines += [
            f"**{where}: {shape}**",
            "",
            "| | ms | extra MiB | times as fast as eager |",
            "|---|--:|--:|--:|",
        ]
        eager = part["contenders"]["eager, with domains"]["ms"]
        for name, one in part["contenders"].items():
            lines.append(f"| {name} | {one['ms']:.4g} | {one['extra_mib']:.0f} | {eager / one['ms']:.2f} |")
        lines.append("")
    return "\n".join(lines)


# ---- contenders -------------------------------------------------------------------------------------------


def _plain(logits: Tensor, targets: Tensor, domains: Tensor) -> tuple[Tensor, Tensor | None]:
    return F.cross_entropy(logits, targets), None


def _with_domains(logits: Tensor, targets: Tensor, domains: Tensor) -> tuple[Tensor, Tensor | None]:
    """What one writes without velopath."""
    nats = F.cross_entropy(logits, targets, reduction="none").float()
    sums = torch.zeros(2, DOMAINS, device=logits.device)
    sums[0].index_add_(0, domains, nats.detach())
    sums[1].index_add_(0, domains, torch.ones_like(nats))
    return nats.mean(), sums


def _ours(backend: str, *, inplace: bool) -> Contender:
    def forward(logits: Tensor, targets: Tensor, domains: Tensor) -> tuple[Tensor, Tensor | None]:
        return domain_cross_entropy(
            logits, targets, domains, n_domains=DOMAINS, inplace=inplace, backend=backend
        )

    return forward


def _linear_then(forward: Contender) -> Contender:
    return lambda hidden, weight, targets, domains: forward(hidden @ weight.t(), targets, domains)


def _linear_ours(backend: str) -> Contender:
    def forward(hidden: Tensor, weight: Tensor, targets: Tensor, domains: Tensor) -> Any:
        return linear_domain_cross_entropy(
            hidden, weight, targets, domains, n_domains=DOMAINS, backend=backend
        )

    return forward


def _liger() -> Contender | None:
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except ImportError:
        return None
    loss = LigerFusedLinearCrossEntropyLoss()
    return lambda hidden, weight, targets, domains: (loss(weight, hidden, targets), None)


def _backward(forward: Contender) -> Contender:
    def both(*inputs: Tensor) -> tuple[Tensor, Tensor | None]:
        loss, sums = forward(*inputs)
        loss.backward()
        return loss.detach(), sums

    return both


def _copy(into: Tensor) -> Contender:
    def copy(logits: Tensor, targets: Tensor, domains: Tensor) -> tuple[Tensor, Tensor | None]:
        with torch.no_grad():
            into.copy_(logits)
        return logits.new_empty(0), None

    return copy


def _matmuls(rows: int, vocab: int, leaves: Inputs) -> Contender:
    """The products alone: logits, gradient of hidden, gradient of weight."""
    logits = torch.empty(rows, vocab, dtype=leaves[0].dtype, device=leaves[0].device)

    def products(hidden: Tensor, weight: Tensor, targets: Tensor, domains: Tensor) -> Any:
        with torch.no_grad():
            torch.mm(hidden, weight.t(), out=logits)
            torch.mm(logits, weight)
            torch.mm(logits.t(), hidden)
        return hidden.new_empty(0), None

    return products


# ---- measuring --------------------------------------------------------------------------------------------


def _measure(
    contenders: Mapping[str, Contender],
    originals: Inputs,
    ids: Inputs,
    rounds: int,
    timed: Callable[[Callable[[], object]], float],
) -> dict[str, dict[str, Any]]:
    leaves = tuple(x.clone().requires_grad_() for x in originals)

    def restore() -> None:
        with torch.no_grad():
            for leaf, original in zip(leaves, originals, strict=True):
                leaf.grad = None
                leaf.copy_(original)

    _agree(contenders, leaves, ids, restore)
    extra = {
        name: _extra_mib(lambda c=c: c(*leaves, *ids), restore, leaves) for name, c in contenders.items()
    }
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            restore()
            samples[name].append(timed(lambda c=contenders[name]: c(*leaves, *ids)) * 1e3)
    return {
        name: {"ms": statistics.median(s), "samples_ms": s, "extra_mib": extra[name]}
        for name, s in samples.items()
    }


def _agree(
    contenders: Mapping[str, Contender], leaves: Inputs, ids: Inputs, restore: Callable[[], None]
) -> None:
    """Also warms up: compiles, fills caches. The first contender with a loss is the one to agree with."""
    want: tuple[float, list[Tensor]] | None = None
    tolerance = 1e-4 if leaves[0].dtype == torch.float32 else 2e-2
    for name, contender in contenders.items():
        restore()
        loss, _ = contender(*leaves, *ids)
        if not loss.numel():
            continue
        # A part of the gradient says enough.
        got = float(loss), [leaf.grad[:64].float() for leaf in leaves if leaf.grad is not None]
        want = want or (got[0], [g.clone() for g in got[1]])
        worst = max(float((a - b).norm() / b.norm()) for a, b in zip(got[1], want[1], strict=True))
        if not abs(got[0] - want[0]) <= tolerance * want[0] or not worst <= tolerance:
            raise AssertionError(
                f"{name}: loss {got[0]}, expected {want[0]}; gradient differs by {worst:.2g}"
            )
    restore()


def _cpu_time(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _gpu_time(work: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _extra_mib(work: Callable[[], object], restore: Callable[[], None], leaves: Inputs) -> float:
    restore()
    gc.collect()
    if leaves[0].device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not reset.exists():
        return float("nan")  # not Linux

    def kib(name: str) -> int:
        return int(next(line.split()[1] for line in status.read_text().splitlines() if line.startswith(name)))

    ctypes.CDLL(None).malloc_trim(0)  # what earlier contenders freed would hide what this one takes
    reset.write_text("5")  # the peak starts again from here
    before_kib = kib("VmRSS")
    work()
    return (kib("VmHWM") - before_kib) / 1024


def _check_device(device: torch.device) -> None:
    """fp64, repeats and synchronisation at a small odd shape; `AssertionError` says which."""
    logits = torch.randn(300, 1003, device=device)
    targets = torch.randint(0, 1003, (300,), device=device)
    domains = torch.randint(0, DOMAINS, (300,), device=device)
    exact, exact_sums = domain_cross_entropy(
        logits.double(), targets, domains, n_domains=DOMAINS, backend="reference"
    )
    seen = []
    for _ in range(20):
        leaf = logits.clone().requires_grad_()
        loss, sums = domain_cross_entropy(leaf, targets, domains, n_domains=DOMAINS, inplace=True)
        loss.backward()
        assert leaf.grad is not None
        seen.append((loss.detach(), sums, leaf.grad))
    assert all(torch.equal(a, b) for other in seen[1:] for a, b in zip(seen[0], other, strict=True)), (
        "repeats"
    )
    assert abs(float(seen[0][0]) - float(exact)) <= 1e-6 * float(exact), "loss against fp64"
    assert float(((seen[0][1] - exact_sums) / exact_sums).abs().max()) <= 1e-6, "sums against fp64"
    if device.type == "cuda":
        leaf = logits.clone().requires_grad_()
        torch.cuda.set_sync_debug_mode("error")
        try:
            loss, _ = domain_cross_entropy(leaf, targets, domains, n_domains=DOMAINS, inplace=True)
            (loss * 0.5).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
