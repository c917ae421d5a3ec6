"""`velopath export`: a version as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def export(
    run: Annotated[Path, typer.Argument(help="run folder")],
    version: Annotated[str, typer.Argument(help="a version, or main@STEP for a kept main checkpoint")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="default RUN/exports/VERSION")] = None,
) -> None:
    """Write weights (safetensors), config, tokenizer and a model card in Hugging Face Llama layout."""
    from velopath.export import export_version
    from velopath.run import Run

    with Run.reopen(run, command="velopath export", mode="append") as job:
        folder = export_version(job, version, out)
        if job.dist.is_main:
            typer.echo(str(folder))
