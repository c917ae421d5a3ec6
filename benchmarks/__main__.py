"""`python -m benchmarks NAME...`: run suites, print their tables, write dated results.

Exit codes: 0 done (also with bars missed: they are in the report), 1 a suite failed, 2 wrong arguments.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks import bars, report

CPU_SUITES: dict[str, Callable[[Mapping[str, Any]], list[bars.Bar]]] = {
    "sampler": bars.sampler_bars,
    "scale": bars.scale_bars,
    "loss": bars.loss_bars,
    "step": bars.step_bars,
    "wait": bars.wait_bars,
    "soak": bars.soak_bars,
}
NAMES = (*CPU_SUITES, "gpu", "all")


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == ["paths"]:
        from benchmarks.paths import command as paths

        return paths.main(arguments[1:])
    if arguments[:1] == ["mixing"]:
        from benchmarks.mixing import command as mixing

        return mixing.main(arguments[1:])
    parser = _parser()
    options = parser.parse_args(arguments)
    names = list(
        dict.fromkeys(n for name in options.names for n in (CPU_SUITES if name == "all" else [name]))
    )
    if "gpu" not in names and (options.smoke or options.only or options.minutes is not None):
        parser.error("--smoke, --only and --minutes belong to gpu")
    if options.out is None:
        options.out = report.LOOKS if options.quick or options.smoke else report.RESULTS
    command, failed = report.command_line(arguments), 0
    for name in names:
        try:
            if name == "gpu":
                failed |= _run_gpu(parser, options, command)
            else:
                _run_suite(name, options, command)
        except Exception:
            # The suites after this one still run; the exit code tells.
            traceback.print_exc()
            print(f"{name}: failed, see above", file=sys.stderr)
            failed = 1
    return failed


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "names",
        nargs="+",
        choices=NAMES,
        metavar="NAME",
        help=f"{', '.join(NAMES)}; or alone: paths, mixing, studies with options of their own (paths --help)",
    )
    parser.add_argument("--quick", action="store_true", help="smaller and shorter, for a look")
    parser.add_argument(
        "--out",
        type=Path,
        help="folder of the dated results (default benchmarks/results, of quick and smoke runs runs/benchmarks)",
    )
    parser.add_argument("--json", action="store_true", help="print the whole result as JSON, not its tables")
    parser.add_argument("--smoke", action="store_true", help="gpu: the same code with tiny shapes on the CPU")
    parser.add_argument("--only", metavar="PART,PART", help="gpu: these parts, kept with today's other parts")
    parser.add_argument("--minutes", type=float, help="gpu: begin no part after this long (default 9)")
    return parser


def _run_suite(name: str, options: argparse.Namespace, command: str) -> None:
    suite = import_module(f"benchmarks.{name}")
    print(f"{name} ...", file=sys.stderr)
    start = time.perf_counter()
    result = suite.run(quick=options.quick)
    found = report.document(
        name,
        result,
        CPU_SUITES[name](result),
        command=command,
        seconds=time.perf_counter() - start,
        quick=options.quick,
    )
    tables = suite.table(result)
    if hasattr(suite, "plot"):
        options.out.mkdir(parents=True, exist_ok=True)
        picture = report.paths(options.out, found)[0].with_suffix(".png")
        suite.plot(result, picture)
        tables += f"\n![{name}]({picture.name})\n"
    _publish(found, tables, options)


def _run_gpu(parser: argparse.ArgumentParser, options: argparse.Namespace, command: str) -> int:
    from benchmarks import gpu, gpu_plots

    try:
        bench = gpu.prepare(
            smoke=options.smoke, quick=options.quick, only=options.only, minutes=options.minutes
        )
    except ValueError as error:
        parser.error(str(error))
    found, tables = gpu.run(bench, folder=options.out, command=command)
    picture = report.paths(options.out, found)[0].with_suffix(".png")
    if gpu_plots.draw(found["result"]["parts"], picture):
        tables = f"![Loss and step times of the suite]({picture.name})\n\n{tables}"
    _publish(found, tables, options)
    return 1 if found["result"]["failed"] else 0


def _publish(found: Mapping[str, Any], tables: str, options: argparse.Namespace) -> None:
    written = report.write(options.out, found, tables)
    print(json.dumps(found, indent=1) if options.json else report.markdown(found, tables))
    print("written:", *written, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
