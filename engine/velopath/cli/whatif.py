"""`velopath whatif`: the logged losses of a run under another controller."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from velopath.errors import ConfigError

if TYPE_CHECKING:
    from velopath.config import ControlConfig
    from velopath.runfolder import RunFolder

NOTE = (
    "The losses are those of the run as it was: under other weights the model would have read other text, and the "
    "losses themselves would have changed. This shows how a rule reacts, not what it would have gained."
)


def whatif(
    run: Annotated[Path, typer.Argument(help="run folder, as `velopath train` or `velopath demo` wrote it")],
    options: Annotated[
        list[str] | None,
        typer.Argument(help="options of the controller as key=value, for example cap=0.5 filter=ema"),
    ] = None,
    controller: Annotated[
        str | None,
        typer.Option("--controller", "-c", help="name of the other controller; default the run's own"),
    ] = None,
    plugin: Annotated[Path | None, typer.Option("--plugin", help="Python file that registers it")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Replay the logged losses of the main path under another controller, offline, and plot both weight curves.

    Writes RUN/whatif-NAME.png. Besides the controller's own options, filter=... and targets.DOMAIN=NATS are
    understood as in the config. The losses themselves would have changed: see the note it prints.

    Examples:
      velopath whatif runs/demo --controller dynamic_batch_loading
      velopath whatif runs/demo --controller velocitune step_size=2 cap=0.4 filter.kind=trend
    """
    from velopath.plots_weights import plot_whatif
    from velopath.runfolder import RunFolder

    folder = RunFolder(run)
    folder.check_is_run()
    value = tried(folder, controller, options or (), plugin)
    picture = plot_whatif(value, folder.path / f"whatif-{value['controller']}.png")
    if as_json:
        typer.echo(json.dumps(value | {"picture": str(picture)}, indent=2, ensure_ascii=False))
        return
    _show(value)
    typer.echo(f"{NOTE}\npicture: {picture}")


def tried(
    folder: RunFolder, name: str | None, options: Sequence[str] = (), plugin: Path | None = None
) -> dict[str, Any]:
    """Both courses of weights as a JSON value: `steps`, and by domain `logged` and `whatif` shares."""
    from velopath.retrace import controller_of, first_weights, read_courses, retrace
    from velopath.runconfig import recorded_config

    choice = _choice(recorded_config(folder).control, name, options, plugin)
    courses = read_courses(folder)
    domains = sorted({d for course in courses for d in course.domains})
    parts = [(controller_of(folder, c, choice), c, first_weights(folder, c)) for c in courses]
    start = time.perf_counter()
    made = [retrace(*part) for part in parts]
    spent = time.perf_counter() - start
    updates = [u for part in made for u in part]
    return {
        "note": NOTE,
        "controller": choice.controller,
        "options": choice.options,
        "steps": [u.seen.step for u in updates],
        "logged": {d: [u.seen.result.get(d) for u in updates] for d in domains},
        "whatif": {d: [u.after.weights.get(d) for u in updates] for d in domains},
        "milliseconds": 1000 * spent,
    }


def _choice(
    control: ControlConfig, name: str | None, options: Sequence[str], plugin: Path | None
) -> ControlConfig:
    """The control section with the changes asked for. Raises `ConfigError` on an option that nobody knows."""
    import yaml
    from omegaconf import OmegaConf

    from velopath import controllers
    from velopath.config import ControlConfig, validate_section

    if plugin is not None:
        controllers.load_plugin(plugin)
    elif control.plugin is not None:
        controllers.load_plugin(control.plugin)
    if bad := [o for o in options if "=" not in o]:
        raise ConfigError(f"option {bad[0]!r} is not of the form key=value")
    try:
        given: Any = OmegaConf.to_container(OmegaConf.from_dotlist(list(options)))
    except yaml.YAMLError as error:
        raise ConfigError(f"options {' '.join(options)}: {error}") from error
    chosen = name or control.controller
    known = controllers.option_names(chosen) - {"targets"}
    sections = {"filter", "targets"}
    if unknown := [o for o in given if o not in known | sections]:
        raise ConfigError(
            f"controller {chosen!r} has no option {unknown[0]!r}; its options are "
            f"{', '.join(sorted(known)) or 'none'}, and {', '.join(sorted(sections))} as in the config"
        )
    own = control.options if chosen == control.controller else {}
    changes = {k: v for k, v in given.items() if k in sections}
    changes["options"] = {**own, **{k: v for k, v in given.items() if k not in sections}}
    return validate_section(ControlConfig, control, {"controller": chosen, **changes}, "control")


def _show(value: dict[str, Any]) -> None:
    from velopath.cli.show import table

    def column(shares: list[float | None]) -> list[str]:
        known = [s for s in shares if s is not None]
        return [f"{sum(known) / len(known):.1%}", f"{max(known):.1%}", f"{known[-1]:.1%}"]

    rows = [[d, *column(value["logged"][d]), *column(value["whatif"][d])] for d in value["logged"]]
    options = " ".join(f"{k}={v}" for k, v in value["options"].items())
    table(
        f"Weights over {len(value['steps'])} controls: as logged, and under {value['controller']} {options}".rstrip(),
        ["domain", "mean", "largest", "last", "what if: mean", "largest", "last"],
        rows,
        f"replayed in {value['milliseconds']:.1f} ms",
    )
