"""The lineage of a run: which version came from which checkpoint, on what data, by which path, at what cost.

A tree: main checkpoints form the trunk, each version is a leaf at the main checkpoint that it was cut from (LR path
switching: the main path keeps its own optimiser and goes on undecayed). Pure values; the run folder keeps them as
one event a line, see `Lineage.apply`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from velopath.errors import ConfigError
from velopath.schedule import LrPath

MAIN = "main"


@dataclass(frozen=True)
class Cost:
    """What was spent: optimiser steps by purpose, tokens trained and evaluated, seconds. Costs add.

    `tokens` counts training tokens of all purposes; `evaluation_tokens` are held-out tokens read forwards only.
    """

    main_steps: int = 0
    branch_steps: int = 0
    proxy_steps: int = 0
    base_steps: int = 0
    tokens: int = 0
    evaluation_tokens: int = 0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        for f in fields(self):
            if getattr(self, f.name) < 0:
                raise ConfigError(f"{f.name} is {getattr(self, f.name)}; expected 0 or more")

    def __add__(self, other: Cost) -> Cost:
        return Cost(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})


@dataclass(frozen=True)
class Version:
    """A node of the lineage with the edge that leads to it: a version, or a checkpoint of the main path.

    `parent` is the main checkpoint ("main@280") that the edge leaves at `branch_step`, counted on the main path;
    None for the first edge of the main path, at step 0. The edge is `steps` updates of `slice`. `tokens` were
    trained on it, `evaluation_tokens` and `seconds` spent on it. `path` is its learning-rate path,
    `heldout_loss` name -> nats per token at its end, `checkpoint` the digest of what was saved there, `export` the
    exported folder relative to the run's. `scores` are those of a downstream evaluation. `rolled_back` is the number of
    the rollback that took a main checkpoint off the trunk; it is then called "main@980~1". `notes` is anything else
    worth keeping (JSON): hardware, hash of the data, head of the log of weights.
    """

    name: str
    parent: str | None
    branch_step: int
    steps: int
    slice: str
    kind: Literal["version", "main"] = "version"
    tokens: int = 0
    evaluation_tokens: int = 0
    seconds: float = 0.0
    path: LrPath | None = None
    heldout_loss: Mapping[str, float] = field(default_factory=dict)
    checkpoint: str | None = None
    export: str | None = None
    scores: Mapping[str, Any] = field(default_factory=dict)
    rolled_back: int | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def step(self) -> int:
        """The step at which the node stands: branch_step + steps."""
        return self.branch_step + self.steps

    @property
    def cost(self) -> Cost:
        """The cost of the edge."""
        main, branch = (self.steps, 0) if self.kind == "main" else (0, self.steps)
        return Cost(main, branch, 0, 0, self.tokens, self.evaluation_tokens, self.seconds)

    def to_json(self) -> dict[str, Any]:
        """A JSON value from which `from_json` makes an equal node."""
        value = {f.name: getattr(self, f.name) for f in fields(self)}
        path = self.path.to_json() if self.path is not None else None
        maps = {name: dict(value[name]) for name in ("heldout_loss", "scores", "notes")}
        return {**value, "path": path, **maps}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Version:
        """The node that `to_json` wrote; keys that a node does not have are passed over. Raises `TypeError` where one
        is missing, which `Lineage.apply` turns into a `ConfigError`."""
        known = {f.name for f in fields(cls)}
        path = LrPath.from_json(value["path"]) if value.get("path") is not None else None
        return cls(**{**{k: v for k, v in value.items() if k in known}, "path": path})


@dataclass(frozen=True)
class Lineage:
    """A frozen tree of versions; every change returns a new one.

    `nodes` in the order they were added: main checkpoints and versions. `spent` are costs outside the tree, as
    (what, cost) pairs: the base model, proxies, evaluations, work lost and done again.
    """

    nodes: tuple[Version, ...] = ()
    spent: tuple[tuple[str, Cost], ...] = ()

    @property
    def versions(self) -> tuple[Version, ...]:
        """The versions, in the order they were cut."""
        return tuple(n for n in self.nodes if n.kind == "version")

    @property
    def main(self) -> tuple[Version, ...]:
        """The main checkpoints of the trunk, by step; not those that a rollback took off it."""
        return tuple(n for n in self.nodes if n.kind == "main" and n.rolled_back is None)

    @property
    def rolled_back(self) -> tuple[Version, ...]:
        """The main checkpoints that a rollback took off the trunk."""
        return tuple(n for n in self.nodes if n.rolled_back is not None)

    @property
    def cost(self) -> Cost:
        """Everything spent: all edges and all that lies beside the tree."""
        return sum((*(n.cost for n in self.nodes), *(cost for _, cost in self.spent)), Cost())

    def find(self, name: str) -> Version:
        """The node called `name`. Raises `ConfigError` naming what there is."""
        for node in self.nodes:
            if node.name == name:
                return node
        known = ", ".join(n.name for n in self.nodes) or "none yet"
        raise ConfigError(f"no version or main checkpoint {name!r}; there are {known}")

    def with_main(self, step: int, slice: str, **facts: Any) -> Lineage:
        """The lineage with the main checkpoint "main@STEP"; unchanged if it is there already.

        `slice` is what the edge from the checkpoint before read; `facts` are further fields of `Version`. A step
        before the last main checkpoint cuts the edge it lies on in two. Raises `ConfigError` on a step below 1.
        """
        if any(node.step == step for node in self.main):
            return self
        if step < 1:
            raise ConfigError(f"main checkpoint at step {step}; expected 1 or more")
        before = max((n for n in self.main if n.step < step), key=lambda n: n.step, default=None)
        start, parent = (before.step, before.name) if before is not None else (0, None)
        node = Version(f"{MAIN}@{step}", parent, start, step - start, slice, "main", **facts)
        after = next((n for n in self.main if n.branch_step == start and n.step > step), None)
        if after is None:
            return replace(self, nodes=(*self.nodes, node))
        # An edge that was run as one is cut in two: its tokens by steps, what else it cost stays behind.
        share = after.tokens * (after.step - step) // after.steps
        node = replace(node, slice=after.slice, tokens=after.tokens - share, evaluation_tokens=0, seconds=0.0)
        rest = replace(after, parent=node.name, branch_step=step, steps=after.step - step, tokens=share)
        at = self.nodes.index(after)
        return replace(self, nodes=(*self.nodes[:at], node, rest, *self.nodes[at + 1 :]))

    def add(self, version: Version) -> Lineage:
        """The lineage with one more version.

        `version.parent` names a main checkpoint that stands at `version.branch_step`, or is "main" for the one at
        that step. Raises `ConfigError` on a name that is taken, an unknown parent or a branch step at which the
        main path has no checkpoint.
        """
        if version.kind != "version":
            raise ConfigError(f"{version.name!r} is a main checkpoint; add it by with_main(step, slice)")
        if not version.name or version.name == MAIN or version.name.startswith(f"{MAIN}@"):
            raise ConfigError(f"version name {version.name!r} is reserved or empty; choose another one")
        if any(node.name == version.name for node in self.nodes):
            raise ConfigError(f"version {version.name!r} exists already; choose another name")
        if version.steps < 1:
            raise ConfigError(f"version {version.name!r} has {version.steps} steps; expected 1 or more")
        at = {node.step: node for node in self.main}
        if version.parent == MAIN and version.branch_step in at:
            parent = at[version.branch_step]
        elif version.parent in (MAIN, None):
            raise ConfigError(
                f"version {version.name!r} branches at step {version.branch_step}, where the main path has no "
                f"checkpoint; it has some at {', '.join(map(str, at)) or 'no step yet'}"
            )
        else:
            parent = self.find(str(version.parent))
        if parent.kind != "main" or parent.step != version.branch_step:
            raise ConfigError(
                f"version {version.name!r} branches at step {version.branch_step} from {parent.name!r}, a "
                f"{'main checkpoint' if parent.kind == 'main' else 'version'} at step {parent.step}; expected a main "
                "checkpoint at the branch step"
            )
        return replace(self, nodes=(*self.nodes, replace(version, parent=parent.name)))

    def with_export(self, name: str, export: str) -> Lineage:
        """The lineage with the exported folder of node `name` noted (relative to the run folder)."""
        self.find(name)
        nodes = tuple(replace(n, export=export) if n.name == name else n for n in self.nodes)
        return replace(self, nodes=nodes)

    def with_scores(self, name: str, scores: Mapping[str, Any]) -> Lineage:
        """The lineage with the downstream scores of node `name` noted, in place of earlier ones."""
        self.find(name)
        nodes = tuple(replace(n, scores=dict(scores)) if n.name == name else n for n in self.nodes)
        return replace(self, nodes=nodes)

    def roll_back(self, number: int, step: int) -> Lineage:
        """The lineage after rollback `number` to `step`: later main checkpoints leave the trunk under other names.

        Versions that were cut from them stay; their parents are the renamed nodes.
        """
        names = {n.name: f"{n.name}~{number}" for n in self.main if n.step > step}
        return self._renamed(names, number)

    def undo_rollback(self, number: int) -> Lineage:
        """The lineage before rollback `number`, whose checkpoints stand on the trunk again."""
        names = {n.name: n.name.removesuffix(f"~{number}") for n in self.nodes if n.rolled_back == number}
        return self._renamed(names, None)

    def _renamed(self, names: Mapping[str, str], rolled_back: int | None) -> Lineage:
        nodes = []
        for node in self.nodes:
            if node.parent is not None and node.parent in names:
                node = replace(node, parent=names[node.parent])
            if node.name in names:
                node = replace(node, name=names[node.name], rolled_back=rolled_back)
            nodes.append(node)
        return replace(self, nodes=tuple(nodes))

    def spend(self, what: str, cost: Cost) -> Lineage:
        """The lineage with a cost beside the tree, such as ("proxy", Cost(proxy_steps=350))."""
        return replace(self, spent=(*self.spent, (what, cost)))

    def ancestors(self, name: str) -> tuple[Version, ...]:
        """The main checkpoints behind node `name`, nearest first. Raises `ConfigError` on an unknown name."""
        row = []
        parent = self.find(name).parent
        while parent is not None:
            node = self.find(parent)
            row.append(node)
            parent = node.parent
        return tuple(row)

    def slices_read(self, name: str) -> tuple[str, ...]:
        """The slices behind node `name`, its own included, in the order they were read."""
        edges = (*reversed(self.ancestors(name)), self.find(name))
        return tuple(dict.fromkeys(edge.slice for edge in edges))

    def apply(self, event: Mapping[str, Any]) -> Lineage:
        """The lineage after one event of the record.

        Events: {"event": "main" | "version", ...node}, {"event": "export", "name", "export"},
        {"event": "scores", "name", "scores"}, {"event": "rollback" | "undo", "number", "step"},
        {"event": "spend", "what", "cost": {...}}; others are passed over: a run folder keeps more.
        Raises `ConfigError` as the methods do.
        """
        try:
            match event.get("event"):
                case "main":
                    node = Version.from_json(event)
                    if node.rolled_back is not None:
                        return replace(self, nodes=(*self.nodes, node))
                    facts = {f.name: getattr(node, f.name) for f in fields(node)}
                    for own in ("name", "parent", "branch_step", "steps", "kind", "rolled_back"):
                        facts.pop(own)
                    return self.with_main(node.step, **facts)
                case "version":
                    return self.add(Version.from_json(event))
                case "export":
                    return self.with_export(event["name"], event["export"])
                case "scores":
                    return self.with_scores(event["name"], event["scores"])
                case "rollback":
                    return self.roll_back(event["number"], event["step"])
                case "undo":
                    return self.undo_rollback(event["number"])
                case "spend":
                    return self.spend(event["what"], Cost(**event["cost"]))
        except ConfigError:
            raise
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ConfigError(f"malformed lineage event {event.get('event')!r}: {error}") from error
        return self

    def to_json(self) -> dict[str, Any]:
        """A JSON value, {"version": 1, "events": [...]}, from which `from_json` makes an equal lineage."""
        events: list[dict[str, Any]] = [{"event": n.kind, **n.to_json()} for n in self.nodes]
        events += [{"event": "spend", "what": what, "cost": asdict(cost)} for what, cost in self.spent]
        return {"version": 1, "events": events}

    @classmethod
    def from_events(cls, events: Iterable[Mapping[str, Any]]) -> Lineage:
        """The lineage that a run's events build up."""
        lineage = cls()
        for event in events:
            lineage = lineage.apply(event)
        return lineage

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Lineage:
        """The lineage that `to_json` wrote. Raises `ConfigError` when it is malformed."""
        if value.get("version") != 1:
            raise ConfigError(f"lineage has version {value.get('version')!r}; expected 1")
        return cls.from_events(value["events"])


def ledger(lineage: Lineage) -> dict[str, int]:
    """Integer totals of a lineage: main_steps, branch_steps, proxy_steps, base_steps, tokens, evaluation_tokens."""
    total = asdict(lineage.cost)
    total.pop("seconds")
    return total


def render(lineage: Lineage) -> str:
    """The lineage as text, newest first, like a version-control log: the main path on the left, versions beside it."""
    rows: list[tuple[str, str, str]] = []
    trunk = " "
    for node in reversed(lineage.main):
        cut = [v for v in lineage.versions if v.parent == node.name]
        for version in reversed(cut):
            rows.append((f"{trunk} * ", version.name, _facts(version)))
            rows.append((f"{trunk}/", "", ""))
        rows.append(("*   ", node.name, _facts(node)))
        trunk = "|"
    for node in lineage.rolled_back:
        rows += [("  * ", v.name, _facts(v)) for v in lineage.versions if v.parent == node.name]
        rows.append(("x   ", node.name, f"{_facts(node)}  rolled back"))
    width = max((len(name) for _, name, _ in rows), default=0)
    lines = [f"{graph}{name:<{width}}  {facts}".rstrip() for graph, name, facts in rows]
    lines += [f"    {what}: {_cost(cost)}" for what, cost in lineage.spent]
    return "\n".join(lines) if lines else "nothing trained yet"


def _facts(node: Version) -> str:
    facts = [f"steps {node.branch_step:,}-{node.step:,} ({node.steps:,})", node.slice]
    if node.tokens:
        facts.append(f"{node.tokens:,} tokens")
    if node.heldout_loss:
        facts.append(f"{sum(node.heldout_loss.values()) / len(node.heldout_loss):.3f} nats")
    if node.path is not None and node.kind == "version":
        facts.append(f"{node.path.shape} to {node.path.floor:.3g}")
    if node.seconds:
        facts.append(f"{node.seconds:,.0f} s")
    if node.scores:
        facts.append(
            ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in node.scores.items())
        )
    if node.export:
        facts.append(f"-> {node.export}")
    return "  ".join(facts)


def _cost(cost: Cost) -> str:
    units = {"tokens": "tokens", "evaluation_tokens": "tokens evaluated", "seconds": "s"}
    shown = [
        f"{value:,.0f} {units.get(name, name.replace('_', ' '))}"
        for name, value in asdict(cost).items()
        if value
    ]
    return ", ".join(shown) or "nothing"
