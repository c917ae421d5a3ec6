"""A soak of the loader: 10^6 steps with pushes, saves and resumes; memory, file descriptors and threads stay flat.

    python -m benchmarks soak            # 10^6 steps, about 3 minutes on an idle core
    python -m benchmarks soak --quick    # 10^4 steps, a few seconds

Raw and zstd shards, two reader threads, document boundaries, an audit log. Every `PUSH` steps new weights are pushed,
every `SAVE` steps the state is taken as JSON, and ten times in all the sampler is closed and another one goes on from
that state, which must give the very steps that the first one had handed out since.
"""

from __future__ import annotations

import gc
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from velopath.audit import verify
from velopath.mds import MdsWriter
from velopath.stream import Sampler, open_sampler

LONG, SHORT = 1_000_000, 10_000
NAMES = ("code", "prose", "verse")
ROWS, ROW_TOKENS = 4, 256
PUSH, SAVE, RESUMES, LOOKS = 250, 1000, 10, 40


def run(quick: bool = False) -> dict[str, Any]:
    """Soak; returns {"steps", "pushes", "saves", "resumes", "epochs", "seconds", "looks", "growth"}.

    `looks` are rows of [step, resident MiB, file descriptors, threads, Python objects]; `growth` of each is the most
    of the last tenth less the most of the second tenth (the first one fills buffers and caches).
    """
    steps = SHORT if quick else LONG
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="velopath-soak-") as root:
        found = _soak(Path(root), steps)
    looks = found["looks"]
    tenth = len(looks) // 10
    growth = {
        name: max(row[k] for row in looks[-tenth:]) - max(row[k] for row in looks[tenth : 2 * tenth])
        for k, name in enumerate(("resident_mib", "file_descriptors", "threads", "objects"), 1)
    }
    return {"steps": steps, "seconds": time.perf_counter() - start, "growth": growth} | found


def table(result: dict[str, Any]) -> str:
    """The result of `run` as Markdown."""
    rows = result["looks"][:: max(1, len(result["looks"]) // 10)]
    epochs = ", ".join(f"{name} {n:.0f}" for name, n in result["epochs"].items())
    lines = [
        f"{result['steps']:,} steps of {ROWS} x {ROW_TOKENS} in {result['seconds']:.0f} s: {result['pushes']:,} "
        f"pushes, {result['saves']:,} states, {result['resumes']} resumes, each compared with what it repeats; "
        f"epochs: {epochs}.",
        "",
        "step | resident MiB | file descriptors | threads | Python objects",
        "--: | --: | --: | --: | --:",
    ]
    lines += [f"{row[0]:,.0f} | {row[1]:.1f} | " + " | ".join(f"{x:,.0f}" for x in row[2:]) for row in rows]
    return "\n".join(lines) + "\n"


def _soak(root: Path, steps: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    for k, name in enumerate(NAMES):
        with MdsWriter(root / name, compression=("zstd", None)[k % 2], size_limit=1 << 16) as writer:
            for length in rng.integers(50, 2000, 200):
                writer.write(rng.integers(0, 50_000, length).astype(np.uint16))
    looks = np.zeros((LOOKS, 5))  # made before: a growing list would be growth
    pushes = saves = resumes = 0
    sampler = _opened(root)
    state, since = json.dumps(sampler.state_dict()), 0
    last: list[int] = []  # hashes of the steps since the state was taken
    try:
        for step in range(steps):
            if step % PUSH == PUSH // 2:
                sampler.push(dict(zip(NAMES, rng.dirichlet(np.ones(3)).tolist(), strict=True)), reason="soak")
                pushes += 1
            if step % SAVE == 0:
                state, since, last = json.dumps(sampler.state_dict()), step, []
                saves += 1
            if (
                len(last) < 32 and step < since + PUSH // 2
            ):  # before the next push, which only the first one is told
                last.append(_hash(sampler))
            else:
                sampler.next()
            if step % (steps // RESUMES) == steps // RESUMES - 1:
                sampler.close()
                sampler = _resumed(root, state, last, step + 1)
                resumes += 1
            if step % (steps // LOOKS) == steps // LOOKS - 1:
                looks[step // (steps // LOOKS)] = [step + 1, *_held()]
        epochs = {name: given["epochs"] for name, given in sampler.exposure().items()}
    finally:
        sampler.close()
    verify(root / "audit.jsonl")
    return {"pushes": pushes, "saves": saves, "resumes": resumes, "epochs": epochs, "looks": looks.tolist()}


def _opened(root: Path) -> Sampler:
    return open_sampler(
        {name: root / name for name in NAMES},
        rows=ROWS,
        row_tokens=ROW_TOKENS,
        eos=0,
        threads=2,
        prefetch=32,
        boundaries=True,
        cache=root / "cache",
        audit=root / "audit.jsonl",
    )


def _resumed(root: Path, state: str, expected: list[int], until: int) -> Sampler:
    """A new sampler from `state`, after it gave the steps `expected` again, at step `until`."""
    sampler = _opened(root)
    sampler.load_state_dict(json.loads(state))
    if [_hash(sampler) for _ in expected] != expected:
        raise AssertionError(f"a resume from step {json.loads(state)['step']} read other rows")
    while sampler.step < until:
        sampler.next()
    return sampler


def _hash(sampler: Sampler) -> int:
    batch = sampler.next()
    return hash((batch.step, batch.tokens.tobytes(), batch.domains.tobytes(), batch.row_ids.tobytes()))


def _held() -> list[float]:
    """Resident MiB, open file descriptors, threads, Python objects of this process."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    counts = [len(os.listdir(f"/proc/self/{part}")) for part in ("fd", "task")]
    return [pages * os.sysconf("SC_PAGESIZE") / (1 << 20), *counts, len(gc.get_objects())]
