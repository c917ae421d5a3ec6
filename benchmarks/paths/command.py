"""`python -m benchmarks paths`: train every arm of the study, as far as the time allows, and write its tables."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import report
from benchmarks.paths import study, tables
from benchmarks.paths.corpus import SlicedText, sliced_text
from benchmarks.paths.smoke import made_up_text
from benchmarks.paths.trainer import Scale

SCALES = {
    "smoke": Scale("smoke", rows=2, steps=10, warmup=2, test_tokens=512, vocabulary=300),
    "small": Scale("small"),
    "full": Scale("full", steps=1465, warmup=60),
    "gpu": Scale("gpu", preset="40m", device="cuda", rows=64, steps=400, warmup=40, peak=1e-3),
}
"""small: T = 0.49M tokens, full: 1.5M, both at 0.16M parameters on one core; gpu: 6.5M tokens, 22M parameters."""


def main(arguments: Sequence[str]) -> int:
    """Exit codes: 0 done (also with jobs left for want of time, or bars missed), 2 wrong arguments."""
    parser = _parser()
    options = parser.parse_args(list(arguments))
    scale = SCALES["smoke" if options.smoke else options.scale]
    if scale.device == "cuda" and not torch.cuda.is_available():
        parser.error("--scale gpu needs a CUDA device and torch sees none; take small or full")
    regimes = tuple(options.regimes.split(","))
    if unknown := [name for name in regimes if name not in study.REGIMES]:
        parser.error(f"--regimes has {unknown[0]!r}; expected {' or '.join(study.REGIMES)}")
    for name in ("steps", "seeds", "minutes"):
        if getattr(options, name) is not None and not getattr(options, name) > 0:
            parser.error(f"--{name} is {getattr(options, name):g}; expected more than 0")
    if options.steps:
        scale = replace(scale, steps=options.steps)
    seeds = options.seeds or (1 if options.smoke else 3)
    out = options.out or (report.LOOKS if options.smoke else report.RESULTS)
    with ExitStack() as stack:
        if options.smoke:
            work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="velopath-paths-")))
            text: SlicedText = made_up_text(work / "text", scale.vocabulary)
        else:
            work = options.work
            text = sliced_text(work / "text")
        jobs = study.jobs(scale, seeds, regimes)
        results = study.Results(work / f"{scale.name}.jsonl")
        start = time.perf_counter()
        _train(jobs, results, text, work / "cache", options.minutes)
        done = [results.found[job.key] for job in jobs if job.key in results.found]
        _publish(done, len(jobs), scale, out, report.command_line(["paths", *arguments]), start)
    return 0


def _train(
    jobs: list[study.Job], results: study.Results, text: SlicedText, cache: Path, minutes: float | None
) -> None:
    """Run the jobs that are not finished; begin none after `minutes`."""
    threads, start = torch.get_num_threads(), time.perf_counter()
    torch.set_num_threads(1)  # at these sizes threads mostly wait for each other
    try:
        for number, job in enumerate(jobs, 1):
            if job.key in results.found:
                continue
            if minutes is not None and time.perf_counter() - start > 60 * minutes:
                print(f"paths: stopped after {minutes:g} minutes; the same command goes on", file=sys.stderr)
                return
            print(
                f"paths: job {number} of {len(jobs)}: {job.kind}, {job.regime}, seed {job.seed} ...",
                file=sys.stderr,
                flush=True,
            )
            results.keep(study.run(job, text, cache))
    finally:
        torch.set_num_threads(threads)


def _publish(
    done: list[dict[str, object]], wanted: int, scale: Scale, out: Path, command: str, start: float
) -> None:
    found = tables.summarise(done)
    suite = "paths-smoke" if scale.name == "smoke" else f"paths-{scale.name}"
    document = report.document(
        suite,
        {"summary": found, "jobs": done, "wanted": wanted},
        tables.bars(found),
        command=command,
        seconds=time.perf_counter() - start,
        quick=False,
        device=torch.device(scale.device),
    )
    picture = report.paths(out, document)[0].with_suffix(".png")
    note = "" if len(done) == wanted else f"{len(done)} of {wanted} jobs are finished.\n\n"
    page = f"{note}![Loss of each version over its cost]({picture.name})\n\n{tables.table(found)}"
    written = report.write(out, document, page)
    tables.draw(found, picture)
    print(report.markdown(json.loads(json.dumps(document)), page))
    print("written:", *written, picture, file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks paths", description=__doc__, allow_abbrev=False
    )
    parser.add_argument(
        "--scale", choices=[n for n in SCALES if n != "smoke"], default="small",
        help="small: 0.49M tokens a slice, about 12 minutes of a core per seed and regime; full: 1.5M, 35 minutes; "
        "gpu: 6.5M and a 22M model",
    )  # fmt: skip
    parser.add_argument("--seeds", type=int, help="paired repeats (default 3)")
    parser.add_argument("--regimes", default="iid,drift", help="iid, drift or both (default)")
    parser.add_argument("--steps", type=int, help="T, updates per slice, in the place of the scale's")
    parser.add_argument(
        "--minutes", type=float, help="begin no job after this long; the same command goes on"
    )
    parser.add_argument(
        "--work", type=Path, default=Path("runs/benchmarks/paths"), help="text, cache and finished jobs"
    )
    parser.add_argument("--out", type=Path, help="folder of the dated result (default benchmarks/results)")
    parser.add_argument(
        "--smoke", action="store_true", help="made-up text and ten steps, to see that it runs"
    )
    return parser
