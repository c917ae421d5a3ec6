"""Per-domain cross-entropy: every CPU form against fp64, its derivatives, its graph, its refusals."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from loss_cases import GRADIENT_TOLERANCE, GRID, IGNORE, Case, answer, largest_errors, problems
from velopath import _core, loss_cpu, loss_ops
from velopath.errors import ConfigError
from velopath.loss import domain_cross_entropy, linear_domain_cross_entropy

FORMS = ["reference", "cpu", "numba"]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()


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
    (first,) = torch.autograd.grad(loss * loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable|does not require grad"):
        first.sum().backward()


# ---- linear -----------------------------------------------------------------------------------------------


def linear_case(dtype=torch.float32, width=24):
    case = Case("", 45, 333, 4, 15, dtype=dtype)
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(case.rows, width, generator=generator).to(dtype)
    weight = torch.randn(case.vocab, width, generator=generator).to(dtype) * 0.3
    _, targets, domains = case.tensors()
    return hidden, weight, targets, domains


@pytest.mark.parametrize("backend", FORMS)
@pytest.mark.parametrize("chunk_bytes", [None, 1, 7 * 333 * 4])
def test_linear_matches_fp64(backend, chunk_bytes):
    hidden, weight, targets, domains = linear_case()
    h64, w64 = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logits = h64 @ w64.t()
    want = answer(logits.detach(), targets, domains, 4)
    logits.backward(want.gradient)
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss, sums = linear_domain_cross_entropy(
        h, w, targets, domains, n_domains=4, chunk_bytes=chunk_bytes, backend=backend
    )
    (loss * 3).backward()
    loss = loss.detach()
    # fp32 products of 24 terms: a little above the loss's own error.
    assert abs(float(loss) - float(want.loss)) < 2e-6 * float(want.loss)
    assert (sums - want.sums).abs().max() < 1e-4 and torch.equal(sums[1].double(), want.sums[1])
    for mine, exact in ((h.grad, h64.grad), (w.grad, w64.grad)):
        assert (mine - 3 * exact).abs().max() < 5e-6 * exact.abs().max()
    with torch.no_grad():
        again, _ = linear_domain_cross_entropy(
            h, w, targets, domains, n_domains=4, chunk_bytes=chunk_bytes, backend=backend
        )
    assert abs(float(again) - float(loss)) <= 1e-6 * float(loss)


@pytest.mark.parametrize("which", ["hidden", "weight"])
def test_linear_with_one_gradient(which):
    hidden, weight, targets, domains = linear_case()
    both = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    linear_domain_cross_entropy(*both, targets, domains, n_domains=4)[0].backward()
    one = [hidden.clone(), weight.clone()]
    one[which == "weight"].requires_grad_()
    linear_domain_cross_entropy(*one, targets, domains, n_domains=4, chunk_bytes=9000)[0].backward()
    mine, other = (one[1], both[1]) if which == "weight" else (one[0], both[0])
    assert (mine.grad - other.grad).abs().max() < 2e-6 * other.grad.abs().max()


def test_linear_refuses_a_second_backward():
    hidden, weight, targets, domains = linear_case()
    loss, _ = linear_domain_cross_entropy(hidden.requires_grad_(), weight, targets, domains, n_domains=4)
    loss.backward(retain_graph=True)
    with pytest.raises(ConfigError, match="backward ran twice"):
        loss.backward()


@pytest.mark.parametrize("autocast", [False, True])
def test_linear_in_bf16_with_fp32_master_weight(autocast):
    hidden, weight, targets, domains = linear_case()
    h = (hidden.clone() if autocast else hidden.bfloat16()).requires_grad_()
    w = weight.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss, sums = linear_domain_cross_entropy(h, w, targets, domains, n_domains=4, chunk_bytes=9000)
    loss.backward()
    loss = loss.detach()
    assert loss.dtype == sums.dtype == torch.float32
    assert h.grad.dtype == h.dtype and w.grad.dtype == torch.float32
    h64, w64 = hidden.double().requires_grad_(), weight.double().requires_grad_()
    exact, _ = linear_domain_cross_entropy(h64, w64, targets, domains, n_domains=4)
    exact.backward()
    exact = exact.detach()
    # bf16 keeps 8 bits of hidden, weight, logits and of the logits' gradient.
    assert abs(float(loss) - float(exact)) < 2**-7 * float(exact)
    for mine, true in ((h.grad, h64.grad), (w.grad, w64.grad)):
        assert (mine - true).norm() < 2**-6 * true.norm()


@pytest.mark.parametrize(
    ("rows", "row_bytes", "budget", "device", "expected"),
    [
        (4096, 128000, 0, "cpu", 512),
        (8192, 2 * 128256, 0, "cuda", 4096),
        (8192, 4 * 262144, 0, "cuda", 2048),
        (100, 10, 1, "cpu", 1),
        (1000, 1, 400, "cpu", 384),
        (1000, 1, 1000, "cpu", 1000),
    ],
)
def test_chunks_keep_the_budget(rows, row_bytes, budget, device, expected):
    assert loss_ops.chunk_rows(rows, row_bytes, budget, device) == expected


# ---- one graph --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("form", ["inplace", "copy", "linear"])
def test_compiles_to_one_graph(form, compiler):
    hidden, weight, targets, domains = linear_case()

    def step(h, w):
        if form == "linear":
            return linear_domain_cross_entropy(h, w, targets, domains, n_domains=4)
        return domain_cross_entropy(h @ w.t(), targets, domains, n_domains=4, inplace=form == "inplace")

    results = []
    for call in (step, torch.compile(step, fullgraph=True, backend=compiler)):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss, sums = call(h, w)
        (2 * loss).backward()
        with torch.no_grad():
            results.append((loss, sums, h.grad, w.grad, call(h, w)[0]))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(eager, compiled, rtol=2e-6, atol=1e-7)


def test_compiled_inplace_copies_no_logits():
    from torch._inductor.utils import run_fw_bw_and_get_code

    hidden, weight, targets, domains = linear_case()
    h, w = hidden.requires_grad_(), weight.requires_grad_()

    @torch.compile(fullgraph=True)
    def step():
        return domain_cross_entropy(h @ w.t(), targets, domains, n_domains=4, inplace=True)[0]

    _, (forward, backward) = run_fw_bw_and_get_code(lambda: step())
    assert "velopath.cross_entropy_.default(buf0" in forward
    assert forward.count("empty_strided_cpu((45, 333)") == 1  # the product itself
    assert "empty_strided_cpu((45, 333)" not in backward


def test_operators_pass_opcheck():
    logits, targets, domains = GRID[0].tensors()
    hidden, weight, t, d = linear_case()
    torch.library.opcheck(loss_ops.cross_entropy_, (logits.clone(), targets, domains, 3, IGNORE, "cpu"))
    torch.library.opcheck(loss_ops.cross_entropy, (logits, targets, domains, 3, IGNORE, "cpu"))
    torch.library.opcheck(
        loss_ops.linear_cross_entropy, (hidden, weight, t, d, 4, IGNORE, 9000, "cpu", True, True)
    )


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


def test_linear_arguments_that_do_not_fit_are_refused():
    hidden, weight, targets, domains = linear_case()
    with pytest.raises(ConfigError, match=r"\(45, 24\) and \(333, 23\)"):
        linear_domain_cross_entropy(hidden, weight[:, 1:], targets, domains, n_domains=4)
    with pytest.raises(ConfigError, match="chunk_bytes is 0"):
        linear_domain_cross_entropy(hidden, weight, targets, domains, n_domains=4, chunk_bytes=0)


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
    code = "import sys, velopath.loss as l; assert not {'triton', 'numba'} & set(sys.modules), 'imported'"
    torch_itself = subprocess.run(
        [sys.executable, "-c", "import sys, torch, torch.library; sys.exit('triton' in sys.modules)"]
    ).returncode
    if torch_itself:
        pytest.skip("this torch imports triton by itself")
    subprocess.run([sys.executable, "-c", code], check=True)


def test_triton_form_wants_a_gpu_or_the_interpreter(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    logits, targets, domains = GRID[0].tensors()
    with pytest.raises(ConfigError, match="move it to a GPU, or set TRITON_INTERPRET=1"):
        domain_cross_entropy(logits, targets, domains, n_domains=3, backend="triton")
