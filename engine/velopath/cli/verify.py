"""`velopath verify`: whether a run's logs, streams, checkpoints, lineage and exports are whole and fit each other."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def verify(
    run: Annotated[Path, typer.Argument(help="run folder, as `velopath train` or `velopath demo` wrote it")],
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of the table")] = False,
) -> None:
    """Check every audit chain, replay every stream, hash every checkpoint, compare lineage and exports with them.

    Reads only. Exit code 3 where something is damaged, naming file and line. Shards are checked by
    `velopath inspect DATA --verify`.

    Example: velopath verify runs/demo
    """
    from velopath.errors import DataError
    from velopath.verification import verify_run

    found = list(verify_run(run))
    damaged = [finding.error for finding in found if finding.error is not None]
    if as_json:
        import json

        rows = [
            {"kind": f.kind, "name": f.name, "found": f.found, "error": f.error and str(f.error)}
            for f in found
        ]
        typer.echo(json.dumps({"whole": not damaged, "findings": rows}, indent=2, ensure_ascii=False))
    else:
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.table import Table

        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        for title in ("what", "name", "found"):
            table.add_column(title, overflow="fold")
        for f in found:
            table.add_row(f.kind, f.name, f.found, style="red" if f.error is not None else None)
        Console().print(table)
        for error in damaged:
            Console().print(str(error), style="red", highlight=False, markup=False, soft_wrap=True)
        if not damaged:
            typer.echo(f"whole: {len(found)} things looked at, all of them fit")
    if damaged:
        more = f"; {len(damaged) - 1} more are listed above" if len(damaged) > 1 else ""
        first = damaged[0]
        raise DataError(f"{first}{more}")
