"""`velopath explain`: one update of the controller with its numbers put in."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from velopath.errors import ConfigError

if TYPE_CHECKING:
    from velopath.retrace import Update
    from velopath.runfolder import RunFolder


def explain(
    run: Annotated[Path, typer.Argument(help="run folder, as `velopath train` or `velopath demo` wrote it")],
    step: Annotated[
        int | None,
        typer.Option("--step", help="explain the weights in force at this step; default the last update"),
    ] = None,
    domain: Annotated[str | None, typer.Option("--domain", "-d", help="only this domain")] = None,
    segment: Annotated[
        str, typer.Option("--segment", "-s", help="main, or a version under in_branch=live")
    ] = "main",
    alarms: Annotated[
        bool, typer.Option("--alarms", help="instead: what the alarms would have said, step by step")
    ] = False,
    limits: Annotated[
        list[str] | None,
        typer.Option("--limit", help="with --alarms, another limit: one_hot=0.6, epochs=null"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Show why the weights of a step are what they are: loss, target, velocity, clip, weight before and after, guards.

    The update is made again from the logged losses by the recorded controller, and compared with the log.

    Examples:
      velopath explain runs/demo --step 400
      velopath explain runs/demo --step 400 --domain verse --json
      velopath explain runs/demo --alarms --limit one_hot=0.5
    """
    from velopath.runfolder import RunFolder

    folder = RunFolder(run)
    folder.check_is_run()
    if alarms:
        _show_alarms(alarms_of(folder, limits or (), segment), as_json)
        return
    value = explained(folder, step, segment)
    if domain is not None:
        if domain not in value["domains"]:
            raise ConfigError(f"no domain {domain!r}; the domains are {', '.join(value['domains'])}")
        value["domains"] = {domain: value["domains"][domain]}
    if as_json:
        typer.echo(json.dumps(value, indent=2, ensure_ascii=False))
    else:
        _show(value)


def explained(folder: RunFolder, step: int | None, segment: str = "main") -> dict[str, Any]:
    """The last update up to `step` as a JSON value; `made_again` says whether it equals the log, bit for bit."""
    from velopath import controllers
    from velopath.retrace import controller_of, read_courses, retrace
    from velopath.runconfig import recorded_config

    courses = read_courses(folder, segment)
    course = next((c for c in reversed(courses) if step is None or c.controls[0].step <= step), None)
    if course is None:
        raise ConfigError(f"step {step} lies before the first control, at step {courses[0].controls[0].step}")
    controller = controller_of(folder, course)
    updates = [u for u in retrace(controller, course) if step is None or u.seen.step <= step]
    update = updates[-1]
    told = None
    if update.before is not None:
        told = controllers.explain(controller, update.before, update.seen.losses, update.seen.progress)
    control = recorded_config(folder).control
    record = update.seen.record
    return {
        "segment": segment,
        "slice": course.slice,
        "step": update.seen.step,
        "reason": record["reason"],
        "shadow": bool(record.get("shadow")),
        "controller": control.controller,
        "signal": control.signal,
        "formula": None if told is None else told.formula,
        "made_again": dict(update.after.weights) == update.seen.result,
        "domains": {name: _domain(name, update, told) for name in course.domains},
    }


def alarms_of(folder: RunFolder, limits: Sequence[str] = (), segment: str = "main") -> list[dict[str, Any]]:
    """All alarms that the rules raise on the recorded controls, under the recorded limits or those given as rule=x."""
    from omegaconf import OmegaConf

    from velopath.alarms import all_alarms
    from velopath.config import validate_section
    from velopath.config_watch import AlarmsConfig
    from velopath.runconfig import recorded_config

    given: Any = OmegaConf.to_container(OmegaConf.from_dotlist(list(limits)))
    chosen = validate_section(AlarmsConfig, recorded_config(folder).alarms, given, "alarms")
    records = folder.metrics("control", segment)
    return [{"step": step, **a._asdict()} for step, found in all_alarms(records, chosen) for a in found]


def _show_alarms(found: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(found, indent=2, ensure_ascii=False))
        return
    for alarm in found:
        typer.echo(f"step {alarm['step']:>8,}  {alarm['rule']:<12}  {alarm['text']}")
    if not found:
        typer.echo("no alarm")


def _domain(name: str, update: Update, told: Any) -> dict[str, Any]:
    record, losses = update.seen.record, update.seen.losses
    before = update.before if update.before is not None else update.after
    return {
        "loss": losses.get(name),
        "stderr": (losses.stderr_of(name) or None) if name in losses else None,
        "target": (record.get("target") or {}).get(name),
        "initial": (record.get("initial") or {}).get(name),
        "terms": {} if told is None else dict(told.terms[name]),
        "before": before.weights[name],
        "after": update.after.weights[name],
        "guards": [] if told is None else list(told.guards[name]),
        "worked": None if told is None else told.worked[name],
    }


def _show(value: dict[str, Any]) -> None:
    from velopath.cli.show import table

    def number(x: float | None) -> str:
        return "-" if x is None else f"{x:.4f}"

    rows = []
    for name, d in value["domains"].items():
        loss = number(d["loss"]) + (f" ± {d['stderr']:.4f}" if d["stderr"] else "")
        shares = [f"{d['before']:.2%}", f"{d['after']:.2%}"]
        rows.append(
            [name, loss, number(d["target"]), number(d["initial"]), *shares, ", ".join(d["guards"]) or "-"]
        )
    what = "proposed" if value["shadow"] else "in force"
    columns = ["domain", "loss", "target", "first loss", "before", "after", "guards"]
    where = f"step {value['step']:,} of {value['segment']} ({value['slice']})"
    title = f"{value['controller']}, {value['reason']} at {where}"
    again = (
        "Made again from the logged losses: equal to the log, bit for bit."
        if value["made_again"]
        else "Made again, it differs from the log: the controller or its options changed since."
    )
    table(
        title, columns, rows, f"Losses in nats per token, signal {value['signal']}; weights {what}. {again}"
    )
    if value["formula"] is None:
        typer.echo(
            "The controller starts here: these losses are the first ones."
            if value["reason"] == "start"
            else "This controller explains no more than that."
        )
        return
    typer.echo(value["formula"])
    for name, d in value["domains"].items():
        typer.echo(f"  {name}: {d['worked']}")
