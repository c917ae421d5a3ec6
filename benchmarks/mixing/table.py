"""The mixing study as tables, bars and pictures: every arm that was run, means over seeds, paired differences."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.bars import Bar
from benchmarks.mixing.headroom import METRICS
from benchmarks.paths.tables import paired

NATURAL, UNIFORM = "static natural", "static uniform"
RECOVERED, TARGET_ERROR = 0.8, 0.15
"""The bars: share of the headroom over static natural; mean absolute target error in nats."""


def summarise(found: Mapping[str, Any]) -> dict[str, Any]:
    """{arm: {"seeds", metric: {"mean", "recovered", "minus_natural", "minus_uniform"}, "domains", "shares"}}.

    Differences are paired by seed, with 95 % intervals; "recovered" is (natural - arm) / (natural - best static), all
    three over the seeds that have them.
    """
    arms: Mapping[str, Mapping[str, Any]] = found["arms"]
    return {name: _arm(arms, name) for name in arms}


def _arm(arms: Mapping[str, Mapping[str, Any]], name: str) -> dict[str, Any]:
    runs = arms[name]

    def by_seed(arm: str, m: str) -> dict[int, float]:
        return {int(seed): run[m] for seed, run in arms.get(arm, {}).items()}

    row: dict[str, Any] = {
        "seeds": sorted(map(int, runs)),
        "steps": _mean([r["steps"] for r in runs.values()]),
    }
    for m in METRICS:
        own, natural, best = by_seed(name, m), by_seed(NATURAL, m), by_seed(f"best static for {m}", m)
        common = own.keys() & natural.keys() & best.keys()
        gained = sum(natural[s] - own[s] for s in common)
        room = sum(natural[s] - best[s] for s in common)
        row[m] = {
            "mean": _mean(list(own.values())),
            "recovered": gained / room if room > 0 else None,
            "minus_natural": paired(own, natural),
            "minus_uniform": paired(own, by_seed(UNIFORM, m)),
        }
    for key in ("test", "shares"):
        row[key] = {d: _mean([run[key][d] for run in runs.values()]) for d in next(iter(runs.values()))[key]}
    return row


def bars(found: Mapping[str, Any]) -> list[Bar]:
    """What the default rule must reach, metric by metric, and the targets."""
    rows = summarise(found)
    wanted = []
    for m in METRICS:
        row = rows.get(f"marginal gain, {m}", {}).get(m, {})
        room = found["headroom"] and found["headroom"][m]["natural"] - found["headroom"][m]["predicted"]
        if room and room > 0.02:
            wanted.append(Bar(f"{m}: headroom recovered", ">=", RECOVERED, row.get("recovered")))
        over = (row.get("minus_uniform") or {}).get("mean")
        wanted.append(Bar(f"{m}: nats above static uniform", "<=", 0.0, over))
    for shares in ("natural", "uniform"):
        error = best_target(found, shares)
        wanted.append(
            Bar(f"target error, {shares} shares", "<=", TARGET_ERROR, error and error["mean_absolute"])
        )
    return wanted


def best_target(found: Mapping[str, Any], shares: str) -> Mapping[str, Any] | None:
    """Mean over the result seeds of the default law's target error at these shares."""
    rows = [
        r
        for r in found["targets"].values()
        if r["shares"] == shares and r["law"] == "auto" and r["seed"] != found["search_seed"]
    ]
    return {"mean_absolute": _mean([r["mean_absolute"] for r in rows])} if rows else None


def table(found: Mapping[str, Any]) -> str:
    """All tables as Markdown."""
    names = list(found["natural"])
    scale = found["scale"]
    parts = [
        f"{scale['steps']} steps of {scale['rows']} x 256 tokens, model `{scale['preset']}`, rate constant, then "
        f"decaying over the last {scale['decay']:.0%}. Search on seed {found['search_seed']}, results on seeds "
        f"{', '.join(map(str, found['seeds']))}. Losses in nats per token of the test set.",
        "Natural shares: " + ", ".join(f"{n} {s:.1%}" for n, s in found["natural"].items()) + ".",
    ]
    if not found["complete"]:
        parts.append(
            "**Not complete**: the same command goes on; what is missing is missing from the tables."
        )
    if found["headroom"]:
        parts += ["## Headroom: the best static mixture", _headroom(found, names)]
    if found["arms"]:
        parts += ["## Arms at one budget, proxies and evaluations counted", _arms(found)]
        parts += ["## Arms by domain: loss (share read)", _domains(found, names)]
    if found["targets"]:
        parts += ["## Target error: predicted minus true, nats", _targets(found, names)]
    if found["sensitivity"]:
        parts += ["## Sensitivity: paired difference to static uniform", _sensitivity(found)]
    return "\n\n".join(parts)


def _headroom(found: Mapping[str, Any], names: Sequence[str]) -> str:
    count = len(found["mixtures"])
    rows = [
        f"{count} mixtures on seed {found['search_seed']}, regression by domain (error when left out "
        + ", ".join(f"{n} {r['error']:.3f}" for n, r in found["regression"].items())
        + "; slope per unit of ln share "
        + ", ".join(f"{n} {r['slope']:.2f}" for n, r in found["regression"].items())
        + ").",
        "",
        "| metric | natural | uniform | best of the mixtures | predicted best | run | headroom | its shares, "
        + " / ".join(names)
        + " |",
        "|---|--:|--:|--:|--:|--:|--:|---|",
    ]
    for m, h in found["headroom"].items():
        shares = " / ".join(f"{100 * h['best'][n]:.0f}" for n in names)
        rows.append(
            f"| {m} | {h['natural']:.3f} | {h['uniform']:.3f} | {h['best of the random ones']:.3f} | "
            f"{h['predicted']:.3f} | {_number(h.get('verified'))} | "
            f"{h['natural'] - h.get('verified', h['predicted']):.3f} | {shares} |"
        )
    return "\n".join(rows)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _arms(found: Mapping[str, Any]) -> str:
    head = "| arm | seeds | steps | " + " | ".join(f"{m} | - uniform | recovered" for m in METRICS) + " |"
    rows = [head, "|---|--:|--:|" + "--:|--:|--:|" * len(METRICS)]
    for name, row in summarise(found).items():
        cells = []
        for m in METRICS:
            cell = row[m]
            share = "" if cell["recovered"] is None or name == NATURAL else f"{cell['recovered']:.0%}"
            cells.append(f"{cell['mean']:.3f} | {_difference(cell['minus_uniform'])} | {share}")
        rows.append(f"| {name} | {len(row['seeds'])} | {row['steps']:.0f} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def _difference(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ""
    if found["low"] is None:
        return f"{found['mean']:+.3f}"
    return f"{found['mean']:+.3f} ({found['low']:+.3f} ... {found['high']:+.3f})"


def _domains(found: Mapping[str, Any], names: Sequence[str]) -> str:
    rows = ["| arm | " + " | ".join(names) + " |", "|---|" + "--:|" * len(names)]
    for name, row in summarise(found).items():
        cells = " | ".join(f"{row['test'][n]:.3f} ({row['shares'][n]:.0%})" for n in names)
        rows.append(f"| {name} | {cells} |")
    return "\n".join(rows)


def _targets(found: Mapping[str, Any], names: Sequence[str]) -> str:
    rows = [
        "| shares, law, seed | mean absolute | " + " | ".join(names) + " | cost: own trunk | main path |",
        "|---|--:|" + "--:|" * (len(names) + 2),
    ]
    for name, row in found["targets"].items():
        cells = " | ".join(f"{row['errors'][n]:+.3f}" for n in names)
        cost = f"{row['cost']['own trunk']:.0%} | {row['cost']['main path']:.0%}"
        rows.append(f"| {name} | {row['mean_absolute']:.3f} | {cells} | {cost} |")
    return "\n".join(rows)


def _sensitivity(found: Mapping[str, Any]) -> str:
    """Per variation: means over the seeds, paired with static uniform."""
    rows = [
        "| varied | value | seeds | steps | mean - uniform | worst - uniform |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for what, values in found["sensitivity"].items():
        for value, runs in values.items():
            cells = [_difference(over_uniform(found, runs, m)) for m in ("mean", "worst")]
            steps = _mean([run["steps"] for run in runs.values()])
            rows.append(f"| {what} | {value} | {len(runs)} | {steps:.0f} | {cells[0]} | {cells[1]} |")
    return "\n".join(rows)


def over_uniform(found: Mapping[str, Any], runs: Mapping[str, Any], m: str) -> dict[str, Any] | None:
    """Paired difference of a metric to static uniform."""
    uniform = {int(seed): run[m] for seed, run in found["arms"].get(UNIFORM, {}).items()}
    return paired({int(seed): run[m] for seed, run in runs.items()}, uniform)


def beliefs(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table of `targets.belief`."""
    lines = ["| beta | k | mean absolute target error, nats | |", "|--:|--:|--:|---|"]
    for row in rows:
        used = "in use" if row["used"] else ""
        lines.append(f"| {row['beta']:g} | {row['k']:g} | {row['mean_absolute']:.4f} | {used} |")
    return "\n".join(lines)


def draw_sensitivity(found: Mapping[str, Any], path: Path) -> None:
    """Mean and worst over static uniform by value, a panel for each variation; bars are 95 % intervals."""
    variations = found["sensitivity"]
    columns = 2
    figure = Figure(figsize=(10, 2.9 * max(1, -(-len(variations) // columns))), layout="constrained")
    FigureCanvasAgg(figure)
    for number, (what, values) in enumerate(variations.items()):
        axes = figure.add_subplot(-(-len(variations) // columns), columns, number + 1)
        for shift, m in ((-0.06, "mean"), (0.06, "worst")):
            rows = [over_uniform(found, runs, m) for runs in values.values()]
            places = [k + shift for k in range(len(rows))]
            middles = [row["mean"] if row else float("nan") for row in rows]
            halves = [
                0.0 if row is None or row["high"] is None else row["high"] - row["mean"] for row in rows
            ]
            axes.errorbar(places, middles, yerr=halves, marker="o", capsize=3, linewidth=1.4, label=m)
        axes.axhline(0, color="#888888", linewidth=0.8)
        axes.set_xticks(range(len(values)), list(values))
        axes.set_title(what, fontsize=9, loc="left")
        axes.set_ylabel("nats over static uniform", fontsize=8)
        axes.tick_params(labelsize=8)
        if number == 0:
            axes.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)


def draw(found: Mapping[str, Any], path: Path) -> None:
    """Shares over the steps of every arm that moves them, one panel each, of the first seed."""
    moving = {
        name: next(iter(runs.values()))
        for name, runs in found["arms"].items()
        if len(next(iter(runs.values()))["weights"]) > 1
    }
    columns = 3
    figure = Figure(figsize=(11, 2.6 * max(1, -(-len(moving) // columns))), layout="constrained")
    FigureCanvasAgg(figure)
    for number, (name, run) in enumerate(moving.items()):
        axes = figure.add_subplot(-(-len(moving) // columns), columns, number + 1)
        for domain in found["natural"]:
            steps = [0, *(w["step"] for w in run["weights"]), run["steps"]]
            shares = [w["weights"][domain] for w in run["weights"]]
            first = run["settings"]["weights"][domain]
            axes.step(steps, [first, *shares, shares[-1]], where="post", label=domain, linewidth=1.4)
        axes.set_title(name, fontsize=9, loc="left")
        axes.set_ylim(0, 1)
        axes.tick_params(labelsize=7)
        if number == 0:
            axes.legend(fontsize=6.5, ncols=2, frameon=False)
    figure.savefig(path, dpi=110)


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values)
