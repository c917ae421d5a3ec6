"""Options of the per-domain cross-entropy in every CPU form against fp64: values, gradients, refusals, one graph."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from loss_cases import GRADIENT_TOLERANCE, GRID, IGNORE, Case
from loss_option_cases import OPTIONS, differences, exact, given_options, upstream_of, wrong
from velopath import _core
from velopath.errors import ConfigError
from velopath.loss import domain_cross_entropy, linear_domain_cross_entropy
from velopath.loss import ops as loss_ops

FORMS = ["reference", "cpu", "numba"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# 16 bits round twice: the gradient, and its product with the upstream gradient.
TWICE = {dtype: 2 * tolerance for dtype, tolerance in GRADIENT_TOLERANCE.items()}


@pytest.mark.parametrize("backend", FORMS)
@pytest.mark.parametrize("name", OPTIONS)
def test_options_match_fp64(name, backend):
    for case in GRID:
        for inplace in (False, True):
            found = differences(case, name, domain_cross_entropy, 2e-6, backend=backend, inplace=inplace)
            assert found == [], case.name


@pytest.mark.parametrize("backend", FORMS)
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_options_match_fp64_in_16_bits(dtype, backend):
    for i, name in enumerate(OPTIONS):
        case = replace(GRID[(0, 1, 10, 11)[i % 4]], dtype=dtype)
        found = differences(
            case, name, domain_cross_entropy, TWICE[dtype], backend=backend, inplace=i % 2 == 1
        )
        assert found == [], name


@pytest.mark.parametrize("instruction_set", _core.instruction_sets().split())
@pytest.mark.parametrize("name", ["options 0222", "options 1120", "options 2210"])
def test_every_instruction_set_computes_options(name, instruction_set, monkeypatch):
    from velopath.loss import cpu

    class Core:
        def __getattr__(self, function):
            call = getattr(_core, function)
            return lambda *args, **kw: call(*args, **kw, instruction_set=instruction_set)

    monkeypatch.setattr(cpu, "_core", Core())
    for case in (GRID[0], replace(GRID[10], dtype=torch.bfloat16), GRID[11]):
        assert differences(case, name, domain_cross_entropy, TWICE[case.dtype], backend="cpu") == []


def hidden_case(dtype=torch.float32):
    case = Case("", 45, 333, 4, 15)
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(45, 24, generator=generator).to(dtype)
    weight = (torch.randn(333, 24, generator=generator) * 0.3).to(dtype)
    return (hidden, weight, *case.tensors()[1:])


@pytest.mark.parametrize("backend", FORMS)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("main", [False, True])
def test_linear_with_options_and_main_gradient(name, backend, main):
    hidden, weight, targets, domains = hidden_case()
    options = given_options(name, 4)
    h64, w64 = hidden.double().requires_grad_(), weight.double().requires_grad_()
    want = exact(h64 @ w64.t(), targets, domains, 4, options)
    want[0].backward(upstream_of(want[0]))
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    main_grad = torch.zeros_like(weight) if main else None
    for _ in range(2 if main else 1):  # into what is there already
        h.grad = None
        got = linear_domain_cross_entropy(
            h,
            w,
            targets,
            domains,
            n_domains=4,
            backend=backend,
            main_grad=main_grad,
            chunk_bytes=9000,
            **options,
        )
        got[0].backward(upstream_of(got[0]))
    if main:
        assert w.grad is None
    d_weight = main_grad / 2 if main else w.grad
    # Products of 24 and of 45 terms in fp32.
    got = (got[0].detach(), got[1], got[2])
    found = wrong(got, [h.grad, d_weight], want, [h64.grad, w64.grad], 8e-6)
    assert [f for f in found if "tokens" not in f and "loss" not in f and "nats" not in f] == []
    torch.testing.assert_close(got[0].double(), want[0].detach(), rtol=3e-6, atol=3e-6)
    torch.testing.assert_close(got[2].double(), want[2], rtol=3e-6, atol=3e-6)


def test_main_gradient_in_fp32_of_bf16_weights():
    hidden, weight, targets, domains = hidden_case(torch.bfloat16)
    w, main_grad = weight.clone().requires_grad_(), torch.zeros(weight.shape)
    linear_domain_cross_entropy(hidden, w, targets, domains, n_domains=4, main_grad=main_grad)[0].backward()
    h64, w64 = hidden.double(), weight.double().requires_grad_()
    linear_domain_cross_entropy(h64, w64, targets, domains, n_domains=4)[0].backward()
    assert w.grad is None and main_grad.dtype == torch.float32
    assert (main_grad - w64.grad).norm() < 2**-7 * w64.grad.norm()


@pytest.mark.parametrize("backend", FORMS)
def test_extremes_with_options(backend):
    options = {
        "z_loss": 1e-4,
        "softcap": 30.0,
        "label_smoothing": 0.1,
        "return_tokens": True,
        "backend": backend,
    }
    logits, targets, domains = Case("", 6, 2500, 3, 6, ignored=(1,)).tensors()
    domains[:] = torch.tensor([0, 0, 0, 0, 2, 0])
    logits[4, 2400] = logits[1, 7] = float("nan")
    leaf = logits.clone().requires_grad_()
    loss, sums, tokens = domain_cross_entropy(
        leaf, targets, domains, n_domains=3, return_accuracy=True, **options
    )
    loss.backward()
    assert loss.isnan() and sums[0].isnan().tolist() == [False, False, True]
    assert tokens[0].isnan().tolist() == [False] * 4 + [True, False]
    assert sums[1].tolist() == [4.0, 0.0, 1.0] and sums[2, 2] == 0
    assert leaf.grad.isnan().any(1).tolist() == [False] * 4 + [True, False]
    assert leaf.grad[1].abs().max() == 0


@pytest.mark.parametrize("backend", FORMS)
def test_accuracy_counts_the_first_of_equal_logits(backend):
    logits = torch.zeros(4, 40)
    logits[:, [7, 9]] = 2.0
    targets = torch.tensor([7, 9, 8, IGNORE])
    _, sums = domain_cross_entropy(
        logits,
        targets,
        torch.tensor([0, 1, 1, 1]),
        n_domains=2,
        return_accuracy=True,
        backend=backend,
        softcap=1.0,
    )
    assert sums[1:].tolist() == [[1.0, 2.0], [1.0, 0.0]]


@pytest.mark.parametrize("backend", FORMS)
def test_uniform_upstream_gradient_of_rows_is_the_mean(backend):
    logits, targets, domains = GRID[0].tensors()
    results = []
    for reduction in ("mean", "none", "sum"):
        leaf = logits.clone().requires_grad_()
        loss, _ = domain_cross_entropy(
            leaf, targets, domains, n_domains=3, reduction=reduction, backend=backend
        )
        (loss.sum() / (1 if reduction == "mean" else int((targets != IGNORE).sum()))).backward()
        results.append(leaf.grad)
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(results[0], results[2], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("form", ["logits", "hidden", "hidden none", "main_grad"])
def test_options_compile_to_one_graph(form):
    torch._dynamo.reset()
    hidden, weight, targets, domains = hidden_case()
    options = given_options("options 1120", 4)
    main = torch.zeros_like(weight)
    if form == "hidden none":
        options["reduction"] = "none"
    if form == "main_grad":
        options["main_grad"] = main

    def step(h, w):
        if form == "logits":
            return domain_cross_entropy(h @ w.t(), targets, domains, n_domains=4, inplace=True, **options)
        return linear_domain_cross_entropy(h, w, targets, domains, n_domains=4, **options)

    results = []
    for call in (step, torch.compile(step, fullgraph=True)):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        main.zero_()
        loss, sums, tokens = call(h, w)
        loss.backward(upstream_of(loss))
        results.append((loss, sums, tokens, h.grad, main.clone() if form == "main_grad" else w.grad))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(eager, compiled, rtol=2e-6, atol=1e-7)
    assert results[0][4].abs().max() > 0


def test_operators_with_options_pass_opcheck():
    logits, targets, domains = GRID[0].tensors()
    hidden, weight, t, d = hidden_case()
    weights = torch.ones(4)
    settings = (4, IGNORE, 0.5, 20.0, 0.1, 1e-3, "none", True, True, "", "cpu")
    torch.library.opcheck(loss_ops.cross_entropy_, (logits.clone(), targets, domains, weights, *settings))
    torch.library.opcheck(loss_ops.cross_entropy, (logits, targets, domains, weights, *settings))
    for upstream in (None, torch.rand(45)):
        arguments = (hidden, weight, t, d, weights, upstream, 9000, True, True, True, *settings)
        torch.library.opcheck(loss_ops.linear_cross_entropy, arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction": "max"}, "reduction is 'max'; expected one of mean, sum, none"),
        ({"label_smoothing": 1.5}, "label_smoothing is 1.5; expected a finite number from 0 to 1"),
        ({"z_loss": float("nan")}, "z_loss is nan"),
        ({"softcap": 0.0}, "softcap is 0.0; expected a finite number above 0 or None"),
        ({"logit_scale": -1.0}, "logit_scale is -1.0; expected a finite number above 0$"),
        ({"domain_weights": torch.ones(2)}, r"floating \(3,\) tensor.*torch.float32 \(2,\)"),
        ({"domain_weights": torch.tensor([1.0, -1.0, 0.0])}, r"domain_weights\[1\] is -1.0"),
        ({"domain_weights": torch.ones(3, requires_grad=True)}, "get no gradient"),
        ({"process_group": "world"}, "torch.distributed is not initialised"),
    ],
)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_options_out_of_range_are_refused(options, message, backend):
    logits, targets, domains = GRID[0].tensors()
    with pytest.raises(ConfigError, match=message):
        domain_cross_entropy(logits, targets, domains, n_domains=3, backend=backend, **options)


def test_main_gradient_that_does_not_fit_is_refused():
    hidden, weight, targets, domains = hidden_case()
    for bad in (weight[1:].clone(), weight.bfloat16(), weight.clone().requires_grad_()):
        with pytest.raises(ConfigError, match=r"main_grad must be torch.float32 \(333, 24\)"):
            linear_domain_cross_entropy(hidden, weight, targets, domains, n_domains=4, main_grad=bad)
