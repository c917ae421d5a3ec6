"""Loss kernels on the GPU: from logits, from hidden states, and what the domains cost, beside the machine's ceilings.

Milliseconds of the device between events, forward and backward apart (velopath, Liger and QuACK compute the gradient
in the forward pass: compare the sum), and peak memory. A contender that cannot run here, or whose numbers differ
from eager torch's, is left out and named. N rows, D width, V vocabulary, K domains.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.bench import Bench
from benchmarks.losses import (
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
    then,
    with_domains,
)
from benchmarks.peers import linear_peers, logits_peers
from benchmarks.timing import paired_ratio, summary, take_turns, timed
from velopath.loss import backends
from velopath.loss.ops import chunk_rows

ROUNDS = 50
LOGITS = ((8192, 32000), (8192, 128256), (16384, 50304), (8192, 151936), (4096, 262144))
LINEAR = (
    (8192, 4096, 128256),
    (8192, 4096, 32000),
    (16384, 2048, 50304),
    (8192, 4096, 151936),
    (8192, 2048, 262144),
)
SMOKE_LOGITS, SMOKE_LINEAR = ((96, 333),), ((96, 32, 333),)

# ---- parts ------------------------------------------------------------------------------------------------


def run_ceilings(bench: Bench) -> dict[str, float]:
    """{"copy_bytes_per_second" (read and written), "matmul_flops_per_second"} of this machine, medians."""
    count = 1 << 20 if bench.smoke else 1 << 30
    source = torch.randn(count, device=bench.device, dtype=bench.dtype)
    target = torch.empty_like(source)
    target.copy_(source)
    copies = [timed(bench.device, lambda: target.copy_(source))[0] for _ in range(bench.rounds(30))]
    moved = 2 * count * source.element_size()
    return {
        "copy_bytes_per_second": moved / summary(copies)["median"],
        "matmul_flops_per_second": matmul_flops_per_second(bench),
    }


def matmul_flops_per_second(bench: Bench) -> float:
    """Of square products of random matrices of 8192, in the dtype of the benchmark."""
    size = 256 if bench.smoke else 8192
    a, b = (torch.randn(size, size, device=bench.device, dtype=bench.dtype) for _ in range(2))
    out = torch.mm(a, b)
    seconds = [timed(bench.device, lambda: torch.mm(a, b, out=out))[0] for _ in range(bench.rounds(30))]
    return 2 * size**3 / summary(seconds)["median"]


def run_logits(bench: Bench) -> dict[str, Any]:
    """{"shapes": [part], "left_out"}: loss and gradient from logits that exist."""
    shapes, skipped = [], []
    for rows, vocab in bench.choose(LOGITS, SMOKE_LOGITS):
        if bench.seconds_left < 20 and shapes:
            skipped.append(f"N={rows} V={vocab}: no time was left")
            continue
        torch.compiler.reset()
        logits = torch.randn(rows, vocab, device=bench.device, dtype=bench.dtype)
        contenders: dict[str, Contender] = {
            "copy of the logits": copy_of(logits),
            "eager, plain": plain,
            EAGER: with_domains,
            "torch.compile, with domains": bench.compiled(with_domains),
            "velopath, in place": ours(inplace=True),
            "velopath": ours(),
            **logits_peers(bench.device),
        }
        arena = Arena(bench.device, (logits,), random_ids(bench.device, rows, vocab), overwritten=True)
        found = measure(arena, contenders, rounds=bench.rounds(ROUNDS), seconds=_budget(bench))
        shapes.append({"rows": rows, "vocab": vocab, "itemsize": logits.element_size(), **found})
        bench.keep({"shapes": shapes, "left_out": skipped})
    return {"shapes": shapes, "left_out": skipped}


def run_linear(bench: Bench) -> dict[str, Any]:
    """{"shapes": [part], "left_out"}: loss and both gradients from hidden states and the output weight."""
    shapes, skipped = [], []
    for rows, width, vocab in bench.choose(LINEAR, SMOKE_LINEAR):
        if bench.seconds_left < 40 and shapes:
            skipped.append(f"N={rows} D={width} V={vocab}: no time was left")
            continue
        torch.compiler.reset()
        hidden = torch.randn(rows, width, device=bench.device, dtype=bench.dtype)
        weight = torch.randn(vocab, width, device=bench.device, dtype=bench.dtype) * width**-0.5
        contenders: dict[str, Contender] = {
            "three matmuls": matmuls(rows, vocab, hidden),
            EAGER: then(with_domains),
            "torch.compile, with domains": bench.compiled(then(with_domains)),
            "velopath": ours_linear(),
            **linear_peers(bench.device),
        }
        ids = random_ids(bench.device, rows, vocab)
        arena = Arena(bench.device, (hidden, weight), ids, overwritten=False)
        found = measure(arena, contenders, rounds=bench.rounds(ROUNDS), seconds=_budget(bench))
        size = hidden.element_size()
        chunk = chunk_rows(rows, vocab * size, 0, bench.device.type)
        allowed = chunk * vocab * size + hidden.numel() * size + (weight.numel() * 4 if chunk < rows else 0)
        shape = {"rows": rows, "width": width, "vocab": vocab, "itemsize": size, "chunk_rows": chunk}
        shapes.append({**shape, "allowed_mib": allowed / 2**20, **found})
        bench.keep({"shapes": shapes, "left_out": skipped})
    return {"shapes": shapes, "left_out": skipped}


def run_domains(bench: Bench) -> dict[str, Any]:
    """{"domains": {K: {"with_ms", "without_ms", "ratio"}}}: row kernel and sums, against row kernel, sum and count."""
    rows, vocab = (96, 333) if bench.smoke else (8192, 32000)
    original = torch.randn(rows, vocab, device=bench.device, dtype=bench.dtype)
    logits, nats = torch.empty_like(original), torch.empty(rows, device=bench.device)
    targets, _ = random_ids(bench.device, rows, vocab)
    backend = "cpu" if bench.device.type == "cpu" else "triton"

    def write_rows() -> Tensor:
        counted = (targets != -100).sum()
        backends.write_rows(
            backend, logits, targets, nats, counted, -100, gradient=True, padded=False, details=None
        )
        return counted

    def with_sums(domains: Tensor, count: int) -> tuple[Tensor, Tensor]:
        return backends.reduce_rows(backend, nats, targets, domains, write_rows(), count, -100, None)

    def sampled(work: Callable[[], object]) -> Callable[[], float]:
        def sample() -> float:
            logits.copy_(original)
            return timed(bench.device, work)[0]

        return sample

    found = {}
    for count in (1, 8, 64, 1024):
        domains = torch.randint(0, count, (rows,), device=bench.device)
        contenders = {
            "with": sampled(partial(with_sums, domains, count)),
            "without": sampled(lambda: (write_rows(), nats.sum() / (targets != -100).sum())),
        }
        for sample in contenders.values():
            sample()
        samples = take_turns(contenders, bench.rounds(4 * ROUNDS), seconds=10)
        found[str(count)] = {
            "with_ms": summary([1e3 * s for s in samples["with"]]),
            "without_ms": summary([1e3 * s for s in samples["without"]]),
            "ratio": paired_ratio(samples["with"], samples["without"]),
        }
    return {"rows": rows, "vocab": vocab, "domains": found}


def _budget(bench: Bench) -> float:
    """Seconds to take samples of one shape for."""
    return min(60.0, max(bench.seconds_left / 3, 5.0))


# ---- tables -----------------------------------------------------------------------------------------------


def table_ceilings(result: Mapping[str, float]) -> str:
    copy, matmul = result["copy_bytes_per_second"] / 1e12, result["matmul_flops_per_second"] / 1e12
    return f"Copy {copy:.3g} TB/s, read and written; square matrix product {matmul:.4g} TFLOP/s.\n"


def table_domains(result: Mapping[str, Any]) -> str:
    lines = [
        f"N={result['rows']} V={result['vocab']}: row kernel and sums",
        "",
        "| K | with domains, ms | plain sum and count, ms | ratio |",
        "|--:|--:|--:|--:|",
    ]
    for count, found in result["domains"].items():
        lines.append(
            f"| {count} | {found['with_ms']['median']:.4g} | {found['without_ms']['median']:.4g} "
            f"| {found['ratio']:.3f} |"
        )
    return "\n".join(lines) + "\n"
