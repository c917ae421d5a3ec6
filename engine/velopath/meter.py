"""The measured side of the loop: sums of a logging interval, kept on the device and copied without waiting for it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from velopath.dist import Dist
from velopath.errors import NumericalError
from velopath.phases import Phases
from velopath.session import Session
from velopath.train_step import StepResult

SKIPS_IN_A_ROW = 3
"""Steps in a row whose gradient is not finite before the loop gives up (our choice)."""

Log = Callable[[dict[str, Any]], None]


class Meter:
    """Makes `step` records. On a GPU a record's numbers travel while the next steps run: it is logged with the next
    one or at `flush`, which must come before anything that is to follow it, a save above all. On a CPU at once.

    `flops_per_token` gives `flops_per_second` of the model (see `ModelConfig.flops_per_token`), with `peak_flops` of
    one device also `mfu`, their ratio per device. Raises `NumericalError` when a record is logged after
    `SKIPS_IN_A_ROW` steps in a row without a finite gradient.
    """

    def __init__(
        self,
        session: Session,
        dist: Dist,
        log: Log,
        *,
        phases: Phases | None = None,
        flops_per_token: int | None = None,
        peak_flops: float | None = None,
    ) -> None:
        self._session, self._dist, self._log = session, dist, log
        self._phases = phases or Phases(dist.device)
        self._flops, self._peak = flops_per_token, peak_flops
        self._row = torch.zeros((), device=dist.device)
        self._nothing = torch.zeros((), device=dist.device)
        self._held: Callable[[], None] | None = None
        self._reset()

    def _reset(self) -> None:
        self._start, self._paused = time.perf_counter(), 0.0
        self._wait, self._first = self._session.wait_seconds, self._session.step
        self._loss = torch.zeros(3, device=self._dist.device)
        self._norm = self._worst = self._nothing

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time of this block out of the throughput."""
        start = time.perf_counter()
        yield
        self._paused += time.perf_counter() - start

    def add(self, result: StepResult) -> None:
        """Count a step; no synchronisation."""
        finite = torch.isfinite(result.grad_norm)
        one = torch.where(finite, 1.0, 0.0)
        self._loss += torch.stack([torch.where(finite, result.loss, 0.0), one, 1.0 - one])
        self._row = torch.where(finite, 0.0, self._row + 1)
        self._worst = torch.maximum(self._worst, self._row)
        self._norm = result.grad_norm

    def record(self, rate: float) -> None:
        """End the interval: a `step` record with `rate`, that of its last step. Starts the next interval."""
        self.flush()
        session = self._session
        sums = torch.cat([self._dist.all_reduce_sum(self._loss), self._worst[None], self._norm[None]])
        spent = time.perf_counter() - self._start
        seconds = max(spent - self._paused, 1e-9)
        waited, taken = session.wait_seconds - self._wait, self._phases.take()
        taken[1]["data"] += waited
        rows, steps = session.sampler.global_rows, session.step - self._first
        tokens = rows * session.sampler.row_tokens
        speed: dict[str, Any] = {"tokens_per_second": steps * tokens / seconds}
        if self._flops is not None:
            speed["flops_per_second"] = speed["tokens_per_second"] * self._flops
            if self._peak is not None:
                speed["mfu"] = speed["flops_per_second"] / (self._peak * self._dist.world)
        head = {"kind": "step", "segment": session.segment, "step": session.step}
        speed["data_wait_share"] = waited / seconds
        arrived = _copied(sums)
        stream = session.stream_hash

        def finish() -> None:
            loss, counted, skipped, worst, norm = arrived()
            if worst >= SKIPS_IN_A_ROW:
                raise NumericalError(
                    f"{SKIPS_IN_A_ROW} steps in a row up to step {head['step']} had no finite gradient; their updates "
                    "were skipped. Look at the data there, or start another run folder with a lower path.peak"
                )
            record = head | {  # `step`: updates done
                "loss": loss / counted if counted else None,
                "rate": rate,
                "grad_norm": None if skipped else norm,
                "tokens": tokens,
                **speed,
                "seconds": spent,  # evaluations and saves included
                "phase_seconds": self._phases.seconds(taken),
                "skipped": round(skipped / self._dist.world),
                "stream": stream,
            }
            self._log(record)

        self._held = finish
        self._reset()
        if self._dist.device.type != "cuda":
            self.flush()

    def flush(self) -> None:
        """Log the record that is held; waits for its numbers."""
        held, self._held = self._held, None
        if held is not None:
            held()


def _copied(values: Tensor) -> Callable[[], list[float]]:
    """A copy of `values` to the host under way; the call waits for it."""
    if values.device.type != "cuda":
        return values.tolist
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()

    def arrived() -> list[float]:
        event.synchronize()
        numbers: list[float] = host.tolist()
        return numbers

    return arrived
