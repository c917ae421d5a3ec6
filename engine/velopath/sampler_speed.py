"""The sampler's own speed on a run's data, for the report: no model, no controller."""

from __future__ import annotations

import time

from velopath.run import Run
from velopath.stream import open_sampler

SECONDS = 0.5


def log_sampler_speed(run: Run) -> float:
    """Tokens per second of the sampler alone on the first slice, in batches of 8 of the run's rows.

    Warm files, one prefetch thread; logged as a `sampler` record. `python -m benchmarks sampler` compares it.
    """
    data = run.config.data
    entry = next(iter(data.slices.values()))
    options = run.config.row_options
    with open_sampler(
        entry.root, rows=8, row_tokens=run.config.train.row_tokens, cache=data.cache, **options
    ) as sampler:
        for _ in range(64):
            next(sampler)
        start = time.perf_counter()
        steps = 0
        while (spent := time.perf_counter() - start) < SECONDS:
            for _ in range(64):
                next(sampler)
            steps += 64
        speed = steps * sampler.global_rows * sampler.row_tokens / spent
    run.log({"kind": "sampler", "segment": "main", "step": run.plan.main_steps, "tokens_per_second": speed})
    return speed
