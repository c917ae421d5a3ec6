"""Two versions of a run side by side: what each read, on which path, for how much, and what it reached."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from velopath.lineage import Lineage, Version
from velopath.runfolder import Record, RunFolder
from velopath.runlineage import read_lineage


def diff_versions(folder: RunFolder, one: str, other: str) -> dict[str, Any]:
    """The JSON value of `velopath diff`: {"one", "other", "common", "domains"}.

    `common` is the last main checkpoint behind both; `domains` maps each domain to its loss (nats per token), the
    tokens read and their share in each, with the `change` of the loss. Raises `ConfigError` on an unknown version.
    """
    lineage = read_lineage(folder)
    nodes = [lineage.find(name) for name in (one, other)]
    behind = [{*(a.name for a in lineage.ancestors(n.name)), n.name} for n in nodes]
    common = [n for n in lineage.nodes if n.kind == "main" and n.name in behind[0] & behind[1]]
    read = [tokens_read(folder, lineage, node) for node in nodes]
    losses = [loss_of(folder, node) for node in nodes]
    domains: dict[str, Any] = {}
    for name in sorted(set().union(*losses, *read)):
        before, after = (loss.get(name) for loss in losses)
        domains[name] = {
            "loss": [before, after],
            "change": None if before is None or after is None else after - before,
            "tokens": [tokens.get(name, 0.0) for tokens in read],
            "share": [tokens.get(name, 0.0) / max(sum(tokens.values()), 1.0) for tokens in read],
        }
    return {
        "one": _facts(lineage, nodes[0]),
        "other": _facts(lineage, nodes[1]),
        "common": max(common, key=lambda n: n.step).name if common else None,
        "domains": domains,
    }


def loss_of(folder: RunFolder, node: Version) -> Mapping[str, float]:
    """Held-out loss by domain of a node: a version's own, a main checkpoint's from the evaluations of the main path."""
    if node.heldout_loss or node.rolled_back is not None:
        return node.heldout_loss
    segment = "main" if node.kind == "main" else node.name
    found = [r["loss"] for r in folder.metrics("eval", segment) if r["step"] == node.step]
    return found[0] if found else {}


def tokens_read(folder: RunFolder, lineage: Lineage, node: Version) -> dict[str, float]:
    """Tokens by domain that a node has read since the main path began, as the samplers counted them.

    A sampler counts anew in every slice, and a branch's goes on from the main path's; so the slices before the node's
    own count whole, and its own up to where the node stands.
    """
    segment = "main" if node.kind == "main" else node.name
    before = [name for name in lineage.slices_read(node.name) if name != node.slice]
    parts = [_last(folder.metrics("exposure", "main"), name, node.step) for name in before]
    parts.append(_last(folder.metrics("exposure", segment), node.slice, node.step))
    total: dict[str, float] = {}
    for part in parts:
        for domain, read in part.items():
            total[domain] = total.get(domain, 0.0) + read["tokens"]
    return total


def _last(records: list[Record], slice: str, step: int) -> Mapping[str, Mapping[str, float]]:
    found = [r["domains"] for r in records if r.get("slice") == slice and r["step"] <= step]
    return found[-1] if found else {}


def _facts(lineage: Lineage, node: Version) -> dict[str, Any]:
    trunk = lineage.ancestors(node.name)
    cost = node.cost
    for edge in trunk:
        cost = cost + edge.cost
    return {
        "name": node.name,
        "parent": node.parent,
        "branch_step": node.branch_step,
        "steps": node.steps,
        "slices": list(lineage.slices_read(node.name)),
        "path": node.path.describe() if node.path is not None else None,
        "final_rate": node.path.rate(node.step) if node.path is not None else None,
        "tokens_behind": cost.tokens,
        "seconds_of_edge": node.seconds,
        "tokens_of_edge": node.tokens,
        "mean_loss": sum(node.heldout_loss.values()) / len(node.heldout_loss) if node.heldout_loss else None,
        "scores": dict(node.scores),
        "data": node.notes.get("data"),
        "hardware": node.notes.get("hardware"),
    }
