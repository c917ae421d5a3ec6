"""The lengths of a plan side by side: as they were asked for, in steps, and in tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from velopath.plan import Plan


@dataclass(frozen=True)
class Length:
    """One length: of the warm-up (no name), of a slice, or of a version's branch.

    `asked_tokens` where it was given in tokens, else None; `tokens` are steps times tokens per step, of all ranks.
    """

    kind: Literal["warm-up", "slice", "branch"]
    name: str
    asked_tokens: int | None
    steps: int
    tokens: int


def plan_lengths(
    plan: Plan,
    tokens_per_step: int,
    asked: Mapping[str, int | None] | None = None,
    warmup: tuple[int | None, int] | None = None,
) -> list[Length]:
    """The lengths of a plan at `tokens_per_step`: warm-up, slices, branches.

    `asked` are the tokens by slice and `warmup` the tokens and the steps, with None where steps were given.
    """
    given = asked or {}
    lengths = []
    if warmup is not None:
        lengths.append(Length("warm-up", "", *warmup, warmup[1] * tokens_per_step))
    for name, steps in plan.slices:
        lengths.append(Length("slice", name, given.get(name), steps, steps * tokens_per_step))
    for branch in plan.branches:
        lengths.append(Length("branch", branch.name, None, branch.steps, branch.steps * tokens_per_step))
    return lengths
