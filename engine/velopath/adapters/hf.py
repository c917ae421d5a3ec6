"""Hugging Face's Trainer on a `velopath.Session`: our rows, our loss, live weights and the path's rate, exact resume.

    heldout = HeldOut.open("data/2026q1", row_tokens=2048)
    session = Session(sampler, path, controller=Velocitune(targets), every=50)
    SessionTrainer(model, args, session=session, evaluate=lambda: evaluate(HiddenModel(model), heldout)).train()

All else stays the Trainer's: optimiser, precision, DDP, clipping, logs, checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerCallback

from velopath.adapters.hf_loss import HiddenModel, add_domain_loss
from velopath.domains import DomainLoss
from velopath.errors import ConfigError, DataError
from velopath.schedule import LrPath
from velopath.schedule_tokens import TokenPath
from velopath.session import Session

__all__ = ["HiddenModel", "SessionTrainer", "add_domain_loss", "path_scheduler"]

STATE = "velopath"  # the session's state among `stateful_callbacks` in a checkpoint's trainer_state.json
Evaluate = Callable[[], Mapping[str, float] | DomainLoss]


def path_scheduler(optimizer: torch.optim.Optimizer, path: LrPath | TokenPath, first: int = 0) -> LambdaLR:
    """A scheduler whose n-th rate is `path.rate(first + n)`, in all groups; its state is the number of steps."""
    for group in optimizer.param_groups:
        group["initial_lr"] = 1.0
    return LambdaLR(optimizer, lambda n: path.rate(first + n))


class SessionTrainer(Trainer):  # type: ignore[misc]
    """`Trainer` on a session in place of a `train_dataset`; `max_steps` of the arguments counts the session's steps.

    A step of the sampler is one of the optimiser: its rows are per_device_train_batch_size times
    gradient_accumulation_steps. The controller gets the losses of `evaluate()`, without it those of the training
    batches. Raises `ConfigError` where arguments and session do not fit, `DataError` where the data ends early.
    """

    def __init__(self, *args: Any, session: Session, evaluate: Evaluate | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.session, self._heldout_loss, self._first, self._sums = session, evaluate, session.step, None
        add_domain_loss(self.model, len(session.sampler.names))
        self.model_accepts_loss_kwargs = (
            False  # the Trainer divides by the accumulation steps: see _micro_batches
        )
        self.args.ignore_data_skip = True  # the session's own state says where to go on
        rows = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        want, sampler = (rows, self.args.process_index, self.args.world_size), session.sampler
        if (sampler.rows, sampler.rank, sampler.world) != want or self.args.max_steps < 1:
            raise ConfigError(
                f"the sampler has {sampler.rows} rows for rank {sampler.rank} of {sampler.world}, the Trainer takes "
                f"{want[0]} for {want[1]} of {want[2]} and max_steps {self.args.max_steps}; expected the same, and 1 "
                "step or more"
            )
        self.add_callback(_Hooks(self))  # behind the others

    def get_train_dataloader(self) -> Any:
        return self._micro_batches()

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        self.lr_scheduler: Any = path_scheduler(optimizer or self.optimizer, self.session.path, self._first)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        if "domains" not in inputs:
            return super().compute_loss(model, inputs, return_outputs, **kwargs)
        share, outputs = inputs.pop("share"), model(**inputs)
        self._sums = outputs["sums"] if self._sums is None else self._sums + outputs["sums"]
        return (outputs["loss"] * share, outputs) if return_outputs else outputs["loss"] * share

    def _micro_batches(self) -> Iterator[dict[str, Any]]:
        """Micro-batches without read-ahead, so that a push holds from the next step on. `share` is a micro-batch's
        counted tokens over the mean of the step's; the mean over micro-batches and ranks is then that over tokens.
        """
        parts = self.args.gradient_accumulation_steps
        for batch in self.session:
            targets, tokens = torch.from_numpy(batch.targets()).long(), torch.from_numpy(batch.tokens)
            step = {"input_ids": tokens[:, :-1].long(), "targets": targets}
            step["domains"] = torch.from_numpy(batch.domains)
            if batch.positions is not None:  # transformers then attends inside documents
                step["position_ids"] = torch.from_numpy(batch.positions)[:, :-1].long()
            counts = torch.stack([(part >= 0).sum() for part in targets.chunk(parts)]).to(self.args.device)
            mean = counts.double().mean() if batch.counts is not None else counts[0]
            mean = self.accelerator.reduce(mean, "mean") if batch.counts is not None else mean
            for i in range(parts):
                share = (counts[i] / mean.clamp(min=1e-9)).float()
                yield {k: v.chunk(parts)[i] for k, v in step.items()} | {"share": share}
        raise DataError(
            f"the data ended at step {self.session.step}; prepare more, or let the sampler repeat"
        )

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self.state.stateful_callbacks[STATE] = self.session.state_dict()  # on every rank: it adds their sums
        super()._save_checkpoint(*args, **kwargs)

    def control_weights(self) -> None:
        """Give the controller its losses where they are due; it pushes the weights of the next step."""
        session, trained = self.session, self.session.step - self._first
        if self._heldout_loss is None and (trained == 0 or trained % session.every):
            return  # the first training losses are those of the first `every` steps
        if session.control_due:
            session.on_eval((self._heldout_loss or session.training_loss)())


class _Hooks(TrainerCallback):  # type: ignore[misc]
    """The session's hooks at the Trainer's events."""

    def __init__(self, trainer: SessionTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer, session = self._trainer, self._trainer.session
        if state.global_step and STATE not in state.stateful_callbacks:
            raise DataError("the checkpoint has no session state: a SessionTrainer did not save it")
        if state.global_step:
            session.load_state_dict(state.stateful_callbacks[STATE])
        if session.step != trainer._first + state.global_step:
            raise ConfigError(f"the session is at step {session.step}, the Trainer at {state.global_step}")
        trainer.control_weights()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.session.on_step(self._trainer._sums)
        self._trainer._sums = None
        self._trainer.control_weights()
