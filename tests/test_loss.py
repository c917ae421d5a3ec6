"""Per-domain cross-entropy: every CPU form against fp64, its derivatives, its refusals."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from loss_cases import GRADIENT_TOLERANCE, GRID, IGNORE, Case, answer, largest_errors, problems
from velopath import _core
from velopath.errors import ConfigError
from velopath.loss import cpu as loss_cpu
from velopath.loss import domain_cross_entropy

FORMS = ["reference", "cpu", "numba"]


def run(case: Case, backend: str, inplace: bool, upstream: float = 1.0):
    logits, targets, domains = case.tensors()
    leaf = logits.clone().requires_grad_()
    loss, sums = domain_cross_entropy(
        leaf, targets, domains, n_domains=case.n_domains, inplace=inplace, backend=backend
    )
    (loss * upstream).backward()
    return leaf, loss.detach(), sums, answer(logits, targets, domains, case.n_domains)


@pytest.mark.parametrize("backend", FORMS)
@pytest.mark.parametrize("case", GRID, ids=lambda c: c.name)
def test_forms_match_fp64(case, backend):
    for inplace in (False, True):
        leaf, loss, sums, want = run(case, backend, inplace)
        assert not problems(largest_errors(loss, sums, leaf.grad, want), 2e-6)
        assert loss.dtype == sums.dtype == torch.float32 and not sums.requires_grad
        assert sums.shape == (2, case.n_domains)
        # The exact number, not its rounding: tokens of all domains are the counted rows.
        assert int(sums[1].sum()) == want.counted


@pytest.mark.parametrize("instruction_set", _core.instruction_sets().split())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [1, 3, 17, 64, 2049, 4100])
def test_every_instruction_set_matches_fp64(vocab, dtype, instruction_set):
    case = Case("", 5, vocab, 1, 5, dtype=dtype)
    logits, targets, domains = case.tensors()
    want = answer(logits, targets, domains, 1)
    nats = torch.empty(5)
    bits = logits.clone()
    _core.cross_entropy_rows(
        (bits.view(torch.uint16) if dtype == torch.bfloat16 else bits).numpy(),
        targets.numpy(),
        nats.numpy(),
        scale=1 / want.counted,
        ignore_index=IGNORE,
        gradient=True,
        threads=2,
        instruction_set=instruction_set,
    )
    loss, sums = loss_cpu.reduce_rows(nats, targets, domains, torch.tensor(want.counted), 1, IGNORE)
    assert not problems(largest_errors(loss, sums, bits, want), GRADIENT_TOLERANCE[dtype])


@pytest.mark.parametrize("backend", ["cpu", "numba"])
def test_thread_count_changes_no_bit(backend):
    case = Case("", 37, 3001, 5, 37)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            leaf, loss, sums, _ = run(case, backend, True)
            results.append((leaf.grad, loss, sums))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("backend", FORMS)
def test_nan_reaches_its_row_and_no_other(backend):
    logits, targets, domains = Case("", 6, 2500, 3, 6, only_domains=(0, 2)).tensors()
    domains[:] = 0
    domains[4] = 2
    logits[4, 2400] = float("nan")
    logits[1, 7] = float("nan")  # an ignored row
    leaf = logits.clone().requires_grad_()
    loss, sums = domain_cross_entropy(leaf, targets, domains, n_domains=3, backend=backend)
    loss.backward()
    assert loss.isnan() and sums[0].isnan().tolist() == [False, False, True]
    assert sums[1].tolist() == [4.0, 0.0, 1.0]
    assert leaf.grad.isnan().any(1).tolist() == [False, False, False, False, True, False]
    assert leaf.grad[1].abs().max() == 0


def test_masked_logits_of_minus_infinity():
    logits, targets, domains = Case("", 4, 40, 1, 4, ignored=()).tensors()
    targets[:] = 3
    logits[:, 10:30] = -torch.inf
    want = answer(logits, targets, domains, 1)
    for backend in FORMS:
        leaf = logits.clone().requires_grad_()
        loss, sums = domain_cross_entropy(leaf, targets, domains, n_domains=1, backend=backend)
        loss.backward()
        assert not problems(largest_errors(loss.detach(), sums, leaf.grad, want), 2e-6)


def test_all_rows_ignored_give_zero_and_no_nan():
    for backend in FORMS:
        leaf, loss, sums, _ = run(next(c for c in GRID if c.name == "all ignored"), backend, False)
        assert loss == 0 and sums.abs().max() == 0 and leaf.grad.abs().max() == 0


def test_reference_derivatives_by_finite_differences():
    logits, targets, domains = Case("", 5, 7, 2, 5).tensors()
    x = logits.double().requires_grad_()

    def loss(z):
        return domain_cross_entropy(z, targets, domains, n_domains=2)[0]

    assert loss(x).dtype == torch.float64
    assert torch.autograd.gradcheck(loss, x) and torch.autograd.gradgradcheck(loss, x)


# ---- upstream gradients, in place -------------------------------------------------------------------------


@pytest.mark.parametrize("backend", FORMS)
@pytest.mark.parametrize("inplace", [False, True])
def test_upstream_gradient_scales_the_gradient(backend, inplace):
    leaf, _, _, want = run(GRID[0], backend, inplace, upstream=-2.5)
    assert (leaf.grad.double() + 2.5 * want.gradient).abs().max() * want.counted < 5e-6


def test_without_inplace_the_logits_stay_and_backward_may_run_twice():
    logits, targets, domains = GRID[0].tensors()
    leaf = logits.clone().requires_grad_()
    loss, _ = domain_cross_entropy(leaf, targets, domains, n_domains=3)
    (loss * 2).backward(retain_graph=True)
    (loss * 3).backward()
    want = answer(logits, targets, domains, 3)
    assert torch.equal(leaf.detach(), logits)
    assert (leaf.grad.double() - 5 * want.gradient).abs().max() * want.counted < 1e-5


def test_inplace_overwrites_a_leaf_counts_a_version_and_refuses_a_second_backward():
    logits, targets, domains = GRID[0].tensors()
    leaf = logits.clone().requires_grad_()
    version = leaf._version
    loss, _ = domain_cross_entropy(leaf, targets, domains, n_domains=3, inplace=True)
    assert leaf._version > version and not torch.equal(leaf.detach(), logits)
    loss.backward(retain_graph=True)
    assert torch.equal(leaf.grad, leaf.detach())
    with pytest.raises(ConfigError, match="backward ran twice"):
        loss.backward()


def test_inplace_is_noticed_by_whoever_saved_the_logits():
    logits, targets, domains = GRID[0].tensors()
    x = logits.clone().requires_grad_()
    capped = torch.tanh(x)  # its derivative needs its result
    loss, _ = domain_cross_entropy(capped, targets, domains, n_domains=3, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_inplace_leaves_logits_alone_where_no_gradient_is_needed():
    logits, targets, domains = GRID[0].tensors()
    before = logits.clone()
    domain_cross_entropy(logits, targets, domains, n_domains=3, inplace=True)
    with torch.no_grad():
        domain_cross_entropy(logits.requires_grad_(), targets, domains, n_domains=3, inplace=True)
    assert torch.equal(logits.detach(), before)


def test_columns_that_are_not_contiguous():
    logits, targets, domains = GRID[0].tensors()
    leaf = logits.t().contiguous().t().requires_grad_()
    assert leaf.stride(1) != 1
    with pytest.raises(ConfigError, match="contiguous columns"):
        domain_cross_entropy(leaf, targets, domains, n_domains=3, inplace=True)
    loss, _ = domain_cross_entropy(leaf, targets, domains, n_domains=3)
    loss.backward()
    want = answer(logits, targets, domains, 3)
    assert (leaf.grad.double() - want.gradient).abs().max() * want.counted < 2e-6


def test_second_derivative_is_refused_by_the_fast_forms():
    logits, targets, domains = GRID[0].tensors()
    leaf = logits.clone().requires_grad_()
    loss, _ = domain_cross_entropy(leaf, targets, domains, n_domains=3)
    # A gradient penalty would else be silently without effect.
    with pytest.raises(
        ConfigError, match="differentiated once; leave out create_graph=True, or use backend="
    ):
        torch.autograd.grad(loss, leaf, create_graph=True)


# ---- refusals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", FORMS)
def test_values_out_of_range_are_refused(backend):
    logits, targets, domains = GRID[0].tensors()
    for bad in (33, -1):
        wrong = targets.clone()
        wrong[5] = bad
        with pytest.raises(ConfigError, match=rf"target {bad} of row 5 is not in \[0, 33\)"):
            domain_cross_entropy(logits, wrong, domains, n_domains=3, backend=backend)
    for bad in (3, -1):
        wrong = domains.clone()
        wrong[4] = bad
        with pytest.raises(ConfigError, match=rf"domain {bad} at 4 is not in \[0, n_domains=3\)"):
            domain_cross_entropy(logits, targets, wrong, n_domains=3, backend=backend)
    padding = domains.clone()
    padding[1] = -1  # row 1 is ignored
    _, sums = domain_cross_entropy(logits, targets, padding, n_domains=3, backend=backend)
    assert sums[1].sum() == 11


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": torch.zeros(11, dtype=torch.int64)}, r"targets must be \(12,\).*\(11,\)"),
        ({"domains": torch.zeros(5, dtype=torch.int64)}, r"N=12 a multiple of B, they are \(5,\)"),
        ({"domains": torch.zeros(12)}, "domains must be int32 or int64, they are torch.float32"),
        (
            {"targets": torch.zeros(12, dtype=torch.uint8)},
            "targets must be int32 or int64, they are torch.uint8",
        ),
        ({"logits": torch.zeros(3, 4, 5)}, r"logits must be a floating \(N, columns\)"),
        ({"logits": torch.zeros(12, 33, dtype=torch.int64)}, "it is torch.int64"),
        ({"n_domains": 0}, "n_domains is 0"),
        ({"backend": "gpu"}, "backend is 'gpu'; expected one of auto, reference, triton, cpu, numba"),
        (
            {"backend": "cpu", "logits": torch.zeros(12, 33).double()},
            "not torch.float64; use backend='reference'",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change, message):
    logits, targets, domains = GRID[0].tensors()
    given = {
        "logits": logits,
        "targets": targets,
        "domains": domains,
        "n_domains": 3,
        "backend": "auto",
    } | change
    first = (given.pop("logits"), given.pop("targets"), given.pop("domains"))
    with pytest.raises(ConfigError, match=message):
        domain_cross_entropy(*first, **given)


def test_core_checks_its_own_arguments():
    logits, targets, nats = np.zeros((3, 4), np.float32), np.zeros(3, np.int64), np.zeros(3, np.float32)
    rest = {"scale": 1.0, "ignore_index": IGNORE, "gradient": True, "threads": 1}

    def refused(match, *arguments, **more):
        with pytest.raises(ValueError, match=match):
            _core.cross_entropy_rows(*arguments, **(rest | more))

    refused(r"target 4 of row 0 is not in \[0, 4\)", logits, targets + 4, nats)
    refused("logits must be float32", logits.astype(np.float64), targets, nats)
    refused("columns of logits must be contiguous", np.zeros((4, 3), np.float32).T, targets, nats)
    refused("one entry per row, 3", logits, targets[:2], nats)
    refused("targets must be int64", logits, targets.astype(np.int32), nats)
    refused("targets must be contiguous", logits, np.zeros(6, np.int64)[::2], nats)
    refused('instruction set "mmx" is not one of', logits, targets, nats, instruction_set="mmx")
    logits.setflags(write=False)
    refused("read-only", logits, targets, nats)


def test_importing_the_loss_imports_no_triton_and_no_numba():
    code = (
        "import sys, torch, torch.library; before = set(sys.modules)\n"  # some builds of torch import triton themselves
        "import velopath.loss; assert not {'triton', 'numba'} & (set(sys.modules) - before), 'imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_triton_form_wants_a_gpu_or_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    logits, targets, domains = GRID[0].tensors()
    with pytest.raises(ConfigError, match="move it to a GPU, or set TRITON_INTERPRET=1"):
        domain_cross_entropy(logits, targets, domains, n_domains=3, backend="triton")
