"""`velopath branch`: cut a version from the main path."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def branch(
    run: Annotated[Path, typer.Argument(help="run folder of `velopath train`")],
    name: Annotated[str, typer.Argument(help="name of the new version, for example v1")],
    at: Annotated[
        int | None,
        typer.Option(help="main-path step to leave from; default the plan's branch point for NAME"),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="length of the branch; default up to its slice's end")
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option(help="cosine, linear, sqrt, knee, multistep or exponential; default its slice's"),
    ] = None,
    no_export: Annotated[
        bool, typer.Option("--no-export", help="do not write the Hugging Face folder")
    ] = False,
) -> None:
    """Branch off a kept main-path checkpoint, decay the rate completely, evaluate, record and export the version.

    The main path keeps its own state and can run on before or after. Run it again to resume.
    """
    from velopath.cli.progress import console_log
    from velopath.downstream import score_version
    from velopath.export import export_version
    from velopath.run import Run
    from velopath.segments import cut_version

    with Run.reopen(run, command="velopath branch") as job, console_log(job):
        version = cut_version(job, name, at=at, steps=steps, shape=shape)
        if not no_export:
            model = export_version(job, version.name)
            job.note("export", str(model))
            score_version(job, version.name, model)
