"""Checks on the device, before anything is timed: fp64 reference, bitwise repeats, no host synchronisation.

Errors are ||x - exact|| / ||exact||. From logits, `exact` is fp64 arithmetic on the same 16-bit logits. From hidden
states the logits are rounded too: there plain torch in the same dtype says how much error is due to that.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import trainers
from benchmarks.bench import Bench
from benchmarks.gpu_step import setup_of
from benchmarks.losses import DOMAINS
from velopath.loss import domain_cross_entropy, linear_domain_cross_entropy
from velopath.loss.reference import cross_entropy_reference

GRADIENT_ERROR = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 2**-8}
REPEATS = 20
Found = dict[str, Any]


def run(bench: Bench) -> dict[str, Found]:
    """{check: {"ok", "detail"}}; a check that raises is one that failed."""
    checks: dict[str, Callable[[Bench], str]] = {}
    for dtype in (torch.float32,) if bench.smoke else GRADIENT_ERROR:
        for vocab in (1003, 1024) if bench.smoke else (1003, 32000, 50257, 128256):
            name = f"{str(dtype).removeprefix('torch.')}, V={vocab}"
            checks[f"logits against fp64, {name}"] = partial(_logits, dtype=dtype, vocab=vocab)
            checks[f"hidden states against fp64, {name}"] = partial(_linear, dtype=dtype, vocab=vocab)
    checks[f"{REPEATS} runs bitwise equal, logits"] = _repeats_from_logits
    checks[f"{REPEATS} runs bitwise equal, hidden states"] = _repeats_from_hidden
    checks["no host synchronisation in the loss"] = _loss_sync
    checks["no host synchronisation and no recompilation in a step"] = _step_sync
    found = {}
    for name, check in checks.items():
        try:
            found[name] = {"ok": True, "detail": check(bench)}
        except Exception as error:
            found[name] = {"ok": False, "detail": f"{type(error).__name__}: {error}"}
    return found


def table(result: Mapping[str, Found]) -> str:
    lines = ["| check | | |", "|---|---|---|"]
    for name, found in result.items():
        detail = " ".join(found["detail"].split())[:300].replace("|", "/")
        lines.append(f"| {name} | {'ok' if found['ok'] else '**failed**'} | {detail} |")
    return "\n".join(lines) + "\n"


def _ids(bench: Bench, rows: int, vocab: int) -> tuple[Tensor, Tensor]:
    """Targets with ignored ones and both ends of the vocabulary; domains of which the last stays empty."""
    targets = torch.randint(0, vocab, (rows,), device=bench.device)
    targets[::7] = -100
    targets[1], targets[2] = 0, vocab - 1
    return targets, torch.randint(0, DOMAINS - 1, (rows,), device=bench.device)


@torch.no_grad()
def _error(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact.double()).norm() / exact.double().norm())


def _expect(what: str, error: float, allowed: float) -> str:
    if not error <= allowed:  # NaN is no error that is allowed
        raise AssertionError(f"{what} is off by {error:.2g}, allowed {allowed:.2g}")
    return f"{what} {error:.1e}"


def _against(sums: Tensor, exact: Tensor, loss: Tensor, exact_loss: Tensor, allowed: float) -> list[str]:
    if not torch.equal(sums[1].double(), exact[1].double()):
        raise AssertionError(f"tokens per domain are {sums[1].tolist()}, expected {exact[1].tolist()}")
    return [
        _expect("loss", _error(loss, exact_loss), allowed),
        _expect("nats", _error(sums[0], exact[0]), allowed),
    ]


def _logits(bench: Bench, dtype: torch.dtype, vocab: int) -> str:
    logits = (4 * torch.randn(257, vocab, device=bench.device)).to(dtype)
    targets, domains = _ids(bench, 257, vocab)
    exact_leaf = logits.double().requires_grad_()
    exact_loss, exact = cross_entropy_reference(exact_leaf, targets, domains, DOMAINS, -100)
    exact_loss.backward()
    leaf = logits.clone().requires_grad_()
    loss, sums = domain_cross_entropy(leaf, targets, domains, n_domains=DOMAINS)
    loss.backward()
    said = _against(sums, exact, loss, exact_loss, 1e-6)
    said.append(_expect("gradient", _error(_grad(leaf), _grad(exact_leaf)), GRADIENT_ERROR[dtype]))
    return ", ".join(said)


def _linear(bench: Bench, dtype: torch.dtype, vocab: int) -> str:
    rows, width = 257, 256
    hidden = torch.randn(rows, width, device=bench.device).to(dtype)
    weight = (torch.randn(vocab, width, device=bench.device) / 16).to(dtype)
    targets, domains = _ids(bench, rows, vocab)

    def plain(to: torch.dtype) -> tuple[Tensor, Tensor, list[Tensor]]:
        leaves = [x.to(to).requires_grad_() for x in (hidden.clone(), weight.clone())]
        loss, sums = cross_entropy_reference(leaves[0] @ leaves[1].t(), targets, domains, DOMAINS, -100)
        loss.backward()
        return loss.detach(), sums, [_grad(leaf) for leaf in leaves]

    exact_loss, exact, exact_grads = plain(torch.float64)
    torch_loss, torch_sums, torch_grads = plain(dtype)
    leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
    # Small chunks, so that several are summed.
    budget = 100 * vocab * hidden.element_size()
    loss, sums = linear_domain_cross_entropy(*leaves, targets, domains, n_domains=DOMAINS, chunk_bytes=budget)
    loss.backward()
    allowed = 2 * max(_error(torch_loss, exact_loss), _error(torch_sums[0], exact[0])) + 1e-6
    said = _against(sums, exact, loss, exact_loss, allowed)
    for name, leaf, of_torch, of_exact in zip(
        ("gradient of hidden", "gradient of the weight"), leaves, torch_grads, exact_grads, strict=True
    ):
        allowed = 2 * _error(of_torch, of_exact) + GRADIENT_ERROR[dtype]
        said.append(_expect(name, _error(_grad(leaf), of_exact), allowed))
    return ", ".join(said)


def _grad(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad


def _repeats_from_logits(bench: Bench) -> str:
    rows, vocab = (64, 1003) if bench.smoke else (4096, 128256)
    logits = torch.randn(rows, vocab, device=bench.device, dtype=bench.dtype)
    targets, domains = _ids(bench, rows, vocab)

    def once() -> list[Tensor]:
        leaf = logits.clone().requires_grad_()
        loss, sums = domain_cross_entropy(leaf, targets, domains, n_domains=DOMAINS, inplace=True)
        loss.backward()
        return [loss.detach(), sums, _grad(leaf)]

    return _repeat(once)


def _repeats_from_hidden(bench: Bench) -> str:
    rows, width, vocab = (64, 32, 1003) if bench.smoke else (8192, 1024, 128256)
    hidden = torch.randn(rows, width, device=bench.device, dtype=bench.dtype)
    weight = torch.randn(vocab, width, device=bench.device, dtype=bench.dtype) * width**-0.5
    targets, domains = _ids(bench, rows, vocab)

    def once() -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
        loss, sums = linear_domain_cross_entropy(*leaves, targets, domains, n_domains=DOMAINS)
        loss.backward()
        return [loss.detach(), sums, *map(_grad, leaves)]

    return _repeat(once)


def _repeat(once: Callable[[], list[Tensor]]) -> str:
    first = once()
    for number in range(1, REPEATS):
        same = [torch.equal(a, b) for a, b in zip(first, once(), strict=True)]
        if not all(same):
            raise AssertionError(f"run {number} differs: loss, sums, gradients are equal: {same}")
    return "loss, sums, gradients"


@contextmanager
def _no_sync(device: torch.device) -> Iterator[None]:
    """Inside, torch raises where the host would wait for the GPU. A CPU has nothing to wait for."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _loss_sync(bench: Bench) -> str:
    rows, width, vocab = 96, 64, 1003
    hidden = torch.randn(rows, width, device=bench.device, dtype=bench.dtype)
    weight = torch.randn(vocab, width, device=bench.device, dtype=bench.dtype)
    targets, domains = _ids(bench, rows, vocab)

    def both() -> None:
        leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
        loss, _ = linear_domain_cross_entropy(*leaves, targets, domains, n_domains=DOMAINS)
        (loss * 0.5).backward()
        leaf = (hidden @ weight.t()).detach().requires_grad_()
        loss, _ = domain_cross_entropy(leaf, targets, domains, n_domains=DOMAINS, inplace=True)
        (loss * 0.5).backward()

    both()
    with _no_sync(bench.device):
        both()
    return "forward and backward, both entry points"


def _step_sync(bench: Bench) -> str:
    """Batches are drawn and pushed for, rates change, a record is begun; only its arrival may be waited for."""
    setup = setup_of(bench, size="check")
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="velopath-bench-")))
        trainers.write_data(root, setup)
        trainer = trainers.Velopath(setup, root, stack, record=lambda _: None)
        trainer.block(4)
        graphs = _graphs()
        with _no_sync(bench.device):
            for _ in range(6):  # within the warm-up: every step has another rate
                trainer.sampler.push(trainers.OTHER_SHARES)
                trainer.one_step()
            trainer.meter.record(trainers.PEAK)
        trainer.meter.flush()
        added = _graphs() - graphs
        if added:
            raise AssertionError(f"{added} graphs were compiled after the first steps, expected none")
    return f"6 steps with 6 rates and 6 pushes; {graphs} graphs in all"


def _graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])
