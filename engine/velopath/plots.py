"""Pictures of plans, targets and learning-rate paths as files (matplotlib; the format follows the file's ending).

They use figures of their own and no global matplotlib state, so they are safe inside other programs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator, NullFormatter

from velopath.errors import ConfigError
from velopath.law import TargetLaw
from velopath.plan import CostTable, Plan, cost_table, make_plan
from velopath.schedule import LrPath
from velopath.targets import DomainTarget, Targets

INK, QUIET, GRID = "#1d2430", "#667085", "#e4e8ee"
BLUE, ORANGE, TEAL = "#2a72d4", "#d9601a", "#0e9384"
COLOURS = (ORANGE, TEAL, "#c2408f", "#b48e06", "#5f9c25", "#c8402f", "#7b6046", "#4a6b8a", "#8a4fc7")
"""Colours of versions, in order; the report's, so that a picture and the report agree."""

STYLE: Any = {  # a plain dict of rc settings; stubs of matplotlib differ in what keys they know
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": "#c3cad5",
    "axes.labelcolor": QUIET,
    "axes.titlecolor": INK,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "lines.linewidth": 2.0,
    "lines.solid_capstyle": "round",
    "svg.hashsalt": "velopath",
}


def plot_plan(plan: Plan | CostTable, path: str | Path) -> Path:
    """Draw the cost in steps of N versions under PTFS, CPT and switching, and the plan's main path and branches.

    Writes `path` (PNG, SVG or PDF by its ending) and returns it.
    """
    costs = plan if isinstance(plan, CostTable) else cost_table(dict(plan.slices), plan.branch_shares)
    if isinstance(plan, CostTable):
        plan = make_plan({row.slice: row.steps for row in plan}, [row.branch_share for row in plan])
    with rc_context(STYLE):
        figure = new_figure(11, 4.3)
        left, right = figure.subplots(1, 2, width_ratios=[1.15, 1])
        _draw_costs(left, costs)
        _draw_walk(right, plan)
        return save_figure(figure, path)


def plot_targets(targets: Targets, path: str | Path) -> Path:
    """Draw a panel per domain: the proxy's points, the fitted law with its band, the target with its interval.

    Writes `path` and returns it. Raises `ConfigError` when no target comes from a law.
    """
    fitted = {name: domain for name, domain in targets.domains.items() if domain.law is not None}
    if not fitted:
        raise ConfigError("no fitted targets to draw: all were given by hand")
    columns = min(3, len(fitted))
    rows = -(-len(fitted) // columns)
    with rc_context(STYLE):
        figure = new_figure(3.7 * columns + 0.3, 2.75 * rows + 0.5)
        axes = figure.subplots(rows, columns, squeeze=False).flatten()
        for place, (axis, (name, domain)) in enumerate(zip(axes, fitted.items(), strict=False)):
            assert domain.law is not None
            _draw_target(axis, name, domain, domain.law, targets.level)
            if place % columns == 0:
                axis.set_ylabel("held-out loss (nats per token)")
            if place + columns >= len(fitted):
                axis.set_xlabel("training tokens, all domains")
        for axis in axes[len(fitted) :]:
            axis.set_visible(False)
        decay = "" if targets.decay is None else f" after decays of {targets.decay:.0%}"
        words = f"Points{decay} (circles), fitted law with its {targets.level:.0%} band, target (diamond)"
        figure.suptitle(words, x=0.01, ha="left", size=10, color=QUIET)
        return save_figure(figure, path)


def plot_lr_paths(
    main: LrPath, branches: Mapping[str, LrPath], path: str | Path, until: int | None = None
) -> Path:
    """Draw the learning rate of the main path and of its branches (name -> path) against the step.

    The main path is drawn up to `until`, by default as far as the last branch point. Writes `path` and returns it.
    """
    starts = [b.decay_from for b in branches.values() if b.decay_from is not None]
    ends = [b.end_step for b in branches.values() if b.end_step is not None]
    last = until if until is not None else max(starts, default=main.end_step or 2 * main.warmup_steps + 100)
    span = max([last, *ends])
    with rc_context(STYLE):
        figure = new_figure(8.6, 3.7)
        axis = figure.subplots()
        steps = _steps(0, last, main.warmup_steps)
        axis.plot(steps, main.rates(steps), color=BLUE, zorder=3)
        axis.annotate(
            "main path",
            (main.warmup_steps, main.peak),
            xytext=(7, -16),
            textcoords="offset points",
            color=BLUE,
            weight="bold",
        )
        for colour, (name, branch) in zip(colours(len(branches)), branches.items(), strict=True):
            first, end = branch.decay_from or 0, branch.end_step or span
            steps = _steps(first, end, 0)
            axis.plot(steps, branch.rates(steps), color=colour, zorder=2)
            axis.plot(first, branch.rate(first), "o", color="white", mec=colour, mew=1.8, ms=6, zorder=4)
            axis.plot(end, branch.rate(end), "o", color=colour, ms=5, zorder=4, clip_on=False)
            axis.annotate(
                name,
                (first, branch.rate(first)),
                xytext=(0, 9),
                textcoords="offset points",
                color=colour,
                weight="bold",
                ha="center",
            )
        axis.set_title("Main path and branches" if branches else "Main path")
        axis.set_xlabel("step")
        axis.set_ylabel("learning rate")
        axis.set_xlim(0, span * 1.04)
        axis.set_ylim(0, main.peak * 1.16)
        axis.yaxis.set_major_formatter(FuncFormatter(_rate_label))
        axis.yaxis.set_major_locator(MaxNLocator(5))
        axis.xaxis.set_major_formatter(FuncFormatter(_count_label))
        return save_figure(figure, path)


def _draw_costs(axis: Axes, costs: CostTable) -> None:
    x = np.arange(1, len(costs) + 1)
    curves = (
        ("from scratch (PTFS)", QUIET, [row.ptfs_total for row in costs]),
        ("path switching", BLUE, [row.switching_total for row in costs]),
        ("continued (CPT)", ORANGE, [row.cpt_total for row in costs]),
    )
    top = max(curves[0][2])
    last = costs.rows[-1]
    labels = [
        f"from scratch (PTFS)\n{last.ptfs_total:,}",
        f"path switching\n{last.switching_total:,} = {last.of_ptfs:.0%} of PTFS,\n{last.of_cpt:.0%} of CPT",
        f"continued (CPT)\n{last.cpt_total:,}",
    ]
    heights = _spread([values[-1] / top for _, _, values in curves], [0.13, 0.18, 0.13])
    for (_, colour, values), label, height in zip(curves, labels, heights, strict=True):
        wide = 2.6 if colour == BLUE else 1.8
        axis.plot(x, values, "o-", color=colour, lw=wide, ms=5, zorder=4 if colour == BLUE else 3)
        axis.annotate(
            label,
            (x[-1], values[-1]),
            xytext=(1.03, height * top),
            textcoords=("axes fraction", "data"),
            color=colour,
            va="center",
            weight="bold" if colour == BLUE else "normal",
            annotation_clip=False,
        )
    axis.set_title(f"Steps for {len(costs)} version{'s' if len(costs) > 1 else ''}, all in all")
    axis.set_xlabel(f"versions cut ({costs.share_words})")
    axis.set_ylabel("steps, cumulative")
    axis.set_xticks(x[:: max(1, len(x) // 12)])
    axis.set_xlim(min(0.9, 1 - 0.03 * len(x)), len(x) + 0.03 * len(x))
    axis.set_ylim(0, top * 1.06)
    axis.xaxis.grid(False)
    axis.yaxis.set_major_formatter(FuncFormatter(_count_label))
    axis.yaxis.set_major_locator(MaxNLocator(6))


def _draw_walk(axis: Axes, plan: Plan) -> None:
    branches = plan.branches
    count = len(branches)
    end = sum(steps for _, steps in plan.slices)
    even = len({branch.steps for branch in branches}) == 1
    edge, labels = 0, []
    for name, steps in plan.slices:
        axis.axvline(edge + steps, color=GRID, lw=1, zorder=0)
        labels.append((edge + steps / 2, name))
        edge += steps
    axis.plot([0, plan.main_steps], [0, 0], color=BLUE, lw=4, zorder=3)
    axis.annotate(
        "main path", (0, 0), xytext=(0, 9), textcoords="offset points", color=BLUE, weight="bold", ha="left"
    )
    for number, (colour, branch) in enumerate(zip(colours(count), branches, strict=True), start=1):
        drop = number - 1 - count  # v1 lowest: so no stem crosses another branch or its name
        axis.plot([branch.start_step, branch.start_step], [0, drop], color=colour, lw=1.2, zorder=2)
        axis.plot([branch.start_step, branch.end_step], [drop, drop], color=colour, lw=4, zorder=3)
        axis.plot(branch.start_step, 0, "o", color="white", mec=colour, mew=1.8, ms=6, zorder=4)
        axis.annotate(
            branch.name if even else f"{branch.name}: {branch.steps:,} steps",
            (branch.start_step, drop),
            xytext=(5, 6),
            textcoords="offset points",
            color=colour,
            weight="bold",
        )
    each = f": branches of {branches[0].steps:,} steps" if even else ""
    axis.set_title(f"What is run{each}")
    axis.set_xlabel("step")
    axis.set_ylim(-count - 0.5, 1.1)
    axis.set_xlim(-0.01 * end, end * 1.02)
    axis.set_yticks([])
    axis.grid(False)
    axis.spines["left"].set_visible(False)
    axis.xaxis.set_major_formatter(FuncFormatter(_count_label))
    axis.xaxis.set_major_locator(MaxNLocator(6))
    if count <= 8:
        for x, name in labels:
            axis.text(x, 0.98, name, transform=axis.get_xaxis_transform(), color=QUIET, ha="center", va="top")


def _draw_target(axis: Axes, name: str, domain: DomainTarget, law: TargetLaw, level: float) -> None:
    tokens, losses = (np.array(column) for column in zip(*law.points, strict=True))
    end = domain.tokens if domain.tokens is not None else tokens[-1]
    x = np.geomspace(tokens[0], max(tokens[-1], end), 80)
    low, high = law.band(x, level)
    beyond = x >= tokens[-1]
    axis.fill_between(x, low, high, color=BLUE, alpha=0.13, lw=0)
    axis.plot(x[~beyond], law.curve(x[~beyond]), color=BLUE, lw=1.8)
    axis.plot(x[beyond], law.curve(x[beyond]), color=BLUE, lw=1.8, ls=(0, (4, 2)))
    axis.plot(tokens, losses, "o", color="white", mec=INK, mew=1.3, ms=5, zorder=4)
    axis.plot(end, domain.target, "D", color=ORANGE, ms=6, zorder=5, clip_on=False)
    axis.annotate(
        f"target {domain.target:.3f}",
        (end, domain.target),
        xytext=(-9, 0),
        textcoords="offset points",
        color=ORANGE,
        weight="bold",
        ha="right",
        va="top" if domain.target <= losses.min() else "bottom",
    )
    axis.set_title(name)
    error = f", left-out error {domain.error:.3f} nats" if domain.error is not None else ""
    axis.text(
        1,
        0.97,
        f"{law.formula}{error}",
        transform=axis.transAxes,
        ha="right",
        va="top",
        color=QUIET,
        size=8,
    )
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_xticks(_ticks(float(tokens[0]), float(x[-1])))
    bottom, top = min(float(low.min()), domain.target), max(float(high.max()), float(losses.max()))
    space = max(0.16 * (top - bottom), (0.1 - (top - bottom)) / 2)  # noise on a flat curve shall look flat
    axis.set_ylim(bottom - space, top + space)
    axis.yaxis.set_major_locator(MaxNLocator(5))


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers (1, 2, 5 times a power of ten) within [low, high]: three to five of them where there are."""
    powers = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    fine = [m * 10.0**p for p in powers for m in (1, 2, 5) if low * 0.97 <= m * 10.0**p <= high * 1.03]
    return fine if len(fine) <= 5 else [t for t in fine if f"{t:e}".startswith("1")]


def _steps(start: int, end: int, warmup_steps: int) -> list[int]:
    """At most about 600 steps from start to end, both included, and the end of the warm-up."""
    steps = {round(s) for s in np.linspace(start, end, 600)} | ({warmup_steps - 1} if warmup_steps else set())
    return sorted(s for s in steps if start <= s <= end)


def _spread(places: list[float], heights: list[float]) -> list[float]:
    """Places of labels, pushed apart so that labels of the given heights do not overlap; shares of the axis."""
    order = sorted(range(len(places)), key=lambda k: -places[k])
    result = list(places)
    for upper, lower in zip(order, order[1:], strict=False):
        result[lower] = min(result[lower], result[upper] - (heights[upper] + heights[lower]) / 2)
    lowest = order[-1]
    rise = max(0.0, heights[lowest] / 2 - 0.04 - result[lowest])
    return [place + rise for place in result]


def colours(count: int) -> list[str]:
    """`count` colours of `COLOURS`, from the first again where they do not suffice."""
    return [COLOURS[k % len(COLOURS)] for k in range(count)]


def _count_label(value: float, _: object = None) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * 10 or (abs(value) >= size and unit != "k"):
            return f"{value / size:g}{unit}"
    return f"{value:,.0f}"


def _rate_label(value: float, _: object = None) -> str:
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches that is part of no global state."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write the figure in the format of the path's ending; returns the path."""
    target = Path(path)
    figure.savefig(target, dpi=160)
    return target
