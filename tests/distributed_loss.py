"""The loss in two gloo processes: run by test_loss_distributed.py as `distributed_loss.py RANK STORE`.

Prints one JSON object: check -> what is wrong with it, empty where nothing is.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from loss_cases import Case
from loss_option_cases import OPTIONS, exact, given_options, upstream_of, wrong
from velopath.loss import domain_cross_entropy, linear_domain_cross_entropy

VOCAB, WIDTH, DOMAINS = 333, 24, 4
FIRST = 170
"""Columns of rank 0: the shards are unequal."""


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    case = Case("", 45, VOCAB, DOMAINS, 15)
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(45, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    weight = (torch.randn(VOCAB, WIDTH, generator=generator, dtype=torch.float64) * 0.3).to(dtype)
    return (hidden, weight, *case.tensors()[1:])


def columns() -> slice:
    return slice(0, FIRST) if dist.get_rank() == 0 else slice(FIRST, VOCAB)


def sharded(name: str, backend: str, dtype: torch.dtype) -> list[str]:
    hidden, weight, targets, domains = inputs(dtype)
    targets[2:4] = torch.tensor([FIRST - 1, FIRST])  # both sides of the cut
    options = given_options(name, DOMAINS)
    h64, w64 = (x.double().clone().requires_grad_() for x in (hidden, weight))
    full = h64 @ w64.t()
    full.retain_grad()
    want = exact(full, targets, domains, DOMAINS, options)
    want[0].backward(upstream_of(want[0]))
    common: dict[str, Any] = {"n_domains": DOMAINS, "backend": backend, "process_group": dist.group.WORLD}
    h, w = hidden.clone().requires_grad_(), weight[columns()].clone().requires_grad_()
    got = linear_domain_cross_entropy(h, w, targets, domains, chunk_bytes=9000, **common, **options)
    got[0].backward(upstream_of(got[0]))
    assert h.grad is not None and w.grad is not None and h64.grad is not None and w64.grad is not None
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5  # products of 24 and 45 terms in fp32
    found = wrong(got, [h.grad, w.grad], want, [h64.grad, w64.grad[columns()]], tolerance)
    # From the logits themselves, which are exact: no product in between.
    leaf = full.detach()[:, columns()].to(dtype).clone().requires_grad_()
    again = domain_cross_entropy(leaf, targets, domains, inplace=True, **common, **options)
    again[0].backward(upstream_of(again[0]))
    assert leaf.grad is not None and full.grad is not None
    found += wrong(again, [leaf.grad], want, [full.grad[:, columns()]], tolerance)
    return [f for f in found if "gradient" in f or "counts" in f or dtype == torch.float64 or _far(f)]


def _far(what: str) -> bool:
    """More than what rounding the logits to fp32 explains."""
    return float(what.split("off by ")[1].split()[0]) > 3e-6


def recut() -> list[str]:
    """Another cut in the same group, of which only rank 1 has other columns than before."""
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(3))
    targets, domains = torch.tensor([0, FIRST, VOCAB - 2]), torch.zeros(3, dtype=torch.int64)
    shard = logits[:, :FIRST] if dist.get_rank() == 0 else logits[:, FIRST:-1]
    loss, _ = domain_cross_entropy(shard, targets, domains, n_domains=1, process_group=dist.group.WORLD)
    error = float(loss - nn.functional.cross_entropy(logits[:, :-1], targets))
    return [] if abs(error) < 1e-5 else [f"the loss is off by {error:.3g}"]


def compiled() -> list[str]:
    """One graph with a process group, too: the operators find it by its name."""
    hidden, weight, targets, domains = inputs(torch.float32)

    def step(h: Tensor, w: Tensor) -> Tensor:
        return linear_domain_cross_entropy(
            h, w, targets, domains, n_domains=DOMAINS, process_group=dist.group.WORLD, z_loss=1e-3
        )[0]

    results = []
    for call in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        h, w = hidden.clone().requires_grad_(), weight[columns()].clone().requires_grad_()
        call(h, w).backward()
        results.append((h.grad, w.grad))
    return [] if all(torch.equal(a, b) for a, b in zip(*results, strict=True)) else ["another gradient"]


class Model(nn.Module):
    """Embedding, one layer (checkpointed with its loss where asked), per-domain loss."""

    def __init__(self, recompute: bool = False) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embed, self.layer = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.recompute = recompute

    def _loss(self, tokens: Tensor, targets: Tensor, domains: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.tanh(self.layer(self.embed(tokens)))
        return linear_domain_cross_entropy(
            hidden, self.head.weight, targets, domains, n_domains=DOMAINS, z_loss=1e-3, softcap=20.0
        )

    def forward(self, tokens: Tensor, targets: Tensor, domains: Tensor) -> tuple[Tensor, Tensor]:
        if self.recompute:
            return checkpoint(self._loss, tokens, targets, domains, use_reentrant=False)  # type: ignore[no-any-return]
        return self._loss(tokens, targets, domains)


def data_parallel(kind: str, recompute: bool) -> list[str]:
    """Mean of two ranks' halves against one process with all rows; every row counts, so the means are equal."""
    generator = torch.Generator().manual_seed(2)
    tokens, targets = (torch.randint(0, VOCAB, (16,), generator=generator) for _ in range(2))
    domains = torch.arange(16) % DOMAINS
    alone, model = Model(), Model(recompute)
    loss, sums = alone(tokens, targets, domains)
    loss.backward()
    mine = slice(8 * dist.get_rank(), 8 * dist.get_rank() + 8)
    wrapped = DistributedDataParallel(model) if kind == "DDP" else fully_shard(model)
    _, part = wrapped(tokens[mine], targets[mine], domains[mine])
    _.backward()
    dist.all_reduce(part)
    found = [] if torch.allclose(part, sums, rtol=1e-6) else ["sums do not add up over ranks"]
    for (name, want), got in zip(alone.named_parameters(), model.parameters(), strict=True):
        grad: Any = got.grad
        grad = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
        error = float((grad - want.grad).abs().max() / want.grad.abs().max())  # type: ignore[union-attr]
        if not error < 1e-5:
            found.append(f"the gradient of {name} is off by {error:.3g}")
    return found


def main(rank: str, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=int(rank), world_size=2)
    results = {
        f"{name}, {backend}": sharded(name, backend, dtype)
        for name in OPTIONS
        for backend, dtype in (("reference", torch.float64), ("cpu", torch.float32), ("numba", torch.float32))
    }
    results["another cut"] = recut()
    results["compiled"] = compiled()
    for kind in ("DDP", "FSDP2"):
        for recompute in (False, True):
            results[f"{kind}{', checkpointed' if recompute else ''}"] = data_parallel(kind, recompute)
    dist.destroy_process_group()
    print(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
