"""`python -m benchmarks mixing`: the mixing study as far as the time allows, and its dated tables."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from benchmarks import report
from benchmarks.mixing import table
from benchmarks.mixing.study import FORMS, open_study, run
from benchmarks.mixing.targets import belief


def main(arguments: Sequence[str]) -> int:
    """Exit codes: 0 done (also with runs left for want of time, or bars missed), 2 wrong arguments."""
    parser = _parser()
    options = parser.parse_args(list(arguments))
    form = "smoke" if options.smoke else "small" if options.small else options.scale
    if FORMS[form].scale.device == "cuda" and not torch.cuda.is_available():
        parser.error("--scale gpu needs a CUDA device and torch sees none; take small or full")
    if options.minutes is not None and not options.minutes >= 0:
        parser.error(f"--minutes is {options.minutes:g}; expected 0 or more")
    out = options.out or (report.LOOKS if options.smoke else report.RESULTS)
    start, threads = time.perf_counter(), torch.get_num_threads()
    with ExitStack() as stack:
        work = options.work
        if options.smoke:
            work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="velopath-mixing-")))
        torch.set_num_threads(1)  # at these sizes threads mostly wait for each other
        stack.callback(torch.set_num_threads, threads)
        if options.belief:
            print(table.beliefs(belief(open_study(form, work))))
            return 0
        found = run(form, folder=work, minutes=options.minutes)
    document = report.document(
        f"mixing-{form}",
        {**found, "summary": table.summarise(found)},
        table.bars(found),
        command=report.command_line(["mixing", *arguments]),
        seconds=time.perf_counter() - start,
        quick=False,
        device=torch.device(FORMS[form].scale.device),
    )
    picture = report.paths(out, document)[0].with_suffix(".png")
    page = f"{table.table(found)}\n\n![Shares over the steps of every arm that moves them]({picture.name})\n"
    varied = picture.with_name(f"{picture.stem}-sensitivity.png")
    picture.parent.mkdir(parents=True, exist_ok=True)
    if found["sensitivity"]:
        page += f"\n![What interval, step size and normalisation change]({varied.name})\n"
        table.draw_sensitivity(found, varied)
    written = report.write(out, document, page)
    table.draw(found, picture)
    print(report.markdown(json.loads(json.dumps(document)), page))
    print("written:", *written, picture, file=sys.stderr)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks mixing", description=__doc__, allow_abbrev=False
    )
    parser.add_argument(
        "--scale", choices=[name for name in FORMS if name != "smoke"], default="full",
        help="small: about 30 minutes of a core; full: four hours; gpu: a 7M model",
    )  # fmt: skip
    parser.add_argument("--small", action="store_true", help="the same as --scale small")
    parser.add_argument(
        "--smoke", action="store_true", help="made-up text and few steps, to see that it runs"
    )
    parser.add_argument(
        "--minutes", type=float, help="begin no run after this long; the same command goes on"
    )
    parser.add_argument(
        "--work", type=Path, default=Path("runs/benchmarks/mixing"), help="data, base models, finished runs"
    )
    parser.add_argument(
        "--belief", action="store_true",
        help="only the runs on which the law for short reaches set its belief about beta, and a table of beliefs",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, help="folder of the dated result (default benchmarks/results)")
    return parser
