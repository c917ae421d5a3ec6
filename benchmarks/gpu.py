"""One call on one GPU, under ten minutes: checks first, then ceilings, loss kernels and the compiled step.

    python -m benchmarks gpu [--only PART,PART] [--minutes 9] [--out DIR]
    python -m benchmarks gpu --smoke          # the same code with tiny shapes on the CPU

Every part, and every shape of a long one, is written as it finishes, so that a run that is cut off keeps them; a
later `--only` of the same day and machine adds to them. A part that fails is written as failed, the others go on.
"""

from __future__ import annotations

import gc
import json
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_checks, gpu_loss, gpu_profile, gpu_step, losses, report
from benchmarks.bars import gpu_bars
from benchmarks.bench import Bench

Part = tuple[Callable[..., dict[str, Any]], Callable[[Mapping[str, Any]], str]]
PARTS: dict[str, Part] = {
    "checks": (gpu_checks.run, gpu_checks.table),
    "ceilings": (gpu_loss.run_ceilings, gpu_loss.table_ceilings),
    "logits": (gpu_loss.run_logits, losses.table_shapes),
    "domains": (gpu_loss.run_domains, gpu_loss.table_domains),
    "step": (gpu_step.run, gpu_step.table),
    "linear": (gpu_loss.run_linear, losses.table_shapes),
    "profile": (gpu_profile.run, gpu_profile.table),
    "step_1b": (gpu_step.run_1b, gpu_step.table),
}
"""In the order in which they run: what matters most first, the longest last."""


def prepare(*, smoke: bool, quick: bool, only: str | None, minutes: float | None) -> Bench:
    """The settings of a call; `ValueError` where they cannot be."""
    names = tuple(PARTS) if only is None else tuple(name.strip() for name in only.split(","))
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        raise ValueError(f"gpu has no part {unknown[0]!r}; the parts are {', '.join(PARTS)}")
    if minutes is not None and not minutes > 0:
        raise ValueError(f"--minutes is {minutes:g}; expected more than 0")
    if not smoke and not torch.cuda.is_available():
        raise ValueError(
            "gpu needs a CUDA device and torch sees none; run it on a machine with one, or add --smoke to run the "
            "same code with tiny shapes on the CPU"
        )
    device = torch.device("cpu") if smoke else torch.device("cuda", torch.cuda.current_device())
    ordered = tuple(name for name in PARTS if name in names)
    return Bench(device, smoke, quick or smoke, ordered, 9.0 if minutes is None else minutes)


def run(bench: Bench, *, folder: Path, command: str) -> tuple[dict[str, Any], str]:
    """Run the parts, writing after each; returns the document and its tables."""
    threads = torch.get_num_threads()
    if bench.smoke:
        torch.set_num_threads(1)  # at tiny shapes threads mostly wait for each other
    try:
        return _run(bench, folder, command)
    finally:
        torch.set_num_threads(threads)


def _run(bench: Bench, folder: Path, command: str) -> tuple[dict[str, Any], str]:
    result: dict[str, Any] = {"parts": {}, "part_seconds": {}, "failed": {}, "left_out": []}
    suite = "gpu-smoke" if bench.smoke else "gpu"
    found = _describe(suite, result, bench, command)
    _add_earlier(result, report.paths(folder, found)[0], found, bench)
    for name in bench.parts:
        if bench.seconds_left <= 0:
            result["left_out"].append(name)
            continue
        print(f"gpu: {name} ...", file=sys.stderr, flush=True)
        start = time.perf_counter()

        def keep(part: dict[str, Any], name: str = name, start: float = start) -> None:
            result["parts"][name] = part
            result["part_seconds"][name] = round(time.perf_counter() - start, 1)
            report.write(folder, _describe(suite, result, bench, command), _tables(result))

        bench.keep = keep
        try:
            keep(PARTS[name][0](bench))
        except Exception as error:
            traceback.print_exc()
            result["failed"][name] = f"{type(error).__name__}: {error}"
        _clean_up(bench)
    return _describe(suite, result, bench, command), _tables(result)


def _describe(suite: str, result: Mapping[str, Any], bench: Bench, command: str) -> dict[str, Any]:
    return report.document(
        suite,
        result,
        gpu_bars(result["parts"]),
        command=command,
        seconds=time.perf_counter() - bench.start,
        quick=bench.quick and not bench.smoke,
        device=bench.device,
    )


def _add_earlier(result: dict[str, Any], path: Path, found: Mapping[str, Any], bench: Bench) -> None:
    """Keep today's parts of the same machine and commit that this call does not run again."""
    if not path.exists():
        return
    earlier = json.loads(path.read_bytes())
    same = all(earlier[key] == found[key] for key in ("hardware", "versions", "commit"))
    if not same:
        return
    for name, part in earlier["result"]["parts"].items():
        if name not in bench.parts:
            result["parts"][name] = part
            result["part_seconds"][name] = earlier["result"]["part_seconds"][name]


def _tables(result: Mapping[str, Any]) -> str:
    sections = []
    for name, part in result["parts"].items():
        sections.append(f"## {name} ({result['part_seconds'][name]:.0f} s)\n\n{PARTS[name][1](part)}")
    sections += [f"## {name}\n\nFailed: {message}" for name, message in result["failed"].items()]
    sections += [f"## {name}\n\nNot begun: no time was left." for name in result["left_out"]]
    return "\n\n".join(section.rstrip() for section in sections) + "\n"


def _clean_up(bench: Bench) -> None:
    """Leave the next part all of the memory and no compiled code that its limits on recompiling would count."""
    torch.compiler.reset()
    gc.collect()
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()
