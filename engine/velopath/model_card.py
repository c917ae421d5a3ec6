"""The model card of an exported version, in Markdown: what it read, on which path, at what cost."""

from __future__ import annotations

from velopath.lineage import Version
from velopath.run import MAIN, Run
from velopath.runlineage import read_lineage


def model_card(run: Run, name: str, version: Version | None) -> str:
    """The text of README.md beside an exported model. All numbers come from the run folder."""
    config = run.config
    lines = [
        "---",
        "library_name: transformers",
        "tags: [velopath, continual-pretraining]",
        "---",
        f"# {config.title}: {name}",
        "",
        "Made by velopath: sampling weights by the "
        f"`{config.control.controller}` controller, learning-rate path switching.",
        "",
    ]
    if version is not None:
        path = version.path
        lines += ["## Learning-rate path", "", path.describe() if path is not None else "unknown", ""]
        lines += ["## Held-out loss", "", "| domain | nats per token |", "| --- | --- |"]
        lines += [f"| {domain} | {loss:.4f} |" for domain, loss in sorted(version.heldout_loss.items())]
        lines += [""]
        lines += [
            "## Data read in this version's history",
            "",
            "| domain | tokens | epochs |",
            "| --- | --- | --- |",
        ]
        for domain, read in sorted(_exposure(run, version).items()):
            lines.append(f"| {domain} | {read['tokens']:,.0f} | {read['epochs']:.2f} |")
        lines += [""]
    start = config.model.hf or f"preset {config.model.preset}, random weights, seed {config.seed}"
    lines += ["## Origin", "", f"- starting model: {start}", f"- configuration hash: {config.hash}"]
    if version is not None:
        lines += [
            f"- parent: {version.parent} at step {version.branch_step}",
            f"- steps of the branch: {version.steps}",
            *_cost(run, version),
        ]
    lines += ["", "## Sources", "", "| domain | source | licence |", "| --- | --- | --- |"]
    for domain, facts in sorted(run.prepared.get("domains", {}).items()):
        lines.append(f"| {domain} | {facts.get('source') or '-'} | {facts.get('licence') or '-'} |")
    return "\n".join(lines) + "\n"


def _cost(run: Run, version: Version) -> list[str]:
    """What the version cost: its own edge, and all that stands behind it in this run."""
    behind = sum((edge.cost for edge in read_lineage(run.folder).ancestors(version.name)), version.cost)
    return [
        f"- trained for it alone: {version.tokens:,} tokens in {version.seconds:,.0f} s",
        f"- trained in its history, in this run: {behind.tokens:,} tokens in {behind.seconds:,.0f} s",
        f"- hash of its slice's data: {version.notes.get('data', 'not recorded')}",
    ]


def _exposure(run: Run, version: Version) -> dict[str, dict[str, float]]:
    """Tokens and epochs by domain that the version has read: the slices before its own on the main path, whole,
    and what its branch's sampler counted (which includes the main path's part of that slice)."""
    before = set(read_lineage(run.folder).slices_read(version.name)) - {version.slice}
    records = [r for r in run.folder.metrics("exposure", MAIN) if r["slice"] in before]
    parts = {r["slice"]: r["domains"] for r in records}  # the last record of a slice is at its end
    own = run.folder.metrics("exposure", version.name)
    total: dict[str, dict[str, float]] = {}
    for domains in [*parts.values(), *([own[-1]["domains"]] if own else [])]:
        for domain, read in domains.items():
            sums = total.setdefault(domain, {"tokens": 0.0, "epochs": 0.0})
            sums["tokens"] += read["tokens"]
            sums["epochs"] += read["epochs"]
    return total
