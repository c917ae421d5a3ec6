"""Loss kernels on the GPU: from logits, from hidden states, and what the domains cost, beside the machine's ceilings.

Milliseconds of the device between events, forward and backward apart (velopath, Liger and QuACK compute the gradient
in the forward pass: compare the sum), and peak memory. A contender that cannot run here, or whose numbers differ
from eager torch's, is left out and named. N rows, D width, V vocabulary, K domains.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.bench import Bench
from benchmarks.peers import linear_peers, logits_peers
from benchmarks.timing import extra_mib, paired_ratio, summary, take_turns, timed
from velopath.loss import domain_cross_entropy, linear_domain_cross_entropy
from velopath.loss.ops import CpuRows, RowBackend, TritonRows, chunk_rows

DOMAINS = 8
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
Contender = Callable[..., Tensor | None]
"""The loss from leaves, targets and domains, to be differentiated; None where there is nothing to differentiate."""


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
        copy = torch.empty_like(logits)
        contenders: dict[str, Contender] = {
            "copy of the logits": lambda x, t, d, to=copy: _nothing(to.copy_(x.detach())),
            "eager, plain": plain,
            "eager, with domains": with_domains,
            "torch.compile, with domains": bench.compiled(with_domains),
            "velopath, in place": lambda x, t, d: domain_cross_entropy(
                x, t, d, n_domains=DOMAINS, inplace=True
            )[0],
            "velopath": lambda x, t, d: domain_cross_entropy(x, t, d, n_domains=DOMAINS)[0],
            **logits_peers(bench.device),
        }
        found = measure(bench, contenders, (logits,), _ids(bench, rows, vocab), overwritten=True)
        shapes.append({"rows": rows, "vocab": vocab, "itemsize": logits.element_size(), **found})
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
            "three matmuls": _matmuls(rows, vocab, hidden),
            "eager, with domains": _then(with_domains),
            "torch.compile, with domains": bench.compiled(_then(with_domains)),
            "velopath": lambda h, w, t, d: linear_domain_cross_entropy(h, w, t, d, n_domains=DOMAINS)[0],
            **linear_peers(bench.device),
        }
        found = measure(bench, contenders, (hidden, weight), _ids(bench, rows, vocab), overwritten=False)
        size = hidden.element_size()
        chunk = chunk_rows(rows, vocab * size, 0, bench.device.type)
        allowed = chunk * vocab * size + hidden.numel() * size + (weight.numel() * 4 if chunk < rows else 0)
        shape = {"rows": rows, "width": width, "vocab": vocab, "itemsize": size, "chunk_rows": chunk}
        shapes.append({**shape, "allowed_mib": allowed / 2**20, **found})
    return {"shapes": shapes, "left_out": skipped}


def run_domains(bench: Bench) -> dict[str, Any]:
    """{"domains": {K: {"with_ms", "without_ms", "ratio"}}}: row kernel and sums, against row kernel, sum and count."""
    rows, vocab = (96, 333) if bench.smoke else (8192, 32000)
    original = torch.randn(rows, vocab, device=bench.device, dtype=bench.dtype)
    logits, nats = torch.empty_like(original), torch.empty(rows, device=bench.device)
    targets, _ = _ids(bench, rows, vocab)
    backend: RowBackend = CpuRows(-100, False) if bench.device.type == "cpu" else TritonRows(-100)

    def write_rows() -> Tensor:
        counted = (targets != -100).sum()
        backend.write_rows(logits, targets, nats, counted, True, False)
        return counted

    def sampled(work: Callable[[], object]) -> Callable[[], float]:
        def sample() -> float:
            logits.copy_(original)
            return timed(bench.device, work)[0]

        return sample

    found = {}
    for count in (1, 8, 64, 1024):
        domains = torch.randint(0, count, (rows,), device=bench.device)
        contenders = {
            "with": sampled(
                lambda k=count, d=domains: backend.reduce_rows(nats, targets, d, write_rows(), k)
            ),
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


# ---- measuring --------------------------------------------------------------------------------------------


def measure(
    bench: Bench,
    contenders: Mapping[str, Contender],
    originals: Sequence[Tensor],
    ids: Sequence[Tensor],
    *,
    overwritten: bool,
) -> dict[str, Any]:
    """{"contenders": {name: times and memory}, "left_out": [why]}. `overwritten`: some write over their inputs.

    `extra_mib` is the peak over inputs and, from hidden states, over the gradient of the weight: that one is the
    parameter's own and exists in any training. The gradient of the logits counts where it is new memory.
    """
    leaves = tuple(x.clone().requires_grad_() for x in originals)
    held: dict[str, Tensor | None] = {}

    def restore() -> None:
        held.clear()
        for leaf, original in zip(leaves, originals, strict=True):
            leaf.grad = None
            if overwritten:
                leaf.detach().copy_(original)

    def forward(contender: Contender) -> None:
        held["loss"] = contender(*leaves, *ids)

    def backward() -> None:
        loss = held.pop("loss")
        if loss is not None:
            loss.backward()

    def sample(contender: Contender) -> list[float]:
        restore()
        return timed(bench.device, lambda: forward(contender), backward)

    reference = _values(contenders, leaves, ids, restore)
    good, left_out, extra = {}, [], {}
    for name, contender in contenders.items():
        try:
            _agree(name, contender, leaves, ids, restore, reference)
            restore()
            extra[name] = extra_mib(bench.device, lambda c=contender: (forward(c), backward()))
            good[name] = lambda c=contender: sample(c)
            sample(contender)
        except Exception as error:
            if name.startswith("velopath"):
                raise
            good.pop(name, None)
            left_out.append(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
    parameter_mib = leaves[1].numel() * leaves[1].element_size() / 2**20 if len(leaves) == 2 else 0.0
    samples = take_turns(good, bench.rounds(ROUNDS), seconds=min(60.0, max(bench.seconds_left / 3, 5)))
    restore()
    return {
        "rounds": len(next(iter(samples.values()))),
        "contenders": {name: _summary(s, extra[name] - parameter_mib) for name, s in samples.items()},
        "left_out": left_out,
    }


def _summary(samples: Sequence[Sequence[float]], extra: float) -> dict[str, Any]:
    return {
        "ms": summary([1e3 * sum(s) for s in samples]),
        "forward_ms": summary([1e3 * s[0] for s in samples]),
        "backward_ms": summary([1e3 * s[1] for s in samples]),
        "extra_mib": extra,
    }


def _values(
    contenders: Mapping[str, Contender],
    leaves: Sequence[Tensor],
    ids: Sequence[Tensor],
    restore: Callable[[], None],
) -> tuple[float, list[Tensor]]:
    """Loss and the first rows of the gradients, which say enough, by eager torch."""
    restore()
    loss = contenders["eager, with domains"](*leaves, *ids)
    assert loss is not None
    loss.backward()
    return float(loss.detach()), [_some(leaf) for leaf in leaves]


def _agree(
    name: str,
    contender: Contender,
    leaves: Sequence[Tensor],
    ids: Sequence[Tensor],
    restore: Callable[[], None],
    reference: tuple[float, list[Tensor]],
) -> None:
    """Run once, which also warms up, and compare with `reference`; `AssertionError` where it differs."""
    restore()
    loss = contender(*leaves, *ids)
    if loss is None:
        return
    loss.backward()
    tolerance = 1e-4 if leaves[0].dtype == torch.float32 else 3e-2
    got = [_some(leaf) for leaf in leaves]
    worst = max(float((a - b).norm() / b.norm()) for a, b in zip(got, reference[1], strict=True))
    value = float(loss.detach())
    if not (math.isclose(value, reference[0], rel_tol=tolerance) and worst <= tolerance):
        raise AssertionError(
            f"{name}: loss {value}, eager torch has {reference[0]}; gradients differ by {worst:.2g}"
        )


def _some(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad[:64].float().clone()


# ---- contenders -------------------------------------------------------------------------------------------


def plain(logits: Tensor, targets: Tensor, domains: Tensor) -> Tensor:
    return F.cross_entropy(logits, targets)


def with_domains(logits: Tensor, targets: Tensor, domains: Tensor) -> Tensor:
    """What one writes without velopath; the sums are made and kept until the end of the call."""
    nats = F.cross_entropy(logits, targets, reduction="none").float()
    sums = torch.zeros(2, DOMAINS, device=logits.device)
    sums[0].index_add_(0, domains, nats.detach())
    sums[1].index_add_(0, domains, torch.ones_like(nats))
    return nats.mean() + 0.0 * sums.sum()  # or the compiler would leave the sums out


def _then(forward: Contender) -> Contender:
    return lambda hidden, weight, targets, domains: forward(hidden @ weight.t(), targets, domains)


def _matmuls(rows: int, vocab: int, like: Tensor) -> Contender:
    """The products alone: logits, gradient of hidden, gradient of the weight."""
    logits = torch.empty(rows, vocab, dtype=like.dtype, device=like.device)

    def products(hidden: Tensor, weight: Tensor, targets: Tensor, domains: Tensor) -> None:
        with torch.no_grad():
            torch.mm(hidden, weight.t(), out=logits)
            torch.mm(logits, weight)
            torch.mm(logits.t(), hidden)

    return products


def _nothing(_: Tensor) -> None:
    return None


def _ids(bench: Bench, rows: int, vocab: int) -> tuple[Tensor, Tensor]:
    targets = torch.randint(0, vocab, (rows,), device=bench.device)
    return targets, torch.randint(0, DOMAINS, (rows,), device=bench.device)


# ---- tables -----------------------------------------------------------------------------------------------


def table_ceilings(result: Mapping[str, float]) -> str:
    copy, matmul = result["copy_bytes_per_second"] / 1e12, result["matmul_flops_per_second"] / 1e12
    return f"Copy {copy:.3g} TB/s, read and written; square matrix product {matmul:.4g} TFLOP/s.\n"


def table_shapes(result: Mapping[str, Any]) -> str:
    lines = []
    for part in result["shapes"]:
        width = f" D={part['width']}" if "width" in part else ""
        lines += [
            f"N={part['rows']}{width} V={part['vocab']}, {8 * part['itemsize']} bits, {part['rounds']} rounds",
            "",
            "| | ms | quartiles | forward | backward | extra MiB | times as fast as eager |",
            "|---|--:|--:|--:|--:|--:|--:|",
        ]
        eager = part["contenders"]["eager, with domains"]["ms"]["median"]
        for name, found in part["contenders"].items():
            ms = found["ms"]
            lines.append(
                f"| {name} | {ms['median']:.4g} | {ms['low']:.4g} to {ms['high']:.4g} "
                f"| {found['forward_ms']['median']:.4g} | {found['backward_ms']['median']:.4g} "
                f"| {found['extra_mib']:.0f} | {eager / ms['median']:.2f} |"
            )
        lines += ["", *(f"Left out: {why}." for why in part["left_out"]), ""]
    lines += [f"Left out: {why}." for why in result["left_out"]]
    return "\n".join(lines) + "\n"


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
