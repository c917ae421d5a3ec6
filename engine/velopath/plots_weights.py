"""Pictures of domain weights over steps (matplotlib; the format follows the file's ending)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.ticker import PercentFormatter

from velopath.plots import QUIET, STYLE, colours, new_figure, save_figure


def plot_whatif(value: Mapping[str, Any], path: str | Path) -> Path:
    """Draw logged shares (solid) and those under another controller (dashed), a panel per domain; returns `path`.

    `value` has `controller`, `steps`, and by domain `logged` and `whatif` shares (None where a slice lacks it).
    """
    domains = list(value["logged"])
    columns = min(3, len(domains))
    rows = -(-len(domains) // columns)
    with rc_context(STYLE):
        figure = new_figure(3.7 * columns + 0.3, 2.3 * rows + 0.6)
        axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flatten()
        for axis, name, colour in zip(axes, domains, colours(len(domains)), strict=False):
            for key, line in (("logged", "-"), ("whatif", (0, (4, 2)))):
                shares = [float("nan") if s is None else s for s in value[key][name]]
                axis.step(value["steps"], shares, where="post", color=colour, ls=line, lw=1.8)
            axis.set_title(name)
            axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes[0].set_ylim(bottom=0)
        for axis in axes[len(domains) :]:
            axis.set_visible(False)
        words = (
            f"Share by step. Solid: as logged. Dashed: {value['controller']} on the same logged losses, "
            "which would have changed"
        )
        figure.suptitle(words, x=0.01, ha="left", size=10, color=QUIET)
        return save_figure(figure, path)
