"""What the sampler's bars ask for beside speed: the first batch of many documents, memory, pushes.

Each is measured in new processes, one after the other in turns, because memory and start-up belong to a process. Run as
a script this file is that process: `python -m benchmarks.sampler_limits PART FOLDER STEPS`.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.sampler_data import ROW_TOKENS, ROWS, SHARES
from benchmarks.synthetic import write_folder, write_shard

DOCUMENTS = 10_000_000
STEP_SECONDS = 0.02
"""What a step takes where pushes are judged: a step of training never takes less."""
STEPS, PUSH_EVERY = 60, 10


def run(root: Path, documents: int = DOCUMENTS, rounds: int = 5, steps: int = STEPS) -> dict[str, Any]:
    """Samples of `rounds` processes each: {"first_batch_seconds", "private_mib", "shard_mib", "push", "after_push"}.

    `first_batch_seconds` is from open_sampler to the first batch of `documents` documents in four domains, warm.
    `private_mib` is anonymous memory over that after the imports, after the first and after `steps` of these batches;
    `push` has the longest of `steps` steps over their median, in runs without pushes, with one before every tenth step,
    and the same with an audit log on disk, in `root`; `after_push` the median of the steps right after a push over that
    of the others. A step hands out a batch and sleeps for `STEP_SECONDS`.
    """
    from benchmarks.timing import take_turns  # imports torch, which the processes do without

    many = root / "many"
    each, per_shard = documents // len(SHARES), 50_000
    for k, name in enumerate(SHARES):
        files = [root / f"many.{k}.{j}.mds" for j in range(max(1, each // per_shard))]
        for j, file in enumerate(files):
            write_shard(file, min(each, per_shard), 30 + j % 40, seed=j)
        write_folder(many / name, files, min(each, per_shard))
    parts = {
        "opening": partial(_process, "opening", many, steps),
        "push-none": partial(_process, "push-none", root / "raw", steps),
        "push": partial(_process, "push", root / "raw", steps),
        "push-audit": partial(_process, "push-audit", root / "raw", steps),
    }
    parts["opening"]()  # the files are in the page cache from here on
    found = take_turns(parts, rounds)
    return {
        "documents": documents,
        "domains": len(SHARES),
        "rounds": rounds,
        "first_batch_seconds": [x["first_batch_seconds"] for x in found["opening"]],
        "private_mib": [x["private_mib"] for x in found["opening"]],
        "shard_mib": max(p.stat().st_size for p in root.glob("many.*.mds")) / 2**20,
        "step_seconds": STEP_SECONDS,
        "steps": steps,
        "push": {name: [x["longest"] for x in found[name]] for name in found if name != "opening"},
        "after_push": {name: [x["after"] for x in found[name]] for name in ("push", "push-audit")},
    }


def describe(found: dict[str, Any]) -> str:
    """The result of `run` in words."""
    median = {name: statistics.median(values) for name, values in found["push"].items()}
    spread = {name: f"{min(v):.3f} to {max(v):.3f}" for name, v in found["push"].items()}
    first, private = found["first_batch_seconds"], found["private_mib"]
    return (
        f"In {found['rounds']} new processes each, medians. First batch of {found['documents'] / 1e6:g}M documents, "
        f"from open_sampler: {statistics.median(first) * 1e3:.0f} ms ({min(first) * 1e3:.0f} to "
        f"{max(first) * 1e3:.0f}). Anonymous memory over the imports, after some batches of these: "
        f"{statistics.median(private):.1f} MiB (the largest shard has {found['shard_mib']:.1f}).\n\n"
        f"Longest of {found['steps']} steps of {STEP_SECONDS * 1e3:.0f} ms over their median: without a push "
        f"{median['push-none']:.3f} ({spread['push-none']}), with a push before every {PUSH_EVERY}th step "
        f"{median['push']:.3f} ({spread['push']}), with an audit log on disk too {median['push-audit']:.3f} "
        f"({spread['push-audit']}). Steps right after a push over the other steps: "
        f"{statistics.median(found['after_push']['push']):.3f}, with a log "
        f"{statistics.median(found['after_push']['push-audit']):.3f}. A step is `next` "
        "and a sleep; every push was in force at once."
    )


def _process(part: str, folder: Path, steps: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.sampler_limits", part, str(folder), str(steps)]
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def memory_mib(kind: str = "RssAnon") -> float:
    """Memory of this process as Linux tells: RssAnon is its own and no file's, VmHWM the peak of all."""
    found = re.search(rf"{kind}:\s*(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def _opening(folder: Path, steps: int) -> dict[str, Any]:
    from velopath.stream import open_sampler

    before, start = memory_mib(), time.perf_counter()
    with open_sampler(folder, rows=ROWS, row_tokens=ROW_TOKENS, weights=SHARES) as sampler:
        next(sampler)
        first = time.perf_counter() - start
        private = memory_mib()
        for _ in range(steps):
            next(sampler)
        private = max(private, memory_mib())
    return {"first_batch_seconds": first, "private_mib": private - before}


def _pushing(folder: Path, steps: int, every: int, audit: bool) -> dict[str, Any]:
    from velopath.stream import open_sampler

    pushed_ones: list[float] = []
    others: list[float] = []
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        log = Path(scratch) / "audit.jsonl" if audit else None
        with open_sampler(folder, rows=ROWS, row_tokens=ROW_TOKENS, weights=SHARES, audit=log) as sampler:
            for step in range(steps + PUSH_EVERY):
                start = time.perf_counter()
                pushed = None
                if every and step % every == every - 1:
                    pushed = sampler.push({name: 1 + (step + k) % 3 for k, name in enumerate(SHARES)})
                batch = next(sampler)
                assert pushed is None or (batch.weights_id, batch.step) == (pushed.id, pushed.from_step)
                time.sleep(STEP_SECONDS)
                if step >= PUSH_EVERY:
                    (pushed_ones if pushed else others).append(time.perf_counter() - start)
    median = statistics.median(pushed_ones + others)
    after = statistics.median(pushed_ones) / statistics.median(others) if every else 1.0
    return {"longest": max(pushed_ones + others) / median, "after": after}


_PARTS: dict[str, Callable[[Path, int], dict[str, Any]]] = {
    "opening": _opening,
    "push-none": lambda folder, steps: _pushing(folder, steps, 0, audit=False),
    "push": lambda folder, steps: _pushing(folder, steps, PUSH_EVERY, audit=False),
    "push-audit": lambda folder, steps: _pushing(folder, steps, PUSH_EVERY, audit=True),
}

if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    print(json.dumps(_PARTS[sys.argv[1]](Path(sys.argv[2]), int(sys.argv[3]))))
