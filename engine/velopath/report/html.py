"""The page of the report: sections of words, tables and figures in one self-contained file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.resources import files
from itertools import pairwise
from typing import Any

from velopath.report.control_words import alarms_section, velocity_notes
from velopath.report.figure import Figure, tokens_text
from velopath.report.figures import figures
from velopath.report.lineage_drawing import lineage_drawing
from velopath.report.record import RunRecord, mean_loss
from velopath.report.tables import (
    cost_table,
    domains_table,
    escape,
    number,
    sources_table,
    swatch,
    target_warnings,
    targets_table,
    versions_table,
)
from velopath.report.times import speed_words, time_table
from velopath.report.words import limits_section

SECTIONS = {
    "paths": "Paths",
    "versions": "Versions",
    "weights": "Weights",
    "losses": "Losses",
    "targets": "Targets",
    "cost": "Cost",
    "speed": "Speed",
    "limits": "Limits",
    "sources": "Sources",
    "config": "Configuration",
}


def page(record: RunRecord) -> str:
    """The whole report as one HTML text that needs no other file and no network."""
    drawn = figures(record)
    body = "".join(
        (
            _header(record),
            _tiles(record),
            _bar(),
            _paths(record, drawn),
            _versions(record),
            _weights(record, drawn),
            _losses(record, drawn),
            _targets(record, drawn),
            _cost(record, drawn),
            _speed(record, drawn),
            limits_section(record),
            _sources(record),
            _config(record),
        )
    )
    from plotly.offline import get_plotlyjs

    title = escape(record.title)
    style, script = _asset("page.css"), _asset("page.js")
    style += _more_colours(len(record.domains))
    specs = _json([f.to_json() for fs in drawn.values() for f in fs])
    return (
        f'<!doctype html>\n<html lang="en" data-theme="light"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{style}</style></head><body><div class=page>{body}"
        f"<footer>Written by velopath {escape(_version(record))} from the files of the run folder.</footer></div>"
        f'<script type="application/json" id="figures">{specs}</script>'
        f"<script>{get_plotlyjs()}</script><script>{script}</script></body></html>\n"
    )


def _asset(name: str) -> str:
    return files("velopath.report").joinpath(name).read_text(encoding="utf-8")


def _json(value: Any) -> str:
    """JSON that is safe inside a script element."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _more_colours(count: int) -> str:
    """Colours beyond the sheet's twelve: hues a golden angle apart, as hex because the script reads hex."""
    import colorsys

    def sheet(light: float) -> str:
        rows = []
        for k in range(12, count):
            r, g, b = colorsys.hls_to_rgb((k * 0.381966) % 1, light, 0.55)
            rows.append(f"--d{k}:#{round(r * 255):02x}{round(g * 255):02x}{round(b * 255):02x};")
        return "".join(rows)

    return f':root{{{sheet(0.42)}}}:root[data-theme="dark"]{{{sheet(0.68)}}}' if count > 12 else ""


def _version(record: RunRecord) -> str:
    from velopath import __version__

    return str((record.about.get("versions") or {}).get("velopath") or __version__)


def _section(id: str, title: str, *parts: str | None, words: str = "") -> str:
    inner = "".join(p for p in parts if p)
    lead = f"<p>{words}</p>" if words else ""
    return f'<section id="{id}"><h2>{title}</h2>{lead}{inner}</section>'


def _missing(sentence: str) -> str:
    return f"<p class=missing>{sentence}</p>"


def _plot(figure: Figure) -> str:
    style = f"height:{figure.height}px"
    return f'<div class=plot id="plot-{figure.id}" style="{style}" role=img aria-label="{escape(figure.title)}"></div>'


def _plots(drawn: Sequence[Figure]) -> str:
    return "".join(f"<figure>{_plot(f)}</figure>" for f in drawn)


def _panels(drawn: Sequence[Figure], now: Sequence[str]) -> str:
    """Small figures side by side, each under its domain's name and one number."""
    inner = "".join(
        f'<figure><figcaption><span class=swatch style="background:var(--{f.colour})"></span>{escape(f.title)}'
        f"<span class=now>{n}</span></figcaption>{_plot(f)}</figure>"
        for f, n in zip(drawn, now, strict=True)
    )
    return f"<div class=panels>{inner}</div>"


def _header(record: RunRecord) -> str:
    about = record.about
    facts: list[tuple[str, object]] = [("command", about.get("command")), ("started", about.get("started"))]
    facts += [("seed", about.get("seed", record.config.get("seed"))), ("config", record.config_hash)]
    facts += list((about.get("hardware") or {}).items()) + list((about.get("versions") or {}).items())
    rows = "".join(
        f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in facts if v is not None and v != ""
    )
    head = f"<h1>{escape(record.title)}</h1><p class=lead>{_lead(record)}</p>"
    return f"<header class=top>{head}<dl class=facts>{rows}</dl></header>"


def _lead(record: RunRecord) -> str:
    main = record.main
    if main is None:
        return "No training step has been recorded yet."
    words = [f"{len(record.domains)} domains on one main path of {main.end:,} steps at a constant rate"]
    if record.versions:
        names = ", ".join(escape(v.name) for v in record.versions)
        words.append(
            f"with {_count(len(record.versions), 'version')} cut from it by a complete decay ({names})"
        )
    moved = sum(1 for c in main.controls if c.get("velocity"))
    words.append(f"and {_count(moved, 'weight update')}" if moved else "with weights that did not move")
    state = about_state(record)
    return ", ".join(words) + "." + (f" {state}" if state else "")


def about_state(record: RunRecord) -> str:
    """A sentence where the run has not ended well or not yet; empty where it is done or not known."""
    sentences = {
        "running": "The run is still going: this is its state so far.",
        "stopped": "The run was stopped with a checkpoint and can be resumed.",
        "failed": "The run failed; this is what it recorded until then.",
    }
    return sentences.get(str(record.about.get("state")), "")


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def _tiles(record: RunRecord) -> str:
    """The headline numbers."""
    ledger, tiles = record.ledger, []
    share = ledger.over_ptfs(ledger.actual)
    if ledger.plan is not None and share is not None:
        cpt = ledger.actual / ledger.plan.costs["cpt"]
        tiles.append(
            (f"{share:.1%}", "of the cost of retraining", f"{ledger.actual:,} steps; {cpt:.0%} of continuing")
        )
    if record.versions:
        last = record.versions[-1]
        start = mean_loss(record.main.evals[0]["loss"]) if record.main and record.main.evals else None
        reached = mean_loss(last.heldout_loss)
        if start is not None and reached is not None:
            tiles.append(
                (
                    f"{start:.2f} → {reached:.2f}",
                    "held-out nats per token",
                    f"mean over domains, start to {last.name}",
                )
            )
    controls = record.main.controls if record.main else ()
    if controls:
        first = controls[0]["weights"]
        moves = [
            (abs(w - first.get(d, 0.0)), d, w, c["step"]) for c in controls for d, w in c["weights"].items()
        ]
        _, name, share, step = max(moves)
        tiles.append(
            (
                f"{first.get(name, 0.0):.0%} → {share:.0%}",
                "largest move of a weight",
                f"{name}, step {step:,}",
            )
        )
    if record.row_tokens:
        total = ledger.actual * record.row_tokens
        tiles.append((tokens_text(total), "tokens trained", f"{record.row_tokens:,} a step"))
    speed, wait = record.rates(record.walk)
    if speed is not None and wait is not None:
        tiles.append(
            (f"{tokens_text(speed)}/s", "training tokens", f"{wait:.1%} of the time waiting for data")
        )
    if record.seconds is not None:
        minutes, seconds = divmod(round(record.seconds), 60)
        tiles.append((f"{minutes}:{seconds:02d} min", "wall time", "everything counted"))
    inner = "".join(
        f"<div class=tile><b>{escape(b)}</b><span class=what>{escape(w)}</span><span>{escape(s)}</span></div>"
        for b, w, s in tiles
    )
    return f"<div class=tiles>{inner}</div>" if tiles else ""


def _bar() -> str:
    links = "".join(f'<a href="#{id}">{title}</a>' for id, title in SECTIONS.items())
    button = "<button id=theme class=end type=button>light / dark</button>"
    return f'<nav class=bar aria-label="Sections">{links}{button}</nav>'


def _key(record: RunRecord) -> str:
    """The domains' colours; a click makes one stand out in every figure."""
    inner = "".join(
        f'<button type=button aria-pressed=false data-colour="d{k}">{swatch(k, d)}</button>'
        for k, d in enumerate(record.domains)
    )
    return f"<div class=key>{inner}</div>"


def _paths(record: RunRecord, drawn: dict[str, list[Figure]]) -> str:
    if not drawn["paths"]:
        return _section("paths", "Learning-rate paths", _missing("No training step has been recorded yet."))
    words = "The main path keeps the peak rate for ever; each version leaves it on a branch and decays completely."
    loss = "<h3>Training loss</h3>" + _plots(drawn["training"]) if drawn["training"] else None
    return _section("paths", "Learning-rate paths", _plots(drawn["paths"]), loss, words=words)


def _versions(record: RunRecord) -> str:
    drawing = lineage_drawing(record)
    if not record.versions:
        return _section("versions", "Versions", drawing, _missing("No version has been cut yet."))
    words = (
        "Held-out loss in nats per token. Below each number: the change since the main checkpoint that the "
        "version left, on the same held-out sample."
    )
    if any(v.undecayed for v in record.versions):
        words += " The last column compares with the main path after as many steps at the peak rate."
    return _section("versions", "Versions", drawing, versions_table(record), words=words)


def _weights(record: RunRecord, drawn: dict[str, list[Figure]]) -> str:
    main = record.main
    if not drawn["weights"] or main is None:
        return _section("weights", "Domain weights", _missing("No weights have been recorded yet."))
    moved = [b for a, b in pairwise(main.controls) if b.get("velocity") and b["weights"] != a["weights"]]
    words = "Share of each domain in the batches of the main path."
    if moved:
        words += " A triangle marks a push by the controller. Click a domain to make it stand out everywhere."
    signal = record.config.get("control", {}).get("signal", "heldout")
    if moved and record.config.get("control", {}).get("controller") == "velocitune":
        source = "held-out losses" if signal == "heldout" else "the losses of the training batches"
        words += f" The controller is driven by {source}."
    velocity = (
        "<h3>Velocity</h3><p class=quiet>The fraction still to be learnt: 1 where the slice began, 0 at the target. "
        "A domain with a larger V gains weight.</p>" + _plots(drawn["velocity"])
        if drawn["velocity"]
        else _missing("The weights did not move: no controller update was recorded.")
    )
    if drawn["velocity"]:
        velocity += velocity_notes(record)
    if drawn["proposed"]:
        velocity = (
            "<h3>Shadow mode</h3><p class=quiet>The controller observed and proposed, and pushed nothing. Solid: in "
            "force; dashed: proposed.</p>" + _plots(drawn["proposed"]) + velocity
        )
    return _section(
        "weights",
        "Domain weights",
        _key(record),
        _plots(drawn["weights"]),
        velocity,
        alarms_section(record),
        words=words,
    )


def _losses(record: RunRecord, drawn: dict[str, list[Figure]]) -> str:
    parts: list[str] = []
    if drawn["losses"]:
        facts = record.domain_facts()
        now = [
            f"{number(facts[f.title]['initial']) or '–'} → {number(facts[f.title]['last_loss']) or '–'}"
            for f in drawn["losses"]
        ]
        parts.append(_panels(drawn["losses"], now))
    else:
        parts.append(_missing("No held-out evaluation has been recorded yet."))
    words = "Nats per token by step. Solid: main path; dashed: branches, ending in a dot; dotted: the target in force."
    table = domains_table(record) if record.domains else ""
    exposure = "<h3>Exposure</h3>" + _plots(drawn["exposure"]) if drawn["exposure"] else ""
    if exposure and not record.exposure_counted:
        exposure += (
            "<p class=quiet>From the shares pushed times the tokens of the steps; the sampler's own count is not "
            "in this run folder.</p>"
        )
    return _section("losses", "Held-out loss by domain", *parts, table, exposure, words=words)


def _targets(record: RunRecord, drawn: dict[str, list[Figure]]) -> str:
    targets = record.targets
    if targets is None:
        return _section(
            "targets",
            "Target losses",
            _missing(
                "This run has no targets.json: its controller needed none, or they were given in the configuration."
            ),
        )
    words = (
        "Each target is a Chinchilla law L(D) = E + B / D^β, fitted to the first steps of "
        f"{'a proxy run' if targets.proxy_tokens else 'the main path'} and read at the tokens of the slice. "
        "The leave-last-out error is the honest size of an extrapolation error; the interval assumes that the law's "
        "form is right."
    )
    if targets.shares:
        words += (
            " The laws hold for the shares that were read there: "
            + ", ".join(f"{escape(d)} {s:.0%}" for d, s in sorted(targets.shares.items()))
            + "."
        )
    if targets.decay_gain is not None:
        words += (
            f" Each point was read after a decay of {targets.decay:.0%} of its steps, which gained at the last one: "
            + ", ".join(f"{escape(d)} {gain:.3f}" for d, gain in sorted(targets.decay_gain.items()))
            + " nats."
        )
    now = [number(targets.domains[f.title].target) or "" for f in drawn["fits"]]
    panels = _panels(drawn["fits"], [f"target {n}" for n in now]) if drawn["fits"] else None
    return _section(
        "targets", "Target losses", targets_table(record), panels, target_warnings(record), words=words
    )


def _cost(record: RunRecord, drawn: dict[str, list[Figure]]) -> str:
    words = (
        "Optimiser steps. PTFS retrains from scratch for every version, CPT continues from the version before. "
        "Path switching lies between them. Base model, proxy and evaluation are listed beside the comparison, not "
        "in it."
    )
    plot = _plots(drawn["cost"]) or _missing(
        "The run folder has no configuration with slices, so there is no plan to compare with."
    )
    return _section("cost", "Cost", plot, cost_table(record), words=words)


def _speed(record: RunRecord, drawn: dict[str, list[Figure]]) -> str:
    if not drawn["throughput"]:
        return _section("speed", "Throughput and data wait", _missing("No throughput has been recorded yet."))
    plots, words = _plots(drawn["throughput"]), speed_words(record)
    return _section("speed", "Throughput and data wait", plots, time_table(record), words=words)


def _sources(record: RunRecord) -> str:
    if not record.data:
        return _section("sources", "Data sources and licences", _missing("The run folder has no data.json."))
    return _section("sources", "Data sources and licences", sources_table(record))


def _config(record: RunRecord) -> str:
    if not record.config_text:
        return _section("config", "Configuration", _missing("The run folder has no config.yaml."))
    segments = ", ".join(f"{escape(s.name)} {s.run_steps:,}" for s in record.segments.values()) or "none"
    return _section(
        "config",
        "Configuration",
        f"<p>Hash {escape(record.config_hash)}. Steps run by segment: {segments}.</p>"
        f"<details><summary>config.yaml, resolved</summary><pre>{escape(record.config_text)}</pre></details>",
    )
