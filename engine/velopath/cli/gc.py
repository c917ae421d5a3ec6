"""`velopath gc`: delete the checkpoints that the lineage does not need."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def gc(
    run: Annotated[Path, typer.Argument(help="run folder")],
    yes: Annotated[bool, typer.Option("--yes", help="delete; without it only show what would go")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of the table")] = False,
) -> None:
    """Show which checkpoints a run needs and which can go; with --yes delete those.

    Kept: versions, the main checkpoints that they were or will be cut from, the last ones of the main path. What a
    rollback took back goes too, and it can then not be undone.
    """
    from velopath.retention import collect, survey
    from velopath.runchange import writing
    from velopath.runfolder import RunFolder

    if yes:
        with writing(run) as folder:
            kept = survey(folder)
            collect(folder)
    else:
        folder = RunFolder(run)
        folder.check_is_run()
        kept = survey(folder)
    if as_json:
        import json

        rows = [{"path": k.path, "bytes": k.bytes, "kept": k.reason or None} for k in kept]
        typer.echo(json.dumps({"deleted": yes, "checkpoints": rows}, indent=2))
        return
    from velopath.cli.show import table

    verb = "deleted" if yes else "would go"
    table(
        "Checkpoints",
        ["folder", "MB", "why"],
        [[k.path, f"{k.bytes / 1e6:,.1f}", k.reason or verb] for k in kept],
        f"{verb}: {sum(k.bytes for k in kept if not k.reason) / 1e6:,.1f} MB of "
        f"{sum(k.bytes for k in kept) / 1e6:,.1f} MB" + ("" if yes else "; --yes deletes it"),
    )
