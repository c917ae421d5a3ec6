"""Target losses of all domains: laws fitted to a proxy run and read at the full data size (Velocitune).

The law and its fit are in `velopath.law`. A law holds for the shares at which its proxy was trained, and for its
learning-rate path: losses of a run whose rate decays mix two effects, so train the proxy at a constant rate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from velopath.errors import ConfigError, NumericalError
from velopath.law import TargetLaw, fit_target
from velopath.law_sized import SIZE_EXPONENT, fit_sized, law_from_json

__all__ = ["FAR", "DomainTarget", "TargetLaw", "Targets", "fit_target"]

FAR = 8.0
"""A target read at more than this many times the last proxy's tokens is flagged with a warning. Our choice."""


@dataclass(frozen=True)
class DomainTarget:
    """The target of one domain: `target` nats per token, read from `law` at `tokens` training tokens.

    `interval` is the law's interval there and `error` its leave-last-out error, in nats. A target given by hand
    has only the first.
    """

    target: float
    tokens: float | None = None
    law: TargetLaw | None = None
    interval: tuple[float, float] | None = None
    error: float | None = None
    warnings: tuple[str, ...] = ()

    @property
    def points(self) -> tuple[tuple[float, float], ...]:
        """The (tokens, nats) pairs behind the target; none where it was given by hand."""
        return self.law.points if self.law is not None else ()


@dataclass(frozen=True)
class Targets:
    """Targets of all domains (by sorted name) and what they assume and cost.

    `shares` are the shares at which the proxy was trained: a law holds for those shares only, and which ones are
    assumed moves a run more than the rule that uses them. `proxy_steps`, `proxy_tokens` (training) and
    `evaluation_tokens` are the cost of the points. `parameters` is the size of the model that they hold for. `decay` is
    the share of its steps that each point decayed before it was read (None: not at all), and `decay_gain` what that
    gained at the last point, nats by domain.
    """

    domains: Mapping[str, DomainTarget]
    shares: Mapping[str, float] | None = None
    proxy_steps: int = 0
    proxy_tokens: int = 0
    evaluation_tokens: int = 0
    level: float = 0.9
    parameters: int | None = None
    decay: float | None = None
    decay_gain: Mapping[str, float] | None = None

    @property
    def losses(self) -> dict[str, float]:
        """Name -> target in nats: what `Velocitune` takes."""
        return {name: domain.target for name, domain in self.domains.items()}

    @property
    def cost_share(self) -> float | None:
        """What the points cost, as a share of the training up to where the targets are read: proxy tokens, and a third
        of each token evaluated (a forward pass); None for targets given by hand."""
        read = max((d.tokens or 0.0 for d in self.domains.values()), default=0.0)
        return (self.proxy_tokens + self.evaluation_tokens / 3) / read if read else None

    @property
    def cost_words(self) -> str:
        """What the points were made of: steps of a trunk and of decays, or the main path's own; and evaluations."""
        own = f"proxy: {self.proxy_steps:,} steps, {self.proxy_tokens:,} tokens, " if self.proxy_steps else ""
        of = "" if own else "points of the main path itself, "
        return f"{own}{of}{self.evaluation_tokens:,} tokens evaluated"

    @property
    def decay_note(self) -> str:
        """What decays there were and what they gained, as a phrase to put behind a sentence."""
        if self.decay is None or self.decay_gain is None:
            return ""
        gains = ", ".join(f"{name} {gain:.3f}" for name, gain in self.decay_gain.items())
        return f"; each point after a decay of {self.decay:.0%} of its steps, which gained at the last: {gains} nats"

    @property
    def cost_note(self) -> str:
        """`cost_share` as a phrase to put behind a sentence; empty for targets given by hand."""
        return "" if self.cost_share is None else f": {self.cost_share:.0%} of the run that they are for"

    @property
    def warnings(self) -> tuple[str, ...]:
        """All warnings, each behind its domain's name."""
        return tuple(f"{name}: {text}" for name, domain in self.domains.items() for text in domain.warnings)

    @classmethod
    def given(cls, losses: Mapping[str, float]) -> Targets:
        """Targets by hand, or a reference model's losses: name -> nats. Raises `ConfigError` unless positive."""
        for name, loss in losses.items():
            if isinstance(loss, bool) or not isinstance(loss, (int, float)) or not 0 < loss < math.inf:
                raise ConfigError(f"target of domain {name!r} is {loss!r}; expected a positive loss in nats")
        return cls({name: DomainTarget(float(losses[name])) for name in sorted(losses)})

    @classmethod
    def fit(
        cls,
        curves: Mapping[str, Sequence[tuple[float, float]]],
        tokens: float,
        *,
        shares: Mapping[str, float] | None = None,
        proxy_steps: int = 0,
        proxy_tokens: int = 0,
        evaluation_tokens: int = 0,
        law: Literal["auto", "three", "two", "prior"] = "auto",
        above_last: Literal["raise", "last"] = "raise",
        level: float = 0.9,
        parameters: int | None = None,
        siblings: Mapping[str, Targets] | None = None,
        size_exponent: float = SIZE_EXPONENT,
        decay: float | None = None,
        decay_gain: Mapping[str, float] | None = None,
    ) -> Targets:
        """One law per domain from `curves` (name -> (tokens, nats) pairs), read at `tokens` training tokens.

        A target above the last proxy loss is refused (`above_last` "raise"), or replaced by that loss with a
        warning ("last"): the domain was not getting better and is held where it is. `siblings` are the targets of
        smaller models on the same data: with `parameters` their points give the law a size term, see
        `velopath.law_sized`. The other arguments are noted. Raises as `fit_target` does, naming the domain.
        """
        if above_last not in ("raise", "last"):
            raise ConfigError(f"above_last is {above_last!r}; expected 'raise' or 'last'")
        others = _sibling_points(siblings or {}, sorted(curves), decay)
        if others and parameters is None:
            raise ConfigError("siblings need the model's own number of parameters")
        domains = {}
        for name in sorted(curves):
            try:
                pairs = list(curves[name])
                reach = tokens / max((p[0] for p in pairs), default=tokens)
                fitted: TargetLaw
                if others and parameters is not None:
                    fitted = fit_sized(pairs, parameters, others[name], exponent=size_exponent)
                else:
                    fitted = fit_target(
                        [p[0] for p in pairs], [p[1] for p in pairs], law=law, extrapolation=reach
                    )
                domains[name] = _read(fitted, tokens, above_last, level)
            except (ConfigError, NumericalError) as error:
                raise type(error)(f"domain {name!r}: {error}") from error
        noted = dict(shares) if shares is not None else None
        cost = (proxy_steps, proxy_tokens, evaluation_tokens)
        return cls(domains, noted, *cost, level, parameters, decay, decay_gain)

    def at(self, tokens: float, *, above_last: Literal["raise", "last"] = "raise") -> Targets:
        """The same laws read at other `tokens`: for the next slice, the cumulative tokens at its end. Targets given
        by hand stay."""
        domains = {
            name: _read(d.law, tokens, above_last, self.level) if d.law is not None else d
            for name, d in self.domains.items()
        }
        return replace(self, domains=domains)

    def to_json(self) -> dict[str, Any]:
        """A JSON value from which `from_json` makes equal targets."""
        domains = {
            name: {
                "target": d.target,
                "tokens": d.tokens,
                "law": d.law.to_json() if d.law is not None else None,
                "points": [list(p) for p in d.points],
                "interval": list(d.interval) if d.interval is not None else None,
                "error": d.error,
                "warnings": list(d.warnings),
            }
            for name, d in self.domains.items()
        }
        return {
            "version": 1,
            "domains": domains,
            "shares": dict(self.shares) if self.shares is not None else None,
            "proxy_steps": self.proxy_steps,
            "proxy_tokens": self.proxy_tokens,
            "evaluation_tokens": self.evaluation_tokens,
            "level": self.level,
            "parameters": self.parameters,
            "decay": self.decay,
            "decay_gain": None if self.decay_gain is None else dict(self.decay_gain),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Targets:
        """The targets that `to_json` wrote. Raises `ConfigError` when they are malformed."""
        if value.get("version") != 1:
            raise ConfigError(f"targets have version {value.get('version')!r}; expected 1")
        try:
            domains = {
                name: DomainTarget(
                    float(d["target"]),
                    d["tokens"],
                    law_from_json(d["law"]) if d["law"] is not None else None,
                    (d["interval"][0], d["interval"][1]) if d["interval"] is not None else None,
                    d["error"],
                    tuple(d["warnings"]),
                )
                for name, d in value["domains"].items()
            }
            cost = (int(value["proxy_steps"]), int(value["proxy_tokens"]), int(value["evaluation_tokens"]))
            gain = value.get("decay_gain")
            return cls(
                domains,
                value["shares"],
                *cost,
                float(value["level"]),
                value.get("parameters"),
                value.get("decay"),
                None if gain is None else {name: float(nats) for name, nats in gain.items()},
            )
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise ConfigError(
                f"malformed targets: {error!r}; expected what Targets.to_json writes"
            ) from error


def _sibling_points(
    siblings: Mapping[str, Targets], names: Sequence[str], decay: float | None
) -> dict[str, dict[float, tuple[tuple[float, float], ...]]]:
    """Domain -> parameters -> points of the siblings. Raises `ConfigError` naming the one that does not fit."""
    found: dict[str, dict[float, tuple[tuple[float, float], ...]]] = {name: {} for name in names}
    for sibling, targets in siblings.items():
        if targets.parameters is None:
            raise ConfigError(f"sibling {sibling!r}: its targets do not say how many parameters it has")
        if targets.decay != decay:
            raise ConfigError(
                f"sibling {sibling!r} was read with proxy.decay {targets.decay}, the model with {decay}; use the same"
            )
        for name in names:
            if name not in targets.domains or not targets.domains[name].points:
                raise ConfigError(f"sibling {sibling!r} has no points of domain {name!r}")
            if targets.parameters in found[name]:
                raise ConfigError(
                    f"sibling {sibling!r}: another one has {targets.parameters:,} parameters, too"
                )
            found[name][targets.parameters] = targets.domains[name].points
    return found if siblings else {}


def _read(law: TargetLaw, tokens: float, above_last: str, level: float) -> DomainTarget:
    warnings = list(law.warnings)
    last = law.points[-1][1]
    if above_last == "last" and law.predict(tokens) > last:
        warnings.append(
            f"the law gives {law.predict(tokens):.4f} nats, above the last proxy loss; took {last:.4f}"
        )
        target = last
    else:
        target = law.predict_target(tokens)
    factor = law.extrapolation(tokens)
    if factor > FAR:
        warnings.append(
            f"read at {factor:.1f} times the last proxy's tokens (more than {FAR:.0f}): train a longer proxy"
        )
    return DomainTarget(
        target, float(tokens), law, law.interval(tokens, level), law.leave_last_out, tuple(warnings)
    )
