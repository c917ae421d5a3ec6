"""The sampler at the size of a large corpus, in simulation: 10^4 shards, 10^9 documents, 10^3 domains.

The index is real: every folder, shard entry, name and offset table is read, checked, mapped and counted. The shards are
32 files under 10^4 names (`benchmarks.synthetic`): the index stands for 210 GB, the disk holds 0.7. So pages are warm,
and what a cold disk or a network would add is not measured. Each round is a process of its own that opens, reads, saves
its state, and another one that resumes from it.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.sampler_limits import memory_mib
from benchmarks.synthetic import write_domains

DOMAINS, SHARDS, DOCUMENTS, TOKENS, FILES = 1000, 10, 100_000, 100, 32
ROWS, WORLD, ROW_TOKENS = 8, 64, 2048
STEPS = 50


def run(quick: bool = False, folder: str | None = None) -> dict[str, Any]:
    """Measure; returns {"index", "rounds", "samples"}: what the index holds, and each figure's values by name.

    Seconds are wall time, `cpu` in a name says CPU time, of all threads. `quick` is a tenth of the domains, shards and
    documents of each.
    """
    domains, shards, documents, rounds = (100, 4, 10_000, 2) if quick else (DOMAINS, SHARDS, DOCUMENTS, 5)
    with ExitStack() as stack:
        root = Path(folder or stack.enter_context(tempfile.TemporaryDirectory(prefix="velopath-scale-")))
        data, state = root / "data", root / "state.json"
        write_domains(data, domains, shards, documents, TOKENS, FILES)
        _process(data, state, "start")  # the files are in the page cache from here on
        found = [_process(data, state, part) for _ in range(rounds) for part in ("start", "resume")]
        stored = sum(p.stat().st_size for p in data.glob(".*.mds"))
        named = sum(p.stat().st_size for p in data.glob("*/*.mds"))
    return {
        "index": {
            "domains": domains,
            "shards": domains * shards,
            "documents": domains * shards * documents,
            "tokens": domains * shards * documents * TOKENS,
            "stored_bytes": stored,
            "named_bytes": named,
        },
        "shape": [ROWS, WORLD, ROW_TOKENS],
        "rounds": rounds,
        "samples": {
            name: [x[name] for x in found if name in x] for name in dict.fromkeys(k for x in found for k in x)
        },
    }


LABELS = {
    "open_seconds": "open_sampler, s",
    "open_cpu_seconds": "open_sampler, s of CPU",
    "first_batch_seconds": "first batch after that, s",
    "anonymous_mib": "private memory over the imports, MiB",
    "resident_mib": "resident memory, mapped offset tables and index included, MiB",
    "plan_ms": "planning a step of 512 rows, ms of CPU",
    "step_ms": "a step of this rank (8 rows), planned and assembled, no thread, ms of CPU",
    "push_ms": "push of 1000 weights with an audit log, ms",
    "state_bytes": "state, bytes of JSON",
    "state_ms": "state_dict, ms",
    "resume_seconds": "resume in a new process: open, load, next batch, s",
    "resume_cpu_seconds": "resume, s of CPU",
    "load_ms": "load_state_dict of it, ms",
}


def table(result: dict[str, Any]) -> str:
    """The result of `run` as Markdown."""
    index = result["index"]
    lines = ["| | median | lowest to highest |", "|---|--:|--:|"]
    for name, label in LABELS.items():
        values = result["samples"][name]
        lines.append(
            f"| {label} | {statistics.median(values):.4g} | {min(values):.4g} to {max(values):.4g} |"
        )
    rows, world, width = result["shape"]
    lines += [
        "",
        f"{index['documents']:,} documents of {index['tokens']:,} tokens in {index['shards']:,} shards of "
        f"{index['domains']:,} domains, {index['named_bytes'] / 1e9:.1f} GB by name, "
        f"{index['stored_bytes'] / 1e9:.2f} GB on disk: the shards are {FILES} files under many names, warm. Rank 0 of "
        f"{world} with {rows} rows of {width} tokens each, weights drawn from a Dirichlet distribution, "
        f"{result['rounds']} rounds of new processes.",
    ]
    return "\n".join(lines) + "\n"


def _process(data: Path, state: Path, part: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.scale", part, str(data), str(state)]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=root)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def _measure(data: Path, state: Path, part: str) -> dict[str, float]:
    import numpy as np

    from velopath.stream import open_sampler

    folders = {p.parent.name: p.parent for p in sorted(data.glob("*/index.json"))}
    drawn = np.random.default_rng(0).dirichlet(np.ones(len(folders)))
    weights = dict(zip(folders, (drawn + 1e-9).tolist(), strict=True))
    before, start, cpu = memory_mib(), time.perf_counter(), time.process_time()
    log = state.with_name(f"audit.{part}.{os.getpid()}.jsonl")
    with open_sampler(
        folders, rows=ROWS, world=WORLD, row_tokens=ROW_TOKENS, weights=weights, threads=0, audit=log
    ) as sampler:
        opened = time.perf_counter() - start
        found: dict[str, float] = {}
        if part == "resume":
            saved = json.loads(state.read_bytes())
            loading = time.perf_counter()
            sampler.load_state_dict(saved)
            found["load_ms"] = (time.perf_counter() - loading) * 1e3
            assert next(sampler).step == STEPS
            found["resume_seconds"] = time.perf_counter() - start
            found["resume_cpu_seconds"] = time.process_time() - cpu
            return found
        found = {"open_seconds": opened, "open_cpu_seconds": time.process_time() - cpu}
        start = time.perf_counter()
        next(sampler)
        found["first_batch_seconds"] = time.perf_counter() - start
        cpu = time.process_time()
        for _ in range(STEPS - 1):
            next(sampler)
        found["step_ms"] = (time.process_time() - cpu) / (STEPS - 1) * 1e3
        cpu = time.process_time()
        sampler.plan(STEPS)
        found["plan_ms"] = (time.process_time() - cpu) / STEPS * 1e3
        start = time.perf_counter()
        sampler.push(weights | {next(iter(weights)): 0.5}, reason="scale")
        found["push_ms"] = (time.perf_counter() - start) * 1e3
        start = time.perf_counter()
        text = json.dumps(sampler.state_dict())
        found["state_ms"] = (time.perf_counter() - start) * 1e3
        state.write_text(text)
        found |= {"state_bytes": len(text), "anonymous_mib": memory_mib() - before}
        found["resident_mib"] = memory_mib("VmHWM")
    return found


if __name__ == "__main__":
    print(json.dumps(_measure(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[1])))
