"""The sampler beside its peers: tokens/s from the same stream of tokens, warm, in the same run.

Four domains of uint16 documents, shares .4/.3/.2/.1, batches of 8 x 2048 (+ 1) tokens. Contenders take turns in
rotated order; medians of five or more rounds, ratios within a round. Ours hands out int32, the peers int64 as their
users do. A peer's settings are all measured, and its fastest one counts. `make peers` makes the environments of the
peers; without them they are named as not measured.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import sampler_data, sampler_limits, sampler_peers
from benchmarks.sampler_data import ROW_TOKENS, ROWS, SHARES, Measure, timed
from benchmarks.timing import paired_ratio, take_turns
from velopath.stream import Sampler, open_sampler

OPTIONS: dict[str, dict[str, Any]] = {
    "raw-inline": {"threads": 0},
    "raw-thread": {},
    "zstd-thread": {"kind": "zstd"},
    "boundaries-inline": {"threads": 0, "boundaries": True},
    "boundaries-thread": {"boundaries": True},
    "best-fit-thread": {"packing": "best_fit"},
    "best-fit-boundaries-thread": {"packing": "best_fit", "boundaries": True},
    "windowed-thread": {"order": "windowed"},
    "best-fit-windowed-thread": {"packing": "best_fit", "order": "windowed"},
}
OURS = {
    "raw-inline": "velopath, raw shards, no thread",
    "raw-thread": "velopath, raw shards, 1 thread",
    "zstd-thread": "velopath, zstd shards, 1 thread",
    "zstd-epoch": "velopath, zstd shards, first epoch with an empty cache",
    "boundaries-inline": "velopath, raw shards, no thread, with document boundaries",
    "boundaries-thread": "velopath, raw shards, 1 thread, with document boundaries",
    "best-fit-thread": "velopath, raw shards, 1 thread, best-fit rows",
    "best-fit-boundaries-thread": "velopath, raw shards, 1 thread, best-fit rows with document boundaries",
    "windowed-thread": "velopath, raw shards, 1 thread, order in windows of shards",
    "best-fit-windowed-thread": "velopath, raw shards, 1 thread, best-fit rows in windows of shards",
    "push-thread": "velopath, raw shards, 1 thread, weights pushed at every step",
}
LIMITS = {
    "memcpy": "limit: memcpy, one thread, 8 bytes a token",
    "libzstd": "limit: libzstd, one thread, 2 bytes a token",
}
LABELS = {**OURS, "memmap": "numpy memmap, nanoGPT style", **sampler_peers.labels(), **LIMITS}
COSTS = {
    "document boundaries, no thread": ("boundaries-inline", "raw-inline"),
    "document boundaries, 1 thread": ("boundaries-thread", "raw-thread"),
    "best-fit rows for joined ones": ("best-fit-thread", "raw-thread"),
    "document boundaries of best-fit rows": ("best-fit-boundaries-thread", "best-fit-thread"),
    "windows of shards": ("windowed-thread", "raw-thread"),
    "windows of shards, best-fit rows": ("best-fit-windowed-thread", "best-fit-thread"),
    "a push at every step": ("push-thread", "raw-thread"),
}
"""What an option costs: (with it, without)."""


def run(quick: bool = False, folder: str | None = None) -> dict[str, Any]:
    """Measure; returns {"shape", "rounds", "seconds", "tokens_per_domain", "open_ms", "contenders", "best", "missing",
    "ratios", "cpu_ratios", "costs", "limits"}.

    `contenders` maps a name of `LABELS` to its samples of tokens/s, their median and tokens per CPU-second; `best` a
    peer to its fastest setting, `missing` what was not measured to the reason. `ratios` divides ours by the best of a
    peer, median over the rounds, `cpu_ratios` the same of tokens per CPU-second. `limits` is of
    `benchmarks.sampler_limits`. `quick` makes data smaller and rounds shorter. Data are written to `folder`, default a
    temporary one.
    """
    tokens, rounds, seconds = (2_000_000, 5, 0.1) if quick else (12_000_000, 7, 0.8)
    with ExitStack() as stack:
        root = Path(folder or stack.enter_context(tempfile.TemporaryDirectory(prefix="velopath-bench-")))
        sampler_data.write(root, tokens)
        contenders, open_ms = _ours(root, stack)
        contenders["memmap"] = sampler_data.memmap(root)
        peers, missing = sampler_peers.start(root, stack)
        contenders |= peers
        contenders |= {"memcpy": sampler_data.memcpy(), "libzstd": sampler_data.libzstd(root)}
        for measure in contenders.values():
            measure(seconds / 4)
        samples = take_turns({name: partial(m, seconds) for name, m in contenders.items()}, rounds)
        limits = sampler_limits.run(root, 400_000 if quick else sampler_limits.DOCUMENTS)
    found = {name: _summary(rows) for name, rows in samples.items()}
    best = _best(found)
    return {
        "shape": [ROWS, ROW_TOKENS],
        "rounds": rounds,
        "seconds": seconds,
        "tokens_per_domain": tokens,
        "open_ms": open_ms,
        "contenders": found,
        "best": best,
        "missing": missing,
        "ratios": _ratios(found, best, "samples"),
        "cpu_ratios": _ratios(found, best, "per_cpu_second"),
        "costs": {
            name: 1 - paired_ratio(found[a]["samples"], found[b]["samples"]) for name, (a, b) in COSTS.items()
        },
        "limits": limits,
    }


def _ours(root: Path, stack: ExitStack) -> tuple[dict[str, Measure], dict[str, float]]:
    """Measures of the sampler's ways of use, and milliseconds to the first batch of the plain ones."""
    contenders: dict[str, Measure] = {}
    open_ms: dict[str, float] = {}
    for name, chosen in OPTIONS.items():
        start = time.perf_counter()
        sampler = stack.enter_context(_opened(root, **chosen))
        next(sampler)
        if name in ("raw-inline", "raw-thread", "zstd-thread"):
            open_ms[name] = (time.perf_counter() - start) * 1e3
        contenders[name] = timed(sampler.next)
    contenders["zstd-epoch"] = partial(_first_epoch, root)
    pushing = stack.enter_context(_opened(root))

    def step() -> None:
        pushing.push(SHARES)
        next(pushing)

    contenders["push-thread"] = timed(step)
    return contenders, open_ms


def _opened(root: Path, kind: str = "raw", **options: Any) -> Sampler:
    return open_sampler(
        root / kind,
        rows=ROWS,
        row_tokens=ROW_TOKENS,
        weights=SHARES,
        **{"cache": root / "cache", **options},
    )


def _first_epoch(root: Path, seconds: float) -> dict[str, float]:
    """Once through all zstd shards, whatever `seconds`: inflated, checked, kept, read."""
    with tempfile.TemporaryDirectory(dir=root) as cache:
        start, cpu = time.perf_counter(), time.process_time()
        even = dict.fromkeys(SHARES, 1.0)
        with _opened(root, "zstd", cache=cache, exhaustion="stop") as sampler:
            sampler.push(even)
            batches = sum(1 for _ in sampler)
        spent, used = time.perf_counter() - start, time.process_time() - cpu
    return {"tokens": batches * ROWS * ROW_TOKENS, "seconds": spent, "cpu_seconds": used}


def _summary(rows: list[dict[str, float]]) -> dict[str, Any]:
    speeds = [r["tokens"] / r["seconds"] for r in rows]
    per_cpu = [r["tokens"] / r["cpu_seconds"] for r in rows]
    return {"samples": speeds, "median": statistics.median(speeds), "per_cpu_second": per_cpu}


def _best(found: dict[str, Any]) -> dict[str, str]:
    """The fastest measured setting of every peer."""
    best = {"memmap": "memmap"}
    for name, peer in sampler_peers.PEERS.items():
        keys = [k for s in peer.settings if (k := sampler_peers.contender(name, s)) in found]
        if keys:
            best[name] = max(keys, key=lambda key: float(found[key]["median"]))
    return best


def _ratios(found: dict[str, Any], best: dict[str, str], field: str) -> dict[str, dict[str, float]]:
    beside = best | {name: name for name in LIMITS}
    return {
        name: {peer: paired_ratio(found[name][field], found[key][field]) for peer, key in beside.items()}
        for name in OURS
        if name in found
    }


def table(result: dict[str, Any]) -> str:
    """The result of `run` as Markdown: contenders, ratios, costs and limits."""
    found, best = result["contenders"], set(result["best"].values())
    lines = ["| | M tokens/s | worst to best | M tokens per CPU-second |", "|---|--:|--:|--:|"]
    for name in sorted(found, key=lambda n: list(LABELS).index(n)):
        samples = found[name]["samples"]
        mark = " (its best)" if name in best and name != "memmap" else ""
        speed, per_cpu = (
            statistics.median(samples) / 1e6,
            statistics.median(found[name]["per_cpu_second"]) / 1e6,
        )
        spread = f"{min(samples) / 1e6:.1f} to {max(samples) / 1e6:.1f}"
        lines.append(f"| {LABELS[name]}{mark} | {speed:.1f} | {spread} | {per_cpu:.1f} |")
    titles = [LABELS["memmap"] if p == "memmap" else sampler_peers.PEERS[p].label for p in result["best"]]
    lines += ["", f"| times as fast as (per CPU-second) | {' | '.join(titles)} |"]
    lines.append("|---|" + "--:|" * len(titles))
    for name, ratios in result["ratios"].items():
        per_cpu = result["cpu_ratios"][name]
        cells = [f"{ratios[p]:.1f} ({per_cpu[p]:.1f})" for p in result["best"]]
        lines.append(f"| {OURS[name]} | {' | '.join(cells)} |")
    rows, width = result["shape"]
    opened = ", ".join(f"{OURS[n]} {ms:.0f} ms" for n, ms in result["open_ms"].items())
    costs = "; ".join(f"{name} {share:.0%}" for name, share in result["costs"].items())
    lines += [
        "",
        f"Batch {rows} x {width}, {len(SHARES)} domains of {result['tokens_per_domain'] / 1e6:.0f}M uint16 tokens, "
        f"medians of {result['rounds']} rounds of {result['seconds']} s, contenders in turn, ratios within a round. "
        f"Padding of best-fit rows is not counted out. To the first batch: {opened} (zstd: inflating included).",
        "",
        f"What an option takes of the speed: {costs}.",
        "",
        sampler_limits.describe(result["limits"]),
    ]
    if result["missing"]:
        lines += ["", "Not measured:", ""]
        lines += [
            f"- {LABELS.get(n) or sampler_peers.PEERS[n].label}: {why}"
            for n, why in result["missing"].items()
        ]
    return "\n".join(lines) + "\n"


def plot(result: dict[str, Any], path: Path) -> None:
    """Tokens/s of ours and of the best of every peer, as bars on a logarithmic axis with every sample."""
    from matplotlib.figure import Figure

    chosen = [*(n for n in OURS if n in result["contenders"]), *result["best"].values(), *LIMITS]
    chosen.sort(key=lambda name: float(result["contenders"][name]["median"]))
    figure = Figure(figsize=(9, 0.3 * len(chosen) + 1.2), layout="constrained")
    axes = figure.subplots()
    colours = ["C0" if n in OURS else "0.8" if n in LIMITS else "C1" for n in chosen]
    medians = [result["contenders"][n]["median"] / 1e6 for n in chosen]
    axes.barh([LABELS[n] for n in chosen], medians, color=colours, alpha=0.6)
    for at, name in enumerate(chosen):
        samples = [x / 1e6 for x in result["contenders"][name]["samples"]]
        axes.plot(samples, [at] * len(samples), "|", color="0.2", markersize=7)
    axes.set_xscale("log")
    axes.set_xlabel("M tokens/s: medians and samples")
    axes.margins(y=0.01)
    figure.savefig(path, dpi=120)
