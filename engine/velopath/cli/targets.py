"""`velopath targets`: target losses from a proxy trunk and a Chinchilla law per domain."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def targets(
    config: Annotated[Path, typer.Argument(help="run config (YAML); its proxy section sets the trunk")],
    overrides: Annotated[list[str] | None, typer.Argument(help="a.b=c overrides")] = None,
    run: Annotated[
        Path | None, typer.Option("--run", "-r", help="run folder; default runs/NAME-OF-THE-CONFIG")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="train the trunk and its decays again over existing targets")
    ] = False,
) -> None:
    """Train the proxy trunk (constant rate, original weights), fit L(D) = E + B/D^beta per domain, extrapolate.

    With proxy.source=main the points are the main path's own first steps, which `velopath train` goes on from.
    Writes RUN/targets.json and RUN/targets.png, which `velopath train` then reads.
    """
    from velopath.cli.progress import console_log
    from velopath.cli.show import show_targets
    from velopath.config import load_config
    from velopath.proxy import find_targets
    from velopath.run import Run

    loaded = load_config(config, overrides or [])
    folder = run if run is not None else Path("runs") / config.stem
    with Run.open(loaded, folder, command="velopath targets") as job:
        with console_log(job):
            found = find_targets(job, force=force)
        show_targets(found)
        typer.echo(f"targets: {job.folder.path / 'targets.json'}")
