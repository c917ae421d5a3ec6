"""Tables on the console."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from velopath.domains import DomainLoss
    from velopath.plan import CostTable, Plan
    from velopath.targets import Targets


def table(title: str, columns: list[str], rows: list[list[str]], caption: str = "") -> None:
    """Print a table: first column to the left, the others to the right."""
    view = Table(title=title, title_justify="left", caption=caption or None, caption_justify="left")
    for i, column in enumerate(columns):
        view.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        view.add_row(*row)
    Console().print(view)


def show_plan(costs: CostTable, plan: Plan) -> None:
    """Cost per version under each method, in steps and shares, and the segments in order."""
    for title, head, rows, caption in plan_tables(costs, plan):
        table(title, head, rows, caption)


def plan_tables(costs: CostTable, plan: Plan) -> list[tuple[str, list[str], list[list[str]], str]]:
    """(title, head, rows, caption) of what `show_plan` prints."""
    differ = costs.branch_share is None
    rows = [
        [
            row.version,
            f"{row.steps:,}",
            f"{row.branch:,} ({row.branch_share:g})" if differ else f"{row.branch:,}",
            f"{row.ptfs_total:,}",
            f"{row.cpt_total:,}",
            f"{row.switching_total:,}",
            f"{row.of_ptfs:.1%}",
            f"{row.of_cpt:.1%}",
        ]
        for row in costs
    ]
    decays = any(s.shape for s in plan.branches)
    segments = [
        [
            s.name,
            s.slice,
            f"{s.start_step:,}",
            f"{s.end_step:,}",
            f"{s.steps:,}",
            *([s.shape or ""] if decays else []),
        ]
        for s in plan.segments
    ]
    return [
        (
            f"Steps up to each version, {costs.share_words}",
            ["version", "slice", "branch", "PTFS", "CPT", "switching", "of PTFS", "of CPT"],
            rows,
            "PTFS trains each version from scratch on all data so far; CPT continues on the new data only. "
            "Proxies, evaluations and a base model are not in it.",
        ),
        (
            "What a run executes",
            ["segment", "slice", "from step", "to step", "steps", *(["shape"] if decays else [])],
            segments,
            "",
        ),
    ]


def length_table(
    lengths: Sequence[Mapping[str, Any]], tokens_per_step: int
) -> tuple[str, list[str], list[list[str]], str]:
    """(title, head, rows, caption) of the lengths of a plan: as they were asked for, in steps and in tokens."""
    rows = [
        [
            f"{row['kind']} {row['name']}".strip(),
            "" if row["asked_tokens"] is None else f"{row['asked_tokens']:,}",
            f"{row['steps']:,}",
            f"{row['tokens']:,}",
        ]
        for row in lengths
    ]
    return (
        f"Lengths at {tokens_per_step:,} tokens a step",
        ["length of", "tokens asked for", "steps", "tokens"],
        rows,
        "A run turns lengths in tokens into whole steps once, by the tokens of its steps on all ranks.",
    )


def show_targets(targets: Targets) -> None:
    """Target, law and errors per domain, and the cost of the proxy."""
    rows = []
    for name, domain in targets.domains.items():
        law = domain.law
        last = f"{domain.points[-1][1]:.3f}" if domain.points else "-"
        interval = f"{domain.interval[0]:.3f} .. {domain.interval[1]:.3f}" if domain.interval else "-"
        formula = law.formula if law else "given"
        error = f"{domain.error:.3f}" if domain.error is not None else "-"
        rows.append([name, last, f"{domain.target:.3f}", interval, error, formula])
    table(
        "Target losses, nats per token",
        ["domain", "last proxy", "target", "90 % interval", "leave-last-out", "law"],
        rows,
        f"{targets.cost_words}{targets.cost_note}{targets.decay_note}",
    )
    for warning in targets.warnings:
        Console().print(f"warning: {warning}", style="yellow", highlight=False)


def show_losses(losses: Mapping[str, DomainLoss]) -> None:
    """Held-out loss per domain and model, with standard errors, mean and worst."""
    names = sorted({name for loss in losses.values() for name in loss})
    rows = [
        [name]
        + [
            f"{loss[name]:.4f} ± {loss.stderr_of(name):.4f}" if name in loss else "-"
            for loss in losses.values()
        ]
        for name in names
    ]
    rows.append(["mean"] + [f"{sum(loss.values()) / len(loss):.4f}" for loss in losses.values()])
    rows.append(["worst"] + [f"{max(loss.values()):.4f}" for loss in losses.values()])
    table("Held-out loss, nats per token ± standard error", ["domain", *losses], rows)


def show_summary(summary: Mapping[str, Any]) -> None:
    """The demo's outcome: losses per domain and version, cost."""
    versions = summary["versions"]
    rows = []
    for name, facts in summary["domains"].items():
        cells = [facts["initial"], facts["target"], *(v["heldout_loss"].get(name) for v in versions)]
        rows.append([name, *("-" if c is None else f"{c:.3f}" for c in cells)])
    table(
        "Held-out loss, nats per token",
        ["domain", "start", "target", *(v["name"] for v in versions)],
        rows,
        "This scale shows mechanics and cost, not which method is better; the report says why.",
    )
    cost = summary["cost"]
    Console().print(
        f"switching: {cost['main_steps'] + cost['branch_steps']:,} steps, {cost['actual_over_ptfs']:.1%} of training "
        f"each version from scratch (planned {cost['planned_over_ptfs']:.1%}); beside it {cost['proxy_steps']:,} proxy "
        f"steps, {cost['base_steps']:,} base steps, {cost['evaluation_tokens']:,} tokens evaluated",
        highlight=False,
    )
