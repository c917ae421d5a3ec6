"""`velopath log`: what came from what in a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from velopath.errors import ConfigError

if TYPE_CHECKING:
    from velopath.lineage import Lineage
    from velopath.runfolder import RunFolder


def log(
    run: Annotated[Path, typer.Argument(help="run folder, as `velopath train` or `velopath demo` wrote it")],
    as_json: Annotated[bool, typer.Option("--json", help="the lineage as JSON")] = False,
    as_mermaid: Annotated[bool, typer.Option("--mermaid", help="the lineage as a Mermaid flowchart")] = False,
) -> None:
    """Show the lineage of a run: main checkpoints, the versions cut from them, steps, data, losses, costs; alarms."""
    from velopath.lineage import Lineage, render
    from velopath.runfolder import RunFolder

    if as_json and as_mermaid:
        raise ConfigError("--json and --mermaid were both given; choose one")
    folder = RunFolder(run)
    folder.check_is_run()
    lineage = Lineage.from_events(folder.events())
    if as_json:
        typer.echo(json.dumps(lineage.to_json(), indent=2, ensure_ascii=False))
    elif as_mermaid:
        typer.echo(mermaid(lineage))
    else:
        typer.echo("\n".join([render(lineage), *control_lines(folder)]))


def control_lines(folder: RunFolder) -> list[str]:
    """What of the main path's controller one must know: shadow mode, and the alarms by step."""
    controls = folder.metrics("control", "main")
    shadow = [r["step"] for r in controls if r.get("shadow")]
    lines = []
    if shadow:
        lines.append(
            f"shadow mode at steps {shadow[0]:,} to {shadow[-1]:,}: weights were proposed and none pushed"
            + (", and is over" if not controls[-1].get("shadow") else "")
        )
    for record in folder.metrics("alarm", "main"):
        lines += [f"alarm at step {record['step']:,}: {alarm['text']}" for alarm in record["alarms"]]
    return lines


def mermaid(lineage: Lineage) -> str:
    """The lineage as a Mermaid flowchart: boxes are main checkpoints, rounded ones versions, arrows what was read."""
    ids = {node.name: f"n{i}" for i, node in enumerate(lineage.nodes)}
    lines = ["flowchart LR"]
    for node in lineage.nodes:
        text = _quoted(node.name)
        if node.heldout_loss:
            text += f"<br/>{sum(node.heldout_loss.values()) / len(node.heldout_loss):.3f} nats"
        left, right = ("[", "]") if node.kind == "main" else ("([", "])")
        lines.append(f'  {ids[node.name]}{left}"{text}"{right}')
    for node in lineage.nodes:
        edge = f'-->|"{node.steps:,} steps, {_quoted(node.slice)}"|'
        lines.append(
            f"  {ids[node.parent] if node.parent is not None else 'start((start))'} {edge} {ids[node.name]}"
        )
    return "\n".join(lines)


def _quoted(text: str) -> str:
    """Foreign text inside a quoted Mermaid label: everything but plain characters as an entity."""
    return "".join(c if c.isalnum() or c in " -_.@" else f"#{ord(c)};" for c in text)
