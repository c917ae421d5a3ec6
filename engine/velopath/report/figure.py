"""One interactive figure of the report, as a plain plotly value; a colour is a name that the page resolves.

A colour string is `INK + name` or `INK + name/opacity`, resolved by `page.js` from the page's style sheet. Each
domain k has the colour `d<k>` in every figure.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from velopath.report.record import MAIN, RunRecord, Segment

INK = "\x01"
"""Marks a colour name; no label can contain it (`label` drops control characters)."""
MOST_POINTS = 1500
"""A curve with more points is drawn as means of bins, so that a long run still makes a small page."""

Trace = dict[str, Any]


@dataclass(frozen=True)
class Figure:
    """A plotly figure: traces, the part of the layout that differs from the page's, height in pixels."""

    id: str
    title: str
    data: list[Trace]
    layout: dict[str, Any] = field(default_factory=dict)
    height: int = 320
    colour: str | None = None

    def to_json(self) -> dict[str, Any]:
        return {"id": self.id, "data": self.data, "layout": self.layout, "height": self.height}


def label(text: object) -> str:
    """A foreign name as plotly shows it literally: no markup, no template, no control characters."""
    clean = "".join(c for c in str(text) if c.isprintable())
    return html.escape(clean, quote=False).replace("%", "&#37;").replace("{", "&#123;")


def colour(name: str, opacity: float | None = None) -> str:
    """A named colour of the style sheet, e.g. `ink`, `accent`, `d0`."""
    return INK + name + (f"/{opacity:g}" if opacity is not None else "")


def thin(steps: Sequence[int], values: Sequence[float]) -> tuple[list[int], list[float]]:
    """At most `MOST_POINTS` points: means of equal bins, each at the bin's last step."""
    size = math.ceil(len(steps) / MOST_POINTS)
    if size <= 1:
        return list(steps), list(values)
    bins = [slice(i, i + size) for i in range(0, len(steps), size)]
    return [steps[b][-1] for b in bins], [math.fsum(values[b]) / len(values[b]) for b in bins]


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Centred running mean over up to `window` points, shorter at both ends."""
    half, n = window // 2, len(values)
    spans = [(max(0, i - half), min(n, i + half + 1)) for i in range(n)]
    return [math.fsum(values[a:b]) / (b - a) for a, b in spans]


def segment_line(segment: Segment) -> dict[str, Any]:
    """How a segment is drawn in every figure that has one line per segment."""
    if segment.name == MAIN:
        return {"color": colour("ink"), "width": 2}
    return {"color": colour("accent"), "width": 2.2}


def slice_marks(record: RunRecord, *, labels: bool = True) -> dict[str, Any]:
    """Layout with a hairline where a slice starts, and its name at the top."""
    end = max((s.end for s in record.walk), default=0)
    rows = [row for row in record.slice_starts if row[1] < end]
    if len(rows) < 2:
        return {}
    shapes = [
        {"type": "line", "xref": "x", "yref": "paper", "x0": start, "x1": start, "y0": 0, "y1": 1}
        | {"line": {"color": colour("line"), "width": 1}, "layer": "below"}
        for _, start, _ in rows[1:]
    ]
    notes = [
        {"x": start, "y": 1, "xref": "x", "yref": "paper", "text": label(name), "showarrow": False}
        | {
            "xanchor": "left",
            "yanchor": "bottom",
            "xshift": 2,
            "font": {"size": 11, "color": colour("quiet")},
        }
        for name, start, _ in rows
    ]
    return {"shapes": shapes, "annotations": notes if labels else []}


def end_label(x: float, y: float | str, text: str, paint: str, **more: Any) -> dict[str, Any]:
    """A direct label right of a line's end."""
    note = {"x": x, "y": y, "text": text, "showarrow": False, "xanchor": "left", "xshift": 6}
    return note | {"font": {"size": 12, "color": paint}} | more


def steps_axis(**more: Any) -> dict[str, Any]:
    return {"title": {"text": "step"}, "rangemode": "tozero"} | more


def epochs_text(epochs: Sequence[float]) -> str | None:
    """Epochs slice by slice: 0.31 + 0.16; None where they are not known."""
    return " + ".join(f"{e:.2f}" for e in epochs) or None


def tokens_text(count: float) -> str:
    """A token count with three digits: 1.86 M."""
    for size, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if count >= size:
            return f"{count / size:#.3g}".rstrip(".") + unit
    return f"{count:.0f}"
