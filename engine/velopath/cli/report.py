"""`velopath report`: the report of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    run: Annotated[Path, typer.Argument(help="run folder, as `velopath train` or `velopath demo` wrote it")],
    png: Annotated[
        Path | None, typer.Option("--png", help="also draw an overview picture to this file")
    ] = None,
) -> None:
    """Write RUN/report.html, one page that works offline, and RUN/summary.json with the same numbers.

    Works on a run that is still going.
    """
    from velopath.report import write_report

    page = write_report(run)
    typer.echo(f"{page}\n{page.with_name('summary.json')}")
    if png is not None:
        from velopath.report.picture import write_png

        typer.echo(write_png(run, png))
