"""`velopath plan`: what N versions cost, before anything is spent."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def plan(
    config: Annotated[
        Path | None, typer.Argument(help="run config; its slices and path.branch_share are the plan")
    ] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="a.b=c overrides of the config")] = None,
    versions: Annotated[int, typer.Option("--versions", "-n", min=1, help="N, without a config")] = 4,
    steps: Annotated[
        list[int] | None,
        typer.Option(
            "--steps", "-t", help="T: steps of one slice; repeat it once per version for unequal slices"
        ),
    ] = None,
    alpha: Annotated[float, typer.Option(help="branch share: branch steps / T")] = 0.6,
    png: Annotated[Path | None, typer.Option(help="also draw the cost curves into this file")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of the table")] = False,
) -> None:
    """Print the cost of PTFS, CPT and path switching per version, and the segments that `train` would run.

    Example: velopath plan --versions 4 --steps 1000 --alpha 0.6 --png plan.png
    """
    from velopath.plan import cost_table, make_plan

    if config is not None:
        from velopath.config import load_config

        loaded = load_config(config, overrides or [])
        slices = {name: entry.steps for name, entry in loaded.data.slices.items()}
        alpha = loaded.path.branch_share
    else:
        lengths = list(steps or [1000])
        if len(lengths) == 1:
            lengths *= versions
        slices = {f"slice-{i}": n for i, n in enumerate(lengths, 1)}
    costs = cost_table(slices, alpha)
    made = make_plan(slices, alpha)
    if as_json:
        import json

        typer.echo(json.dumps({"costs": costs.to_json(), "plan": made.to_json()}, indent=2))
    else:
        from velopath.cli.show import show_plan

        show_plan(costs, made)
    if png is not None:
        from velopath.plots import plot_plan

        plot_plan(costs, png)
        typer.echo(f"curve: {png}", err=as_json)
