"""`velopath override`: a rate changed while the run is under way, with its reason on record."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from velopath.errors import ConfigError


def override(
    run: Annotated[Path, typer.Argument(help="run folder")],
    setting: Annotated[str, typer.Argument(help="path.peak=X, path.floor=X or path.shape=X")],
    reason: Annotated[str, typer.Option(help="why; it stands in the lineage")],
) -> None:
    """Change a rate of a run that has begun: the peak from the main path's last checkpoint on, the floor of later
    branches, or their shape (where a slice has none of its own; `velopath branch --shape` chooses one version's).

    Without it, another rate in the config is refused with a diff. Versions that are cut keep the path they had.

    Example: velopath override runs/2026 path.peak=2e-4 --reason "spikes since step 8000"
    """
    from velopath.runchange import writing
    from velopath.runconfig import override as override_setting

    key, equals, value = setting.partition("=")
    if not equals:
        raise ConfigError(f"{setting!r} is not of the form path.peak=2e-4")
    with writing(run) as folder:
        config = override_setting(folder, key, value, reason)
    changes = "".join(f", {rate:g} from step {step:,}" for step, rate in sorted(config.path.changes.items()))
    typer.echo(
        f"main path: peak {config.path.peak:g}{changes}; branches: {config.path.shape} to {config.path.floor:g}"
    )
