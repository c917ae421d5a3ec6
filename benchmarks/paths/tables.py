"""The paths study as tables, bars and a picture: every arm, mean over seeds, paired differences with intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from scipy.stats import t as students_t

from benchmarks.bars import Bar
from benchmarks.paths.corpus import SLICES
from benchmarks.paths.study import ALPHA, arrived

OURS = f"switching {ALPHA:g}, cosine"
PTFS, EQUAL_COST = "PTFS", "CPT, re-warmed, 1.45 passes"


def summarise(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """{regime: {"seeds", "steps", "arms": {arm: {"n", "loss": [4], "domains": [4 x {domain: nats}], "cost": [4],
    "minus_ptfs", "minus_equal_cost": {"n", "mean", "low", "high"} or None}}}} of the jobs in `results`.

    Losses are means over seeds; "cost" is in units of T; differences are of version 4, paired by seed, with the 95 %
    interval of Student's t (None for one pair).
    """
    found: dict[str, Any] = {}
    for regime in sorted({r["job"]["regime"] for r in results}, reverse=True):
        jobs = [r for r in results if r["job"]["regime"] == regime]
        arms: dict[str, dict[int, list[dict[str, Any]]]] = {}
        for result in jobs:
            for arm, versions in result["arms"].items():
                arms.setdefault(arm, {})[result["job"]["seed"]] = versions
        steps = jobs[0]["job"]["scale"]["steps"]
        last = {
            arm: {s: metric(v[-1]["loss"], regime, SLICES - 1) for s, v in runs.items()}
            for arm, runs in arms.items()
        }
        found[regime] = {
            "seeds": sorted({r["job"]["seed"] for r in jobs}),
            "steps": steps,
            "arms": {
                arm: {
                    "n": len(runs),
                    "loss": [
                        _mean(metric(v[k]["loss"], regime, k) for v in runs.values()) for k in range(SLICES)
                    ],
                    "domains": [_by_domain([v[k]["loss"] for v in runs.values()]) for k in range(SLICES)],
                    "cost": [next(iter(runs.values()))[k]["cost"] / steps for k in range(SLICES)],
                    "minus_ptfs": paired(last[arm], last.get(PTFS, {})),
                    "minus_equal_cost": paired(last[arm], last.get(EQUAL_COST, {})),
                }
                for arm, runs in arms.items()
            },
        }
    return found


def metric(loss: Mapping[str, float], regime: str, number: int) -> float:
    """Mean over the domains that have arrived by slice `number`."""
    return _mean(loss[name] for name in arrived(regime, number))


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> dict[str, Any] | None:
    """Mean of ours - theirs over the seeds of both and its 95 % interval; None without a common seed."""
    differences = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    if not differences:
        return None
    mean, half = statistics.fmean(differences), None
    if len(differences) > 1:
        error = statistics.stdev(differences) / math.sqrt(len(differences))
        half = float(students_t.ppf(0.975, len(differences) - 1)) * error
    return {
        "n": len(differences),
        "mean": mean,
        "low": None if half is None else mean - half,
        "high": None if half is None else mean + half,
    }


def bars(found: Mapping[str, Any]) -> list[Bar]:
    """Switching within 0.05 nats of PTFS, at 58 % of its cost, alike slices; and no worse than CPT at equal cost."""
    arms = found.get("iid", {}).get("arms", {})
    ours, ptfs = arms.get(OURS), arms.get(PTFS)
    cost = ours["cost"][-1] / ptfs["cost"][-1] if ours and ptfs else None
    to_ptfs, to_cpt = (ours or {}).get("minus_ptfs"), (ours or {}).get("minus_equal_cost")
    return [
        Bar("version 4: switching - PTFS, nats", "<=", 0.05, to_ptfs and to_ptfs["mean"]),
        Bar("version 4: updates of switching / of PTFS", "<=", 0.58, cost),
        Bar("version 4: switching - CPT at equal cost, nats", "<=", 0.0, to_cpt and to_cpt["mean"]),
    ]


def table(found: Mapping[str, Any]) -> str:
    """Markdown."""
    lines = []
    for regime, part in found.items():
        what = "slices alike" if regime == "iid" else "drifting slices: new domains arrive with each"
        seeds = ", ".join(map(str, part["seeds"]))
        lines += [
            f"## {what}",
            "",
            f"T = {part['steps']} updates; seeds {seeds}. Held-out loss in nats per token.",
            "",
        ]
        lines += ["| arm | n | v1 | v2 | v3 | v4 | cost / T | of PTFS | v4 - PTFS | v4 - CPT at equal cost |"]
        lines += ["|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|"]
        ptfs = part["arms"].get(PTFS)
        for arm, row in sorted(part["arms"].items(), key=lambda item: item[1]["loss"][-1]):
            share = f"{row['cost'][-1] / ptfs['cost'][-1]:.0%}" if ptfs else ""
            losses = " | ".join(f"{loss:.3f}" for loss in row["loss"])
            ours = f"**{arm}**" if arm == OURS else arm
            differences = f"{_difference(row['minus_ptfs'])} | {_difference(row['minus_equal_cost'])}"
            lines.append(
                f"| {ours} | {row['n']} | {losses} | {row['cost'][-1]:.2g} | {share} | {differences} |"
            )
        lines += ["", "Version 4 by domain:", "", *_domains(part["arms"]), ""]
    return "\n".join(lines) + "\n"


def draw(found: Mapping[str, Any], path: Path) -> None:
    """Loss of each version over what has been spent by then, a line per arm, a panel per regime."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2 * len(found), 4.6), layout="constrained")
    for number, (regime, part) in enumerate(found.items()):
        axes = figure.add_subplot(1, len(found), number + 1)
        for arm, row in part["arms"].items():
            ours = arm == OURS
            axes.plot(
                row["cost"], row["loss"], marker="o", markersize=5, linewidth=2.6 if ours else 1.2, label=arm,
                color="#0b6e4f" if ours else None, zorder=3 if ours else 2,
            )  # fmt: skip
        axes.set_title("slices alike" if regime == "iid" else "drifting slices", loc="left", fontsize=10)
        axes.set_xlabel("updates spent in all, in units of T (versions 1 to 4)")
        axes.set_ylabel("held-out loss, nats per token")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=7, frameon=False)
    figure.savefig(path, dpi=120)


def _domains(arms: Mapping[str, Any]) -> Iterator[str]:
    names = next(iter(arms.values()))["domains"][-1]
    yield f"| arm | {' | '.join(names)} |"
    yield f"|---|{'--:|' * len(names)}"
    for arm, row in sorted(arms.items(), key=lambda item: item[1]["loss"][-1]):
        last = row["domains"][-1]
        yield f"| {arm} | {' | '.join(f'{last[name]:.3f}' for name in names)} |"


def _by_domain(losses: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: _mean(loss[name] for loss in losses) for name in losses[0]}


def _difference(value: Mapping[str, Any] | None) -> str:
    if value is None:
        return ""
    interval = "" if value["low"] is None else f" ({value['low']:+.3f} to {value['high']:+.3f})"
    return f"{value['mean']:+.3f}{interval}"


def _mean(values: Any) -> float:
    return statistics.fmean(values)
