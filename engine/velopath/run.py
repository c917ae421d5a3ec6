"""Run: one run folder at work: main path, branches, targets, evaluation, export, each resumable.

`Run` decides what is trained, from which checkpoint, on which slice and path; `Loop` trains it. Opening a run takes
its lock, so that two processes cannot write one folder.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
import torch

from velopath.alarm_watch import AlarmWatch
from velopath.checkpoint import Checkpoint, latest_checkpoint, load_checkpoint
from velopath.config import RunConfig
from velopath.config_change import check_unchanged, split_rows
from velopath.configured_plan import in_steps, main_path, plan_of, slice_steps
from velopath.controllers import Controller
from velopath.dist import Dist, init_from_env
from velopath.environment import describe_environment
from velopath.errors import ConfigError, DataError, StoppedError, WriteError
from velopath.evaluate import HeldOut, Tokens
from velopath.loop import Loop, StopRequest
from velopath.machine import make_step, restart, starting_model
from velopath.model import Decoder
from velopath.phases import Phases
from velopath.plan import Plan
from velopath.profiling import Profile
from velopath.runchange import complete
from velopath.runconfig import has_begun, recorded_config, recorded_rows, slice_folders, slice_table
from velopath.runfolder import RunFolder
from velopath.runlineage import kept_steps
from velopath.schedule import LrPath
from velopath.session import Session
from velopath.stream import Sampler, open_sampler
from velopath.stream_data import heldout_names, read_settings, read_table
from velopath.train_step import TrainStep

MAIN = "main"
HEARTBEAT_SECONDS = 30.0
"""run.json is written again this often while training, so that a killed command's time counts too."""
Mode = Literal["train", "append", "read"]
"""How a run is opened: to train; to add an export, leaving run.json as it is; only to look, without its lock."""


@dataclass(frozen=True)
class Piece:
    """Updates `start` to `end` (exclusive) of a stretch that read one slice, whose own first update is `first`."""

    slice: str
    first: int
    start: int
    end: int


class Run:
    """A run folder opened for work, as a context manager. All ranks open it; rank 0 writes.

    `watchers` are called with every metrics record and with `begin` and `note` records for the console.
    """

    def __init__(
        self, config: RunConfig, folder: RunFolder, dist: Dist, command: str, mode: Mode = "train"
    ) -> None:
        self.config, self.folder, self.dist, self.command, self.mode = config, folder, dist, command, mode
        self.stop = StopRequest()
        alarms = AlarmWatch(config.alarms, folder, self.log, self.note, self.stop.for_alarm)
        self.watchers: list[Callable[[dict[str, Any]], None]] = [alarms]
        self.seconds_before = 0.0
        """Work done for this run before it was opened, for run.json (the demo's corpus and base model)."""
        self.plan: Plan = plan_of(config)
        self._stack = ExitStack()
        self._clock = time.perf_counter()
        self._heldout: dict[tuple[str, ...], HeldOut] = {}
        self._step: TrainStep | None = None
        self._phases = Phases(dist.device)
        self._profile: Profile | None = None

    # -- opening ---------------------------------------------------------------------------------------------

    @classmethod
    def open(cls, config: RunConfig, path: Path, command: str) -> Run:
        """A new run in `path`, or the one that is there if its configuration is the same (else `ConfigError`).

        Until a first step is recorded or saved there is nothing to continue, and any configuration is taken. Lengths in
        tokens become steps here, by the run's tokens per step; what is recorded has steps.
        """
        dist = init_from_env(config.train.device)
        folder = RunFolder(path, create=True)
        recorded = folder.path / "config.yaml"
        if has_begun(folder):
            known = _on_ranks(recorded_config(folder), folder, dist, config.train.micro_rows)
            config = in_steps(config, known.train.rows * dist.world * known.train.row_tokens)
            check_unchanged(known, config, recorded, dist.world)
        config = in_steps(config, config.train.rows * dist.world * config.train.row_tokens)
        return cls(config, folder, dist, command)

    @classmethod
    def reopen(cls, path: Path, command: str, mode: Mode = "train") -> Run:
        """The run in `path`, with the configuration recorded there."""
        folder = RunFolder(path)
        config = recorded_config(folder)
        dist = init_from_env(config.train.device)
        return cls(_on_ranks(config, folder, dist), folder, dist, command, mode)

    def __enter__(self) -> Run:
        if self.config.train.cpu_threads is not None:
            torch.set_num_threads(self.config.train.cpu_threads)
        with ExitStack() as stack:  # undone where the start fails, kept where it succeeds
            stack.callback(self.folder.close)
            stack.callback(self.dist.close)
            if self.dist.is_main and self.mode != "read":
                stack.enter_context(self.folder.lock())
                complete(self.folder)  # what a killed process began to change
            if self.dist.is_main and self.mode == "train":
                self._write_start()
            stack.enter_context(self.stop.installed())
            self._stack = stack.pop_all()
        return self

    def _write_start(self) -> None:
        tables = {}
        for name in self.config.data.slices:
            slice_folders(self.config, name)  # refuses a folder without data
            tables[name] = slice_table(self.config, name)
        self.folder.write_text("config.yaml", self.config.to_yaml())
        self.folder.write_json("plan.json", self.plan.to_json())
        self.folder.write_json("data.json", tables)
        self._write_about("running")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._stack, suppress(WriteError) if error is not None else nullcontext():  # that one says more
            if self.dist.is_main and self.mode == "train":
                state = (
                    "done" if error is None else "stopped" if isinstance(error, StoppedError) else "failed"
                )
                self._write_about(state)

    def _write_about(self, state: str) -> None:
        """run.json: first start, seconds of all commands so far, also of killed ones, what ran where."""
        before = self.folder.read_json("run.json") or {}
        now = datetime.now(UTC).isoformat(timespec="seconds")
        spent = time.perf_counter() - self._clock  # since it was last written: a kill loses no more than that
        before_opening, self.seconds_before = self.seconds_before, 0.0
        self._clock = time.perf_counter()
        about = {
            "name": self.config.title,
            "command": self.command,
            "state": state,
            "started": before.get("started", now),
            "ended": None if state == "running" else now,
            "seconds": before.get("seconds", 0.0) + spent + before_opening,
            "seed": self.config.seed,
            "world": self.dist.world,
            "global_rows": self.config.train.rows * self.dist.world,
        }
        self.folder.write_json("run.json", about | describe_environment(self.dist.device))

    def profile(self, steps: int) -> None:
        """Profile the next `steps` steps on rank 0 into the folder's `profile/`, see `velopath.profiling`."""
        if self.dist.is_main:
            folder = self.folder.path / "profile"
            self._profile = Profile(folder, steps, lambda text: self.note("profile", text))
            self._stack.callback(self._profile.close)

    # -- records ---------------------------------------------------------------------------------------------

    def log(self, record: dict[str, Any]) -> None:
        """Append a metrics record and show it to the watchers; nothing on ranks other than 0."""
        if self.dist.is_main:
            self.folder.append_metric(record)
            self._watch(record)
            if self.mode == "train" and time.perf_counter() - self._clock > HEARTBEAT_SECONDS:
                self._write_about("running")

    def begin(self, segment: str, step: int, until: int) -> None:
        """A segment starts or goes on at `step`: earlier records of it beyond that step are void."""
        if step or (self.dist.is_main and self.folder.metrics(segment=segment)):
            self.log({"kind": "resume", "segment": segment, "step": step})
        self._watch({"kind": "begin", "segment": segment, "step": step, "until": until})

    def note(self, segment: str, text: str) -> None:
        """A line for people."""
        self._watch({"kind": "note", "segment": segment, "text": text})

    def _watch(self, record: dict[str, Any]) -> None:
        for watcher in self.watchers:
            watcher(record)

    # -- parts -----------------------------------------------------------------------------------------------

    def checkpoints(self, segment: str) -> Path:
        """The folder of a segment's checkpoints."""
        return self.folder.path / "checkpoints" / segment

    def kept_main_steps(self) -> list[int]:
        """The steps at which the main path has a checkpoint, in order."""
        return kept_steps(self.checkpoints(MAIN))

    def main_path(self) -> LrPath:
        """The learning-rate path of the main path."""
        return main_path(self.config)

    def pieces(self, start: int, end: int) -> list[Piece]:
        """Updates `start` to `end` cut at the borders of the slices."""
        found, first = [], 0
        for name, steps in self.plan.slices:
            last = first + steps
            if max(start, first) < min(end, last):
                found.append(Piece(name, first, max(start, first), min(end, last)))
            first = last
        if end > first:
            raise ConfigError(
                f"step {end} lies beyond the last slice, which ends at step {first}; add a slice"
            )
        return found

    def tokens_at_slice_end(self, slice_name: str, tokens_per_step: int) -> int:
        """Training tokens of the main path, from its start to the end of a slice."""
        done = 0
        for name, steps in self.plan.slices:
            done += steps
            if name == slice_name:
                break
        return done * tokens_per_step

    def new_model(self) -> Decoder:
        """The starting model: the Hugging Face folder of the config, or its preset with seeded random weights."""
        return starting_model(self.config, self.prepared, self.dist.device)

    def loop_at(self, *roots: Path) -> tuple[Loop, Checkpoint | None]:
        """A loop at the latest checkpoint of the first root that has one, or at the starting model.

        A root may also be one checkpoint's own folder.
        """
        step, is_new = self._train_step()
        loop = Loop(
            self.config, self.dist, step, self._phases, self.held_out, self.log, self.stop, self._profile
        )
        for root in roots:
            folder = root if (root / "manifest.json").exists() else latest_checkpoint(root)
            if folder is not None:
                checkpoint = load_checkpoint(folder)
                checkpoint.restore(step.decoder, step.optimizer, rng=True)
                return loop, checkpoint
        if not is_new:
            restart(step.decoder, self.new_model())
            step.optimizer.state.clear()
        torch.manual_seed(self.config.seed)
        return loop, None

    def _train_step(self) -> tuple[TrainStep, bool]:
        """The one step of this process, and whether it was made just now: all segments train the same tensors, so
        that a compiled step is compiled once."""
        if self._step is not None:
            return self._step, False
        n_domains = max(len(slice_folders(self.config, name)) for name in self.config.data.slices)
        self._step = make_step(
            self.config, self.new_model(), n_domains=n_domains, dist=self.dist, phases=self._phases
        )
        return self._step, True

    def held_out(self, names: tuple[str, ...]) -> HeldOut:
        """The held-out set of these domains: of the configured folder, else of the first slice that has each."""
        if names not in self._heldout:
            data = self.config.data
            roots = [data.heldout] if data.heldout is not None else [s.root for s in data.slices.values()]
            streams: list[Tokens] = []
            starts: list[Any] = []
            for name in names:
                root = next((r for r in roots if name in heldout_names(r)), roots[0])
                part = HeldOut.open(root, row_tokens=self.config.train.row_tokens, names=[name])
                streams += part.streams
                starts += part.starts or ()
            self._heldout[names] = HeldOut(
                names, tuple(streams), self.config.train.row_tokens, self.config.seed, tuple(starts)
            )
        return self._heldout[names]

    @contextmanager
    def session(
        self,
        piece: Piece,
        *,
        segment: str,
        path: LrPath,
        state: dict[str, Any] | None,
        controller: Controller | None = None,
    ) -> Iterator[Session]:
        """A session on the piece's slice; `state` is a checkpoint's, used if it is of the same slice.

        Every segment has an audit log of its own per slice. Row order is keyed by the slice's name, so that adding
        slices never changes what earlier ones give; the proxy reads the main path's rows. The log of a branch begins
        as a fork of the one of the segment that `state` comes from.
        """
        entry, train = self.config.data.slices[piece.slice], self.config.train
        known = state if state is not None and state["slice"] == piece.slice else None
        parent = known["segment"] if known is not None and known["segment"] != segment else None
        self.folder.audit(segment, piece.slice).parent.mkdir(exist_ok=True)
        with open_sampler(
            slice_folders(self.config, piece.slice),
            rows=train.rows,
            row_tokens=train.row_tokens,
            seed=self.config.seed,
            rank=self.dist.rank,
            world=self.dist.world,
            weights=entry.weights,
            exhaustion=self.config.data.exhaustion,
            **read_settings(self.config.data),
            on_bad_shard=self.config.data.on_bad_shard,
            audit=self.folder.audit(segment, piece.slice),
            audit_parent=None if parent is None else self.folder.audit(parent, piece.slice),
            start_step=piece.first,
            threads=train.threads,
            allocate=_pinned if self.dist.device.type == "cuda" else None,
            domain_key_salt=piece.slice,
            **self.config.row_options,
        ) as sampler:
            self._note_quarantine(sampler, segment)
            session = Session(
                sampler,
                path,
                controller=controller,
                every=self.config.control.every,
                reduce=self.dist.all_reduce_sum,
                record=lambda record: self.log({**record, "slice": piece.slice}),
                segment=segment,
                end=piece.first + slice_steps(self.config)[piece.slice],
                shadow=self.config.control.shadow,
            )
            if known is not None:
                session.load_state_dict(known["session"])
            if session.step != piece.start:
                raise DataError(
                    f"the state of {segment} is at step {session.step}, expected {piece.start} in {piece.slice}",
                    path=self.checkpoints(segment),
                )
            yield session

    def _note_quarantine(self, sampler: Sampler, segment: str) -> None:
        """Tell what was left out; ranks that leave out other shards would read by other plans: `DataError`."""
        if self.config.data.on_bad_shard == "fail":
            return
        here = [[bad.domain, bad.shard] for bad in sampler.quarantined]
        differs = torch.tensor(float(self.dist.broadcast_json(here) != here), device=self.dist.device)
        if self.dist.all_reduce_sum(differs).item():
            raise DataError(
                f"the ranks found different shards bad, rank {self.dist.rank} {here}; give all ranks the same files, "
                "or look at the disks of the machines"
            )
        for bad in sampler.quarantined:
            self.note(segment, f"left out {bad.domain}/{bad.shard}: {bad.reason}")

    @property
    def data_root(self) -> str:
        """The first slice's folder or URL: its tokenizer is the run's."""
        return next(iter(self.config.data.slices.values())).root

    @property
    def prepared(self) -> dict[str, Any]:
        """The first slice's domains.json; empty where the folder was not written by `prepare`."""
        return read_table(self.data_root) or {}

    @property
    def domain_names(self) -> tuple[str, ...]:
        """All domains of all slices, sorted."""
        names: set[str] = set()
        for name in self.config.data.slices:
            names |= set(slice_folders(self.config, name))
        return tuple(sorted(names))


def _on_ranks(recorded: RunConfig, folder: RunFolder, dist: Dist, micro_rows: int | None = None) -> RunConfig:
    """The recorded configuration with the rows per rank that keep the rows of a step on the present ranks."""
    rows = recorded_rows(folder)
    if rows is None:  # killed before its first step
        return recorded
    return split_rows(recorded, *rows, dist.world, micro_rows)


def _pinned(shape: tuple[int, int]) -> np.ndarray[Any, np.dtype[np.int32]]:
    """Page-locked host memory, so that copies to the GPU do not hold up the host."""
    return torch.empty(shape, dtype=torch.int32, pin_memory=True).numpy()
