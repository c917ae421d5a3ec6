"""`velopath run`: a whole plan, unattended."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def run(
    plan: Annotated[Path, typer.Argument(help="run config (YAML), or a run folder to go on with")],
    overrides: Annotated[list[str] | None, typer.Argument(help="a.b=c overrides of the config")] = None,
    run: Annotated[
        Path | None, typer.Option("--run", "-r", help="run folder; default runs/NAME-OF-THE-CONFIG")
    ] = None,
) -> None:
    """Execute a plan to its end: targets where the controller needs them, main path, branches, exports, downstream
    scores (`evaluate.command`), report. Run it again after a kill or a stop: it goes on where it was.

    Examples:
      velopath run run.yaml --run runs/2026 'evaluate.command=python judge.py {model}'
      velopath run runs/2026
    """
    from velopath.cli.progress import console_log
    from velopath.cli.train import resolve
    from velopath.report import write_report
    from velopath.run import Run
    from velopath.unattended import execute_plan

    loaded, folder = resolve(plan, overrides or [], run)
    command = "velopath run"
    opened = Run.reopen(folder, command) if plan.is_dir() else Run.open(loaded, folder, command)
    with opened as job, console_log(job):
        execute_plan(job)
    if job.dist.is_main:
        typer.echo(f"report: {write_report(folder)}")
