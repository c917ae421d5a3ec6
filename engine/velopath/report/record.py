"""RunRecord: everything a report says about a run, read once from the files of its folder.

Figures, tables, the PNG and `summary.json` all draw on this value, so they cannot disagree.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from velopath.config import read_tree
from velopath.errors import DataError
from velopath.lineage import Lineage
from velopath.plan import Plan
from velopath.runfolder import Record, RunFolder, is_proxy
from velopath.stream_data import check_table
from velopath.targets import Targets

MAIN, BASE, PROXY = "main", "base", "proxy"
"""Segment names with a meaning of their own."""


def is_branch(segment: str) -> bool:
    """Whether a segment is the branch of a version."""
    return segment not in (MAIN, BASE) and not is_proxy(segment)


@dataclass(frozen=True)
class Segment:
    """One stretch of training: its records in force in order of step, and the steps really run.

    `start` and `end` count updates; `run_steps` >= end - start, because steps that a resume repeated were run too.
    """

    name: str
    start: int
    end: int
    run_steps: int
    steps: tuple[Record, ...]
    evals: tuple[Record, ...]
    controls: tuple[Record, ...]
    judged: tuple[Record, ...]
    exposures: tuple[Record, ...]
    alarms: tuple[Record, ...] = ()

    def curve(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and values of a field of the step records, where it is a number."""
        points = [(r["step"], float(r[key])) for r in self.steps if r.get(key) is not None]
        return [s for s, _ in points], [v for _, v in points]

    def losses(self, domain: str) -> tuple[list[int], list[float]]:
        """Steps and held-out losses (nats per token) of a domain."""
        points = [(r["step"], float(r["loss"][domain])) for r in self.evals if domain in r["loss"]]
        return [s for s, _ in points], [v for _, v in points]

    def heldout_at(self, step: int, like: Record) -> Mapping[str, float] | None:
        """Held-out losses at exactly this step on as many tokens as `like`, so that the two compare; else None."""
        found = [r for r in (*self.evals, *self.judged) if r["step"] == step and like]
        return next((r["loss"] for r in found if r.get("tokens") == like.get("tokens")), None)


@dataclass(frozen=True)
class VersionRow:
    """One version cut from the main path: where it left, how long it ran, what it reached."""

    name: str
    parent: str
    branch_step: int
    steps: int
    slice: str
    heldout_loss: Mapping[str, float]
    before: Mapping[str, float] | None
    """Held-out losses of the main checkpoint it left from."""
    undecayed: Mapping[str, float] | None
    """Held-out losses of the main path after as many steps as the finished version, at the peak rate."""
    export: str | None
    shape: str | None
    """The shape of its decay."""


@dataclass(frozen=True)
class Ledger:
    """Cost in optimiser steps, as run; `plan` is what the configuration planned.

    Base, proxy and evaluation stand beside the comparison, not in it.
    """

    main_steps: int
    branch_steps: int
    proxy_steps: int
    base_steps: int
    evaluation_tokens: int
    plan: Plan | None

    @property
    def actual(self) -> int:
        return self.main_steps + self.branch_steps

    def over_ptfs(self, steps: int | None) -> float | None:
        """Steps as a fraction of retraining from scratch at every version; None without a plan."""
        return None if self.plan is None or steps is None else steps / self.plan.costs["ptfs"]


@dataclass(frozen=True)
class RunRecord:
    """A run as its folder tells it. Missing files make empty fields, never errors."""

    title: str
    about: Mapping[str, Any]
    config: Mapping[str, Any]
    config_text: str
    config_hash: str | None
    domains: tuple[str, ...]
    segments: Mapping[str, Segment]
    versions: tuple[VersionRow, ...]
    ledger: Ledger
    targets: Targets | None
    data: Mapping[str, Mapping[str, Any]]
    """By slice, what its `domains.json` says."""
    sampler_tokens_per_second: float | None

    @property
    def main(self) -> Segment | None:
        return self.segments.get(MAIN)

    @property
    def branches(self) -> tuple[Segment, ...]:
        return tuple(s for n, s in self.segments.items() if is_branch(n))

    @property
    def walk(self) -> tuple[Segment, ...]:
        """The main path and the branches: what the learning-rate path is made of."""
        return (*((self.main,) if self.main else ()), *self.branches)

    @property
    def row_tokens(self) -> int:
        """Tokens of one optimiser step; 0 before the first step is logged."""
        return max((int(r.get("tokens") or 0) for s in self.walk for r in s.steps), default=0)

    @property
    def slice_starts(self) -> list[tuple[str, int, int]]:
        """(slice, first step, last step + 1) in the order of the main path."""
        rows, at = [], 0
        for name, steps in self.ledger.plan.slices if self.ledger.plan else ():
            rows.append((name, at, at + steps))
            at += steps
        return rows

    @property
    def seconds(self) -> float | None:
        value = self.about.get("seconds")
        return float(value) if isinstance(value, (int, float)) else None

    def domain_facts(self) -> dict[str, dict[str, float | None]]:
        """Per domain: tokens read on the main path, first, target and last held-out loss in nats."""
        controls = self.main.controls if self.main else ()
        evals = self.main.evals if self.main else ()
        initial = controls[0].get("initial") if controls else None
        initial = initial or (evals[0]["loss"] if evals else {})
        target = (controls[-1].get("target") if controls else None) or (
            self.targets.losses if self.targets else {}
        )
        last = evals[-1]["loss"] if evals else {}
        read = self.tokens_read()
        return {
            name: {
                "tokens": round(read.get(name, 0)),
                "initial": initial.get(name),
                "target": target.get(name),
                "last_loss": last.get(name),
            }
            for name in self.domains
        }

    @property
    def exposure_counted(self) -> bool:
        """Whether the sampler counted what the main path read; else shares pushed times tokens stand in."""
        return bool(self.main and self.main.exposures)

    def tokens_read(self) -> dict[str, float]:
        """Tokens of each domain that the main path read, over all slices."""
        tokens = dict.fromkeys(self.domains, 0.0)
        main = self.main
        if main is None:
            return tokens
        for record in _last_of_slice(main.exposures):
            for name, row in record["domains"].items():
                tokens[name] = tokens.get(name, 0.0) + row["tokens"]
        if not main.exposures:
            ends = [c["step"] for c in main.controls[1:]] + [main.end]
            for control, end in zip(main.controls, ends, strict=False):
                for name, share in control["weights"].items():
                    tokens[name] = tokens.get(name, 0.0) + share * (end - control["step"]) * self.row_tokens
        return tokens

    def epochs(self, domain: str) -> list[float]:
        """Epochs of the domain's data that the main path read, slice by slice; empty where nothing was counted."""
        rows = _last_of_slice(self.main.exposures) if self.main else []
        return [r["domains"][domain]["epochs"] for r in rows if domain in r["domains"]]

    def rates(self, segments: Iterable[Segment]) -> tuple[float | None, float | None]:
        """Tokens per second and the share of time spent waiting for data, each weighted by time."""
        tokens = seconds = waited = 0.0
        for segment in segments:
            at = segment.start
            for r in segment.steps:
                if r.get("tokens_per_second"):
                    count = (r["step"] - at) * (r.get("tokens") or 0)
                    tokens, spent = tokens + count, count / r["tokens_per_second"]
                    seconds, waited = seconds + spent, waited + spent * (r.get("data_wait_share") or 0.0)
                at = r["step"]
        return (tokens / seconds, waited / seconds) if seconds > 0 else (None, None)


def read_run(run: RunFolder) -> RunRecord:
    """Read a run folder. Raises `DataError` on a damaged file; a file that is not there is an empty field."""
    about = _object(run, "run.json")
    config, text = _config(run)
    planned = _object(run, "plan.json")
    plan = Plan.from_json(planned) if planned else None
    lineage = Lineage.from_events(run.events())
    segments = _segments(run, _starts(plan, lineage))
    seen = [r["loss"] for s in segments.values() for r in s.evals]
    seen += [r["weights"] for s in segments.values() for r in s.controls]
    names = {name for values in seen for name in values}
    data = _data(run)
    speeds = run.metrics("sampler")
    targets = _object(run, "targets.json")
    return RunRecord(
        title=str(about.get("name") or config.get("title") or run.path.name),
        about=about,
        config=config,
        config_text=text,
        config_hash=_hash(config) if config else None,
        domains=tuple(sorted(names or {n for d in data.values() for n in d})),
        segments=segments,
        versions=_versions(run, segments, lineage),
        ledger=_ledger(run, segments, plan, lineage),
        targets=Targets.from_json(targets) if targets else None,
        data=data,
        sampler_tokens_per_second=float(speeds[-1]["tokens_per_second"]) if speeds else None,
    )


def mean_loss(losses: Mapping[str, float] | None) -> float | None:
    """Plain mean over domains in nats; None without losses."""
    return math.fsum(losses.values()) / len(losses) if losses else None


def _object(run: RunFolder, name: str) -> dict[str, Any]:
    value = run.read_json(name)
    if value is not None and not isinstance(value, dict):
        raise DataError(f"expected a JSON object, got {type(value).__name__}", path=run.path / name)
    return value or {}


def _config(run: RunFolder) -> tuple[dict[Any, Any], str]:
    """The resolved configuration, also one of another version of the schema, and its text."""
    path = run.path / "config.yaml"
    return read_tree(path) if path.exists() else ({}, "")


def _data(run: RunFolder) -> dict[str, dict[str, Any]]:
    """Slice -> domain -> what its domains.json says of it."""
    tables = {name: table for name, table in _object(run, "data.json").items() if table is not None}
    for table in tables.values():
        check_table(table, str(run.path / "data.json"))
    return {name: table.get("domains", {}) for name, table in tables.items()}


def _hash(config: Mapping[str, Any]) -> str:
    """The same digits as `RunConfig.hash`, also for a configuration of another version of the schema."""
    text = json.dumps(config, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _segments(run: RunFolder, starts: Mapping[str, int]) -> dict[str, Segment]:
    """Segments by name: main first, versions in the order they were cut, base and proxy last."""
    records = run.metrics()
    ran = _steps_run(run.records(), starts)
    found: dict[str, Segment] = {}
    for name in dict.fromkeys(r["segment"] for r in records):
        mine = sorted((r for r in records if r["segment"] == name), key=lambda r: r["step"])

        def of(kind: str, mine: Sequence[Record] = mine) -> tuple[Record, ...]:
            return tuple(r for r in mine if r.get("kind") == kind)

        start, end = _start(name, mine[0]["step"], starts), max(r["step"] for r in mine)
        found[name] = Segment(
            name,
            start,
            end,
            ran.get(name, 0),
            of("step"),
            of("eval"),
            of("control"),
            of("version"),
            of("exposure"),
            of("alarm"),
        )
    order = {MAIN: 0, BASE: 2}
    return dict(
        sorted(found.items(), key=lambda i: (3 if is_proxy(i[0]) else order.get(i[0], 1), i[1].start))
    )


def _start(name: str, first: int, starts: Mapping[str, int]) -> int:
    """Updates done before a segment's first: its branch step, the step in a decay's name, or 0."""
    if is_branch(name):
        return starts.get(name, first)
    return int(name.removeprefix(f"{PROXY}-")) if name.startswith(f"{PROXY}-") else 0


def _steps_run(records: Iterable[Record], starts: Mapping[str, int]) -> dict[str, int]:
    """Steps really run per segment; those that a `resume` record took back and repeated count each time.

    Steps between the last record and a `kill -9` are in no file and do not count.
    """
    at: dict[str, int] = {}
    ran: dict[str, int] = {}
    for record in records:
        name, step = record["segment"], record["step"]
        before = at.setdefault(name, _start(name, step, starts))
        if record.get("kind") == "resume":
            at[name] = step
        elif step > before:
            if "change" not in record:  # else copied here by an undone rollback
                ran[name] = ran.get(name, 0) + step - before
            at[name] = step
    return ran


def _starts(plan: Plan | None, lineage: Lineage) -> dict[str, int]:
    """Branch steps by version: as planned, and over that as cut."""
    planned = {s.name: s.start_step for s in plan.branches} if plan else {}
    return planned | {v.name: v.branch_step for v in lineage.versions}


def _versions(run: RunFolder, segments: Mapping[str, Segment], lineage: Lineage) -> tuple[VersionRow, ...]:
    """The finished versions, by branch step: those in the lineage, and those whose end was judged."""
    cut = {v.name: v for v in lineage.versions}
    main = segments.get(MAIN)
    rows = []
    for name in dict.fromkeys((*(n for n in segments if is_branch(n)), *cut)):
        branch, known = segments.get(name), cut.get(name)
        judged = [r for r in branch.judged if r["step"] > branch.start] if branch else []
        reached: Record = judged[-1] if judged else {}
        start = known.branch_step if known else branch.start if branch else 0
        steps = known.steps if known else reached["step"] - start if reached else 0
        if not steps:
            continue  # still on its way
        export = run.path / "exports" / name
        found = str(export.relative_to(run.path)) if export.is_dir() else None
        rows.append(
            VersionRow(
                name=name,
                parent=(known.parent if known else None) or f"{MAIN}@{start}",
                branch_step=start,
                steps=steps,
                slice=known.slice if known else str(reached.get("slice") or ""),
                heldout_loss=(known.heldout_loss if known else None) or reached.get("loss", {}),
                before=(branch.heldout_at(start, reached) if branch else None)
                or (main.heldout_at(start, reached) if main else None),
                undecayed=main.heldout_at(start + steps, reached) if main else None,
                export=(known.export if known else None) or found,
                shape=known.path.shape if known and known.path else None,
            )
        )
    return tuple(sorted(rows, key=lambda row: row.branch_step))


def _last_of_slice(records: Sequence[Record]) -> list[Record]:
    """The last exposure of each slice: a sampler counts anew in every slice."""
    return list({r.get("slice"): r for r in records}.values())


def _ledger(run: RunFolder, segments: Mapping[str, Segment], plan: Plan | None, lineage: Lineage) -> Ledger:
    """The steps run. The base model's come from the lineage, which notes what the starting model cost, else from
    the run that made it, where that lies in this folder."""
    base = list(RunFolder(run.path / "base").records()) if (run.path / "base").is_dir() else []

    def steps(name: str) -> int:
        return segments[name].run_steps if name in segments else 0

    return Ledger(
        main_steps=steps(MAIN),
        branch_steps=sum(s.run_steps for n, s in segments.items() if is_branch(n)),
        proxy_steps=sum(s.run_steps for n, s in segments.items() if is_proxy(n)),
        base_steps=lineage.cost.base_steps or steps(BASE) + sum(_steps_run(base, {}).values()),
        evaluation_tokens=sum(
            sum(r["tokens"].values())
            for r in (*run.records(), *base)
            if r.get("kind") in ("eval", "version") and r.get("tokens") and "change" not in r
        ),
        plan=plan,
    )
