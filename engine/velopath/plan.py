"""The plan of a row of versions and its cost: path switching beside training from scratch and continuing.

Letters: N versions; T_i steps of the slice that version i adds; S_i = T_1 + ... + T_i; alpha_i its branch share (alpha
where all have one); r_i = round(alpha_i T_i) steps of branch i; b_i = S_i - r_i its branch step on the main path. All
counts are exact integers; a half rounds up, on alpha as it is written in decimals.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any, Literal

from velopath.errors import ConfigError
from velopath.schedule_segment import SHAPES

Steps = Mapping[str, int] | Sequence[int]
"""Slices in order: name -> steps, or only the steps, which are then named "slice-1", "slice-2" ..."""
Shares = float | Mapping[str, float] | list[float] | tuple[float, ...]
"""Branch shares: one alpha for all slices, or one for each, by name or in order."""


def branch_steps(steps: int, branch_share: float) -> int:
    """r = round(alpha T), half up: the steps of the branch of a slice of `steps` steps.

    `branch_share` is taken as the decimal it prints as (0.145 of 100 is 14.5, so 15). Raises `ConfigError` unless
    0 < alpha <= 1 and r >= 1: a branch longer than its slice would leave the main path before the slice begins.
    """
    if isinstance(branch_share, bool) or not isinstance(branch_share, (int, float)):
        raise ConfigError(f"branch_share is {branch_share!r}; expected a number in (0, 1]")
    if not (math.isfinite(branch_share) and branch_share > 0):
        raise ConfigError(f"branch_share is {branch_share}; expected a share of the slice in (0, 1]")
    if branch_share > 1:
        raise ConfigError(
            f"branch_share is {branch_share}: the branch would be longer than its slice of {steps} steps; "
            "expected at most 1"
        )
    length = share_steps(steps, branch_share)
    if length < 1:
        raise ConfigError(
            f"branch_share {branch_share} of a slice of {steps} steps is a branch of 0 steps; raise the share or "
            "lengthen the slice"
        )
    return length


def token_steps(tokens: int, tokens_per_step: int) -> int:
    """The steps that read `tokens` most nearly: tokens / tokens_per_step rounded half up, and at least 1."""
    for name, value in (("tokens", tokens), ("tokens_per_step", tokens_per_step)):
        if value < 1:
            raise ConfigError(f"{name} is {value}; expected 1 or more")
    return max(1, (2 * tokens + tokens_per_step) // (2 * tokens_per_step))


def share_steps(steps: int, share: float) -> int:
    """round(share * steps), half up, with `share` as the decimal it prints as."""
    return math.floor(Fraction(str(share)) * steps + Fraction(1, 2))


def compare_costs(steps: Steps, branch_share: Shares) -> dict[str, int]:
    """Steps in all that N versions cost under each method: {"ptfs", "cpt", "switching"}.

    PTFS trains each version from scratch: sum_i S_i. CPT continues: S_N. Switching runs one main path and a branch per
    version: S_N + r_1 + ... + r_(N-1), r_i = round(alpha_i T_i); the last branch replaces the end of the main path,
    which is not run, so alpha_N changes no cost. With equal slices and shares: T N (N + 1) / 2, T N and T N + (N - 1)
    alpha T; at alpha = 0.6 and N = 4 switching costs 58 % of PTFS and 145 % of CPT. Derived from LR path switching.
    Raises `ConfigError` on wrong input.
    """
    return cost_table(steps, branch_share).totals


@dataclass(frozen=True)
class CostRow:
    """What version i costs, in steps, and all versions up to it (`_total`).

    `branch` is r_i at the `branch_share` alpha_i, `ptfs` S_i, `cpt` T_i; `switching` is what is run from the cut of
    version i - 1 on: the main path from b_(i-1) to b_i and the branch, T_i + r_(i-1).
    """

    version: str
    slice: str
    steps: int
    branch_share: float
    branch: int
    ptfs: int
    cpt: int
    switching: int
    ptfs_total: int
    cpt_total: int
    switching_total: int

    @property
    def of_ptfs(self) -> float:
        """Switching's total over that of PTFS."""
        return self.switching_total / self.ptfs_total

    @property
    def of_cpt(self) -> float:
        """Switching's total over that of CPT."""
        return self.switching_total / self.cpt_total


@dataclass(frozen=True)
class CostTable:
    """One `CostRow` per version, in order; iterates over its rows."""

    rows: tuple[CostRow, ...]

    def __iter__(self) -> Iterator[CostRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def branch_share(self) -> float | None:
        """The one share of all versions; None where they differ."""
        shares = {row.branch_share for row in self.rows}
        return shares.pop() if len(shares) == 1 else None

    @property
    def share_words(self) -> str:
        """The branch shares for people: "branch share 0.6", "branch shares 0.2 to 0.6"."""
        shares = sorted({row.branch_share for row in self.rows})
        if len(shares) == 1:
            return f"branch share {shares[0]:g}"
        return f"branch shares {shares[0]:g} to {shares[-1]:g}"

    @property
    def totals(self) -> dict[str, int]:
        """Steps of all versions under each method: {"ptfs", "cpt", "switching"}."""
        last = self.rows[-1]
        return {"ptfs": last.ptfs_total, "cpt": last.cpt_total, "switching": last.switching_total}

    def to_json(self) -> dict[str, Any]:
        """A JSON value: the branch share of all (null where they differ), rows with their own and their shares of PTFS
        and CPT, totals."""
        rows = [{**asdict(row), "of_ptfs": row.of_ptfs, "of_cpt": row.of_cpt} for row in self.rows]
        return {"branch_share": self.branch_share, "rows": rows, "totals": self.totals}


def cost_table(slices: Steps, branch_share: Shares) -> CostTable:
    """The cost of each version under PTFS, CPT and switching. Raises `ConfigError` as `compare_costs` does."""
    rows: list[CostRow] = []
    end = ptfs_total = switching_total = before = 0
    for number, (name, steps, share, branch) in enumerate(_branches(slices, branch_share), start=1):
        end += steps
        switching = steps + before
        ptfs_total += end
        switching_total += switching
        rows.append(
            CostRow(
                f"v{number}",
                name,
                steps,
                share,
                branch,
                end,
                steps,
                switching,
                ptfs_total,
                end,
                switching_total,
            )
        )
        before = branch
    return CostTable(tuple(rows))


@dataclass(frozen=True)
class Segment:
    """A piece of the plan: updates `start_step` to `end_step` (exclusive) of `name`, reading `slice`.

    A "main" segment is called "main" and carries the main path on; a "branch" is called like the version that it
    ends in, starts from its `parent`'s checkpoint at `start_step` and decays by `shape` (None: not planned). Steps
    count over the whole path.
    """

    name: str
    kind: Literal["main", "branch"]
    slice: str
    start_step: int
    end_step: int
    parent: str | None = None
    shape: str | None = None

    @property
    def steps(self) -> int:
        """Updates in the segment."""
        return self.end_step - self.start_step


@dataclass(frozen=True)
class Plan:
    """What a run executes, in order: the main path to b_1, branch v1, the main path through the rest of slice 1 and
    on to b_2 in slice 2, branch v2 ... The main path after the last branch point is not run.

    `slices` are (name, steps) pairs, `branch_shares` their alpha_i. Since alpha_i <= 1, b_i lies in slice i; at
    alpha_i = 1 it is the slice's first step and the main segment before it, being empty, is left out.
    """

    slices: tuple[tuple[str, int], ...]
    branch_shares: tuple[float, ...]
    segments: tuple[Segment, ...]

    @property
    def versions(self) -> tuple[str, ...]:
        """The names of the versions, in order."""
        return tuple(s.name for s in self.segments if s.kind == "branch")

    @property
    def branches(self) -> tuple[Segment, ...]:
        """The branch segments, in order."""
        return tuple(s for s in self.segments if s.kind == "branch")

    @property
    def main_steps(self) -> int:
        """Updates on the main path: b_N."""
        return sum(s.steps for s in self.segments if s.kind == "main")

    @property
    def branch_steps(self) -> int:
        """Updates on all branches: r_1 + ... + r_N."""
        return sum(s.steps for s in self.branches)

    @property
    def steps(self) -> int:
        """All updates; equals `compare_costs(...)["switching"]`."""
        return self.main_steps + self.branch_steps

    @property
    def costs(self) -> dict[str, int]:
        """`compare_costs` of the plan's slices."""
        return compare_costs(dict(self.slices), self.branch_shares)

    @property
    def planned_over_ptfs(self) -> float:
        """The plan's updates over those of training every version from scratch."""
        return self.steps / self.costs["ptfs"]

    def to_json(self) -> dict[str, Any]:
        """A JSON value from which `from_json` makes an equal plan."""
        return {
            "version": 2,
            "slices": [list(pair) for pair in self.slices],
            "branch_shares": list(self.branch_shares),
            "segments": [asdict(s) for s in self.segments],
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Plan:
        """The plan that `to_json` wrote, of version 2 or of version 1, which had one `branch_share` for all slices.
        Raises `ConfigError` when it is malformed or its segments do not follow from its slices."""
        version = value.get("version")
        if version not in (1, 2):
            raise ConfigError(f"plan has version {version!r}; expected 1 or 2")
        try:
            slices = tuple((str(name), steps) for name, steps in value["slices"])
            segments = tuple(Segment(**s) for s in value["segments"])
            branches = [s for s in segments if s.kind == "branch"]
            plan = make_plan(
                dict(slices),
                value["branch_share" if version == 1 else "branch_shares"],
                versions=[s.name for s in branches],
                shapes=[s.shape for s in branches],
            )
        except ConfigError:
            raise
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ConfigError(f"malformed plan: {error}; expected what Plan.to_json writes") from error
        if plan.segments != segments:
            raise ConfigError("malformed plan: its segments do not follow from its slices and branch shares")
        return plan


def make_plan(
    slices: Steps,
    branch_share: Shares,
    *,
    versions: Sequence[str] | None = None,
    shapes: Sequence[str | None] | None = None,
) -> Plan:
    """The plan of one version per slice, by LR path switching.

    `slices` in order, with their steps; `branch_share` alpha, of all or of each; `versions` names them (default v1, v2
    ...), `shapes` are their decays'. Example: two slices of 700 steps, alpha 0.6: branches of 420 steps from 280 and
    980. Raises `ConfigError`.
    """
    planned = _branches(slices, branch_share)
    names = [f"v{i}" for i in range(1, len(planned) + 1)] if versions is None else list(versions)
    decays = [None] * len(planned) if shapes is None else list(shapes)
    for what, given in (("version names", names), ("shapes", decays)):
        if len(given) != len(planned):
            raise ConfigError(f"{len(given)} {what} for {len(planned)} slices; expected one each")
    if wrong := [shape for shape in decays if shape is not None and shape not in SHAPES]:
        raise ConfigError(f"shape is {wrong[0]!r}; expected one of {', '.join(SHAPES)}")
    if len(set(names)) != len(names) or "main" in names or "" in names:
        raise ConfigError(f"version names are {names}; expected different names, none empty and none 'main'")
    segments = []
    end = at = 0
    previous = ""
    for name, shape, (slice_name, steps, _, length) in zip(names, decays, planned, strict=True):
        if at < end:  # the rest of the slice before, at the peak rate
            segments.append(Segment("main", "main", previous, at, end))
        start, end = end, end + steps
        at = end - length
        if start < at:
            segments.append(Segment("main", "main", slice_name, start, at))
        segments.append(Segment(name, "branch", slice_name, at, end, parent="main", shape=shape))
        previous = slice_name
    pairs = tuple((slice_name, steps) for slice_name, steps, _, _ in planned)
    return Plan(pairs, tuple(share for _, _, share, _ in planned), tuple(segments))


def _branches(slices: Steps, branch_share: Shares) -> list[tuple[str, int, float, int]]:
    """(name, T_i, alpha_i, r_i) of the slices in order."""
    named = _slices(slices)
    rows = []
    for (name, steps), share in zip(named.items(), _shares(branch_share, list(named)), strict=True):
        try:
            rows.append((name, steps, share, branch_steps(steps, share)))
        except ConfigError as error:
            raise ConfigError(f"slice {name!r}: {error}") from None
    return rows


def _shares(given: Shares, names: list[str]) -> list[float]:
    """The branch share of each slice."""
    if isinstance(given, Mapping):
        if set(given) != set(names):
            raise ConfigError(
                f"branch shares are given for {', '.join(map(str, given)) or 'nothing'}; expected one for each of the "
                f"slices {', '.join(names)}"
            )
        return [given[name] for name in names]
    if isinstance(given, (list, tuple)):
        if len(given) != len(names):
            raise ConfigError(
                f"{len(given)} branch shares for {len(names)} slices; expected one for all, or one each"
            )
        return list(given)
    return [given] * len(names)


def _slices(slices: Steps) -> dict[str, int]:
    named = (
        dict(slices)
        if isinstance(slices, Mapping)
        else {f"slice-{i}": steps for i, steps in enumerate(slices, start=1)}
    )
    if not named:
        raise ConfigError("no slices: a plan needs the steps of at least one version")
    for name, steps in named.items():
        try:
            named[name] = count = (
                0 if isinstance(steps, bool) else operator.index(steps)
            )  # numpy's integers too
        except TypeError:
            count = 0
        if count < 1:
            raise ConfigError(f"slice {name!r} has {steps!r} steps; expected a whole number, 1 or more")
    return named
