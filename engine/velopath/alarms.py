"""Alarms: rules on what the controller saw and did, each a pure function of the control records so far.

The records are those of one slice, from the start of its controller on (see `velopath.runfolder`), newest last. In
shadow mode the proposed weights count. All rules and limits are our choice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from velopath.config_watch import AlarmsConfig

Records = Sequence[Mapping[str, Any]]

STARVED_CONTROLS = 3
"""Controls in a row that a share must stay at or below the limit."""
OSCILLATION_UPDATES = 6
"""Updates whose changes of a share are looked at; 4 of the 5 pairs must change sign."""
STALLED_GAIN = 0.01
"""A velocity that fell by less than this over the updates looked at has stalled, unless it is below 0.05 already."""


class Alarm(NamedTuple):
    """A rule that holds: its name, its domain (None: all of them), the number seen, the limit, and a sentence."""

    rule: str
    domain: str | None
    value: float
    limit: float
    text: str


def alarms_now(records: Records, limits: AlarmsConfig) -> list[Alarm]:
    """The alarms that hold at the last of the records; a limit of None switches its rule off."""
    found = []
    for name, rule in RULES.items():
        limit = getattr(limits, name)
        if records and limit is not None and limit is not False:
            found += rule(records, float(limit))
    return found


def new_alarms(records: Records, limits: AlarmsConfig) -> list[Alarm]:
    """The alarms that hold at the last record and did not at the one before: each is said once until it ends."""
    before = {(a.rule, a.domain) for a in alarms_now(records[:-1], limits)}
    return [a for a in alarms_now(records, limits) if (a.rule, a.domain) not in before]


def all_alarms(records: Records, limits: AlarmsConfig) -> list[tuple[int, list[Alarm]]]:
    """Step and new alarms of each control of a segment, slice by slice: what a run would have said."""
    found, first = [], 0
    for at, record in enumerate(records):
        if record.get("reason") == "start":
            first = at
        if alarms := new_alarms(records[first : at + 1], limits):
            found.append((int(record["step"]), alarms))
    return found


def one_hot(records: Records, limit: float) -> list[Alarm]:
    """The largest share is `limit` or more."""
    weights = _weights(records[-1])
    name = max(weights, key=weights.__getitem__)
    share = weights[name]
    text = f"{name} has {share:.1%} of the batch (limit {limit:.1%}): the mixture is near one-hot"
    return [Alarm("one_hot", name, share, limit, text)] if share >= limit and len(weights) > 1 else []


def starved(records: Records, limit: float) -> list[Alarm]:
    """A domain that began above `limit` had at most that share at the last `STARVED_CONTROLS` controls."""
    last = [_weights(r) for r in records[-STARVED_CONTROLS:]]
    found = []
    for name, first in _weights(records[0]).items():
        if first > limit and len(last) == STARVED_CONTROLS and max(w[name] for w in last) <= limit:
            text = f"{name} has had at most {limit:.1%} for {STARVED_CONTROLS} controls: it is starved"
            found.append(Alarm("starved", name, last[-1][name], limit, text))
    return found


def oscillation(records: Records, limit: float) -> list[Alarm]:
    """A share goes to and fro: over `OSCILLATION_UPDATES` updates all but one change of sign, by `limit` on average."""
    last = [_weights(r) for r in records[-OSCILLATION_UPDATES - 1 :]]
    found = []
    for name in last[-1] if len(last) > OSCILLATION_UPDATES else ():
        moves = [b[name] - a[name] for a, b in pairwise(last)]
        turns = sum(a * b < 0 for a, b in pairwise(moves))
        size = sum(map(abs, moves)) / len(moves)
        if turns >= OSCILLATION_UPDATES - 2 and size >= limit:
            text = f"{name} goes to and fro by {size:.1%} an update (limit {limit:.1%}): lower step_size or filter"
            found.append(Alarm("oscillation", name, size, limit, text))
    return found


def epochs(records: Records, limit: float) -> list[Alarm]:
    """A domain of the slice was read more than `limit` times; nothing where the record has no tokens."""
    told = records[-1].get("progress") or {}
    found = []
    for name, size in told.get("epoch", {}).items():
        read = told["tokens"].get(name, 0) / size if size else 0.0
        if read > limit:
            text = f"{name} is in its epoch {read + 1:.1f} of this slice (limit {limit:g} epochs read)"
            found.append(Alarm("epochs", name, read, limit, text))
    return found


def regression(records: Records, limit: float) -> list[Alarm]:
    """A domain's loss lies above its first one by more than `limit` nats and 2 standard errors: it is forgotten."""
    found = []
    last = records[-1]
    for name, loss in (last.get("losses") or last.get("last") or {}).items():
        rise = loss - (last.get("initial") or {}).get(name, loss)
        least = max(limit, 2 * (last.get("stderr") or {}).get(name, 0.0))
        if rise > least:
            text = (
                f"{name} is {rise:.3f} nats above where it began (limit {least:.3f}): it is being forgotten"
            )
            found.append(Alarm("regression", name, rise, least, text))
    return found


def stalled(records: Records, limit: float) -> list[Alarm]:
    """A velocity has not fallen for `limit` updates though its domain is not near its target."""
    count = int(limit)
    rows = [r["velocity"] for r in records if r.get("velocity")]
    found = []
    for name in rows[-1] if len(rows) > count else ():
        values = [row[name] for row in rows]
        idle = name in (records[-1].get("flagged") or ()) or values[-1] < 0.05
        if not idle and min(values[:-count]) - min(values[-count:]) < STALLED_GAIN:
            text = f"{name} has V {values[-1]:.2f} and got no nearer to its target in {count} updates"
            found.append(Alarm("stalled", name, values[-1], limit, text))
    return found


def negative_gap(records: Records, limit: float) -> list[Alarm]:
    """A domain began at or below its target, so that it has no velocity of its own."""
    first = records[0]
    found = []
    for name, target in (first.get("target") or {}).items():
        gap = (first.get("initial") or {}).get(name, target + 1) - target
        if gap <= 0:
            text = f"{name} began {-gap:.3f} nats below its target: look at the target"
            found.append(Alarm("negative_gap", name, gap, 0.0, text))
    return found


RULES: dict[str, Callable[[Records, float], list[Alarm]]] = {
    "one_hot": one_hot,
    "starved": starved,
    "oscillation": oscillation,
    "epochs": epochs,
    "regression": regression,
    "stalled": stalled,
    "negative_gap": negative_gap,
}


def _weights(record: Mapping[str, Any]) -> Mapping[str, float]:
    found: Mapping[str, float] = record.get("proposed") or record["weights"]
    return found
