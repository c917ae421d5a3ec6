"""Velocitune: domain weights that follow how much of each domain is still to be learnt (arXiv 2411.14318).

Letters: K domains i; l[i] held-out loss now, l_init[i] at the start, l_target[i] to be reached, all in nats per
token; V[i] velocity; w[i] share. Everything here is pure: a state goes in, a new state comes out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, fields, replace
from typing import Any, ClassVar, Literal

from velopath.domains import DomainLoss, MixtureWeights, check_weights, normalised
from velopath.errors import ConfigError
from velopath.rule_state import Explanation
from velopath.shares import (
    bounded_shares,
    check_range,
    logs_of,
    mean_losses,
    normalised_logs,
    shares_of,
    smoothed,
)

__all__ = ["VelocityState", "Velocitune", "bounded_shares", "mean_losses"]


@dataclass(frozen=True)
class VelocityState:
    """What Velocitune remembers between updates; tuples stand in the order of `names` (sorted).

    `shares` are in force now and sum to 1; `log_shares` are their natural logarithms, kept beside them because a
    share that has become too small for a float must be able to come back (-inf: a share of 0 stays 0).
    `initial`, `target` and `last` are losses in nats per token. `velocity` is V of the last update (None before
    the first), after clamping and after the rule for small gaps. `clipped` names the domains whose V left [0, 1]
    at the last update, `flagged` those whose gap is too small for a velocity of their own. `updates` counts
    updates, `id` is the id of the weights. `prior` are the first shares (None in states saved before there was a
    use for them).
    """

    names: tuple[str, ...]
    shares: tuple[float, ...]
    log_shares: tuple[float, ...]
    initial: tuple[float, ...]
    target: tuple[float, ...]
    last: tuple[float, ...]
    velocity: tuple[float, ...] | None = None
    clipped: tuple[str, ...] = ()
    flagged: tuple[str, ...] = ()
    updates: int = 0
    id: int = 0
    prior: tuple[float, ...] | None = None

    @property
    def weights(self) -> MixtureWeights:
        """The shares in force, as a mapping name -> share with the state's id."""
        return MixtureWeights(self.names, self.shares, self.id)

    def record(self) -> dict[str, Any]:
        """The state by domain name, for the metrics record: weights, velocity (or None), initial, target and last
        loss, and the names flagged and clipped."""

        def named(values: tuple[float, ...]) -> dict[str, float]:
            return dict(zip(self.names, values, strict=True))

        return {
            "weights": named(self.shares),
            "velocity": named(self.velocity) if self.velocity is not None else None,
            "initial": named(self.initial),
            "target": named(self.target),
            "last": named(self.last),
            "flagged": list(self.flagged),
            "clipped": list(self.clipped),
            "updates": self.updates,
        }

    def to_json(self) -> dict[str, Any]:
        """A JSON value from which `Velocitune.state_from_json` makes an equal state."""
        value = {f.name: getattr(self, f.name) for f in fields(self)}
        value = {k: list(v) if isinstance(v, tuple) else v for k, v in value.items()}
        # JSON has no -inf.
        value["log_shares"] = [x if math.isfinite(x) else None for x in self.log_shares]
        return {"controller": "velocitune", "version": 1, **value}


@dataclass(frozen=True)
class Velocitune:
    """The Velocitune controller: a domain that still has far to go to its target gets a larger share.

    Every update (Velocitune, update rule; the defaults are this faithful mode)::

        V[i] = min(max((l[i] - l_target[i]) / (l_init[i] - l_target[i]), 0), 1)
        w[i] <- w[i] * exp(eta * V[i]) / sum_j w[j] * exp(eta * V[j])

    V is the fraction still to be learnt: 1 at the start, 0 at the target. The paper has eta = 1. Everything
    below is our choice and off by default:

    - `step_size`: eta.
    - `normalise`: what the distance to the target is divided by: "gap" (the rule's), "target" (l_target: the relative
      distance, limited to [0, 1]) or "none" (nats, limited to 0 or more); without "gap" no gap is too small.
    - `smoothing`: c in w <- (1 - c) * w + c * q, with q = 1/K (`smoothing_to` "uniform", as the relatives' code has
      it) or q = the first shares ("prior"). It makes the integral of V leak.
    - `small_gap`: "raise" makes `start` refuse a domain with l_init <= l_target, where the rule is undefined.
      "mean": a domain whose gap l_init - l_target is below `min_gap` nats or below 2 standard errors of l_init
      (where `losses` is a `DomainLoss` that knows them) is flagged and takes the mean V of the other domains; if
      all are flagged, V is 1 for all, so the weights stay.
    - `floor`, `cap`: bounds on every share, see `bounded_shares`. They act on the state itself, so a share does
      not wind up behind its bound; `start` applies them to the first weights too.
    - `missing`: "raise", or "last" to use the last known loss of a domain that was not evaluated.

    `targets` maps each domain to l_target in nats per token.
    """

    targets: Mapping[str, float]
    _: KW_ONLY
    step_size: float = 1.0
    smoothing: float = 0.0
    smoothing_to: Literal["uniform", "prior"] = "uniform"
    small_gap: Literal["raise", "mean"] = "raise"
    min_gap: float = 0.25
    floor: float = 0.0
    cap: float = 1.0
    missing: Literal["raise", "last"] = "raise"
    normalise: Literal["gap", "target", "none"] = "gap"

    needs_targets: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", {name: self.targets[name] for name in sorted(self.targets)})
        for name, target in self.targets.items():
            if isinstance(target, bool) or not isinstance(target, (int, float)) or not math.isfinite(target):
                raise ConfigError(f"target of domain {name!r} is {target!r}; expected a finite loss in nats")
        check_range("step_size", self.step_size, 0.0, math.inf, "positive", self.step_size > 0)
        check_range("smoothing", self.smoothing, 0.0, 1.0, "in [0, 1]")
        check_range("min_gap", self.min_gap, 0.0, math.inf, "0 nats or more")
        check_range("floor", self.floor, 0.0, 1.0, "in [0, 1]")
        check_range("cap", self.cap, 0.0, 1.0, "in [0, 1]")
        for option, value, known in (
            ("smoothing_to", self.smoothing_to, ("uniform", "prior")),
            ("small_gap", self.small_gap, ("raise", "mean")),
            ("missing", self.missing, ("raise", "last")),
            ("normalise", self.normalise, ("gap", "target", "none")),
        ):
            if value not in known:
                raise ConfigError(f"{option} is {value!r}; expected one of {', '.join(map(repr, known))}")

    def start(self, losses: Mapping[str, float], weights: Mapping[str, float]) -> VelocityState:
        """The state before the first update: l_init is `losses`, w is `weights` (normalised, then bounded).

        `losses`, `weights` and the targets must name the same domains. Use the same held-out sample for these
        losses as for later ones: a shift between samples is a bias that the weights integrate.
        Raises `ConfigError` on a small gap (see the class) or on names that differ.
        """
        names = tuple(sorted(self.targets))
        check_weights(weights, names)
        initial = mean_losses(losses, names)
        target = tuple(float(self.targets[n]) for n in names)
        flagged = self._small_gaps(names, initial, target, losses)
        shares = bounded_shares(normalised([weights[n] for n in names]), self.floor, self.cap)
        first_id = weights.id if isinstance(weights, MixtureWeights) else 0
        return VelocityState(
            names,
            shares,
            logs_of(shares),
            initial,
            target,
            initial,
            flagged=flagged,
            id=first_id,
            prior=shares,
        )

    def observe(
        self, state: VelocityState, losses: Mapping[str, float]
    ) -> tuple[VelocityState, MixtureWeights]:
        """The state after one update with the present `losses` (nats per token) and its weights, whose id grows by 1.

        Losses equal to the first ones leave the weights bit for bit as they are (every V is 1; with `smoothing`
        they still move to uniform). Raises `NumericalError` on NaN or infinity; `state` is then still valid.
        """
        update = self._update(state, losses)
        return update.state, update.state.weights

    def explain(self, state: VelocityState, losses: Mapping[str, float]) -> Explanation:
        """The update that `observe` makes of the same arguments, with its numbers."""
        update = self._update(state, losses)
        after, velocity = update.state, update.state.velocity or ()
        total = math.fsum(
            w * math.exp(self.step_size * v) for w, v in zip(state.shares, velocity, strict=True)
        )
        terms, worked, guards = {}, {}, {}
        for k, name in enumerate(state.names):
            now, goal, first, v = after.last[k], state.target[k], state.initial[k], velocity[k]
            terms[name] = {"raw": update.raw[k], "velocity": v, "factor": math.exp(self.step_size * v)}
            terms[name] |= {"scaled": update.scaled[k], "smoothed": update.smoothed[k]}
            fired = [
                ("small gap", name in state.flagged),
                ("clip", name in after.clipped),
                ("smoothing", bool(self.smoothing)),
                ("floor", after.shares[k] == self.floor and update.smoothed[k] < self.floor),
                ("cap", after.shares[k] == self.cap and update.smoothed[k] > self.cap),
            ]
            guards[name] = tuple(guard for guard, did in fired if did)
            own = f"V = {now:.4f} - {goal:.4f} = {update.raw[k]:.4f}"
            if self.normalise != "none":
                gap = first - goal if self.normalise == "gap" else goal
                under = f"({first:.4f} - {goal:.4f})" if self.normalise == "gap" else f"{goal:.4f}"
                own = f"V = ({now:.4f} - {goal:.4f}) / {under} = "
                own += f"{now - goal:.4f} / {gap:.4f} = {update.raw[k]:.4f}" if gap else "undefined"
            if name in state.flagged:
                own += f", gap too small: mean of the others {v:.4f}"
            elif name in after.clipped:
                own += f", cut to {v:.4f}"
            worked[name] = (
                f"{own}; w: {state.shares[k]:.4f} * exp({self.step_size:g} * {v:.4f}) / {total:.4f} = "
                f"{update.scaled[k]:.4f}"
            )
            if after.shares[k] != update.scaled[k]:
                bounds = [g for g in guards[name] if g in ("smoothing", "floor", "cap")]
                worked[name] += f", then {', '.join(bounds) or 'bounds of others'}: {after.shares[k]:.4f}"
        by = {"gap": " / (l_init - l_target), in 0 ... 1", "target": " / l_target, in 0 ... 1"}
        formula = f"V = (l - l_target){by.get(self.normalise, ', 0 or more')}; w <- w exp(eta V) / sum(w exp(eta V))"
        return Explanation(formula, terms, worked, guards)

    def _update(self, state: VelocityState, losses: Mapping[str, float]) -> _Update:
        last = mean_losses(losses, state.names, state.last if self.missing == "last" else None)
        raw, velocity, clipped = self._velocities(state, last)
        shares, logs = state.shares, state.log_shares
        if max(velocity) > min(velocity):
            logs = normalised_logs([w + self.step_size * v for w, v in zip(logs, velocity, strict=True)])
            shares = shares_of(logs)
        scaled = shares
        if self.smoothing:
            shares = smoothed(shares, self.smoothing, state.prior if self.smoothing_to == "prior" else None)
            logs = logs_of(shares)
        mixed = shares
        bounded = bounded_shares(shares, self.floor, self.cap)
        if bounded != shares:
            shares, logs = bounded, logs_of(bounded)
        after = replace(
            state,
            shares=shares,
            log_shares=logs,
            last=last,
            velocity=velocity,
            clipped=clipped,
            updates=state.updates + 1,
            id=state.id + 1,
        )
        return _Update(raw, scaled, mixed, after)

    def state_from_json(self, value: Mapping[str, Any]) -> VelocityState:
        """The state that `VelocityState.to_json` wrote, exactly. Raises `ConfigError` on another controller's state."""
        if value.get("controller") != "velocitune" or value.get("version") != 1:
            raise ConfigError(
                f"state of controller {value.get('controller')!r} version {value.get('version')!r}; "
                "expected 'velocitune' version 1"
            )
        known = {f.name for f in fields(VelocityState)}
        if missing := sorted(known - {"prior"} - set(value)):
            raise ConfigError(f"velocitune state lacks {missing[0]!r}; the saved state is incomplete")
        data: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in value.items() if k in known
        }
        data["log_shares"] = tuple(-math.inf if x is None else x for x in data["log_shares"])
        state = VelocityState(**data)
        if set(state.names) != set(self.targets):
            raise ConfigError(
                f"saved state has domains {', '.join(state.names)} but the targets name {', '.join(self.targets)}"
            )
        if state.prior is None and self.smoothing_to == "prior":
            raise ConfigError(
                "the saved state has no first shares, which smoothing_to='prior' needs; start again"
            )
        return state

    def _small_gaps(
        self,
        names: tuple[str, ...],
        initial: tuple[float, ...],
        target: tuple[float, ...],
        losses: Mapping[str, float],
    ) -> tuple[str, ...]:
        flagged: list[str] = []
        if self.normalise != "gap":
            return ()
        for name, now, goal in zip(names, initial, target, strict=True):
            if self.small_gap == "raise":
                if now <= goal:
                    raise ConfigError(
                        f"domain {name!r} starts at a loss of {now:.4f} nats, not above its target {goal:.4f}: its "
                        "velocity is undefined; give it a lower target or set small_gap='mean'"
                    )
                continue
            error = losses.stderr_of(name) if isinstance(losses, DomainLoss) else 0.0
            if now - goal < max(self.min_gap, 2 * error) or now <= goal:
                flagged.append(name)
        return tuple(flagged)

    def _velocities(
        self, state: VelocityState, last: tuple[float, ...]
    ) -> tuple[tuple[float, ...], tuple[float, ...], tuple[str, ...]]:
        """(l - l_target) over what `normalise` says, V, and the names whose V was clamped."""
        every: list[float] = []
        own: dict[str, float] = {}
        clipped = []
        for name, loss, start, goal in zip(state.names, last, state.initial, state.target, strict=True):
            scale = {"gap": start - goal, "target": goal, "none": 1.0}[self.normalise]
            every.append((loss - goal) / scale if scale else math.nan)
            if name in state.flagged:
                continue
            own[name] = min(max(every[-1], 0.0), math.inf if self.normalise == "none" else 1.0)
            if own[name] != every[-1]:
                clipped.append(name)
        neutral = math.fsum(own.values()) / len(own) if own else 1.0
        return tuple(every), tuple(own.get(name, neutral) for name in state.names), tuple(clipped)


@dataclass(frozen=True)
class _Update:
    """The stages of an update: V before the clamp, shares after the exponential and after smoothing, the new state."""

    raw: tuple[float, ...]
    scaled: tuple[float, ...]
    smoothed: tuple[float, ...]
    state: VelocityState
