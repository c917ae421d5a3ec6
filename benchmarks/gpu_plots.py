"""The GPU suite as one picture: milliseconds of each loss by shape, tokens/s of each training step."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

OURS, CEILING, PEER = "#0b6e4f", "#b8b8b8", "#5b7db1"
LEAST = ("copy of the logits", "three matmuls")
"""What must be done in any case: no contender, but a floor under them."""


def draw(parts: Mapping[str, Any], path: Path) -> Path | None:
    """Write the picture of the parts that were run; None where none of them has bars to show.

    Medians with quartiles; green is velopath, grey the floor, blue everyone else. Logits and linear: shorter is
    better; steps: longer is better.
    """
    panels = _panels(parts)
    if not panels:
        return None
    from matplotlib.figure import Figure

    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(6.4 * columns, 3.4 * rows), layout="constrained")
    for number, (title, unit, bars) in enumerate(panels):
        axes = figure.add_subplot(rows, columns, number + 1)
        names = list(bars)[::-1]
        values = [bars[name]["median"] for name in names]
        spread = [
            [v - bars[name]["low"] for name, v in zip(names, values, strict=True)],
            [bars[name]["high"] - v for name, v in zip(names, values, strict=True)],
        ]
        axes.barh(names, values, xerr=spread, color=[_colour(name) for name in names], ecolor="#404040")
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlabel(unit)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlim(0, 1.15 * max(bar["high"] for bar in bars.values()))
        for name, value in zip(names, values, strict=True):
            text = f"  {value:,.0f}" if value >= 1000 else f"  {value:.3g}"
            axes.annotate(text, (bars[name]["high"], name), va="center", fontsize=8)
    figure.savefig(path, dpi=120)
    return path


def _panels(parts: Mapping[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """(title, unit, {contender: {"median", "low", "high"}}) of each shape and step."""
    panels = []
    for part, title in (("logits", "from logits"), ("linear", "from hidden states")):
        for shape in parts.get(part, {}).get("shapes", ()):
            width = f", D={shape['width']}" if "width" in shape else ""
            bars = {name: found["ms"] for name, found in shape["contenders"].items()}
            panels.append((f"loss {title}, N={shape['rows']}{width}, V={shape['vocab']}", "ms", bars))
    for part in ("step", "step_1b"):
        if part in parts:
            size = parts[part]["setup"]["parameters"] / 1e6
            bars = {name: found["tokens_per_second"] for name, found in parts[part]["contenders"].items()}
            panels.append((f"training step, {size:,.3g}M parameters", "tokens/s", bars))
    return panels


def _colour(name: str) -> str:
    return CEILING if name in LEAST else OURS if name.startswith("velopath") else PEER
