"""`velopath rollback`: the main path back to an earlier checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from velopath.errors import ConfigError


def rollback(
    run: Annotated[Path, typer.Argument(help="run folder")],
    step: Annotated[int | None, typer.Argument(help="step of a kept main checkpoint", min=1)] = None,
    undo: Annotated[bool, typer.Option("--undo", help="undo the last rollback instead")] = False,
) -> None:
    """Take the main path back to a kept checkpoint, on record. Slices that had not begun by then leave the run.

    Nothing is deleted, versions stay. `--undo` takes it back again, until the main path trains on or `velopath gc`.

    Example: velopath rollback runs/2026 20000
    """
    from velopath import rollback as rollbacks
    from velopath.runchange import writing

    if undo == (step is not None):
        raise ConfigError("give either the step to go back to, or --undo")
    with writing(run) as folder:
        event = rollbacks.undo(folder) if step is None else rollbacks.roll_back(folder, step)
    names = ", ".join(event["slices"])
    if undo:
        back = f"; the slices {names} are back" if names else ""
        typer.echo(f"rollback {event['number']} to step {event['step']:,} is undone{back}")
    else:
        gone = f"; the slices {names} are out" if names else ""
        typer.echo(
            f"rollback {event['number']}: the main path is at step {event['step']:,} again, was at "
            f"{event['from']:,}{gone}"
        )
