"""`velopath demo`: the main job on real text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="run folder")] = Path("runs/demo"),
    fresh: Annotated[
        bool, typer.Option("--fresh", help="delete the folder of an earlier demo first")
    ] = False,
) -> None:
    """Build a corpus from pinned packages, train a base model, targets, main path and two versions, and report.

    About five minutes on two cores; interrupted, the same command goes on. Open RUN/report.html afterwards.
    """
    from velopath.cli.progress import console_log
    from velopath.cli.show import show_summary
    from velopath.demo import run_demo

    summary = run_demo(out, show=console_log, say=lambda text: typer.echo(text), fresh=fresh)
    show_summary(summary)
    typer.echo(f"open {out / 'report.html'}")
