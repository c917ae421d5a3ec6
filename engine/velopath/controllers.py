"""Controllers by name: what a controller is, and how one is registered and built.

A controller of one's own needs no change here. In a file of your own, imported before the run is built::

    from velopath.controllers import register

    @register("mine")
    class Mine:
        needs_targets = False
        def start(self, losses, weights): ...
        def observe(self, state, losses): ...
        def state_from_json(self, value): ...
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol, TypeVar

from velopath.baselines import Static, Uniform
from velopath.domains import MixtureWeights
from velopath.errors import ConfigError
from velopath.velocity import Velocitune


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
    with the keyword `targets`, a mapping name -> nats.
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
    """The names of all registered controllers, sorted."""
    return tuple(sorted(_REGISTRY))


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
        raise ConfigError(f"unknown controller {name!r}; registered are {', '.join(names())}")
    return _REGISTRY[name]


def _place(controller: Callable[..., Any]) -> str:
    return f"{controller.__module__}.{getattr(controller, '__qualname__', controller)}"


register("velocitune")(Velocitune)
register("static")(Static)
register("uniform")(Uniform)
