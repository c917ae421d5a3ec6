"""Every kind of path: closed form = stepped = resumed at every step, on the step and the token axis, under torch."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim.lr_scheduler import LambdaLR

from velopath.errors import ConfigError
from velopath.optim_path import PathLR
from velopath.schedule import SHAPES, LrPath
from velopath.schedule_tokens import BatchRamp, TokenPath

PEAK = 2e-3


def zoo(shape: str, warmup: int, steps: int, floor: float) -> dict[str, LrPath]:
    """One path of every kind; `steps` is a slice's."""
    slices = [steps, steps + 7, steps]
    main = LrPath.main(PEAK, warmup)
    return {
        "main": main,
        "branch": main.branch(warmup + steps, steps, shape, floor),
        "ptfs": LrPath.ptfs(PEAK, warmup, warmup + steps, shape, floor),
        "rewarm": LrPath.cpt(PEAK, slices, min(warmup, steps - 1), shape=shape, floor=floor),
        "end_rate": LrPath.cpt(
            PEAK, slices, min(warmup, steps - 1), mode="end_rate", shape=shape, floor=floor
        ),
        "one_decay": LrPath.cpt(
            PEAK, slices, min(warmup, steps - 1), mode="one_decay", shape=shape, floor=floor
        ),
        "wsd": LrPath.wsd(PEAK, warmup, warmup + 2 * steps, 0.2, shape, floor),
        "wsd_s": LrPath.wsd_s(
            PEAK, slices, min(warmup, steps // 2), decay_share=0.4, shape=shape, floor=floor
        ),
        "infinite": LrPath.infinite(PEAK, PEAK / 4, warmup, steps, shape),
        "annealed": LrPath.infinite(PEAK, PEAK / 4, warmup, steps, shape).branch(
            warmup + 2 * steps, steps, shape, min(floor, PEAK / 4)
        ),
    }


class Stepper:
    """A path walked as a state machine: one piece after the other, forgetting where it came from."""

    def __init__(self, path: LrPath, step: int = 0) -> None:
        self.pieces = list(path.segments)
        self.step = step

    def next(self) -> float:
        while len(self.pieces) > 1 and self.pieces[1].start <= self.step:
            self.pieces.pop(0)
        piece, done = self.pieces[0], self.step - self.pieces[0].start
        self.step += 1
        if done < piece.warmup_steps:
            return piece.warm_from + (piece.peak - piece.warm_from) * (done + 1) / piece.warmup_steps
        length = None if piece.steps is None else piece.steps - piece.warmup_steps
        done -= piece.warmup_steps
        if length is None or piece.shape == "constant":
            return piece.peak
        if done >= length:
            return piece.floor
        x, drop = done / length, piece.peak - piece.floor
        factor = math.prod(f for at, f in piece.factors if at <= x)
        half = piece.half_life or length / 8
        by_shape = {
            "cosine": piece.floor + drop * math.cos(math.pi * x / 2) ** 2,
            "linear": piece.peak - drop * x,
            "sqrt": piece.peak - drop * math.sqrt(x),
            "knee": piece.peak if x < piece.hold else piece.peak - drop * (x - piece.hold) / (1 - piece.hold),
            "multistep": max(piece.floor, piece.peak * factor),
            "exponential": max(piece.floor, piece.peak * 0.5 ** (done / half)),
        }
        return by_shape[piece.shape]


@given(
    shape=st.sampled_from(SHAPES),
    warmup=st.integers(0, 9),
    steps=st.integers(10, 40),
    floor=st.floats(0.01, 0.5).map(lambda share: share * PEAK),
    resumed_at=st.integers(0, 120),
)
@settings(max_examples=40, deadline=None)
def test_closed_form_is_stepping_is_resuming(
    shape: str, warmup: int, steps: int, floor: float, resumed_at: int
) -> None:
    for name, path in zoo(shape, warmup, steps, floor).items():
        again = LrPath.from_json(json.loads(json.dumps(path.to_json())))
        assert again == path, name
        walk, resumed = Stepper(path), Stepper(again, resumed_at)
        for step in range(140):
            expected = walk.next()
            assert path.rate(step) == pytest.approx(expected, rel=1e-12, abs=1e-18), (name, step)
            if step >= resumed_at:
                assert resumed.next() == pytest.approx(path.rate(step), rel=1e-12, abs=1e-18), (name, step)


def test_wsd_and_wsd_s_and_the_infinite_rate_as_tables() -> None:
    wsd = LrPath.wsd(1.0, 10, 110, decay_share=0.2, shape="linear")  # decay of 22 from 88
    assert wsd.rates([0, 9, 87, 88, 99, 110]).tolist() == pytest.approx([0.1, 1, 1, 1, 0.5, 0])
    assert (wsd.kind, wsd.end_step) == ("wsd", 110)
    s = LrPath.wsd_s(1.0, [100, 50], 10, decay_share=0.2, rewarm_steps=4, shape="linear", floor=0.2)
    # slice 1 decays from 80 to 100, slice 2 warms up over 100 .. 103 from the floor and decays from 140 to 150
    assert s.rates([4, 79, 80, 90, 100, 103, 104, 139, 145, 150]).tolist() == pytest.approx(
        [0.5, 1, 1, 0.6, 0.4, 1, 1, 1, 0.6, 0.2]
    )
    assert LrPath.wsd_s(1.0, [100, 50], decay_share=0.2, shape="linear").rate(100) == 1.0  # at once
    endless = LrPath.infinite(1.0, 0.25, 10, 100)
    assert endless.rates([9, 10, 60, 110, 10**9]).tolist() == pytest.approx([1, 1, 0.625, 0.25, 0.25])
    annealed = endless.branch(500, 100, "linear")
    assert annealed.rates([499, 500, 550, 600]).tolist() == pytest.approx([0.25, 0.25, 0.125, 0])
    with pytest.raises(ConfigError, match="slice 2 has 5 steps: a warm-up of 4 and a decay of 2 do not fit"):
        LrPath.wsd_s(1.0, [100, 5], 10, decay_share=0.4, rewarm_steps=4)
    with pytest.raises(ConfigError, match="floor 0.5 is above the peak 0.1"):
        LrPath.infinite(0.1, 0.5, 10, 100)


@given(
    shape=st.sampled_from(SHAPES),
    warmup=st.integers(0, 9),
    steps=st.integers(10, 40),
    batch=st.integers(1, 5000),
)
@settings(max_examples=40, deadline=None)
def test_tokens_at_a_constant_batch_are_steps(shape: str, warmup: int, steps: int, batch: int) -> None:
    by_step = LrPath.main(PEAK, warmup).branch(warmup + 20, steps, shape, PEAK / 10)
    main = TokenPath(LrPath.main(PEAK, warmup * batch), BatchRamp.constant(batch))
    by_token = main.branch(warmup + 20, steps * batch, shape, PEAK / 10)
    assert by_token.end_step == by_step.end_step
    for step in range(warmup + steps + 30):
        assert by_token.rate(step) == pytest.approx(by_step.rate(step), rel=1e-12), step
    assert TokenPath.from_json(json.loads(json.dumps(by_token.to_json()))) == by_token


def test_a_growing_batch_keeps_the_token_axis() -> None:
    """The rate is a function of the tokens read, whatever the batch: half of them read is half of the decay."""
    ramp = BatchRamp.linear(100, 400, steps=30, stages=3)  # 100, 200, 300 for 10 updates each, then 400
    assert ramp.stages == ((0, 100), (10, 200), (20, 300), (30, 400))
    assert [ramp.tokens_before(s) for s in (0, 10, 15, 30, 40)] == [0, 1000, 2000, 6000, 10000]
    assert [ramp.step_at(t) for t in (0, 1, 1000, 1001, 6000, 6001, 10000)] == [0, 1, 10, 11, 30, 31, 40]
    path = TokenPath(LrPath.ptfs(1.0, 1000, 11000, "linear"), ramp)
    assert path.end_step == 43  # 10000 tokens before update 40, 11200 before 43
    assert path.rate(4) == 0.5  # 500 of 1000 warm-up tokens once it is done
    assert path.rate(30) == pytest.approx(0.5)  # 6000 tokens: 5000 of 10000 of the decay
    branch = TokenPath(LrPath.main(1.0), ramp).branch(20, 2400, "linear")
    assert branch.rates([19, 20, 24, 28]).tolist() == pytest.approx([1, 1, 0.5, 0])
    for step in range(60):
        assert ramp.step_at(ramp.tokens_before(step)) == step
    with pytest.raises(ConfigError, match="rising steps from 0"):
        BatchRamp(((5, 100),))
    with pytest.raises(ConfigError, match="0 tokens an update from step 0 on"):
        BatchRamp.constant(0)


def optimizer_of(rate: float) -> torch.optim.Optimizer:
    weight, bias = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))
    groups = [{"params": [weight]}, {"params": [bias], "lr": rate / 10}]
    return torch.optim.AdamW(groups, lr=rate)


@pytest.mark.parametrize("kind", sorted(zoo("cosine", 5, 20, 1e-4)))
@pytest.mark.parametrize("scheduler", [PathLR, lambda o, p: LambdaLR(o, p.multiplier)])
def test_the_groups_of_an_optimiser_carry_the_paths_rate(kind: str, scheduler: Any) -> None:
    path = zoo("cosine", 5, 20, 1e-4)[kind]
    optimizer = optimizer_of(path.peak)
    schedule = scheduler(optimizer, path)
    for step in range(90):
        big, small = (float(group["lr"]) for group in optimizer.param_groups)
        assert big == pytest.approx(path.rate(step), rel=1e-12)
        assert small == pytest.approx(path.rate(step) / 10, rel=1e-12)
        if step == 40:  # resume in a new process
            state = json.loads(json.dumps(schedule.state_dict())) if scheduler is PathLR else None
            if state is not None:
                optimizer = optimizer_of(path.peak)
                schedule = scheduler(optimizer, path)
                schedule.load_state_dict(state)
                assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(path.rate(40), rel=1e-12)
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize("scheduler", [PathLR, lambda o, p: LambdaLR(o, p.multiplier)])
def test_the_groups_carry_the_rate_of_the_tokens_read_while_the_batch_grows(scheduler: Any) -> None:
    """100 tokens an update, 200 from update 10 on, 300 from 20: a warm-up of 1,000 tokens, a decay of 2,400 from 20."""
    ramp = BatchRamp(((0, 100), (10, 200), (20, 300)))
    path = TokenPath(LrPath.main(PEAK, 1000), ramp).branch(20, 2400, "linear", floor=PEAK / 10)
    expected = {0: 0.1, 4: 0.5, 9: 1.0, 10: 1.0, 20: 1.0, 22: 0.775, 24: 0.55, 26: 0.325, 28: 0.1, 40: 0.1}
    optimizer = optimizer_of(path.peak)
    schedule = scheduler(optimizer, path)
    for step in range(41):
        if step == 23:  # resume in a new process
            state, groups = json.loads(json.dumps(schedule.state_dict())), optimizer.state_dict()
            optimizer = optimizer_of(path.peak)
            schedule = scheduler(optimizer, path)
            optimizer.load_state_dict(groups)
            schedule.load_state_dict(state)
        if step in expected:
            big, small = (float(group["lr"]) / PEAK for group in optimizer.param_groups)
            assert (big, 10 * small) == pytest.approx((expected[step],) * 2, rel=1e-12), step
        optimizer.step()
        schedule.step()


def test_another_path_on_resume_is_an_error_with_a_diff() -> None:
    path = LrPath.main(PEAK, 10)
    schedule = PathLR(optimizer_of(PEAK), path)
    state = schedule.state_dict()
    other = LrPath.main(2 * PEAK, 10)
    with pytest.raises(ConfigError, match=r"segments\.0\.peak: 0\.002 -> 0\.004"):
        PathLR(optimizer_of(PEAK), other).load_state_dict(state)
    optimizer = optimizer_of(2 * PEAK)
    PathLR(optimizer, other, changed_because="loss went up").load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(other.rate(0))


def test_in_the_trainer_of_transformers(tmp_path: Any) -> None:
    """Hugging Face's Trainer, given LambdaLR on the path, trains every update at the path's rate."""
    import transformers  # slow to import: only here

    path = LrPath.main(PEAK, 3).branch(6, 6)
    model = torch.nn.Linear(2, 1)
    seen: list[float] = []

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": self.inner(x).square().mean()}

    class Watch(transformers.TrainerCallback):  # type: ignore[misc,name-defined]
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kept: Any) -> None:
            seen.append(float(kept["optimizer"].param_groups[0]["lr"]))

    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK)
    trainer = transformers.Trainer(
        model=Model(),
        args=transformers.TrainingArguments(
            output_dir=str(tmp_path), max_steps=12, use_cpu=True, report_to=[], disable_tqdm=True
        ),
        train_dataset=[{"x": torch.ones(2)} for _ in range(96)],
        optimizers=(optimizer, LambdaLR(optimizer, path.multiplier)),
        callbacks=[Watch()],
    )
    trainer.train()
    assert seen == pytest.approx([path.rate(step) for step in range(12)], rel=1e-12)


def test_in_the_trainer_of_transformers_while_the_batch_grows(tmp_path: Any) -> None:
    """A dataloader of 2, then 4 rows of 8 tokens: every update has the rate of the tokens read before it."""
    import transformers  # slow to import: only here

    ramp = BatchRamp(((0, 16), (4, 32)))
    path = TokenPath(LrPath.main(PEAK, 64), ramp).branch(6, 128, "linear")
    seen: list[tuple[int, float]] = []

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.Linear(8, 1)

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            seen.append((x.numel(), float(optimizer.param_groups[0]["lr"])))
            return {"loss": self.inner(x).square().mean()}

    class Growing(transformers.Trainer):  # type: ignore[misc,name-defined]
        def get_train_dataloader(self) -> Any:
            ends = [ramp.tokens_before(step) // 8 for step in range(11)]
            batches = [list(range(a, b)) for a, b in zip(ends, ends[1:], strict=False)]
            rows = [{"x": torch.ones(8)} for _ in range(ends[-1])]
            return torch.utils.data.DataLoader(rows, batch_sampler=batches)  # type: ignore[arg-type]

    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK)
    options = {"max_steps": 10, "use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no"}
    trainer = Growing(
        model=model,
        args=transformers.TrainingArguments(output_dir=str(tmp_path), **options),
        optimizers=(optimizer, LambdaLR(optimizer, path.multiplier)),
    )
    trainer.train()
    # warm-up of 64 tokens in 4 updates; the decay from update 6 on, 32 of 128 tokens an update
    rates = [0.25, 0.5, 0.75, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    assert [tokens for tokens, _ in seen] == [16] * 4 + [32] * 6
    assert [rate / PEAK for _, rate in seen] == pytest.approx(rates, rel=1e-12)
