"""The planner's tables on the console and as a page."""

from __future__ import annotations

import html
from pathlib import Path
from typing import TYPE_CHECKING, Any

from velopath.cli.show import length_table, plan_tables, table

if TYPE_CHECKING:
    from velopath.plan import CostTable, Plan

WORDS = {"ptfs": "PTFS", "cpt": "CPT", "wsd_s": "WSD-S", "switching": "switching"}


def show_price(value: dict[str, Any]) -> None:
    """Lengths in tokens, totals, what-if, break-even and storage."""
    for title, head, rows, caption in tables(value):
        table(title, head, rows, caption)


def show_actual(value: dict[str, Any]) -> None:
    """What a run planned beside what it cost."""
    rows = [
        [
            r["segment"],
            f"{r['planned_steps']:,}",
            f"{r['actual_steps']:,}",
            f"{r['tokens']:,}",
            f"{r['seconds']:,.0f}",
        ]
        for r in value["rows"]
    ]
    for name in ("planned", "actual"):
        facts = value[name]
        rows.append(
            [
                name,
                f"{facts['steps']:,}",
                f"{facts['of_ptfs']:.1%} of PTFS",
                f"{facts['of_cpt']:.1%} of CPT",
                "",
            ]
        )
    beside = ", ".join(f"{v:,} {k.replace('_', ' ')}" for k, v in value["beside"].items())
    head = ["segment", "steps planned", "steps run", "tokens", "seconds"]
    table("Planned and real", head, rows, f"steps that a kill made void were run too; beside it: {beside}")


def tables(value: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]], str]]:
    """(title, head, rows, caption) of the planner's tables."""
    totals, stored = value["totals"], value["storage"]
    ptfs, cpt = totals["ptfs"]["steps"], totals["cpt"]["steps"]
    methods = [
        [
            WORDS[m],
            f"{t['steps']:,}",
            f"{t['steps'] / ptfs:.1%}",
            f"{t['steps'] / cpt:.1%}",
            _number(t["gpu_hours"]),
            _number(t["money"]),
            f"{stored[m]['versions']} + {stored[m]['resumable']}",
            "-" if stored[m]["bytes"] is None else f"{stored[m]['bytes'] / 1e9:,.1f} GB",
        ]
        for m, t in totals.items()
    ]
    head = ["method", "steps", "of PTFS", "of CPT", "GPU hours", "price", "exports + resumable", "storage"]
    even = value["break_even"]
    words = (
        f"Switching is cheaper than PTFS from {even['cheaper_than_ptfs_from'] or 'no version of this plan'} on and "
        f"costs at most half from {even['half_of_ptfs_from'] or 'no version of this plan'} on. For switching's price "
        f"CPT could read every slice {even['cpt_passes']:.2f} times. Hours and price hold evaluations"
    )
    proxy = value["proxy"]
    if proxy["steps"]:
        words += f"; a proxy for targets is {proxy['steps']:,} steps ({_number(proxy['gpu_hours'])} GPU hours) more"
    alphas = [
        [f"{r['alpha']:g}", f"{r['steps']:,}", f"{r['of_ptfs']:.1%}", f"{r['of_cpt']:.1%}"]
        for r in value["what_if"]
    ]
    if value["branch_share"] is None:
        steps = totals["switching"]["steps"]
        alphas.insert(0, ["as planned", f"{steps:,}", f"{steps / ptfs:.1%}", f"{steps / cpt:.1%}"])
    lengths = value["lengths"]
    return [
        *([length_table(lengths, value["price"]["tokens_per_step"])] if lengths else []),
        ("All versions under each method", head, methods, f"{words}."),
        (
            "What if: switching with one branch share for all versions",
            ["alpha", "steps", "of PTFS", "of CPT"],
            alphas,
            "",
        ),
    ]


def price_page(costs: CostTable, plan: Plan, value: dict[str, Any], path: Path) -> None:
    """Write the tables and the cost curves as one HTML file that needs nothing else."""
    import tempfile

    from velopath.plots import plot_plan

    with tempfile.TemporaryDirectory() as scratch:
        drawing = plot_plan(costs, Path(scratch) / "plan.svg").read_text(encoding="utf-8")
    parts = [drawing[drawing.index("<svg") :]]
    for title, head, rows, caption in [*plan_tables(costs, plan), *tables(value)]:
        cells = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows)
        names = "".join(f"<th>{html.escape(name)}</th>" for name in head)
        parts.append(
            f"<h2>{html.escape(title)}</h2><table><tr>{names}</tr>{cells}</table><p>{html.escape(caption)}</p>"
        )
    style = (
        "body{font:15px sans-serif;max-width:60em;margin:2em auto}td,th{padding:.2em .8em;text-align:right}"
    )
    page = f"<!doctype html><meta charset=utf-8><title>Plan</title><style>{style}</style>{''.join(parts)}"
    path.write_text(page, encoding="utf-8")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.4g}"
