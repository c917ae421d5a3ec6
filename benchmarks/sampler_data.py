"""What the sampler's suite reads: one stream of tokens per domain, in each contender's files; and limits."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

from velopath.mds import MdsWriter

SHARES = {"code": 0.4, "prose": 0.3, "maths": 0.2, "verse": 0.1}
ROWS, ROW_TOKENS = 8, 2048
BATCH_TOKENS = ROWS * ROW_TOKENS
Measure = Callable[[float], dict[str, float]]
"""Works for about so many seconds; returns {"tokens", "seconds", "cpu_seconds"}."""


def write(root: Path, tokens: int) -> None:
    """Documents as raw and zstd MDS, rows packed offline as raw MDS, and flat files with the documents' lengths."""
    for number, name in enumerate(SHARES):
        rng = np.random.default_rng(number)
        ids = np.minimum(rng.zipf(1.2, tokens) - 1, 49_999).astype(np.uint16)  # compresses about as text does
        lengths = np.clip(rng.lognormal(6.2, 1.0, 4 * tokens // 500), 20, 20_000).astype(int)
        ends = np.minimum(np.cumsum(lengths), tokens)
        ends = ends[: np.searchsorted(ends, tokens) + 1]
        documents = np.split(ids, ends[:-1])
        for kind, compression in (("raw", None), ("zstd", "zstd")):
            with MdsWriter(root / kind / name, compression=compression) as writer:
                for document in documents:
                    writer.write(document)
        with MdsWriter(root / "rows" / name, compression=None) as writer:
            for row in ids[: tokens // (ROW_TOKENS + 1) * (ROW_TOKENS + 1)].reshape(-1, ROW_TOKENS + 1):
                writer.write(row)
        ids.tofile(root / f"{name}.bin")
        np.save(root / f"{name}.lengths.npy", np.diff(ends, prepend=0))


def timed(step: Callable[[], Any], tokens: int = BATCH_TOKENS) -> Measure:
    """Calls `step`, which handles so many tokens, again and again."""

    def measure(seconds: float) -> dict[str, float]:
        for _ in range(8):
            step()
        steps, start, cpu = 0, time.perf_counter(), time.process_time()
        while time.perf_counter() - start < seconds:
            step()
            steps += 1
        spent = time.perf_counter() - start
        return {"tokens": steps * tokens, "seconds": spent, "cpu_seconds": time.process_time() - cpu}

    return measure


def memmap(root: Path) -> Measure:
    """nanoGPT's get_batch, for several domains."""
    data = [np.memmap(root / f"{name}.bin", np.uint16, "r") for name in SHARES]
    rng, shares = np.random.default_rng(0), list(SHARES.values())

    def step() -> Any:
        domains = rng.choice(len(data), ROWS, p=shares)
        at = [int(rng.integers(0, len(data[k]) - ROW_TOKENS - 1)) for k in domains]
        rows = [data[k][i : i + ROW_TOKENS + 1].astype(np.int64) for k, i in zip(domains, at, strict=True)]
        return np.stack(rows)

    return timed(step)


def memcpy() -> Measure:
    """Bytes copied by one thread between buffers larger than any cache; 8 bytes count as a token."""
    source = np.ones(1 << 26, np.uint8)
    target = np.empty_like(source)
    return timed(lambda: np.copyto(target, source), len(source) // 8)


def libzstd(root: Path) -> Measure:
    """The shards of one domain inflated in memory by one thread; 2 bytes count as a token."""
    shards = [path.read_bytes() for path in sorted((root / "zstd" / "code").glob("*.zstd"))]
    inflater = zstandard.ZstdDecompressor()
    sizes = [zstandard.frame_content_size(shard) for shard in shards]
    out = 0

    def step() -> None:
        nonlocal out
        inflater.decompress(shards[out % len(shards)])
        out += 1

    # Equal shards but for the last one: the mean is what a step handles.
    return timed(step, sum(sizes) // (2 * len(sizes)))
