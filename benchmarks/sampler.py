"""The sampler beside numpy memmap and mosaicml-streaming: tokens/s on the same shards, in the same run.

Four domains of uint16 documents, shares .4/.3/.2/.1, batches of 8 x 2048 (+ 1) tokens. Contenders take turns in
rotated order, warm; medians of five or more rounds. Ours hands out int32, the peers int64 as their users do.

mosaicml-streaming needs an environment of its own (it pins numpy and pulls in 79 packages):

    python -m venv .venv-mosaic && .venv-mosaic/bin/pip install mosaicml-streaming==0.13.0 torch==2.13.0

It is found there, in $VELOPATH_MOSAIC_PYTHON or by `mosaic_python`; without it its rows are left out.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.timing import take_turns
from velopath.mds import MdsWriter
from velopath.stream import Sampler, open_sampler

SHARES = {"code": 0.4, "prose": 0.3, "maths": 0.2, "verse": 0.1}
ROWS, ROW_TOKENS = 8, 2048
MOSAIC = {
    "mosaic-documents": "mosaicml-streaming, packing documents",
    "mosaic-documents-workers": "mosaicml-streaming, packing documents, 2 workers",
    "mosaic-rows": "mosaicml-streaming, rows packed offline",
}
LABELS = {
    "raw-inline": "velopath, raw shards, no thread",
    "raw-thread": "velopath, raw shards, 1 thread",
    "zstd-thread": "velopath, zstd shards, 1 thread",
    "boundaries-inline": "velopath, raw shards, no thread, with document boundaries",
    "boundaries-thread": "velopath, raw shards, 1 thread, with document boundaries",
    "best-fit-thread": "velopath, raw shards, 1 thread, best-fit rows",
    "best-fit-boundaries-thread": "velopath, raw shards, 1 thread, best-fit rows with document boundaries",
    "windowed-thread": "velopath, raw shards, 1 thread, order in windows of shards",
    "push-thread": "velopath, raw shards, 1 thread, weights pushed at every step",
    "memmap": "numpy memmap, nanoGPT style",
    **MOSAIC,
}
Measure = Callable[[float], dict[str, float]]


def run(quick: bool = False, mosaic_python: str | None = None, folder: str | None = None) -> dict[str, Any]:
    """Measure; returns {"shape", "rounds", "seconds", "tokens_per_domain", "open_ms", "contenders", "ratios"}.

    `contenders` maps a name of `LABELS` to its samples of tokens/s, their median and tokens per CPU-second;
    `ratios` divides our medians by the peers'. `quick` makes the data smaller and the rounds shorter. Data are
    written to `folder`, default a temporary one.
    """
    tokens, rounds, seconds = (2_000_000, 5, 0.25) if quick else (12_000_000, 7, 1.0)
    with ExitStack() as stack:
        root = Path(folder or stack.enter_context(tempfile.TemporaryDirectory(prefix="velopath-bench-")))
        _write(root, tokens)
        contenders: dict[str, Measure] = {}
        open_ms = {}
        options: dict[str, dict[str, Any]] = {
            "raw-inline": {"threads": 0},
            "raw-thread": {},
            "zstd-thread": {"kind": "zstd"},
            "boundaries-inline": {"threads": 0, "boundaries": True},
            "boundaries-thread": {"boundaries": True},
            "best-fit-thread": {"packing": "best_fit"},
            "best-fit-boundaries-thread": {"packing": "best_fit", "boundaries": True},
            "windowed-thread": {"order": "windowed"},
        }
        for name, chosen in options.items():
            start = time.perf_counter()
            sampler = stack.enter_context(_opened(root, **chosen))
            next(sampler)
            if name in ("raw-inline", "raw-thread", "zstd-thread"):
                open_ms[name] = (time.perf_counter() - start) * 1e3
            contenders[name] = _timed(sampler.next)
        contenders["push-thread"] = _timed(_pushing(stack.enter_context(_opened(root))))
        contenders["memmap"] = _timed(_memmap(root))
        python = mosaic_python or os.environ.get("VELOPATH_MOSAIC_PYTHON") or ".venv-mosaic/bin/python"
        if Path(python).exists():
            ask = stack.enter_context(_mosaic(python, root))
            contenders |= {name: _asking(ask, name.removeprefix("mosaic-")) for name in MOSAIC}
        for measure in contenders.values():
            measure(seconds / 2)
        samples = take_turns({name: partial(m, seconds) for name, m in contenders.items()}, rounds)
    found = {name: _summary(rows) for name, rows in samples.items()}
    return {
        "shape": [ROWS, ROW_TOKENS],
        "rounds": rounds,
        "seconds": seconds,
        "tokens_per_domain": tokens,
        "open_ms": open_ms,
        "contenders": found,
        "ratios": _ratios(found),
    }


def table(result: dict[str, Any]) -> str:
    """The result of `run` as Markdown."""
    peers = [p for p in ("memmap", *MOSAIC) if p in result["contenders"]]
    heads = ["", "M tokens/s", "worst to best", "M tokens per CPU-second", *(f"x {LABELS[p]}" for p in peers)]
    lines = [" | ".join(heads), " | ".join(["---"] * len(heads))]
    for name, found in result["contenders"].items():
        low, high = min(found["samples"]) / 1e6, max(found["samples"]) / 1e6
        cpu = f"{found['per_cpu_second'] / 1e6:.1f}" if found["per_cpu_second"] else "-"
        ratios = [f"{result['ratios'][name][p]:.1f}" if name in result["ratios"] else "" for p in peers]
        cells = [LABELS[name], f"{found['median'] / 1e6:.1f}", f"{low:.1f} to {high:.1f}", cpu, *ratios]
        lines.append(" | ".join(cells))
    rows, width = result["shape"]
    opened = ", ".join(f"{LABELS[n]} {ms:.0f} ms" for n, ms in result["open_ms"].items())
    notes = (
        f"Batch {rows} x {width}, {len(SHARES)} domains of {result['tokens_per_domain'] / 1e6:.0f}M uint16 tokens, "
        f"medians of {result['rounds']} rounds of {result['seconds']} s, contenders in turn. To the first batch: "
        f"{opened} (zstd: inflating included). Padding of best-fit rows is not counted out."
    )
    if not any(p in result["contenders"] for p in MOSAIC):
        notes += " mosaicml-streaming was not there: benchmarks/sampler.py says how to make its environment."
    return "\n".join(f"| {line} |" for line in lines) + f"\n\n{notes}\n"


def _write(root: Path, tokens: int) -> None:
    """Documents as raw and zstd MDS, rows packed offline as raw MDS, and flat files for the memmap."""
    for number, name in enumerate(SHARES):
        rng = np.random.default_rng(number)
        ids = np.minimum(rng.zipf(1.2, tokens) - 1, 49_999).astype(np.uint16)  # compresses about as text does
        lengths = np.clip(rng.lognormal(6.2, 1.0, 4 * tokens // 500), 20, 20_000).astype(int)
        ends = np.minimum(np.cumsum(lengths), tokens)
        ends = ends[: np.searchsorted(ends, tokens) + 1]
        documents = [d for d in np.split(ids, ends[:-1]) if len(d)]
        for kind, compression in (("raw", None), ("zstd", "zstd")):
            with MdsWriter(root / kind / name, compression=compression) as writer:
                for document in documents:
                    writer.write(document)
        with MdsWriter(root / "rows" / name, compression=None) as writer:
            for row in ids[: tokens // (ROW_TOKENS + 1) * (ROW_TOKENS + 1)].reshape(-1, ROW_TOKENS + 1):
                writer.write(row)
        ids.tofile(root / f"{name}.bin")


def _opened(root: Path, kind: str = "raw", **options: Any) -> Sampler:
    return open_sampler(
        root / kind, rows=ROWS, row_tokens=ROW_TOKENS, weights=SHARES, cache=root / "cache", **options
    )


def _pushing(sampler: Sampler) -> Callable[[], Any]:
    def step() -> Any:
        sampler.push(SHARES)
        return next(sampler)

    return step


def _memmap(root: Path) -> Callable[[], Any]:
    """nanoGPT's get_batch, for several domains."""
    data = [np.memmap(root / f"{name}.bin", np.uint16, "r") for name in SHARES]
    rng, shares = np.random.default_rng(0), list(SHARES.values())

    def step() -> Any:
        domains = rng.choice(len(data), ROWS, p=shares)
        at = [int(rng.integers(0, len(data[k]) - ROW_TOKENS - 1)) for k in domains]
        rows = [data[k][i : i + ROW_TOKENS + 1].astype(np.int64) for k, i in zip(domains, at, strict=True)]
        return np.stack(rows)

    return step


def _timed(step: Callable[[], Any]) -> Measure:
    def measure(seconds: float) -> dict[str, float]:
        for _ in range(8):
            step()
        batches, start, cpu = 0, time.perf_counter(), time.process_time()
        while time.perf_counter() - start < seconds:
            step()
            batches += 1
        spent = time.perf_counter() - start
        return {
            "tokens": batches * ROWS * ROW_TOKENS,
            "seconds": spent,
            "cpu_seconds": time.process_time() - cpu,
        }

    return measure


@contextmanager
def _mosaic(python: str, root: Path) -> Iterator[Callable[[str], dict[str, float]]]:
    """The peer's process; it sleeps while others are measured."""
    script = str(Path(__file__).with_name("mosaic_peer.py"))
    folders = [str(root / "raw"), str(root / "rows")]
    command = [python, script, *folders, str(ROWS), str(ROW_TOKENS), "2", json.dumps(SHARES)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        reader, writer = process.stdout, process.stdin

        def ask(line: str) -> dict[str, float]:
            if line:
                print(line, file=writer, flush=True)
            answer = reader.readline()
            if not answer:
                raise RuntimeError(f"{python} {script} ended with {process.wait()}; its message is above")
            found: dict[str, float] = json.loads(answer)
            return found

        ask("")
        try:
            yield ask
        finally:
            writer.close()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def _asking(ask: Callable[[str], dict[str, float]], name: str) -> Measure:
    return lambda seconds: ask(f"{name} {seconds}")


def _summary(rows: list[dict[str, float]]) -> dict[str, Any]:
    speeds = [r["tokens"] / r["seconds"] for r in rows]
    # Worker processes do their work outside the process that is measured.
    per_cpu = [r["tokens"] / r["cpu_seconds"] for r in rows if r["cpu_seconds"] > 0.5 * r["seconds"]]
    return {
        "samples": speeds,
        "median": statistics.median(speeds),
        "per_cpu_second": statistics.median(per_cpu) if len(per_cpu) == len(rows) else None,
    }


def _ratios(found: dict[str, Any]) -> dict[str, dict[str, float]]:
    peers = [p for p in ("memmap", *MOSAIC) if p in found]
    ours = [name for name in found if name not in peers]
    return {name: {p: found[name]["median"] / found[p]["median"] for p in peers} for name in ours}
