"""The controller that a configuration describes: its options, what it needs to know, and the filter before it. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from velopath import controllers
from velopath.config import ControlConfig
from velopath.controllers import Controller
from velopath.errors import ConfigError
from velopath.filters import Filtered, make_filter
from velopath.targets import Targets


def configured(
    control: ControlConfig,
    *,
    targets: Callable[[], Mapping[str, float]],
    tokens: Callable[[], Mapping[str, float] | None],
) -> Controller:
    """The controller of `control`; `targets` and `tokens` (name -> nats, tokens) are asked only where it needs them.

    Options that only other controllers know are left out, so that `control.controller=static` is enough to compare.
    With `signal: training` or `anchored` a domain that no batch held keeps its last loss (our choice): small weights
    make such intervals normal. Raises `ConfigError` on an unknown controller, option or filter.
    """
    if control.plugin is not None:
        controllers.load_plugin(control.plugin)
    known = controllers.option_names(control.controller)
    foreign = {o for name in controllers.names() for o in controllers.option_names(name)} - known
    options: dict[str, Any] = {k: v for k, v in control.options.items() if k not in foreign}
    if control.signal != "heldout" and "missing" in known:
        options.setdefault("missing", "last")
    if "tokens" in known and "tokens" not in options:
        options["tokens"] = tokens()
    if controllers.needs_targets(control.controller):
        options["targets"] = targets()
    built = controllers.build(control.controller, **options)
    return built if control.filter is None else Filtered(built, make_filter(control.filter))


def fitted_losses(control: ControlConfig, targets: Targets) -> dict[str, float]:
    """Name -> nats of a targets.json; `decay_gain` "measured" adds what the proxies' own decays gained each domain.

    Raises `ConfigError` where that is asked for and the points were read undecayed.
    """
    if control.decay_gain != "measured":
        return targets.losses
    if targets.decay_gain is None:
        raise ConfigError(
            "control.decay_gain is 'measured' and the targets are of undecayed points; set proxy.decay and fit them "
            "again, or leave decay_gain out"
        )
    return with_decay_gain(targets.losses, targets.decay_gain, tuple(targets.losses))


def with_decay_gain(
    targets: Mapping[str, float],
    gain: Literal["measured"] | float | Mapping[str, float] | None,
    domains: tuple[str, ...],
) -> dict[str, float]:
    """Targets of decayed proxies as those of an undecayed path: each plus the nats that the decay gained it.

    The gain differs by domain, so that without it the velocities are biased (our study: 0.20 to 0.39 nats). `domains`
    are all that the run has; `ConfigError` names one of `gain` that is not among them. "measured" gains are those of
    `fitted_losses`, and nothing is added here.
    """
    if gain is None or gain == "measured":
        return dict(targets)
    if isinstance(gain, Mapping) and (unknown := sorted(set(gain) - set(domains))):
        raise ConfigError(f"control.decay_gain names {unknown[0]!r}; the domains are {', '.join(domains)}")
    if isinstance(gain, Mapping):
        return {n: t + gain.get(n, 0.0) for n, t in targets.items()}
    return {n: t + float(gain) for n, t in targets.items()}
