"""`velopath diff`: two versions of a run side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def diff(
    run: Annotated[Path, typer.Argument(help="run folder")],
    one: Annotated[str, typer.Argument(help="a version, or main@STEP")],
    other: Annotated[str, typer.Argument(help="the version that is compared with it")],
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of the tables")] = False,
) -> None:
    """Show what differs between two versions: data, steps, rate, shares read, cost, and losses per domain.

    Losses of versions are on the larger sample that versions are judged by, those of main checkpoints on the
    controller's: compare like with like.
    """
    from velopath.runfolder import RunFolder
    from velopath.version_diff import diff_versions

    folder = RunFolder(run)
    folder.check_is_run()
    found = diff_versions(folder, one, other)
    if as_json:
        import json

        typer.echo(json.dumps(found, indent=2, ensure_ascii=False))
        return
    from velopath.cli.show import table

    table(
        f"{one} and {other}, which have {found['common'] or 'nothing'} in common",
        ["", one, other],
        [[label, *(_cell(found[side][key]) for side in ("one", "other"))] for label, key in ROWS],
    )
    rows = []
    for name, facts in found["domains"].items():
        losses = ["-" if loss is None else f"{loss:.4f}" for loss in facts["loss"]]
        change = "-" if facts["change"] is None else f"{facts['change']:+.4f}"
        tokens = [f"{n:,.0f} ({s:.1%})" for n, s in zip(facts["tokens"], facts["share"], strict=True)]
        rows.append([name, *losses, change, *tokens])
    head = ["domain", f"{one} loss", f"{other} loss", "change", f"{one} tokens", f"{other} tokens"]
    table(
        "By domain: held-out loss in nats per token, tokens read since the start of the main path", head, rows
    )


ROWS = (
    ("parent", "parent"),
    ("left the main path at", "branch_step"),
    ("steps of its own", "steps"),
    ("slices", "slices"),
    ("rate", "path"),
    ("rate at its end", "final_rate"),
    ("tokens behind it", "tokens_behind"),
    ("tokens of its own", "tokens_of_edge"),
    ("seconds of its own", "seconds_of_edge"),
    ("mean loss", "mean_loss"),
    ("scores", "scores"),
    ("hash of its slice's data", "data"),
)


def _cell(value: Any) -> str:
    match value:
        case None | {}:
            return "-"
        case float():
            return f"{value:.6g}"
        case int():
            return f"{value:,}"
        case list():
            return ", ".join(map(str, value))
        case dict():
            return ", ".join(f"{k} {v}" for k, v in value.items())
    return str(value)
