"""Figures of the learning-rate path: rates, training loss, throughput, cost."""

from __future__ import annotations

from typing import Any

from velopath.report.figure import (
    Figure,
    Trace,
    colour,
    end_label,
    label,
    segment_line,
    slice_marks,
    smooth,
    steps_axis,
    thin,
)
from velopath.report.record import MAIN, RunRecord, Segment


def paths_figure(record: RunRecord) -> Figure | None:
    """Rate by step: the main path and every branch from where it left."""
    data: list[Trace] = []
    layout = slice_marks(record)
    notes = list(layout.get("annotations", []))
    for segment in record.walk:
        steps, rates = segment.curve("rate")
        if not steps:
            continue
        name = label(segment.name)
        x, y = thin(steps, rates)
        if segment.name != MAIN and (left := _rate_at(record.main, segment.start)) is not None:
            x, y = [segment.start, *x], [left, *y]
        data.append(
            {"type": "scatter", "mode": "lines", "name": name, "x": x, "y": y, "line": segment_line(segment)}
            | {"hovertemplate": "step %{x:,}<br>rate %{y:.3~e}<extra>" + name + "</extra>"}
        )
        if segment.name == MAIN:
            notes.append(
                end_label(x[0], max(y), "main", colour("ink"), yanchor="bottom", xshift=0, xanchor="left")
            )
            continue
        middle = len(x) * 11 // 20
        notes.append(end_label(x[middle], y[middle], f"<b>{name}</b>", colour("accent")))
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "x": [x[0], x[-1]],
                "y": [y[0], y[-1]],
                "hoverinfo": "skip",
            }
            | {"marker": {"size": 8, "color": [colour("paper"), colour("accent")]}}
        )
        data[-1]["marker"]["line"] = {"color": colour("accent"), "width": 2}
    if not data:
        return None
    layout |= {"annotations": notes, "xaxis": steps_axis(), "showlegend": False}
    layout["yaxis"] = {"title": {"text": "learning rate"}, "rangemode": "tozero", "exponentformat": "power"}
    return Figure("paths", "Learning-rate paths", data, layout, 330)


def _rate_at(main: Segment | None, step: int) -> float | None:
    """The main path's rate where a branch left it; None where that step was not logged."""
    return dict(zip(*main.curve("rate"), strict=True)).get(step) if main else None


def training_loss_figure(record: RunRecord) -> Figure | None:
    data: list[Trace] = []
    layout = slice_marks(record)
    notes = list(layout.get("annotations", []))
    for segment in record.walk:
        x, y = thin(*segment.curve("loss"))
        if not x:
            continue
        line, name = segment_line(segment), label(segment.name)
        paint = line["color"]
        data.append(
            {"type": "scatter", "mode": "lines", "x": x, "y": y, "hoverinfo": "skip"}
            | {"line": {"color": paint + "/0.22", "width": 1}}
        )
        mean = smooth(y, max(3, len(y) // 30))
        data.append(
            {"type": "scatter", "mode": "lines", "x": x, "y": mean, "name": name, "line": line}
            | {"hovertemplate": "step %{x:,}<br>%{y:.3f} nats<extra>" + name + "</extra>"}
        )
        if segment.name != MAIN:
            notes.append(end_label(x[-1], mean[-1], f"<b>{name}</b>", paint))
        else:
            notes.append(
                end_label(x[0], max(y[: 1 + len(y) // 20]), "main", paint, yanchor="bottom", xshift=0)
            )
    if not data:
        return None
    layout |= {"annotations": notes, "xaxis": steps_axis(), "showlegend": False}
    layout["yaxis"] = {"title": {"text": "training loss, nats per token"}}
    return Figure("training", "Training loss", data, layout, 320)


def throughput_figure(record: RunRecord) -> Figure | None:
    data: list[Trace] = []
    for segment in record.walk:
        line, name = segment_line(segment), label(segment.name)
        for key, axis, text in (
            ("tokens_per_second", "y", "%{y:,.0f} tokens/s"),
            ("data_wait_share", "y2", "%{y:.2%} waiting"),
        ):
            x, y = thin(*segment.curve(key))
            if x:
                data.append(
                    {"type": "scatter", "mode": "lines", "name": name, "x": x, "y": y, "yaxis": axis}
                    | {"line": line | {"width": 1.4}}
                    | {"hovertemplate": f"step %{{x:,}}<br>{text}<extra>{name}</extra>"}
                )
    if not data:
        return None
    layout: dict[str, Any] = {"showlegend": False, "xaxis": steps_axis(anchor="y2")}
    layout["yaxis"] = {"title": {"text": "tokens / s"}, "rangemode": "tozero", "domain": [0.42, 1]}
    layout["yaxis2"] = {"title": {"text": "data wait"}, "rangemode": "tozero", "domain": [0, 0.3]}
    layout["yaxis2"] |= {"tickformat": "~%", "nticks": 4, "anchor": "x"}
    return Figure("throughput", "Throughput and data wait", data, layout, 340)


def cost_figure(record: RunRecord) -> Figure | None:
    """Steps of the ways to make the same versions, and of this run."""
    ledger = record.ledger
    plan = ledger.plan
    if plan is None:
        return None
    costs, versions = plan.costs, len(plan.versions)
    rows = [
        ("this run", [("accent", ledger.branch_steps), ("ink", ledger.main_steps)]),
        ("path switching, planned", [("accent", plan.branch_steps), ("ink", plan.main_steps)]),
        ("continue each time (CPT)", [("quiet", costs["cpt"])]),
        ("retrain each time (PTFS)", [("quiet", costs["ptfs"])]),
    ]
    data: list[Trace] = []
    notes: list[dict[str, Any]] = []
    words = {"ink": "main path", "accent": "branches"}
    for name, parts in rows:
        total = sum(steps for _, steps in parts)
        for paint, steps in reversed(parts):
            data.append(
                {"type": "bar", "orientation": "h", "x": [steps], "y": [name], "text": [words.get(paint, "")]}
                | {
                    "textposition": "inside",
                    "insidetextanchor": "start",
                    "textfont": {"color": colour("paper")},
                }
                | {"marker": {"color": colour(paint, 0.9)}, "constraintext": "none"}
                | {"hovertemplate": f"{name}: %{{x:,}} steps<extra></extra>"}
            )
        text = f"{total:,} steps · {total / costs['ptfs']:.1%} of PTFS"
        notes.append(end_label(total, name, text, colour("ink")))
    layout: dict[str, Any] = {"barmode": "stack", "showlegend": False, "bargap": 0.4, "annotations": notes}
    word = "version" if versions == 1 else "versions"
    layout["xaxis"] = {
        "title": {"text": f"optimiser steps for {versions} {word}"},
        "range": [0, costs["ptfs"] * 1.42],
    }
    layout["yaxis"] = {"showgrid": False, "automargin": True}
    return Figure("cost", "Cost of the versions", data, layout, 250)
