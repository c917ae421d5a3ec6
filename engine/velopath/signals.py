"""Signals: what a controller is given as a domain's loss between its held-out evaluations. Pure.

Held-out losses are right and cost a forward pass; training losses come for free, follow the level with an offset per
domain, and little of its movement from one update to the next (our study). `Anchored` joins them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from velopath.domains import DomainLoss
from velopath.errors import ConfigError


@dataclass(frozen=True)
class Anchored:
    """Training-batch movement between held-out anchors, one value per domain in the order of `names`::

        e <- keep * e + (1 - keep) * training loss                      (the first one: e = training loss)
        l = anchor + (e - e at the anchor)                              nats per token

    Anchors are held-out losses: the first control, the second (until then nothing was trained, so there is no e to
    move from), and every `every`-th from there. The offset between training and held-out loss cancels, and the noise
    of e is re-anchored away. A domain that no batch has held since keeps its last l. `stderr` is that of the anchor:
    the error of the movement is not known and not in it. Our choice.
    """

    names: tuple[str, ...] = ()
    anchor: tuple[float, ...] = ()
    stderr: tuple[float, ...] = ()
    average: tuple[float | None, ...] = ()
    at_anchor: tuple[float | None, ...] = ()
    since: int = 0
    """Controls since the anchor."""

    def due(self, every: int) -> bool:
        """Whether the next control needs a held-out evaluation."""
        return not self.names or all(e is None for e in self.at_anchor) or self.since + 1 >= every

    def next(
        self, training: DomainLoss, heldout: DomainLoss | None, keep: float
    ) -> tuple[Anchored, DomainLoss]:
        """The state and the losses of a control: `training` since the last one, `heldout` where it is an anchor.

        Raises `ConfigError` without `heldout` at the first control.
        """
        if heldout is not None and set(heldout.names) != set(self.names or heldout.names):
            raise ConfigError(
                f"held-out losses of {', '.join(heldout.names)}; expected {', '.join(self.names)}"
            )
        if heldout is None and not self.names:
            raise ConfigError("the first control needs held-out losses: there is nothing to move from")
        names = self.names if heldout is None else heldout.names
        before = dict(zip(self.names, self.average, strict=True))
        average = tuple(_mixed(before.get(n), training.get(n), keep) for n in names)
        if heldout is None:
            state = replace(self, average=average, since=self.since + 1)
            # A domain read for the first time since moves from where it stands now.
            held = (now if then is None else then for now, then in zip(average, self.at_anchor, strict=True))
            state = replace(state, at_anchor=tuple(held))
        else:
            anchor = tuple(heldout[n] for n in names)
            state = Anchored(names, anchor, tuple(map(heldout.stderr_of, names)), average, average)
        return state, state.loss

    @property
    def loss(self) -> DomainLoss:
        """The losses now; their token counts are 1, since they are no sums."""
        rows = zip(self.anchor, self.average, self.at_anchor, strict=True)
        moved = tuple(a + (0.0 if now is None or then is None else now - then) for a, now, then in rows)
        return DomainLoss(self.names, moved, (1,) * len(self.names), self.stderr)

    def to_json(self) -> dict[str, Any]:
        """A JSON value from which `from_json` makes an equal state."""
        rows = {k: list(getattr(self, k)) for k in ("names", "anchor", "stderr", "average", "at_anchor")}
        return rows | {"since": self.since}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Anchored:
        """The state that `to_json` wrote."""
        rows: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in value.items()}
        return cls(**rows)


def _mixed(before: float | None, now: float | None, keep: float) -> float | None:
    if now is None or before is None:
        return before if now is None else now
    return keep * before + (1 - keep) * now
