"""How long training waits for the sampler: a step of 50 ms, fed by it or by one batch that is always there.

    python -m benchmarks wait            # about 70 s; --quick: 7 s

Two kinds of step: `device`, in which the host sleeps, as it does while a GPU works; and `host`, in which it multiplies
matrices on one core. Sampler and mock take turns in blocks of steps. What is judged is the time inside `next` as a
share of the steps; what the steps take in all is beside it.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from velopath.mds import MdsWriter
from velopath.stream import open_sampler

STEP_MS = 50.0
ROWS, ROW_TOKENS = 8, 2048
BLOCK = 10


def run(quick: bool = False) -> dict[str, Any]:
    """Measure; returns {"step_ms", "blocks", "kinds": {kind: {"sampler" and "mock": {...}, "over_mock"}}}.

    Each has `wait_us` [median, 99th percentile, most] of a call, `wait_share` of the steps' time and `step_ms`, the
    median of a step with its wait; `over_mock` is the ratio of the two `step_ms` less 1.
    """
    blocks = 3 if quick else 17
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory(prefix="velopath-wait-") as root:
        for name in ("code", "prose", "verse"):
            with MdsWriter(Path(root) / name) as writer:
                for _ in range(1000):
                    writer.write(rng.integers(0, 50_000, 1500).astype(np.uint16))
        with open_sampler(root, rows=ROWS, row_tokens=ROW_TOKENS, eos=0, cache=f"{root}/cache") as sampler:
            mock = sampler.next()
            kinds = {
                "device": _measured(sampler.next, lambda: mock, lambda: time.sleep(STEP_MS / 1e3), blocks),
                "host": _measured(sampler.next, lambda: mock, _compute(), blocks),
            }
    return {"step_ms": STEP_MS, "blocks": blocks, "kinds": kinds}


def table(result: dict[str, Any]) -> str:
    """The result of `run` as Markdown."""
    lines = [
        "step | fed by | wait us, median | 99 % | most | wait share | step ms",
        "--- | --- " + "| --: " * 5,
    ]
    for kind, found in result["kinds"].items():
        for feeder in ("sampler", "mock"):
            part = found[feeder]
            waits = " | ".join(f"{x:.1f}" for x in part["wait_us"])
            lines.append(f"{kind} | {feeder} | {waits} | {part['wait_share']:.4%} | {part['step_ms']:.3f}")
        lines.append(f"{kind} | sampler over mock | | | | | {found['over_mock']:+.3%}")
    count = result["blocks"] * BLOCK
    notes = (
        f"{count} steps of each, batch {ROWS} x {ROW_TOKENS}, one reader thread, zstd shards in the cache."
    )
    return "\n".join(lines) + f"\n\n{notes}\n"


def _measured(
    sampler: Callable[[], Any], mock: Callable[[], Any], compute: Callable[[], Any], blocks: int
) -> dict[str, Any]:
    times: dict[str, list[tuple[float, float]]] = {"sampler": [], "mock": []}
    for block in range(blocks):
        for feeder, take in (("sampler", sampler), ("mock", mock))[:: 1 if block % 2 else -1]:
            for _ in range(BLOCK):
                start = time.perf_counter()
                batch = take()
                got = time.perf_counter()
                assert batch.tokens.shape == (ROWS, ROW_TOKENS + 1)
                compute()
                times[feeder].append((got - start, time.perf_counter() - start))
    found: dict[str, Any] = {}
    for feeder, pairs in times.items():
        waits, steps = (np.array(part) for part in zip(*pairs, strict=True))
        found[feeder] = {
            "wait_us": [float(x) * 1e6 for x in np.quantile(waits, (0.5, 0.99, 1))],
            "wait_share": float(waits.sum() / steps.sum()),
            "step_ms": statistics.median(steps.tolist()) * 1e3,
        }
    found["over_mock"] = found["sampler"]["step_ms"] / found["mock"]["step_ms"] - 1
    return found


def _compute() -> Callable[[], None]:
    """Products of matrices for about `STEP_MS` on one core."""
    a = np.random.default_rng(1).standard_normal((256, 256)).astype(np.float32)

    def compute() -> None:
        until = time.perf_counter() + STEP_MS / 1e3
        while time.perf_counter() < until:
            np.dot(a, a)

    return compute
