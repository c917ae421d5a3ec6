"""What the step suite trains: velopath's parts as its loop puts them together, and a loop written by hand."""

from __future__ import annotations

import json
import statistics
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.timing import summary, wait_for
from velopath.dist import Dist
from velopath.mds import MdsWriter
from velopath.meter import Meter
from velopath.model import Decoder, ModelConfig
from velopath.optim import build_optimizer
from velopath.phases import Phases
from velopath.schedule import LrPath
from velopath.session import Session
from velopath.stream import open_sampler
from velopath.train_step import StepResult, TrainStep

SHARES = {"code": 0.4, "maths": 0.2, "prose": 0.3, "verse": 0.1}
OTHER_SHARES = {"code": 0.1, "maths": 0.3, "prose": 0.2, "verse": 0.4}
LOG_EVERY = 10
PEAK = 1e-3
Sample = dict[str, float]
Record = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Setup:
    """What is trained where: B = `rows` rows of T = `row_tokens` tokens a step."""

    device: torch.device
    model: ModelConfig
    rows: int
    row_tokens: int
    bf16: bool = False
    compile: bool = False

    @property
    def tokens(self) -> int:
        return self.rows * self.row_tokens


class Trainer(Protocol):
    """A contender: `block` trains n steps and says {"seconds", "wait_seconds", "steps"}."""

    def block(self, steps: int) -> Sample: ...


class PlainLoss(nn.Module):
    """`F.cross_entropy` in the place of velopath's loss: no domains; the sums are zeros."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, tokens_BT1: Tensor, domains_B: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.decoder.logits(self.decoder(tokens_BT1[:, :-1])).flatten(0, 1)
        loss = F.cross_entropy(logits, tokens_BT1[:, 1:].reshape(-1).long())
        return loss, torch.zeros(2, len(SHARES), device=loss.device)


class HandMadeDomains(nn.Module):
    """Losses per domain as one writes them without velopath: `reduction="none"`, then `index_add`."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, tokens_BT1: Tensor, domains_B: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.decoder.logits(self.decoder(tokens_BT1[:, :-1])).flatten(0, 1)
        nats = F.cross_entropy(logits, tokens_BT1[:, 1:].reshape(-1).long(), reduction="none").float()
        of_row = domains_B.repeat_interleave(tokens_BT1.shape[1] - 1)
        sums = torch.zeros(2, len(SHARES), device=nats.device)
        sums[0].index_add_(0, of_row, nats.detach())
        sums[1].index_add_(0, of_row, torch.ones_like(nats))
        return nats.mean(), sums


class OtherLossStep(TrainStep):
    """The same step around another loss."""

    def __init__(self, module: nn.Module, *args: Any, compile: bool, **options: Any) -> None:
        super().__init__(*args, **options)
        self._module = torch.compile(module) if compile else module  # type: ignore[assignment]


class Velopath:
    """The parts of `velopath.loop` at work on one sampler; `record` None trains without a log."""

    def __init__(
        self,
        setup: Setup,
        root: Path,
        stack: ExitStack,
        *,
        record: Record | None,
        loss: Callable[[Decoder], nn.Module] | None = None,
    ) -> None:
        self.setup, self.record, dist = setup, record, Dist(device=setup.device)
        decoder = Decoder(setup.model, device=setup.device)
        phases = None if record is None else Phases(setup.device)
        options: dict[str, Any] = {
            "n_domains": len(SHARES),
            "dist": dist,
            "bf16": setup.bf16,
            "phases": phases,
        }
        optimizer = build_optimizer(decoder)
        if loss is None:
            self.step = TrainStep(decoder, optimizer, compile=setup.compile, **options)
        else:
            self.step = OtherLossStep(loss(decoder), decoder, optimizer, compile=setup.compile, **options)
        self.sampler = stack.enter_context(
            open_sampler(
                root / "mds",
                rows=setup.rows,
                row_tokens=setup.row_tokens,
                weights=SHARES,
                allocate=_pinned if setup.device.type == "cuda" else None,
            )
        )
        self.session = Session(self.sampler, LrPath.main(peak=PEAK, warmup_steps=10))
        self.meter = Meter(self.session, dist, record or (lambda _: None), phases=phases)
        self._in_flight: deque[tuple[torch.cuda.Event, Any]] = deque()

    def one_step(self) -> StepResult:
        """As the body of `velopath.loop.Loop.run`."""
        rate, batch = self.session.rate, self.session.next_batch()
        result = self.step(self._to_device(batch.tokens), self._to_device(batch.domains), rate)
        if self.setup.device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
            self._in_flight.append((event, batch))
            if len(self._in_flight) > 2:
                self._in_flight.popleft()[0].synchronize()
        self.session.on_step(torch.where(torch.isfinite(result.grad_norm), result.sums, 0.0))
        if self.record is not None:
            self.meter.add(result)
            if self.session.step % LOG_EVERY == 0:
                self.meter.record(rate)
        return result

    def block(self, steps: int) -> Sample:
        wait_for(self.setup.device)
        start, waited = time.perf_counter(), self.session.wait_seconds
        for _ in range(steps):
            self.one_step()
        self.meter.flush()
        wait_for(self.setup.device)
        spent = time.perf_counter() - start
        return {"seconds": spent, "wait_seconds": self.session.wait_seconds - waited, "steps": steps}

    def pushes(self, steps: int, every: int) -> dict[str, Any]:
        """Step times with a push before each `every`-th, each step waited for; "ratio" of their medians."""
        pushed: list[float] = []
        others: list[float] = []
        calls: list[float] = []
        mixes = deque((OTHER_SHARES, SHARES))
        for number in range(steps):
            wait_for(self.setup.device)
            start = time.perf_counter()
            if is_push := number % every == every - 1:
                self.sampler.push(mixes[0], reason="benchmark")
                calls.append(time.perf_counter() - start)
                mixes.rotate()
            self.one_step()
            wait_for(self.setup.device)
            (pushed if is_push else others).append((time.perf_counter() - start) * 1e3)
        return {
            "pushes": len(pushed),
            "call_ms": summary([1e3 * s for s in calls]),
            "pushed_step_ms": summary(pushed),
            "other_step_ms": summary(others),
            "ratio": statistics.median(pushed) / statistics.median(others),
        }

    def log_calls(self, steps: int) -> dict[str, float]:
        """{"ms_per_step"}: medians of the log's own calls, a record spread over its steps, nothing left to wait for."""
        assert self.record is not None
        adds, records = [], []
        for number in range(steps):
            result = self.one_step()
            wait_for(self.setup.device)
            start = time.perf_counter()
            self.meter.add(result)
            wait_for(self.setup.device)
            adds.append(time.perf_counter() - start)
            if number % LOG_EVERY == 0:
                start = time.perf_counter()
                self.meter.record(PEAK)
                self.meter.flush()
                records.append(time.perf_counter() - start)
        return {"ms_per_step": 1e3 * (statistics.median(adds) + statistics.median(records) / LOG_EVERY)}

    def _to_device(self, array: np.ndarray[Any, Any]) -> Tensor:
        return torch.from_numpy(array).to(self.setup.device, non_blocking=True)


class PlainLoop:
    """The hand-written loop. `compile` compiles forward and loss; the optimiser is torch's fused AdamW.

    `model` (tokens, domains) -> (loss, anything) takes the place of our decoder with `F.cross_entropy`.
    """

    def __init__(
        self, setup: Setup, root: Path, record: Record, *, compile: bool, model: nn.Module | None = None
    ) -> None:
        self.setup, self.record, self.count = setup, record, 0
        self.model = model or PlainLoss(Decoder(setup.model, device=setup.device))
        self.forward = torch.compile(self.model) if compile else self.model
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=PEAK, betas=(0.9, 0.95), weight_decay=0.1, fused=True
        )
        self.data = [np.memmap(root / f"{name}.bin", np.uint16, "r") for name in SHARES]
        self.rng = np.random.default_rng(0)
        self.none = torch.zeros(setup.rows, dtype=torch.int32, device=setup.device)

    def batch(self) -> Tensor:
        domains = self.rng.choice(len(self.data), self.setup.rows, p=list(SHARES.values()))
        width = self.setup.row_tokens + 1
        at = [int(self.rng.integers(0, len(self.data[k]) - width)) for k in domains]
        rows = [self.data[k][i : i + width].astype(np.int64) for k, i in zip(domains, at, strict=True)]
        tokens = torch.from_numpy(np.stack(rows))
        if self.setup.device.type == "cuda":
            return tokens.pin_memory().to(self.setup.device, non_blocking=True)
        return tokens

    def block(self, steps: int) -> Sample:
        wait_for(self.setup.device)
        start, waited = time.perf_counter(), 0.0
        for _ in range(steps):
            before = time.perf_counter()
            tokens = self.batch()
            waited += time.perf_counter() - before
            with torch.autocast(self.setup.device.type, torch.bfloat16, enabled=self.setup.bf16):
                loss, _ = self.forward(tokens, self.none)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.count += 1
            if self.count % LOG_EVERY == 0:
                self.record({"step": self.count, "loss": loss.item()})
        wait_for(self.setup.device)
        return {"seconds": time.perf_counter() - start, "wait_seconds": waited, "steps": steps}


def write_data(root: Path, setup: Setup) -> None:
    """Documents of made-up tokens, frequent ones first: MDS for us, the same ids in flat files for the memmap."""
    tokens = max(500_000, 64 * setup.tokens)
    for number, name in enumerate(SHARES):
        rng = np.random.default_rng(number)
        ids = (np.minimum(rng.zipf(1.2, tokens), 1 << 30) % min(setup.model.vocab_size, 1 << 16)).astype(
            np.uint16
        )
        with MdsWriter(root / "mds" / name, compression=None) as writer:
            for document in np.array_split(ids, tokens // 500):
                writer.write(document)
        ids.tofile(root / f"{name}.bin")


def record_to(stack: ExitStack, path: Path) -> Record:
    """One JSON object a line, flushed, as a run folder keeps its metrics."""
    file = stack.enter_context(path.open("a", encoding="utf-8"))

    def record(entry: dict[str, Any]) -> None:
        file.write(json.dumps(entry) + "\n")
        file.flush()

    return record


def _pinned(shape: tuple[int, int]) -> np.ndarray[Any, np.dtype[np.int32]]:
    return torch.empty(shape, dtype=torch.int32, pin_memory=True).numpy()
