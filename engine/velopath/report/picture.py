"""The overview of a run as one static picture, for a README or a chat: rates, weights, losses, cost."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from velopath.report.domain_figures import held, target_line
from velopath.report.record import MAIN, RunRecord, read_run
from velopath.runfolder import RunFolder

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, QUIET, LINE, ACCENT = "#1d2430", "#667085", "#dfe3ea", "#5b47d6"
DOMAINS: tuple[str, ...] = ("#2a72d4", "#d9601a", "#0e9384", "#c2408f", "#b48e06", "#5f9c25")
DOMAINS += ("#c8402f", "#7b6046", "#4a6b8a", "#8a4fc7", "#3c8c5a", "#a8577a")
"""The light colours of `page.css`; a test holds the two together."""


def write_png(run: str | Path, path: str | Path) -> Path:
    """Draw the run's overview to the PNG file `path` and return it. Raises `DataError` as `read_run`.

    A panel whose records are missing says so.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    record = read_run(RunFolder(run))
    layout = ConstrainedLayoutEngine(w_pad=0.14, h_pad=0.12, wspace=0.03, hspace=0.05)
    figure = Figure(figsize=(12, 7.2), dpi=150, facecolor="white", layout=layout)
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2).flat
    _rates(axes[0], record)
    _weights(axes[1], record)
    _losses(axes[2], record)
    _cost(axes[3], record)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target)
    return target


def paint(k: int) -> str:
    """The colour of domain k."""
    return DOMAINS[k % len(DOMAINS)]


def _frame(ax: Axes, title: str, x: str, y: str) -> None:
    ax.set_title(title, loc="left", fontsize=12, fontweight="bold", color=INK, pad=10)
    ax.set_xlabel(x, color=QUIET, fontsize=9.5)
    ax.set_ylabel(y, color=QUIET, fontsize=9.5)
    ax.tick_params(colors=QUIET, labelsize=9, length=3)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(LINE)
    ax.grid(axis="y", color=LINE, linewidth=0.7)
    ax.set_axisbelow(True)


def _nothing(ax: Axes, text: str) -> None:
    ax.text(0.5, 0.5, text, transform=ax.transAxes, ha="center", va="center", color=QUIET)


def _slices(ax: Axes, record: RunRecord, end: int) -> None:
    for _, start, _ in record.slice_starts[1:]:
        if start < end:
            ax.axvline(start, color=LINE, linewidth=1, zorder=0)


def _rates(ax: Axes, record: RunRecord) -> None:
    _frame(ax, "Learning-rate paths", "step", "learning rate")
    end = max((s.end for s in record.walk), default=0)
    _slices(ax, record, end)
    for segment in record.walk:
        x, y = segment.curve("rate")
        if not x:
            continue
        main = segment.name == MAIN
        ax.plot(x, y, color=INK if main else ACCENT, linewidth=1.8, solid_capstyle="round")
        middle = len(x) // 2
        if main:
            ax.annotate("main", (x[0], max(y)), (2, 4), textcoords="offset points", color=INK, fontsize=9.5)
        else:
            ax.plot(x[-1], y[-1], "o", color=ACCENT, markersize=5, clip_on=False)
            ax.annotate(
                segment.name,
                (x[middle], y[middle]),
                (7, 0),
                textcoords="offset points",
                color=ACCENT,
                fontweight="bold",
            )
    if not end:
        _nothing(ax, "no step recorded yet")
    ax.set_ylim(bottom=0)
    ax.set_xlim(left=0)
    ax.margins(y=0.12)


def _weights(ax: Axes, record: RunRecord) -> None:
    _frame(ax, "Domain weights", "step", "share of the batch")
    main = record.main
    if main is None or not main.controls:
        _nothing(ax, "no weights recorded yet")
        return
    below = [0.0] * (len(main.controls) + 2)
    right, room = main.end, 0.0
    for k, domain in enumerate(record.domains):
        x, y = held(main, domain)
        top = [b + v for b, v in zip(below, y, strict=False)]
        ax.fill_between(x, below[: len(x)], top, step="post", color=paint(k), alpha=0.82, linewidth=0)
        at = max((below[len(x) - 1] + top[-1]) / 2, room)
        room = at + 0.062
        ax.annotate(
            f"{domain} {y[-1]:.0%}",
            (right, at),
            (6, 0),
            textcoords="offset points",
            color=paint(k),
            fontsize=9,
            va="center",
        )
        below = top
    ax.set_xlim(0, right)
    ax.set_ylim(0, 1)
    ax.yaxis.set_major_formatter(lambda v, _: f"{v:.0%}")


def _losses(ax: Axes, record: RunRecord) -> None:
    _frame(ax, "Held-out loss", "step", "nats per token")
    drawn = False
    for k, domain in enumerate(record.domains):
        for segment in record.walk:
            x, y = segment.losses(domain)
            if not x:
                continue
            main = drawn = True
            main = segment.name == MAIN
            ax.plot(
                x, y, color=paint(k), linewidth=1.6 if main else 1.2, linestyle="-" if main else (0, (3, 1.6))
            )
            if not main:
                ax.plot(x[-1], y[-1], "o", color=paint(k), markersize=3.5)
        steps, targets = target_line(record, domain)
        levels = [(s, t) for s, t in zip(steps, targets, strict=True) if s is not None and t is not None]
        for (a, level), (b, _) in zip(levels[::2], levels[1::2], strict=True):
            ax.plot([a, b], [level, level], color=paint(k), linewidth=0.9, linestyle=":", alpha=0.75)
    if not drawn:
        _nothing(ax, "no evaluation recorded yet")
        return
    ax.set_xlim(left=0)
    _slices(ax, record, max(s.end for s in record.walk))
    ax.text(
        1,
        1.02,
        "solid main · dashed branch · dotted target",
        transform=ax.transAxes,
        ha="right",
        color=QUIET,
        fontsize=8.5,
    )


def _cost(ax: Axes, record: RunRecord) -> None:
    _frame(ax, "Cost of the versions", "optimiser steps", "")
    ledger = record.ledger
    if ledger.plan is None:
        _nothing(ax, "no plan in the run folder")
        return
    costs = ledger.plan.costs
    bars = [
        ("this run", [(INK, ledger.main_steps, "main path"), (ACCENT, ledger.branch_steps, "branches")]),
        ("continue (CPT)", [("#98a2b3", costs["cpt"], "")]),
        ("retrain (PTFS)", [("#98a2b3", costs["ptfs"], "")]),
    ]
    for row, (_, parts) in enumerate(bars):
        left = 0
        for tint, steps, text in parts:
            ax.barh(row, steps, left=left, color=tint, height=0.5)
            if steps:
                ax.text(left + costs["ptfs"] * 0.012, row, text, color="white", va="center", fontsize=9)
            left += steps
        total = f"  {left:,} · {left / costs['ptfs']:.1%} of PTFS"
        ax.text(left, row, total, va="center", color=INK, fontsize=9.5)
    ax.set_yticks(range(len(bars)), [name for name, _ in bars])
    ax.grid(visible=False, axis="y")
    ax.set_xlim(0, costs["ptfs"] * 1.45)
    ax.set_ylim(-0.6, len(bars) - 0.4)
