"""The Triton form on CPU tensors: run by test_kernels.py in a process that has TRITON_INTERPRET=1 from its start.

Prints one JSON object: case -> what is wrong with it, empty where nothing is.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace

import torch

from loss_cases import GRADIENT_TOLERANCE, GRID, Case, answer, largest_errors, problems
from loss_option_cases import OPTIONS, differences
from velopath.kernels import sharded_rows
from velopath.kernels.rows import row_config, scale_in_place
from velopath.loss import domain_cross_entropy, linear_domain_cross_entropy

# The interpreter truncates to bf16 where a GPU rounds.
TOLERANCE = GRADIENT_TOLERANCE | {torch.bfloat16: 2**-7}
# Rows too long for registers are read twice: 17000 columns of fp32, 33000 of 16 bits.
LONG = Case("row read twice", 2, 17000, 2, 2, ignored=())
SIXTEEN = [
    replace(case, name=f"{case.name}, {kind}", dtype=dtype)
    for case in (GRID[0], replace(LONG, vocab=33000))
    for kind, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16))
]
CASES = [*GRID, LONG, replace(LONG, name="all ignored, row read twice", ignored=(0, 1)), *SIXTEEN]


def grid(case: Case) -> list[str]:
    logits, targets, domains = case.tensors()
    assert row_config(case.vocab, logits.element_size())["WHOLE_ROW"] == ("twice" not in case.name)
    want = answer(logits, targets, domains, case.n_domains)
    leaf = logits.clone().requires_grad_()
    loss, sums = domain_cross_entropy(
        leaf, targets, domains, n_domains=case.n_domains, inplace=True, backend="triton"
    )
    loss.backward()
    errors = largest_errors(loss.detach(), sums, leaf.grad, want)
    with torch.no_grad():
        again, _ = domain_cross_entropy(logits, targets, domains, n_domains=case.n_domains, backend="triton")
    found = problems(errors, TOLERANCE[case.dtype])
    return found if torch.equal(again, loss.detach()) else [*found, "another loss without gradient"]


# Whole rows with every pair of options; rows read twice with all that has a branch of its own.
OPTION_CASES = {name: GRID[i % 3 if i < 6 else i + 2] for i, name in enumerate(OPTIONS)}
LONG_OPTIONS = ("options 0222", "options 1120", "options 2210")


def with_options(case: Case, name: str) -> list[str]:
    tolerance = 2 * TOLERANCE[case.dtype]  # 16 bits are rounded by the upstream gradient, too
    return differences(case, name, domain_cross_entropy, tolerance, backend="triton", inplace=True)


def shards() -> list[str]:
    """Statistics and gradient of one shard against the form in torch; 333 columns of a padded 384."""
    from velopath.loss import backends
    from velopath.loss.options import RowOptions

    found = []
    for options, dtype in ((RowOptions(), torch.float32), (RowOptions(0.7, 5.0), torch.float16)):
        buffer = torch.full((6, 384), float("nan"), dtype=dtype)
        logits = buffer[:, :333]
        logits.copy_(torch.randn(6, 333, generator=torch.Generator().manual_seed(3)) * 3)
        local = torch.tensor([0, 332, -1, 333, backends.NOT_COUNTED, 100])
        logits[4, 5] = float("nan")
        keep = local != backends.NOT_COUNTED
        factors = torch.rand(4, 6, dtype=torch.float64)
        factors[0] = 12.0
        results = []
        for form, x in (("reference", logits.clone()), ("triton", logits)):
            statistics = backends.statistics(form, x, local, options, padded=form == "triton")
            backends.write_gradient(form, x, local, factors, options, padded=form == "triton")
            results.append((statistics[:, keep], x.double()))
        (want, gradient), (got, mine) = results
        # The maximum left of no column is -inf in both.
        if not torch.allclose(got, want, rtol=2e-6, atol=2e-5):
            found.append(f"statistics are off by {(got - want).abs().max():.3g}")
        if not (error := float((mine - gradient).abs().max() / gradient.abs().max())) < TOLERANCE[dtype]:
            found.append(f"the gradient is off by {error:.3g}")
    assert sharded_rows.STATISTICS == 7 and sharded_rows.NOT_COUNTED.value == backends.NOT_COUNTED
    return found


def linear() -> list[str]:
    # 333 columns are padded to 384 in the chunk.
    case = Case("", 21, 333, 3, 7)
    _, targets, domains = case.tensors()
    generator = torch.Generator().manual_seed(5)
    hidden, weight = (torch.randn(n, 16, generator=generator) * 0.5 for n in (case.rows, case.vocab))
    results = []
    for dtype, form in ((torch.float64, "reference"), (torch.float32, "triton")):
        h, w = hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
        loss, sums = linear_domain_cross_entropy(
            h, w, targets, domains, n_domains=3, backend=form, chunk_bytes=9 * 333 * 4
        )
        (loss * 1.5).backward()
        results.append((loss.detach(), sums, h.grad, w.grad))
    return [
        f"{name} is off by {error:.3g}"
        for name, exact, mine in zip(("loss", "sums", "hidden", "weight"), *results, strict=True)
        if not (error := float((exact - mine).abs().max() / exact.abs().max())) < 3e-6
    ]


def invalid_ids_give_nan() -> list[str]:
    from velopath.kernels.domain_sums import reduce_rows
    from velopath.kernels.rows import write_rows

    logits, targets, domains = GRID[0].tensors()
    found = []
    for kind in ("target", "domain"):
        t, d, x, nats = targets.clone(), domains.clone(), logits.clone(), torch.empty(12)
        (t if kind == "target" else d)[3] = 33
        counted = (t != -100).sum()
        write_rows(x, t, nats, counted, -100, True)
        loss, _ = reduce_rows(nats, t, d, counted, 3, -100)
        rows = x.isnan().all(1).nonzero()[:, 0].tolist()
        if not loss.isnan() or rows != ([3] if kind == "target" else []):
            found.append(f"{kind}: loss {float(loss)}, NaN in the gradient of rows {rows}")
    return found


def nan_logit() -> list[str]:
    found = []
    for case in (GRID[0], LONG):
        logits, targets, domains = case.tensors()
        domains[:] = 1
        domains[0] = 0
        logits[0, 5] = float("nan")
        leaf = logits.clone().requires_grad_()
        loss, sums = domain_cross_entropy(leaf, targets, domains, n_domains=3, backend="triton")
        loss.backward()
        rows = leaf.grad.isnan().any(1).nonzero()[:, 0].tolist()
        if not loss.isnan() or sums[0].isnan().tolist() != [True, False, False] or rows != [0]:
            found.append(f"loss {float(loss)}, sums {sums.tolist()}, rows {rows}")
    return found


def padding_belongs_to_the_caller() -> list[str]:
    # A view of a wider tensor, as wide as our own padded buffers are.
    whole = torch.full((4, 384), 7.0)
    case = Case("", 4, 333, 1, 4)
    logits, targets, domains = case.tensors()
    whole[:, :333] = logits
    leaf = whole[:, :333].requires_grad_()
    domain_cross_entropy(leaf, targets, domains, n_domains=1, inplace=True, backend="triton")[0].backward()
    return [] if bool((whole[:, 333:] == 7).all()) else ["columns beyond the logits were overwritten"]


def scaling() -> list[str]:
    x = torch.randn(5000)
    want, same = x * 0.25, x.clone()
    scale_in_place(x, torch.tensor(0.25))
    scale_in_place(same, torch.tensor(1.0))
    return [] if torch.equal(x, want) and torch.equal(same * 0.25, want) else ["the product is wrong"]


def main() -> None:
    assert os.environ.get("TRITON_INTERPRET") == "1", "set before triton is imported"
    checks: dict[str, Callable[[], list[str]]] = {
        f.__name__: f
        for f in (linear, shards, invalid_ids_give_nan, nan_logit, padding_belongs_to_the_caller, scaling)
    }
    results = {case.name: grid(case) for case in CASES}
    results |= {name: with_options(case, name) for name, case in OPTION_CASES.items()}
    results |= {f"{name}, row read twice": with_options(LONG, name) for name in LONG_OPTIONS}
    print(json.dumps(results | {name: check() for name, check in checks.items()}))


if __name__ == "__main__":
    main()
