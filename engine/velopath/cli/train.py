"""`velopath train`: the main path of a run, and its versions where asked."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from velopath.config import RunConfig


def train(
    config: Annotated[Path, typer.Argument(help="run config (YAML), or a run folder to go on with")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="a.b=c overrides, for example path.peak=3e-4")
    ] = None,
    run: Annotated[
        Path | None, typer.Option("--run", "-r", help="run folder; default runs/NAME-OF-THE-CONFIG")
    ] = None,
    until: Annotated[
        int | None, typer.Option(help="main-path step to stop at; default the last branch point", min=1)
    ] = None,
    versions: Annotated[
        bool, typer.Option("--versions", help="also cut and export every version that the plan names")
    ] = False,
    profile: Annotated[
        int | None,
        typer.Option(help="write a trace of this many steps, and their operators, to RUN/profile", min=1),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print config, mixture, rates, time and memory; train nothing")
    ] = False,
) -> None:
    """Train the main path: constant rate, weights moved by the controller, a checkpoint kept at each branch point.

    Run it again to resume exactly where it stopped. With the run folder in place of the config it goes on as recorded
    there, also with slices that `velopath data add` appended. Under torchrun it uses all ranks.

    Examples:
      velopath train run.yaml --dry-run
      velopath train run.yaml --run runs/2026q1
      torchrun --nproc-per-node 8 -m velopath train run.yaml -r runs/2026q1
      velopath train runs/2026q1 --until 5000
    (Write -r there: torchrun takes --run for its own --run-path.)
    """
    loaded, folder = resolve(config, overrides or [], run)
    if dry_run:
        from velopath.cli.dry_run import show_dry_run

        show_dry_run(loaded, folder)
        return
    from velopath.cli.progress import console_log
    from velopath.run import Run
    from velopath.segments import train_main
    from velopath.unattended import execute_plan

    command = "velopath train"
    opened = Run.reopen(folder, command) if config.is_dir() else Run.open(loaded, folder, command)
    with opened as job, console_log(job):
        if profile is not None:
            job.profile(profile)
        if versions:
            execute_plan(job, score=False)
        else:
            train_main(job, until)


def resolve(config: Path, overrides: list[str], run: Path | None) -> tuple[RunConfig, Path]:
    """The configuration and the run folder that `velopath train CONFIG [OVERRIDES] [--run RUN]` means."""
    from velopath.config import load_config
    from velopath.errors import ConfigError
    from velopath.runconfig import recorded_config
    from velopath.runfolder import RunFolder

    if not config.is_dir():
        return load_config(config, overrides), run if run is not None else Path("runs") / config.stem
    if run is not None or overrides:
        raise ConfigError(
            f"{config} is a run folder, which holds its own configuration: leave --run and overrides out"
        )
    return recorded_config(RunFolder(config)), config
