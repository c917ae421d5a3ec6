"""One run of the study: a small decoder on the six domains under a mixing rule, within a budget of tokens.

What a run spends outside training is taken off its training steps: every arm may spend the same. A forward pass
counts a third of a training token (forward and backward cost three times a forward pass).
"""

from __future__ import annotations

import copy
import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.mixing.corpus import ROW_TOKENS, VOCABULARY, StudyData
from velopath import controllers
from velopath.dist import Dist
from velopath.evaluate import HeldOut, evaluate
from velopath.model import Decoder, preset
from velopath.optim import build_optimizer
from velopath.proxy_points import decay_steps
from velopath.schedule import LrPath
from velopath.session import Session
from velopath.stream import open_sampler
from velopath.train_step import TrainStep

VERSION = 1
"""Raise it when a change moves results: finished runs of another version are not taken again."""
FORWARD_COST = 1 / 3
WITHOUT_LOSSES = ("static", "uniform", "temperature", "schedule")
"""Controllers that look at no loss: nothing is evaluated for them."""


@dataclass(frozen=True)
class Scale:
    """Sizes of a study: the same file runs on two cores and on a GPU.

    `steps` is the budget of a run in steps of `rows` x 256 tokens; the rate decays over the last `decay` share.
    `heldout_tokens` per domain and evaluation are what rules and their targets see: the same sample.
    """

    preset: str = "tiny"
    device: str = "cpu"
    rows: int = 4
    steps: int = 600
    base_steps: int = 500
    warmup: int = 30
    peak: float = 3e-3
    decay: float = 0.4
    test_tokens: int = 16_384
    heldout_tokens: int = 2048

    @property
    def step_tokens(self) -> int:
        return self.rows * ROW_TOKENS

    @property
    def budget(self) -> int:
        """Training tokens of a run."""
        return self.steps * self.step_tokens


@dataclass(frozen=True)
class RunSettings:
    """What a run depends on, and so what its result is kept under.

    `seed` is base model and data order: equal seeds make a pair. `weights` are the first shares. `every` is the
    update interval in steps, `signal` what drives the controller ("heldout" or "training"), `heldout_tokens` per
    domain and evaluation. `other_tokens` were spent before (a proxy), in training tokens. The rule
    starts at step `begin`, until then the first shares hold. `constant` keeps the rate, `stop` ends the run early.
    `watch` evaluates the control set after these steps for the record, at no cost: no rule sees it. With `decays` a
    copy of the model is decayed over that share of the steps from each of them on, and evaluated at its end, too. A
    run without controller also notes the training loss since the step watched before: what comes for free.
    """

    seed: int
    weights: Mapping[str, float]
    scale: Scale = Scale()
    controller: str = "static"
    options: Mapping[str, Any] = field(default_factory=dict)
    every: int = 50
    signal: str = "heldout"
    heldout_tokens: int = 4096
    other_tokens: int = 0
    begin: int = 0
    constant: bool = False
    watch: tuple[int, ...] = ()
    watch_tokens: int = 8192
    stop: int | None = None
    decays: float = 0.0
    version: int = VERSION

    @property
    def key(self) -> str:
        """A hash of what is not default, so that a setting added later leaves the keys of finished runs alone."""
        return _key(asdict(self))

    def evaluation_tokens(self, steps: int, domains: int) -> int:
        """Held-out tokens that the rule looks at in so many steps: before the run, and at every update."""
        if self.controller in WITHOUT_LOSSES:
            return 0
        times = 1 + (steps - 1 - self.begin) // self.every if self.signal == "heldout" else 1
        return times * self.heldout_tokens * domains

    def train_steps(self, domains: int) -> int:
        """The most steps whose whole cost stays within the budget."""
        if self.stop is not None:
            return self.stop
        for steps in range(self.scale.steps, 0, -1):
            spent = steps * self.scale.step_tokens + self.other_tokens
            if spent + FORWARD_COST * self.evaluation_tokens(steps, domains) <= self.scale.budget:
                return steps
        raise ValueError(f"{self.other_tokens} tokens of proxy leave nothing of {self.scale.budget}")


def _key(settings: dict[str, Any]) -> str:
    usual = json.loads(json.dumps(asdict(RunSettings(0, {}))))
    settings = usual | json.loads(json.dumps(settings))  # tuples as JSON has them
    scale = {k: v for k, v in settings["scale"].items() if v != usual["scale"][k]}
    if settings["controller"] in WITHOUT_LOSSES:  # what such a run does not depend on
        settings = settings | {k: usual[k] for k in ("every", "signal", "heldout_tokens", "begin")}
    told = {k: v for k, v in settings.items() if v != usual[k] and k != "scale"} | {"scale": scale}
    text = json.dumps(told | {"seed": settings["seed"]}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Bench:
    """Data, base models and hold-outs of a study, and `run`. Base models are kept in `folder`/bases."""

    def __init__(self, data: StudyData, folder: Path) -> None:
        self.data, self.folder = data, folder
        self.control, self.test = data.heldout("control"), data.heldout("test")

    def run(self, settings: RunSettings) -> dict[str, Any]:
        """Train and test one run; a JSON value with its settings, losses by domain, weights over time and cost."""
        scale, names = settings.scale, self.data.names
        steps = settings.train_steps(len(names))
        start = time.perf_counter()
        torch.set_num_threads(1 if scale.device == "cpu" else torch.get_num_threads())
        decoder = self._base(settings.seed, scale)
        path = LrPath.main(peak=scale.peak, warmup_steps=scale.warmup)
        if not settings.constant:
            path = path.branch(at_step=steps - round(scale.decay * steps), steps=round(scale.decay * steps))
        controller = controllers.build(settings.controller, **settings.options)
        records: list[dict[str, Any]] = []
        watched: dict[int, dict[str, float]] = {}
        decayed: dict[int, dict[str, float]] = {}
        trained: dict[int, dict[str, float]] = {}
        with open_sampler(
            self.data.train, rows=scale.rows, row_tokens=ROW_TOKENS, seed=settings.seed,
            weights=settings.weights, threads=0, cache=self.folder / "cache",
        ) as sampler:  # fmt: skip
            session = Session(
                sampler, path, every=settings.every, record=records.append, end=steps,
            )  # fmt: skip
            optimizer = build_optimizer(decoder)
            for _ in self._train(decoder, session, scale, steps, optimizer):
                if session.step == settings.begin and settings.controller not in WITHOUT_LOSSES:
                    session.training_loss()
                    session.controller = controller
                if session.control_due:
                    if settings.signal == "training" and session.started:
                        session.on_eval(session.training_loss())
                    else:
                        session.on_eval(self._loss(decoder, self.control, settings.heldout_tokens, scale))
                if session.step in settings.watch:
                    watched[session.step] = dict(
                        self._loss(decoder, self.control, settings.watch_tokens, scale)
                    )
                    if settings.controller == "static":
                        trained[session.step] = dict(session.training_loss())
                    if settings.decays and session.step < steps:
                        end, losses = self._decayed(decoder, optimizer, session, settings)
                        decayed[end] = losses
            exposure = sampler.exposure()
        if steps in settings.watch:
            watched[steps] = dict(self._loss(decoder, self.control, settings.watch_tokens, scale))
        test = self._loss(decoder, self.test, scale.test_tokens, scale)
        read = {name: exposure[name]["tokens"] for name in names}
        return {
            "settings": asdict(settings),
            "steps": steps,
            "evaluation_tokens": settings.evaluation_tokens(steps, len(names)),
            "test": dict(test),
            "stderr": {name: test.stderr_of(name) for name in names},
            "shares": {name: read[name] / sum(read.values()) for name in names},
            "epochs": {name: exposure[name]["epochs"] for name in names},
            "weights": [{"step": r["step"], "weights": r["weights"]} for r in records if "weights" in r],
            "watched": watched,
            "decayed": decayed,
            "trained": trained,
            "seconds": time.perf_counter() - start,
        }

    def _decayed(
        self, decoder: Decoder, optimizer: torch.optim.Optimizer, session: Session, settings: RunSettings
    ) -> tuple[int, dict[str, float]]:
        """A copy that decays from here over `decays` of the steps done: its last step and control losses there."""
        scale = settings.scale
        length = decay_steps(session.step, settings.decays)
        end = session.step + length
        other = Decoder(preset(scale.preset, vocab_size=VOCABULARY), seed=0, device=scale.device)
        other.load_state_dict(decoder.state_dict())
        moments = build_optimizer(other)
        moments.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        with open_sampler(
            self.data.train, rows=scale.rows, row_tokens=ROW_TOKENS, seed=settings.seed,
            weights=settings.weights, threads=0, cache=self.folder / "cache",
        ) as sampler:  # fmt: skip
            sampler.load_state_dict(session.sampler.state_dict())
            branch = Session(sampler, session.path.branch(at_step=session.step, steps=length))
            for _ in self._train(other, branch, scale, end, moments):
                pass
        return end, dict(self._loss(other, self.control, settings.watch_tokens, scale))

    def _train(
        self,
        decoder: Decoder,
        session: Session,
        scale: Scale,
        steps: int,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> Iterator[None]:
        """Steps of a session; yields before each of them, when the model is up to date."""
        dist = Dist(device=torch.device(scale.device))
        step = TrainStep(
            decoder, optimizer or build_optimizer(decoder), n_domains=len(self.data.names), dist=dist,
            bf16=scale.device != "cpu", compile=False,
        )  # fmt: skip
        decoder.train()
        while session.step < steps:
            yield
            rate = session.rate
            batch = session.next_batch()
            tokens = torch.from_numpy(batch.tokens).to(dist.device)
            domains = torch.from_numpy(batch.domains).to(dist.device)
            session.on_step(step(tokens, domains, rate).sums)

    def _loss(self, decoder: Decoder, heldout: HeldOut, tokens: int | None, scale: Scale) -> Any:
        dist = Dist(device=torch.device(scale.device))
        return evaluate(
            decoder, heldout, tokens_per_domain=tokens, batch_rows=16, dist=dist, bf16=scale.device != "cpu"
        )

    def _base(self, seed: int, scale: Scale) -> Decoder:
        """The base model of a seed: trained on `KNOWN` with a complete decay, as one gets it from elsewhere."""
        decoder = Decoder(preset(scale.preset, vocab_size=VOCABULARY), seed=seed, device=scale.device)
        what = json.dumps([seed, scale.preset, scale.rows, scale.base_steps, scale.peak, VERSION])
        file = self.folder / "bases" / f"{hashlib.sha256(what.encode()).hexdigest()[:16]}.pt"
        if not file.is_file():
            path = LrPath.ptfs(peak=scale.peak, warmup_steps=scale.warmup, steps=scale.base_steps)
            weights = {name: float(name in self.data.known) for name in self.data.names}
            with open_sampler(
                self.data.train, rows=scale.rows, row_tokens=ROW_TOKENS, seed=1000 + seed,
                weights=weights, threads=0, cache=self.folder / "cache",
            ) as sampler:  # fmt: skip
                session = Session(sampler, path)
                for _ in self._train(decoder, session, scale, scale.base_steps):
                    pass
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.save(decoder.state_dict(), file)
        decoder.load_state_dict(torch.load(file, map_location=scale.device, weights_only=True))
        return decoder


class Results:
    """Finished runs in a file, one JSON a line: a study that was interrupted goes on where it was."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._found: dict[str, dict[str, Any]] = {}
        if file.is_file():
            for line in file.read_text().splitlines():
                result = json.loads(line)
                self._found[_key(result["settings"])] = result

    def __contains__(self, settings: RunSettings) -> bool:
        return settings.key in self._found

    def of(self, bench: Bench, settings: RunSettings) -> dict[str, Any]:
        """The result of these settings: the one kept, or a run's, kept from now on."""
        if settings.key not in self._found:
            result = bench.run(settings)
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a") as out:
                out.write(json.dumps(result) + "\n")
            self._found[settings.key] = result
        return json.loads(json.dumps(self._found[settings.key]))
