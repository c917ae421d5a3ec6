"""Figures by domain: weights, velocity, held-out loss, exposure."""

from __future__ import annotations

from typing import Any

from velopath.report.figure import (
    Figure,
    Trace,
    colour,
    end_label,
    epochs_text,
    label,
    slice_marks,
    steps_axis,
    tokens_text,
)
from velopath.report.record import MAIN, RunRecord, Segment


def held(segment: Segment, domain: str) -> tuple[list[int], list[float]]:
    """Steps and shares of a domain as a staircase: each push holds until the next one, the last to the end."""
    points = [(r["step"], float(r["weights"].get(domain, 0.0))) for r in segment.controls]
    if points and segment.end > points[-1][0]:
        points.append((segment.end, points[-1][1]))
    return [s for s, _ in points], [v for _, v in points]


def weights_figure(record: RunRecord) -> Figure | None:
    """Shares over steps, stacked, with a tick at each push."""
    main = record.main
    if main is None or not main.controls:
        return None
    data: list[Trace] = []
    layout = slice_marks(record)
    notes, below, gap = list(layout.get("annotations", [])), 0.0, 0.0
    for k, domain in enumerate(record.domains):
        x, y = held(main, domain)
        name = label(domain)
        data.append(
            {"type": "scatter", "mode": "lines", "stackgroup": "shares", "name": name, "x": x, "y": y}
            | {"line": {"shape": "hv", "width": 1, "color": colour("paper")}}
            | {"fillcolor": colour(f"d{k}", 0.82), "hovertemplate": "%{y:.1%}"}
        )
        middle = max(below + y[-1] / 2, gap)
        gap, below = middle + 0.062, below + y[-1]
        notes.append(end_label(x[-1], middle, f"{name} {y[-1]:.0%}", colour(f"d{k}")))
    pushes = [r["step"] for r in main.controls if r.get("velocity")]
    if pushes:
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "x": pushes,
                "y": [1.025] * len(pushes),
                "cliponaxis": False,
            }
            | {
                "marker": {"symbol": "triangle-down", "size": 7, "color": colour("quiet")},
                "hoverinfo": "skip",
            }
        )
    layout |= {
        "annotations": notes,
        "xaxis": steps_axis(range=[0, main.end]),
        "hovermode": "x unified",
        "showlegend": False,
    }
    layout["yaxis"] = {"title": {"text": "share of the batch"}, "range": [0, 1.04], "tickformat": ".0%"}
    layout["margin"] = {"r": 24 + 7 * max(len(d) + 5 for d in record.domains)}
    return Figure("weights", "Domain weights", data, layout, 360)


def proposed_figure(record: RunRecord) -> Figure | None:
    """Shares in force and those that a controller in shadow mode proposed; None where none was."""
    main = record.main
    if main is None or not any(c.get("shadow") for c in main.controls):
        return None
    data: list[Trace] = []
    for k, domain in enumerate(record.domains):
        x, y = held(main, domain)
        rows = [(c["step"], (c.get("proposed") or c["weights"]).get(domain)) for c in main.controls]
        name = label(domain)
        for dash, steps, shares, word in (
            ("solid", x, y, "in force"),
            ("4px,2px", *map(list, zip(*rows, strict=True)), "proposed"),
        ):
            data.append(
                {"type": "scatter", "mode": "lines", "name": f"{name}, {word}", "x": steps, "y": shares}
                | {"line": {"shape": "hv", "color": colour(f"d{k}"), "width": 1.8, "dash": dash}}
                | {"hovertemplate": "%{y:.1%}"}
            )
    layout = slice_marks(record) | {"xaxis": steps_axis(), "hovermode": "x unified", "showlegend": False}
    layout["yaxis"] = {"title": {"text": "share of the batch"}, "tickformat": ".0%", "rangemode": "tozero"}
    return Figure("proposed", "Weights in force and proposed", data, layout, 320)


def velocity_figure(record: RunRecord) -> Figure | None:
    controls = [r for r in (record.main.controls if record.main else ()) if r.get("velocity")]
    if not controls:
        return None
    data: list[Trace] = []
    starts = [start for _, start, _ in record.slice_starts]
    for k, domain in enumerate(record.domains):
        x: list[int | None] = []
        y: list[float | None] = []
        marks: list[str] = []
        for before, control in zip([None, *controls], controls, strict=False):
            if before and any(before["step"] <= s < control["step"] for s in starts):
                x, y, marks = [*x, None], [*y, None], [*marks, "circle"]  # the controller started again
            x.append(control["step"])
            y.append(control["velocity"].get(domain))
            marks.append("circle-open" if domain in (control.get("flagged") or ()) else "circle")
        data.append(
            {"type": "scatter", "mode": "lines+markers", "name": label(domain), "x": x, "y": y}
            | {"line": {"color": colour(f"d{k}"), "width": 1.8}, "connectgaps": False}
            | {"marker": {"symbol": marks, "size": 6}, "hovertemplate": "%{y:.2f}"}
        )
    layout = slice_marks(record) | {"xaxis": steps_axis(), "hovermode": "x unified", "showlegend": False}
    layout["yaxis"] = {"title": {"text": "velocity V"}, "range": [-0.02, 1.05]}
    return Figure("velocity", "Velocity", data, layout, 320)


def target_line(record: RunRecord, domain: str) -> tuple[list[int | None], list[float | None]]:
    """The target in force by step, broken where a slice brings another; empty without targets."""
    x: list[int | None] = []
    y: list[float | None] = []
    main = record.main
    rows = [(r["step"], (r.get("target") or {}).get(domain)) for r in (main.controls if main else ())]
    rows = [(s, t) for s, t in rows if t is not None]
    changes = [i for i, (_, t) in enumerate(rows) if i == 0 or t != rows[i - 1][1]]
    end = max((s.end for s in record.walk), default=0)
    for i, nxt in zip(changes, [*changes[1:], None][: len(changes)], strict=True):
        until = rows[nxt][0] if nxt is not None else end
        x, y = [*x, rows[i][0], until, None], [*y, rows[i][1], rows[i][1], None]
    return x, y


def domain_loss_figure(record: RunRecord, k: int) -> Figure | None:
    """Held-out loss of one domain: main path, branches, target, start."""
    domain = record.domains[k]
    data: list[Trace] = []
    x, y = target_line(record, domain)
    if x:
        data.append(
            {"type": "scatter", "mode": "lines", "name": "target", "x": x, "y": y}
            | {"line": {"color": colour("quiet"), "width": 1.4, "dash": "dot"}}
            | {"hovertemplate": "target %{y:.3f} nats<extra></extra>"}
        )
    for segment in record.walk:
        steps, losses = segment.losses(domain)
        if not steps:
            continue
        main, name = segment.name == MAIN, label(segment.name)
        data.append(
            {"type": "scatter", "mode": "lines+markers", "name": name, "x": steps, "y": losses}
            | {"line": {"color": colour(f"d{k}"), "width": 2, "dash": "solid" if main else "4px,2px"}}
            | {"marker": {"size": 3.5 if main else [3.5] * (len(steps) - 1) + [8], "line": {"width": 0}}}
            | {"hovertemplate": "step %{x:,}<br>%{y:.3f} nats<extra>" + name + "</extra>"}
        )
    if not any(t["name"] != "target" for t in data):
        return None
    layout = slice_marks(record, labels=False) | {"showlegend": False}
    layout["margin"] = {"l": 42, "r": 10, "t": 8, "b": 28}
    layout["xaxis"] = {"rangemode": "tozero", "nticks": 5}
    layout["yaxis"] = {"nticks": 5}
    return Figure(f"loss-{k}", domain, data, layout, 210, colour=f"d{k}")


def exposure_figure(record: RunRecord) -> Figure | None:
    """Tokens of each domain that the main path read."""
    if record.main is None:
        return None
    rows = record.tokens_read()
    if not any(rows.values()):
        return None
    domains = list(reversed(record.domains))
    tokens = [rows[d] for d in domains]
    epochs = [epochs_text(record.epochs(d)) for d in domains]
    text = [
        f"{tokens_text(t)} tokens" + (f" · {e} epochs" if e else "")
        for t, e in zip(tokens, epochs, strict=True)
    ]
    paint = [colour(f"d{record.domains.index(d)}", 0.85) for d in domains]
    bar: Trace = {"type": "bar", "orientation": "h", "x": tokens, "y": [label(d) for d in domains]}
    bar |= {"text": text, "textposition": "outside", "cliponaxis": False, "marker": {"color": paint}}
    bar |= {"hovertemplate": "%{y}: %{text}<extra></extra>"}
    layout: dict[str, Any] = {"showlegend": False, "bargap": 0.35}
    layout["xaxis"] = {"title": {"text": "tokens read on the main path"}, "range": [0, max(tokens) * 1.4]}
    layout["yaxis"] = {"showgrid": False, "automargin": True, "type": "category"}
    return Figure("exposure", "Exposure", [bar], layout, 90 + 34 * len(domains))


def target_fit_figure(record: RunRecord, k: int) -> Figure | None:
    """Proxy losses of one domain, the law through them, and the target it was read at with its interval."""
    domain = record.domains[k]
    t = record.targets.domains.get(domain) if record.targets else None
    if t is None or t.law is None or not t.tokens:
        return None
    first, paint = t.points[0][0], colour(f"d{k}")
    grid = [first * (t.tokens / first) ** (i / 40) for i in range(41)]
    low, high = t.interval or (t.target, t.target)
    data: list[Trace] = [
        {"type": "scatter", "mode": "lines", "x": grid, "y": [t.law.predict(x) for x in grid]}
        | {"line": {"color": paint, "width": 1.6}, "hoverinfo": "skip"},
        {"type": "scatter", "mode": "markers", "x": [p[0] for p in t.points], "y": [p[1] for p in t.points]}
        | {
            "marker": {"color": paint, "size": 6},
            "hovertemplate": "%{x:.3s} tokens<br>%{y:.3f} nats<extra></extra>",
        },
        {"type": "scatter", "mode": "markers", "x": [t.tokens], "y": [t.target]}
        | {"marker": {"symbol": "diamond", "size": 9, "color": colour("quiet")}}
        | {"error_y": {"array": [high - t.target], "arrayminus": [t.target - low], "color": colour("quiet")}}
        | {"hovertemplate": "target %{y:.3f} nats<br>at %{x:.3s} tokens<extra></extra>"},
    ]
    data[2]["error_y"] |= {"type": "data", "symmetric": False, "thickness": 1.4, "width": 4}
    layout: dict[str, Any] = {"showlegend": False, "margin": {"l": 42, "r": 14, "t": 8, "b": 28}}
    ticks = [first, t.points[-1][0], t.tokens]
    layout["xaxis"] = {"type": "log", "tickvals": ticks, "ticktext": [tokens_text(x) for x in ticks]}
    layout["yaxis"] = {"nticks": 5}
    return Figure(f"fit-{k}", domain, data, layout, 190, colour=f"d{k}")
