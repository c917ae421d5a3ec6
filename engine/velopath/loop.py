"""The training loop: steps of one session until a given step, with metrics, control, checkpoints and a clean stop.

It stands on `Session`, the seam that other trainers embed, and adds what a whole product needs around it.
"""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from velopath.checkpoint import prune, save_checkpoint, step_folder
from velopath.config import RunConfig
from velopath.dist import Dist
from velopath.domains import DomainLoss
from velopath.environment import peak_flops
from velopath.errors import AlarmError, DataError, StoppedError, VelopathError
from velopath.evaluate import HeldOut, evaluate
from velopath.meter import Log, Meter
from velopath.phases import Phases
from velopath.profiling import Profile
from velopath.runconfig import older_domains
from velopath.session import Session
from velopath.sharding import is_sharded
from velopath.stream import TokenBatch
from velopath.train_step import TrainStep


class StopRequest:
    """Set by SIGTERM, SIGINT or an alarm; the loop saves and raises `StoppedError`. A second signal acts at once."""

    def __init__(self) -> None:
        self.requested = False
        self.alarm: str | None = None
        """The alarm that asked, where it was no signal."""

    def for_alarm(self, text: str) -> None:
        """Ask for a stop on account of an alarm."""
        self.requested, self.alarm = True, text

    @contextmanager
    def installed(self) -> Iterator[StopRequest]:
        """Handle the signals inside this block only; the previous handlers return afterwards."""

        def handle(number: int, frame: FrameType | None) -> None:
            if self.requested:
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
            self.requested = True

        signals = (signal.SIGTERM, signal.SIGINT)
        before = [signal.signal(s, handle) for s in signals]
        try:
            yield self
        finally:
            for s, handler in zip(signals, before, strict=True):
                signal.signal(s, handler)


@dataclass
class Loop:
    """The step (model and optimiser) and held-out set of one run on this rank, and the loop over a session's steps.

    `checkpoints` is the folder of this segment's checkpoints, one sub-folder `step-NNNNNNNN` each. `log` gets every
    metrics record, on rank 0 only.
    """

    config: RunConfig
    dist: Dist
    step: TrainStep
    phases: Phases
    heldout: Callable[[tuple[str, ...]], HeldOut]
    log: Log
    stop: StopRequest = field(default_factory=StopRequest)
    profile: Profile | None = None
    _older: dict[str, tuple[str, ...]] = field(default_factory=dict, init=False)
    """Slice -> the domains that only earlier slices have: what the model may forget there."""
    _evaluated: int | None = field(default=None, init=False)
    """The step of the last held-out evaluation."""

    def run(
        self,
        session: Session,
        *,
        until: int,
        slice_name: str,
        checkpoints: Path,
        keep: frozenset[int] = frozenset(),
        watch: bool = False,
        evaluate_at: frozenset[int] = frozenset(),
        evaluate_end: bool = False,
    ) -> str:
        """Train until `session.step == until`; save at the end, every `checkpoint_every` steps and at `keep`.

        Returns the digest of the last checkpoint (on rank 0; "" elsewhere).

        `watch` evaluates a session (without controller) as often as a controller would, `evaluate_at` after so many
        updates, both for the record; `evaluate_end` evaluates at the end, if the controller did not. What is logged
        about a step is logged before its save: a run killed at any point has all of it once it is resumed.
        Raises `StoppedError` after a requested stop (state saved), `NumericalError` after `SKIPS_IN_A_ROW`
        steps without a finite gradient (nothing saved since), `DataError` where the data ends early.
        """
        train, step = self.config.train, self.step
        n_domains = len(session.sampler.names)
        step.decoder.train()
        meter = Meter(
            session,
            self.dist,
            self.log,
            phases=self.phases,
            flops_per_token=step.decoder.flops_per_token(train.row_tokens),
            peak_flops=train.peak_flops or peak_flops(self.dist.device),
        )
        in_flight: deque[tuple[Any, Any]] = deque()
        digest = ""
        with meter.paused():
            self.control(session, slice_name, watch, evaluate_at)
        while session.step < until:
            rate = session.rate
            try:
                batch = session.next_batch()
            except StopIteration:
                meter.flush()
                self.save(session, slice_name=slice_name, checkpoints=checkpoints, keep=keep)
                raise DataError(
                    f"the data ended at step {session.step} of {until} (exhaustion {self.config.data.exhaustion!r}); "
                    "prepare more data, plan fewer steps or set data.exhaustion=repeat"
                ) from None
            result = step(
                self._to_device(batch.tokens), self._to_device(batch.domains), rate, **self._padded(batch)
            )
            if self.dist.device.type == "cuda":
                self._hold_until_copied(in_flight, batch)
            sums = result.sums[:, :n_domains]
            session.on_step(torch.where(torch.isfinite(result.grad_norm), sums, 0.0))
            meter.add(result)
            if self.profile is not None:
                self.profile.step()
            if session.step % train.log_every == 0 or session.step == until:
                meter.record(rate)
            stop = self._must_stop(session.step)  # asked once a step: a signal may come at any moment
            due = session.step % train.checkpoint_every == 0 or session.step in keep
            save = due or stop or session.step == until
            if save or session.control_due or session.step in evaluate_at:
                meter.flush()
            with meter.paused():
                self.control(session, slice_name, watch, evaluate_at)
                if session.step == until:
                    self._log_end(session, slice_name, evaluate_end)
                if save:
                    digest = self.save(session, slice_name=slice_name, checkpoints=checkpoints, keep=keep)
            if stop and session.step < until:
                where = f"at step {session.step} of {until}; state saved in {checkpoints}; the same command resumes it"
                if self.stop.alarm is not None:
                    raise AlarmError(f"stopped by an alarm ({self.stop.alarm}) {where}")
                raise StoppedError(f"stopped {where}")
        return digest

    def control(
        self,
        session: Session,
        slice_name: str,
        watch: bool = False,
        evaluate_at: frozenset[int] = frozenset(),
    ) -> None:
        """Evaluate and let the controller move the weights, where it is due."""
        if not session.control_due:
            watched = watch and session.controller is None and session.step % session.every == 0
            if watched or session.step in evaluate_at:
                self.evaluate(self.config.control.heldout_tokens, session=session, slice_name=slice_name)
        else:
            losses = self._signal(session, slice_name)
            with self.phases.host("control"):
                session.on_eval(losses)

    def _signal(self, session: Session, slice_name: str) -> DomainLoss:
        """The losses of a control that is due."""
        control = self.config.control
        heldout = None
        if not session.started or control.signal == "heldout" or self._anchor_due(session):
            heldout = self.evaluate(control.heldout_tokens, session=session, slice_name=slice_name)
            if control.signal != "anchored":
                return heldout
        with self.phases.host("control"):
            training = session.training_loss()
        if control.signal == "training":
            return training
        session.signal, losses = session.signal.next(training, heldout, control.anchor_keep)
        return losses

    def _anchor_due(self, session: Session) -> bool:
        control = self.config.control
        return control.signal == "anchored" and session.signal.due(control.anchor_every)

    def _log_end(self, session: Session, slice_name: str, evaluate: bool) -> None:
        """What the stretch has read in all, and on request its held-out loss."""
        if evaluate and self._evaluated != session.step:
            self.evaluate(self.config.control.heldout_tokens, session=session, slice_name=slice_name)
        record = {"kind": "exposure", "segment": session.segment, "step": session.step, "slice": slice_name}
        self.log(record | {"domains": session.sampler.exposure()})

    def evaluate(self, tokens: int, *, session: Session, slice_name: str, kind: str = "eval") -> DomainLoss:
        """Held-out loss per domain on `tokens` tokens of each, the same on all ranks, logged as a record `kind`.

        Domains that only earlier slices have are measured and logged too, where `evaluate.old_domains` says so; an
        "eval" returns the slice's own, for the controller.
        """
        rotation = session.step if self.config.control.rotate and kind == "eval" else 0
        with self.phases.host("evaluate"):
            losses = own = self.held_out_loss(session.sampler.names, tokens, rotation)
            if older := self._older_domains(slice_name):
                losses = own.joined(self.held_out_loss(older, tokens, rotation))
        if kind == "eval":
            self._evaluated = session.step
        record = {"kind": kind, "segment": session.segment, "step": session.step, "slice": slice_name}
        record |= {"loss": dict(losses), "tokens": dict(zip(losses.names, losses.tokens, strict=True))}
        if losses.stderr is not None:
            record["stderr"] = dict(zip(losses.names, losses.stderr, strict=True))
        self.log(record)
        return own if kind == "eval" else losses

    def _older_domains(self, slice_name: str) -> tuple[str, ...]:
        if not self.config.evaluate.old_domains:
            return ()
        if slice_name not in self._older:
            self._older[slice_name] = older_domains(self.config, slice_name)
        return self._older[slice_name]

    def held_out_loss(self, names: tuple[str, ...], tokens: int, rotation: int = 0) -> DomainLoss:
        """Held-out loss per domain, with standard errors."""
        return evaluate(
            self.step.decoder,
            self.heldout(names),
            tokens_per_domain=tokens,
            rotation=rotation,
            batch_rows=self.config.evaluate.batch_rows,
            dist=self.dist,
            bf16=self.config.train.precision == "bf16",
            document_mask=self.config.train.document_mask,
        )

    def save(self, session: Session, *, slice_name: str, checkpoints: Path, keep: frozenset[int]) -> str:
        """Write `checkpoints/step-NNNNNNNN` from rank 0 and prune older rolling ones; returns its digest there."""
        state = {
            "segment": session.segment,
            "slice": slice_name,
            "step": session.step,
            "session": session.state_dict(),
            "path": session.path.to_json(),
            "config_hash": self.config.hash,
        }
        digest = ""
        differs = self.dist.broadcast_json(session.stream_hash) != session.stream_hash
        if self.dist.all_reduce_sum(torch.tensor(float(differs), device=self.dist.device)).item():
            raise VelopathError(
                f"up to step {session.step} the ranks read by different weights; nothing was saved there. "
                "Push the same weights on every rank"
            )
        with self.phases.host("save"):
            step = self.step
            if self.dist.is_main or is_sharded(step.decoder):
                digest = save_checkpoint(
                    step_folder(checkpoints, session.step),
                    model=step.decoder,
                    optimizer=step.optimizer,
                    state=state,
                    write=self.dist.is_main,
                )
            if self.dist.is_main:
                prune(checkpoints, keep_last=self.config.train.keep_last, keep_steps=set(keep))
            self.dist.barrier()
        return digest

    def _must_stop(self, step: int) -> bool:
        """Whether any rank was asked to stop; all ranks agree, so several ranks ask each other only now and then."""
        if self.dist.world == 1:
            return self.stop.requested
        if step % self.config.train.log_every:
            return False
        flag = torch.tensor([float(self.stop.requested)], device=self.dist.device)
        return bool(self.dist.all_reduce_sum(flag).item() > 0)

    def _padded(self, batch: TokenBatch) -> dict[str, Tensor]:
        """`targets` where the batch has padding, `documents` and `positions` where it has them."""
        found = {} if batch.counts is None else {"targets": self._to_device(batch.targets())}
        for name, array in (("documents", batch.documents), ("positions", batch.positions)):
            if array is not None:
                found[name] = self._to_device(array)[:, :-1]
        return found

    def _to_device(self, array: np.ndarray) -> Tensor:
        """A copy on the device, the host not waiting for it: the sampler's tokens are pinned, the rest is here."""
        tensor = torch.from_numpy(array)
        if self.dist.device.type == "cuda" and not tensor.is_pinned():
            tensor = tensor.pin_memory()
        return tensor.to(self.dist.device, non_blocking=True)

    @staticmethod
    def _hold_until_copied(in_flight: deque[tuple[Any, Any]], batch: Any) -> None:
        """Keep a pinned batch alive until the GPU has read it; at most two steps are queued ahead."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        in_flight.append((event, batch))
        if len(in_flight) > 2:
            in_flight.popleft()[0].synchronize()
