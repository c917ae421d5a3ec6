"""`velopath replay`: what a run read, made again from its audit logs and compared with what it recorded."""

from __future__ import annotations

import csv
import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from velopath.errors import ConfigError

if TYPE_CHECKING:
    from velopath.replay import Step


def replay(
    run: Annotated[Path, typer.Argument(help="run folder, as `velopath train` or `velopath demo` wrote it")],
    segment: Annotated[str, typer.Option("--segment", "-s", help="main, a version, or proxy")] = "main",
    steps: Annotated[
        str | None, typer.Option("--steps", help="a:b, steps a to b - 1; either may be left out; default all")
    ] = None,
    show: Annotated[bool, typer.Option("--show", help="print every row's id by domain")] = False,
    to_csv: Annotated[
        Path | None, typer.Option("--csv", help="write step,domain,row lines here; - for the output")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON; with --show also the ids")] = False,
) -> None:
    """Make the stream of (step, domain, row) ids again, without model or data, and compare its hash with the record.

    Every hash in metrics.jsonl and in the checkpoints of the segment up to the last step asked for is compared.
    Exit code 3, naming file and line, where one differs.

    Examples:
      velopath replay runs/demo
      velopath replay runs/demo --segment v1 --steps 100:110 --show
      velopath replay runs/demo --steps 0:50 --csv rows.csv
    """
    from velopath.replay import replay as replayed
    from velopath.replay import stretches
    from velopath.runfolder import RunFolder

    parts = stretches(RunFolder(run), segment)
    start, end = _range(steps, parts[0].start, parts[-1].end)
    summary: list[dict[str, Any]] = []
    stream: list[dict[str, Any]] = []
    with ExitStack() as stack:
        out = None
        if to_csv is not None:
            file = sys.stdout if str(to_csv) == "-" else stack.enter_context(to_csv.open("w", newline=""))
            out = csv.writer(file, lineterminator="\n")
            out.writerow(("step", "domain", "row"))
        for part in parts:
            first, last = max(start, part.start), min(end, part.end)
            if first >= last:
                continue
            rows, hash = 0, ""
            for step in replayed(part, first, last):
                rows, hash = rows + len(step.row_ids), step.hash
                if out is not None:
                    out.writerows(
                        (step.step, step.names[k], int(i))
                        for k, i in zip(step.domains, step.row_ids, strict=True)
                    )
                if show and as_json:
                    stream.append({"step": step.step, "rows": _by_domain(step), "hash": step.hash})
                elif show:
                    typer.echo(f"{step.step:>8}  {step.hash[:12]}  {_line(step)}")
            compared = {
                s: hashes for s, hashes in part.recorded.items() if first < s <= _covered(part.recorded, last)
            }
            summary.append(
                {
                    "slice": part.slice,
                    "steps": [first, last],
                    "rows": rows,
                    "hash": hash,
                    "compared": sum(map(len, compared.values())),
                }
            )
    if as_json:
        whole: dict[str, Any] = {"run": str(run), "segment": segment, "stretches": summary}
        typer.echo(json.dumps(whole | ({"stream": stream} if show else {}), indent=None if show else 2))
        return
    for item in summary:
        first, last = item["steps"]
        typer.echo(
            f"{segment}, {item['slice']}: steps {first}:{last}, {item['rows']:,} rows, hash {item['hash'][:16]}; "
            f"{item['compared']} recorded hashes agree",
            err=str(to_csv) == "-",
        )


def _range(text: str | None, first: int, last: int) -> tuple[int, int]:
    """Steps of "a:b" inside those recorded."""
    if text is None:
        return first, last
    begin, colon, end = text.partition(":")
    if not colon or not all(part.isdigit() or not part for part in (begin, end)):
        raise ConfigError(f"--steps is {text!r}; expected a:b, such as 100:200, 100: or :200")
    start, stop = int(begin or first), int(end or last)
    if not first <= start < stop <= last:
        raise ConfigError(f"--steps {text}: the segment's recorded steps are {first}:{last}")
    return start, stop


def _covered(recorded: dict[int, Any], last: int) -> int:
    """The record up to which a replay to `last` compares."""
    return min((s for s in recorded if s >= last), default=last)


def _by_domain(step: Step) -> dict[str, list[int]]:
    return {
        name: step.row_ids[step.domains == k].tolist()
        for k, name in enumerate(step.names)
        if (step.domains == k).any()
    }


def _line(step: Step) -> str:
    return "; ".join(f"{name} {' '.join(map(str, ids))}" for name, ids in _by_domain(step).items())
