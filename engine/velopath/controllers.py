"""Controllers by name: what a controller is, and how one is registered and built.

A controller of one's own needs no change here. In a file of your own::

    from velopath.controllers import register

    @register("mine")
    class Mine:
        needs_targets = False
        def start(self, losses, weights): ...
        def observe(self, state, losses): ...
        def state_from_json(self, value): ...

A run finds it in three ways: the file is imported before the run is built; the config names it (`control.plugin:
mine.py`); or an installed package announces it as an entry point `mine = "package.module:Mine"` of the group
`velopath.controllers`, which is loaded when the name is first asked for.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

from velopath.baselines import Schedule, Static, Temperature, Uniform
from velopath.domains import MixtureWeights, Progress
from velopath.errors import ConfigError
from velopath.gain import MarginalGain
from velopath.rivals import Ado, DoReMi, DynamicBatchLoading, Odm
from velopath.rule_state import Explanation
from velopath.velocity import Velocitune

GROUP = "velopath.controllers"
"""The entry-point group of controllers in other packages."""


class ControllerState(Protocol):
    """What a run keeps between updates: a small frozen value, the same on all ranks."""

    @property
    def weights(self) -> MixtureWeights:
        """The shares in force."""
        ...

    def record(self) -> dict[str, Any]:
        """What goes into the metrics record, by domain name; see `VelocityState.record` for the keys."""
        ...

    def to_json(self) -> dict[str, Any]:
        """A JSON value from which the controller's `state_from_json` makes an equal state."""
        ...


class Controller(Protocol):
    """A rule that turns held-out losses into weights. All methods are pure: no clock, file, rank or torch.

    `losses` is a mapping name -> nats per token, or a `DomainLoss`. A controller with `needs_targets` is built
    with the keyword `targets`, a mapping name -> nats; one that takes `tokens` gets the training tokens by domain.
    `start` and `observe` may take a further keyword `progress`, a `Progress`: where the run stands. An optional
    `explain(state, losses)`, with `progress` where `observe` has it, returns the `Explanation` of that update.
    """

    needs_targets: ClassVar[bool]

    def start(self, losses: Mapping[str, float], weights: Mapping[str, float]) -> Any:
        """The first `ControllerState`, from the losses before training and the first weights."""
        ...

    def observe(self, state: Any, losses: Mapping[str, float]) -> tuple[Any, MixtureWeights]:
        """The next `ControllerState`, and the weights to be pushed."""
        ...

    def state_from_json(self, value: Mapping[str, Any]) -> Any:
        """The `ControllerState` that `to_json` wrote."""
        ...


def start(
    controller: Controller,
    losses: Mapping[str, float],
    weights: Mapping[str, float],
    progress: Progress | None = None,
) -> Any:
    """`controller.start`, with `progress` where it takes that."""
    return controller.start(losses, weights, **_progress(controller.start, progress))


def observe(
    controller: Controller, state: Any, losses: Mapping[str, float], progress: Progress | None = None
) -> tuple[Any, MixtureWeights]:
    """`controller.observe`, with `progress` where it takes that."""
    return controller.observe(state, losses, **_progress(controller.observe, progress))


def explain(
    controller: Controller, state: Any, losses: Mapping[str, float], progress: Progress | None = None
) -> Explanation | None:
    """`controller.explain`, with `progress` where it takes that; None of a controller that explains nothing."""
    method = getattr(controller, "explain", None)
    return None if method is None else method(state, losses, **_progress(method, progress))


def _progress(method: Callable[..., Any], progress: Progress | None) -> dict[str, Progress]:
    if progress is None:
        return {}
    taken = inspect.signature(method).parameters.values()
    takes = any(p.name == "progress" or p.kind is p.VAR_KEYWORD for p in taken)
    return {"progress": progress} if takes else {}


_REGISTRY: dict[str, Callable[..., Controller]] = {}
_C = TypeVar("_C", bound=Callable[..., Any])
_METHODS = ("start", "observe", "state_from_json", "needs_targets")


def register(name: str) -> Callable[[_C], _C]:
    """A class decorator that makes the controller known under `name`.

    Raises `ConfigError` when the name is taken by another class or a method is missing. Registering the same
    class again is allowed: modules are reloaded in notebooks.
    """

    def add(controller: _C) -> _C:
        lacking = [m for m in _METHODS if not hasattr(controller, m)]
        if lacking:
            raise ConfigError(f"controller {name!r} lacks {lacking[0]!r}; it needs {', '.join(_METHODS)}")
        taken = _REGISTRY.get(name)
        if taken is not None and _place(taken) != _place(controller):
            raise ConfigError(f"controller name {name!r} is taken by {_place(taken)}; choose another name")
        _REGISTRY[name] = controller
        return controller

    return add


def names() -> tuple[str, ...]:
    """The names of all controllers, registered and announced by installed packages, sorted."""
    return tuple(sorted({*_REGISTRY, *(point.name for point in entry_points(group=GROUP))}))


def load_plugin(path: str | Path) -> None:
    """Run the Python file at `path`, which registers controllers. A file that was loaded is not run again.

    Raises `ConfigError` where it does not exist, fails, or is no Python file.
    """
    place = Path(path).resolve()
    name = f"velopath_plugin_{place.stem}"
    if (loaded := sys.modules.get(name)) is not None and loaded.__file__ == str(place):
        return
    spec = importlib.util.spec_from_file_location(name, place) if place.is_file() else None
    if spec is None or spec.loader is None:
        raise ConfigError(
            f"no Python file {place}; control.plugin names a file ending in .py that registers controllers"
        )
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ConfigError(f"control.plugin {place} failed: {type(error).__name__}: {error}") from error


def needs_targets(name: str) -> bool:
    """Whether the controller `name` is built with `targets=`. Raises `ConfigError` on an unknown name."""
    return bool(getattr(_find(name), "needs_targets", False))


def option_names(name: str) -> set[str]:
    """The keywords that the controller `name` takes. Raises `ConfigError` on an unknown name."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {p.name for p in inspect.signature(_find(name)).parameters.values() if p.kind in kinds}


def build(name: str, **options: Any) -> Controller:
    """The controller `name` with its options. Raises `ConfigError` on an unknown name or option."""
    factory = _find(name)
    known = inspect.signature(factory).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in known.values())
    unknown = [option for option in options if option not in known]
    if unknown and not open_ended:
        raise ConfigError(
            f"controller {name!r} has no option {unknown[0]!r}; its options are {', '.join(known) or 'none'}"
        )
    required = [p.name for p in known.values() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if missing := [p for p in required if p not in options]:
        raise ConfigError(f"controller {name!r} needs {missing[0]!r}")
    return factory(**options)


def _find(name: str) -> Callable[..., Controller]:
    if name not in _REGISTRY:
        for point in entry_points(group=GROUP, name=name):
            register(name)(point.load())
            return _REGISTRY[name]
        raise ConfigError(f"unknown controller {name!r}; registered are {', '.join(names())}")
    return _REGISTRY[name]


def _place(controller: Callable[..., Any]) -> str:
    return f"{controller.__module__}.{getattr(controller, '__qualname__', controller)}"


register("velocitune")(Velocitune)
for _rule in (Static, Uniform, Temperature, Schedule, DynamicBatchLoading, DoReMi, Ado, Odm, MarginalGain):
    register(_rule.name)(_rule)
