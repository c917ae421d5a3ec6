"""`velopath data`: the data slices of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from velopath.errors import ConfigError
from velopath.urls import redact

app = typer.Typer(help="The data slices of a run.", no_args_is_help=True)


@app.callback()
def data() -> None:
    """The data slices of a run: what the main path reads next."""


@app.command("add")
def add(
    run: Annotated[Path, typer.Argument(help="run folder")],
    name: Annotated[str, typer.Argument(help="name of the new slice, for example 2026q3")],
    root: Annotated[
        str, typer.Argument(help="its prepared folder or URL: new domains, or more data of old ones")
    ],
    steps: Annotated[
        int | None, typer.Option(help="updates of the main path on it; or give --tokens", min=1)
    ] = None,
    tokens: Annotated[
        str | None,
        typer.Option(
            help="tokens of the main path on it, such as 2e9; the steps that read them are recorded"
        ),
    ] = None,
    replay: Annotated[
        float, typer.Option(help="share of its tokens that come from domains which only earlier slices have")
    ] = 0.0,
    target: Annotated[
        list[str] | None,
        typer.Option("--target", help="DOMAIN=NATS for the controller; repeat it for every new domain"),
    ] = None,
    branch_share: Annotated[
        float | None,
        typer.Option(help="branch share of the version cut here; default path.branch_share of the run"),
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option(
            help="decay of that version: cosine, linear, sqrt, knee, multistep or exponential; default path.shape of "
            "the run"
        ),
    ] = None,
) -> None:
    """Append a slice of data to a run, on record: the main path reads it after the slices that are there.

    Go on with `velopath train RUN`. The same command again changes nothing.

    Examples:
      velopath data add runs/2026 2026q3 data/2026q3 --steps 10000 --replay 0.2
      velopath data add runs/2026 2026q4 data/2026q4 --tokens 2e9 --branch-share 0.3 --shape knee
    """
    from velopath.config_lengths import whole_tokens
    from velopath.configured_plan import plan_of, slice_steps
    from velopath.runchange import writing
    from velopath.runconfig import add_slice, recorded_tokens_per_step

    targets = {}
    for text in target or []:
        domain, _, value = text.partition("=")
        try:
            targets[domain] = float(value)
        except ValueError:
            raise ConfigError(f"--target {text!r}; expected DOMAIN=NATS, such as code=1.2") from None
    if (steps is None) == (tokens is None):
        raise ConfigError("a slice has one length: give either --steps or --tokens")
    with writing(run) as folder:
        config = add_slice(
            folder,
            name,
            root,
            steps=steps,
            tokens=None if tokens is None else whole_tokens(tokens),
            replay=replay,
            targets=targets,
            branch_share=branch_share,
            shape=shape,
        )
        per_step = recorded_tokens_per_step(folder)
    entry = config.data.slices[name]
    lengths = slice_steps(config)
    first = sum(count for other, count in lengths.items() if other != name)
    read = "" if per_step is None else f" ({lengths[name] * per_step:,} tokens)"
    typer.echo(
        f"{name}: steps {first:,} to {first + lengths[name]:,} of the main path{read}, from {redact(entry.root)}"
    )
    (branch,) = (b for b in plan_of(config).branches if b.slice == name)
    typer.echo(f"  {branch.name}: {branch.shape} over {branch.steps:,} steps from step {branch.start_step:,}")
    for domain, source in sorted(entry.replay.items()):
        typer.echo(
            f"  replays {domain} of {source}: {(entry.weights or {}).get(domain, 0.0):.1%} of the tokens"
        )
