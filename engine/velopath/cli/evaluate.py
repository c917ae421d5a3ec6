"""`velopath eval`: held-out loss per domain of versions, checkpoints or Hugging Face folders."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    run: Annotated[Path, typer.Argument(help="run folder (for its held-out set and settings)")],
    models: Annotated[
        list[str], typer.Argument(help="versions, main@STEP, or folders with a Hugging Face checkpoint")
    ],
    tokens: Annotated[
        int | None, typer.Option(min=1, help="held-out tokens per domain; default the config's")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Evaluate models side by side on the run's held-out set: nats per token, standard errors, mean and worst."""
    from velopath.cli.show import show_losses
    from velopath.export import evaluate_model
    from velopath.run import Run

    with Run.reopen(run, command="velopath eval", mode="read") as job:
        losses = {model: evaluate_model(job, model, tokens) for model in models}
    if as_json:
        import json

        typer.echo(json.dumps({model: dict(loss) for model, loss in losses.items()}, indent=2))
    else:
        show_losses(losses)
