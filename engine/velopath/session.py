"""Session: sampler, controller and path bound together; what our loop and other trainers stand on.

A trainer of one's own keeps its model, optimiser and collectives and calls four hooks:

```python
session = Session(sampler, path, controller=Velocitune(targets), every=50)
session.on_eval(losses_before_training)              # once: l_init
for batch in session:                                # TokenBatch: tokens (rows, T+1), domains (rows,)
    rate = session.rate                              # of this batch's step
    loss, sums = ...                                 # velopath.linear_domain_cross_entropy
    session.on_step(sums)                            # stays on the device, no synchronisation
    if session.control_due:
        session.on_eval(held_out_losses)             # observes and pushes the new weights
state = session.state_dict()                         # JSON; exact resume
```

Embedded, it installs no signal handler, starts no process group and touches no logger; sums over ranks come from
the `reduce` callable. All ranks call the same hooks with the same losses.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from velopath import controllers
from velopath.controllers import Controller
from velopath.domains import DomainLoss, MixtureWeights, Progress
from velopath.errors import ConfigError, VelopathError
from velopath.schedule import LrPath
from velopath.schedule_tokens import TokenPath
from velopath.signals import Anchored
from velopath.stream import Sampler, TokenBatch
from velopath.stream_order import next_hash

Record = Callable[[dict[str, Any]], None]


class Sums(Protocol):
    """A (2, K) array of nats and tokens on any device: torch tensor or numpy array."""

    def tolist(self) -> list[list[float]]: ...


class Session:
    """One stretch of training on one sampler: hands out batches and rates, turns losses into weights.

    `path` gives the rate of each step; one in tokens must count those of the sampler's steps, which do not grow, else
    `ConfigError`. `controller` (None: the weights stay) is asked every `every` steps, counted
    from the sampler's first step. `reduce` adds a (2, K) array over ranks (default: one rank). `record` receives
    one dict per control, for a log; give it on rank 0 only. `segment` names the stretch in those records; `end` is the
    step at which it is planned to end, for controllers that plan ahead. With `shadow` the controller observes, proposes
    and is logged, and nothing is pushed.
    """

    def __init__(
        self,
        sampler: Sampler,
        path: LrPath | TokenPath,
        *,
        controller: Controller | None = None,
        every: int = 50,
        reduce: Callable[[Any], Any] | None = None,
        record: Record | None = None,
        segment: str = "main",
        end: int | None = None,
        shadow: bool = False,
    ) -> None:
        if every < 1:
            raise ConfigError(f"every is {every}; the controller needs 1 step or more between updates")
        if isinstance(path, TokenPath):
            _check_batch(path, sampler.global_rows * sampler.row_tokens)
        self.sampler, self.path, self.controller, self.segment = sampler, path, controller, segment
        self.every, self.end, self.shadow = every, end, shadow
        self.initial: DomainLoss | None = None
        """Losses of the starting model, where the controller is to start from these and not from the first it is given:
        l_init of a controller that begins later than the run."""
        self.signal = Anchored()
        """The state of the anchored signal, for a loop that uses it; saved with the session."""
        self.step = sampler.step
        """Steps finished, which is the number of the next step."""
        self.wait_seconds = 0.0
        """Time spent in `next_batch` so far: the share of it in a step is the data wait."""
        self.stream_hash = sampler.order.first_hash()
        """Hash of the rows that all ranks read up to `step`, see `velopath.stream_order`; a replay gives it again."""
        self._first = sampler.step
        self._reduce = reduce if reduce is not None else lambda sums: sums
        self._record = record if record is not None else lambda _: None
        self._state: Any = None
        self._observed: int | None = None  # the step at which the controller was last given losses
        self._sums: Any = None
        self._carried: list[list[float]] | None = None  # global sums from before a resume
        self._batch: TokenBatch | None = None

    def __iter__(self) -> Iterator[TokenBatch]:
        while True:
            try:
                batch = self.next_batch()
            except StopIteration:
                return
            yield batch

    def next_batch(self) -> TokenBatch:
        """The next batch of this rank; `StopIteration` where the exhaustion policy ends the stream.

        Raises `ConfigError` where the batch handed out before was not reported by `on_step`.
        """
        if self._batch is not None:
            raise ConfigError(
                f"on_step was not called for step {self._batch.step}; call it after every batch"
            )
        start = time.perf_counter()
        batch = next(self.sampler)
        self.wait_seconds += time.perf_counter() - start
        self._batch = batch
        return batch

    @property
    def rate(self) -> float:
        """Learning rate of the step in flight, or of the next one between steps."""
        return self.path.rate(self.step)

    @property
    def weights(self) -> MixtureWeights:
        """Shares in force for the next step."""
        return self.sampler.weights

    @property
    def started(self) -> bool:
        """Whether the controller knows its first losses."""
        return self._state is not None

    @property
    def progress(self) -> Progress:
        """Where the stretch stands, for the controller: steps, and tokens read by all ranks."""
        table = self.sampler.table
        return Progress(
            self.step,
            self._first,
            self.end,
            {name: round(row["tokens"]) for name, row in self.sampler.exposure().items()},
            dict(zip(table.names, table.tokens, strict=True)),
        )

    @property
    def observed(self) -> bool:
        """Whether the controller was given losses at the present step already."""
        return self._observed == self.step

    @property
    def control_due(self) -> bool:
        """Whether the controller wants losses now, before the next step."""
        if self.controller is None:
            return False
        if not self.started:
            return True
        return (self.step - self._first) % self.every == 0 and not self.observed

    def on_step(self, sums: Sums | None = None) -> None:
        """The batch handed out last was trained on; `sums` (2, K) are its nats and tokens per domain.

        Adds the sums where they are (no device synchronisation) for `training_loss`, in fp64: there sums of fp32
        numbers are exact, so that neither a save in between nor the number of ranks changes a bit.
        """
        if self._batch is None:
            raise ConfigError("on_step without a batch; call next_batch first")
        self.step = self._batch.step + 1
        self._note_rows(self._batch)
        self._batch = None
        if sums is not None:
            wide = _wide(sums)
            self._sums = wide if self._sums is None else self._sums + wide

    def _note_rows(self, batch: TokenBatch) -> None:
        """Take the step's rows of all ranks into the hash; every rank checks that it read its own part of them."""
        domains, row_ids = batch.domains, batch.row_ids
        if self.sampler.world > 1:
            domains, row_ids = self.sampler.ids(batch.step)
            own = slice(self.sampler.rank * self.sampler.rows, (self.sampler.rank + 1) * self.sampler.rows)
            if not (
                np.array_equal(domains[own], batch.domains) and np.array_equal(row_ids[own], batch.row_ids)
            ):
                raise VelopathError(
                    f"rank {self.sampler.rank} read rows {batch.row_ids.tolist()} at step {batch.step}, its part of "
                    f"the plan is {row_ids[own].tolist()}; push weights and load states between steps only"
                )
        self.stream_hash = next_hash(self.stream_hash, batch.step, domains, row_ids)

    def training_loss(self) -> DomainLoss:
        """Loss per domain of the training batches since the last call, over all ranks. Synchronises the device."""
        names = self.sampler.names
        sums = self._carried
        if self._sums is not None:
            sums = _add(self._reduce(self._sums).tolist(), self._carried)
        self._sums = self._carried = None
        if sums is None:
            return DomainLoss(names, (0.0,) * len(names), (0,) * len(names))
        nats, tokens = sums
        return DomainLoss(names, tuple(nats), tuple(round(n) for n in tokens))

    def on_eval(self, losses: Mapping[str, float] | DomainLoss) -> MixtureWeights:
        """Give the controller `losses` in nats per token by domain; push what it answers; return the weights.

        The first call starts the controller (l_init) and moves nothing, unless there are `initial` losses to start
        from: then it is an update already. Updates push from the next step on.
        """
        if self.controller is None:
            return self.weights
        self._observed = self.step
        if not self.started:
            if self.initial is None:
                self._state = controllers.start(self.controller, losses, self.weights, self.progress)
                if dict(self._state.weights) != dict(
                    self.weights
                ):  # floor and cap act on the first weights too
                    self._push(self._state.weights)
                self._log("start", losses, self.progress)
                return self.weights
            # Recorded at the step that the losses are of; at the present one the update's record would replace it.
            now = self.progress
            then = replace(now, step=now.first, tokens=dict.fromkeys(now.tokens, 0))
            self._state = controllers.start(self.controller, self.initial, self.weights, then)
            self._log("start", self.initial, then)
        self._state, proposed = controllers.observe(self.controller, self._state, losses, self.progress)
        self._push(proposed)
        self._log("update", losses, self.progress)
        return self.weights

    def _push(self, weights: Mapping[str, float]) -> None:
        if self.shadow:
            return
        rule = getattr(self.controller, "controller", self.controller)  # the one behind a filter
        reason = type(rule).__name__
        self.sampler.push(dict(weights), reason=reason, digest=self._digest())

    def _digest(self) -> str:
        text = json.dumps(self._state.to_json(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def _log(self, reason: str, losses: Mapping[str, float], progress: Progress) -> None:
        record = {"kind": "control", "segment": self.segment, "step": progress.step, "reason": reason}
        record |= self._state.record()
        if self.shadow:
            record |= {"shadow": True, "proposed": dict(self._state.weights)}
        seen: dict[str, Any] = {"losses": dict(losses), "progress": progress.to_json()}
        if isinstance(losses, DomainLoss) and losses.stderr is not None:
            seen["stderr"] = dict(zip(losses.names, losses.stderr, strict=True))
        self._record(record | seen | {"weights": dict(self.weights), "id": self.weights.id})

    def state_dict(self) -> dict[str, Any]:
        """JSON state after the last step reported by `on_step`; a batch in flight is not part of it.

        Identical on all ranks (training sums are reduced, so every rank must call this).
        """
        sums = self._carried
        if self._sums is not None:
            sums = _add(self._reduce(self._sums + 0).tolist(), self._carried)
        return {
            "version": 2,
            "step": self.step,
            "stream": self.stream_hash,
            "first": self._first,
            "observed": self._observed,
            "sampler": self.sampler.state_dict(after=None if self._batch is None else self.step - 1),
            "controller": None if self._state is None else self._state.to_json(),
            "sums": sums,
            "signal": self.signal.to_json(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken. A state without controller keeps this one unstarted;
        a session without controller (a branch that holds its weights) ignores the state of one.
        """
        if state.get("version") != 2:
            raise ConfigError(
                f"session state of version {state.get('version')!r}; this velopath reads version 2"
            )
        self.sampler.load_state_dict(state["sampler"])
        self.step, self._first, self._batch = int(state["step"]), int(state["first"]), None
        self._sums, self._carried, self.stream_hash = None, state["sums"], str(state["stream"])
        self._observed = state["observed"]
        self.signal = Anchored.from_json(state.get("signal", {}))  # a state from before there was one
        if self.controller is not None and state["controller"] is not None:
            self._state = self.controller.state_from_json(state["controller"])


def _check_batch(path: TokenPath, tokens: int) -> None:
    for start, width in path.ramp.stages:
        if width != tokens:
            raise ConfigError(
                f"the path counts {width} tokens an update from step {start} on, the sampler's steps have {tokens}; a "
                f"session's batch does not grow: use BatchRamp.constant({tokens})"
            )


def _wide(sums: Any) -> Any:
    """The sums in fp64: a torch tensor on its device, anything else as a numpy array."""
    return sums.double() if hasattr(sums, "double") else np.asarray(sums, np.float64)


def _add(a: list[list[float]], b: list[list[float]] | None) -> list[list[float]]:
    if b is None:
        return a
    return [[x + y for x, y in zip(row, other, strict=True)] for row, other in zip(a, b, strict=True)]
