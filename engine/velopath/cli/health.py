"""`velopath health`: whether a run is fit to branch, a decay pays, a version is better."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from velopath.errors import VelopathError

CODES = {"ok": 0, "stop": 6, "warn": 7}


def health(
    run: Annotated[Path, typer.Argument(help="run folder")],
    name: Annotated[
        str | None, typer.Argument(help="a branch under way or a version; default the main path")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of the table")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="do not run health.command")] = False,
) -> None:
    """Judge the main path before a branch, a branch while it decays, or a version after: a verdict with reasons.

    The limits stand in the config under `health`; they may be changed at any time. Reads only, also while the run is
    being trained. Exit codes for schedulers: 0 ok, 6 stop, 7 warn.

    Example: velopath health runs/2026 && velopath branch runs/2026 v3
    """
    from velopath.alarm_watch import run_command
    from velopath.runconfig import recorded_config
    from velopath.runfolder import RunFolder
    from velopath.runhealth import run_health

    folder = RunFolder(run)
    folder.check_is_run()
    found = run_health(folder, name)
    facts = found.to_json()
    if as_json:
        import json

        typer.echo(json.dumps(facts, indent=2, ensure_ascii=False))
    else:
        from velopath.cli.show import table

        rows = [
            [f["rule"], f["level"], f"{f['value']:.3g}", f"{f['limit']:.3g}", f["text"]]
            for f in facts["findings"]
        ]
        title = f"{found.name} at step {found.step:,} ({found.stage} a branch): {found.verdict}"
        table(title, ["rule", "", "value", "limit", "what was seen"], rows)
    command = recorded_config(folder).health.command
    if command is not None and found.verdict != "ok" and not quiet:
        problem = run_command(command, {"run": str(run.resolve()), **facts})
        if problem is not None:
            raise VelopathError(f"health.command: {problem}")
    raise typer.Exit(CODES[found.verdict])
