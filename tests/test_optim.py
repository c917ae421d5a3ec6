"""AdamW's groups, its rate as a tensor, clipping."""

import pytest
import torch

from velopath.errors import ConfigError
from velopath.model import Decoder, preset
from velopath.optim import build_optimizer, clip_grad_norm, current_rate, set_rate


def fill_gradients(model: torch.nn.Module, seed: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        weight.grad = scale * torch.randn(weight.shape, generator=generator)


def test_matrices_decay_and_norms_do_not():
    model = Decoder(preset("tiny"))
    optimizer = build_optimizer(model, weight_decay=0.3)
    decayed, plain = optimizer.param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    assert {p.ndim for p in decayed["params"]} == {2} and {p.ndim for p in plain["params"]} == {1}
    assert len(decayed["params"]) + len(plain["params"]) == len(list(model.parameters()))
    assert any(p is model.unembed_weight for p in decayed["params"])


def test_updates_follow_the_formula_with_a_new_rate_each_step():
    model = Decoder(preset("tiny", num_hidden_layers=1))
    optimizer = build_optimizer(model, weight_decay=0.2, betas=(0.8, 0.9), eps=1e-6)
    weight = model.model.layers[0].mlp.up_proj.weight
    expected = weight.detach().double()
    first = second = torch.zeros_like(expected)
    for step in range(4):
        rate = 3e-3 / (step + 1.7)
        fill_gradients(model, step)
        gradient = weight.grad.double()
        set_rate(optimizer, rate)
        assert current_rate(optimizer) == rate  # fp64 on a CPU: the path's rate to the last bit
        optimizer.step()
        first, second = 0.8 * first + 0.2 * gradient, 0.9 * second + 0.1 * gradient**2
        scaled = (first / (1 - 0.8 ** (step + 1))) / ((second / (1 - 0.9 ** (step + 1))).sqrt() + 1e-6)
        expected = expected * (1 - rate * 0.2) - rate * scaled
    assert (weight - expected).abs().max() < 1e-7


def test_a_tensor_rate_gives_the_bits_of_a_float_rate():
    results = []
    for as_float in (True, False):
        model = Decoder(preset("tiny"))
        optimizer = build_optimizer(model)
        assert isinstance(optimizer.param_groups[0]["lr"], torch.Tensor)
        if as_float:
            for group in optimizer.param_groups:
                group["lr"] = 0.0
        for step in range(3):
            fill_gradients(model, step)
            set_rate(optimizer, 1e-3 / (step + 0.3))
            optimizer.step()
        results.append(list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_clipping_scales_to_the_norm_and_returns_the_one_before():
    model = Decoder(preset("tiny"))
    fill_gradients(model, 0)
    before = [p.grad.clone() for p in model.parameters()]
    true = torch.sqrt(sum((g.double() ** 2).sum() for g in before))
    assert abs(clip_grad_norm(model.parameters(), None) / true - 1) < 1e-6
    assert abs(clip_grad_norm(model.parameters(), 0.0) / true - 1) < 1e-6
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))
    assert abs(clip_grad_norm(model.parameters(), 2.0) / true - 1) < 1e-6
    for weight, gradient in zip(model.parameters(), before, strict=True):
        assert torch.allclose(weight.grad, gradient * float(2.0 / true), rtol=1e-5)
    clip_grad_norm(model.parameters(), 5.0)
    assert abs(clip_grad_norm(model.parameters(), None) - 2.0) < 1e-4  # already small enough: untouched
    model.model.norm.weight.grad[3] = float("nan")
    assert clip_grad_norm(model.parameters(), 1.0).isnan()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"betas": (0.9, 1.0)}, r"betas\[1\] is 1.0; expected 0 <= betas\[1\] < 1"),
        ({"rate": float("nan")}, "rate is nan"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        build_optimizer(Decoder(preset("tiny")), **options)


def test_nothing_to_train_is_refused():
    with pytest.raises(ConfigError, match="no parameter that needs a gradient"):
        build_optimizer(Decoder(preset("tiny")).requires_grad_(False))
