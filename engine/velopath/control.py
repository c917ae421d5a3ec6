"""The controller of a run's slice: built from the config, with the targets of that slice's domains."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from velopath.configured import configured, fitted_losses, with_decay_gain
from velopath.controllers import Controller
from velopath.errors import ConfigError
from velopath.run import Run
from velopath.runconfig import slice_folders, slice_table
from velopath.runfolder import RunFolder
from velopath.targets import Targets


def controller_for(run: Run, slice_name: str) -> Controller:
    """The configured controller for a slice: targets of its domains, read at its end.

    See `velopath.configured`. Raises `ConfigError` naming the domain that has no target.
    """
    control = run.config.control

    def targets() -> dict[str, float]:
        return with_decay_gain(_slice_targets(run, slice_name), control.decay_gain, run.domain_names)

    return configured(control, targets=targets, tokens=lambda: _slice_tokens(run, slice_name))


def check_controllers(run: Run, until: int, known: Collection[str] = ()) -> None:
    """Build the controllers of all slices up to step `until`: what is missing is said before anything is trained.

    `known` are domains whose targets are still to come, from the main path's first steps.
    """
    for piece in run.pieces(0, until):
        if not known:
            controller_for(run, piece.slice)
        elif missing := sorted(set(slice_folders(run.config, piece.slice)) - set(known) - set(_given(run))):
            raise _no_target(run, missing[0], piece.slice)


def _slice_tokens(run: Run, slice_name: str) -> dict[str, int] | None:
    """name -> training tokens of a slice's domains; None where the folder was not written by `velopath prepare`."""
    table = (slice_table(run.config, slice_name) or {}).get("domains", {})
    found = {name: table.get(name, {}).get("tokens") for name in slice_folders(run.config, slice_name)}
    return None if None in found.values() else found


def _slice_targets(run: Run, slice_name: str) -> dict[str, float]:
    """name -> nats for the domains of a slice: given ones first, then those of targets.json."""
    domains = slice_folders(run.config, slice_name)
    source = run.config.control.targets
    found = given = _given(run)
    path = Path(source) if isinstance(source, str) else run.folder.path / "targets.json"
    if set(domains) - set(given):
        value = RunFolder(path.parent).read_json(path.name) if path.parent.is_dir() else None
        if value is not None:
            train = run.config.train
            tokens = run.tokens_at_slice_end(slice_name, train.rows * run.dist.world * train.row_tokens)
            fitted = Targets.from_json(value).at(tokens, above_last="last")
            found = fitted_losses(run.config.control, fitted) | given
    if missing := sorted(set(domains) - set(found)):
        raise _no_target(run, missing[0], slice_name)
    return {name: found[name] for name in domains}


def _given(run: Run) -> dict[str, float]:
    """Targets by hand."""
    source = run.config.control.targets
    return Targets.given(source).losses if isinstance(source, dict) else {}


def _no_target(run: Run, domain: str, slice_name: str) -> ConfigError:
    source = run.config.control.targets
    path = source if isinstance(source, str) else run.folder.path / "targets.json"
    return ConfigError(
        f"controller {run.config.control.controller!r} has no target for domain {domain!r} of slice {slice_name!r} "
        f"(neither control.targets nor {path}); run `velopath targets`, which covers the domains of the first slice, "
        "give others in control.targets as domain: nats, or set control.controller=static"
    )
