"""Cross-entropy from hidden states, and every form under torch.compile: numbers, chunks, one graph, operators."""

from __future__ import annotations

import pytest
import torch

from loss_cases import GRID, IGNORE, Case, answer
from velopath.errors import ConfigError
from velopath.loss import domain_cross_entropy, linear_domain_cross_entropy
from velopath.loss import ops as loss_ops

FORMS = ["reference", "cpu", "numba"]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()


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
    settings = (IGNORE, 1.0, 0.0, 0.0, 0.0, "mean", False, False, "", "cpu")
    torch.library.opcheck(loss_ops.cross_entropy_, (logits.clone(), targets, domains, None, 3, *settings))
    torch.library.opcheck(loss_ops.cross_entropy, (logits, targets, domains, None, 3, *settings))
    gradients = (True, True, False)
    torch.library.opcheck(
        loss_ops.linear_cross_entropy, (hidden, weight, t, d, None, None, 9000, *gradients, 4, *settings)
    )


def test_linear_arguments_that_do_not_fit_are_refused():
    hidden, weight, targets, domains = linear_case()
    with pytest.raises(ConfigError, match=r"\(45, 24\) and \(333, 23\)"):
        linear_domain_cross_entropy(hidden, weight[:, 1:], targets, domains, n_domains=4)
    with pytest.raises(ConfigError, match="chunk_bytes is 0"):
        linear_domain_cross_entropy(hidden, weight, targets, domains, n_domains=4, chunk_bytes=0)
