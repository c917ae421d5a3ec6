"""What a plan costs beyond steps: methods side by side, GPU hours, money, storage, overheads, what-if, break-even.

Letters as in `velopath.plan`. WSD-S goes on from each decayed checkpoint, so it costs what CPT costs. All our choice
but the step counts, which follow from LR path switching.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from velopath.errors import ConfigError
from velopath.plan import CostRow, CostTable, Shares, Steps, cost_table

METHODS = ("ptfs", "cpt", "wsd_s", "switching")
ALPHAS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
FORWARD_SHARE = 1 / 3
"""A token that is only evaluated costs a third of one that is trained: forward without backward. The usual count."""


@dataclass(frozen=True)
class Price:
    """What a step costs. `tokens_per_step` global; `tokens_per_second` of all GPUs together, None: no hours.

    `gpus` and `gpu_hour` (money per GPU and hour) turn hours into money. `parameters` give the size of a checkpoint:
    4 bytes of weights and 8 of moments each, 4 alone in an export. `evaluation_tokens` are read once every `every`
    steps, `version_tokens` twice per version, by every method alike; `proxy_steps` once, by methods that need targets.
    """

    tokens_per_step: int | None = None
    tokens_per_second: float | None = None
    gpus: int = 1
    gpu_hour: float | None = None
    parameters: float | None = None
    evaluation_tokens: int = 0
    version_tokens: int = 0
    every: int | None = None
    proxy_steps: int = 0

    def __post_init__(self) -> None:
        for name in ("tokens_per_step", "tokens_per_second", "gpus", "gpu_hour", "parameters"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{name} is {value}; expected a positive number")

    def hours(self, steps: float) -> float | None:
        """GPU hours of so many training steps; None where throughput or batch are not known."""
        if self.tokens_per_second is None or self.tokens_per_step is None:
            return None
        return steps * self.tokens_per_step / self.tokens_per_second / 3600 * self.gpus

    def money(self, steps: float) -> float | None:
        """What they cost; None where a price is missing."""
        hours = self.hours(steps)
        return None if hours is None or self.gpu_hour is None else hours * self.gpu_hour

    def overhead(self, steps: int, versions: int) -> float:
        """Evaluations beside `steps` of training and for `versions`, as training steps that cost as much."""
        if self.tokens_per_step is None:
            return 0.0
        read = self.version_tokens * 2 * versions
        read += self.evaluation_tokens * (steps // self.every) if self.every else 0
        return FORWARD_SHARE * read / self.tokens_per_step


@dataclass(frozen=True)
class MethodRow:
    """One version under one method: steps of its own and up to it, with overheads as steps, GPU hours and money.

    `branch_share` and `branch_steps` are those of its branch, which only switching has.
    """

    version: str
    slice: str
    method: str
    branch_share: float | None
    branch_steps: int | None
    steps: int
    steps_total: int
    overhead_steps: float
    gpu_hours: float | None
    money: float | None
    tokens: int | None


def method_rows(table: CostTable, price: Price) -> list[MethodRow]:
    """All versions under all methods, version by version."""
    rows = []
    totals = dict.fromkeys(METHODS, 0)
    for row in table:
        for method in METHODS:
            steps = _own(row, method)
            totals[method] += steps
            overhead = price.overhead(steps, 1)
            paid = steps + overhead
            rows.append(
                MethodRow(
                    row.version,
                    row.slice,
                    method,
                    row.branch_share if method == "switching" else None,
                    row.branch if method == "switching" else None,
                    steps,
                    totals[method],
                    overhead,
                    price.hours(paid),
                    price.money(paid),
                    None if price.tokens_per_step is None else steps * price.tokens_per_step,
                )
            )
    return rows


def what_if(slices: Steps, alphas: Sequence[float] = ALPHAS) -> list[dict[str, float]]:
    """Switching's total steps if all versions had one branch share, for each of `alphas`, as shares of PTFS and CPT
    too; shares that round to no branch are left out."""
    rows = []
    for alpha in alphas:
        try:
            totals = cost_table(slices, alpha).totals
        except ConfigError:
            continue
        steps = totals["switching"]
        rows.append(
            {
                "alpha": alpha,
                "steps": steps,
                "of_ptfs": steps / totals["ptfs"],
                "of_cpt": steps / totals["cpt"],
            }
        )
    return rows


def break_even(table: CostTable) -> dict[str, Any]:
    """Where switching pays, and what its extra cost over CPT would buy CPT instead.

    `cheaper_than_ptfs_from` and `half_of_ptfs_from` name the first versions at which switching's total is below PTFS's,
    and at most half of it (None: not in this plan). `cpt_passes` is how often CPT could read each slice for
    switching's price, `extra_steps_over_cpt` that price in steps.
    """
    cheaper = next((r.version for r in table if r.switching_total < r.ptfs_total), None)
    half = next((r.version for r in table if 2 * r.switching_total <= r.ptfs_total), None)
    totals = table.totals
    return {
        "cheaper_than_ptfs_from": cheaper,
        "half_of_ptfs_from": half,
        "cpt_passes": totals["switching"] / totals["cpt"],
        "extra_steps_over_cpt": totals["switching"] - totals["cpt"],
    }


def storage(table: CostTable, price: Price) -> dict[str, dict[str, float | None]]:
    """Checkpoints to keep under each method, with bytes where the parameters are known.

    `versions` are exports; `resumable` hold moments too: CPT and WSD-S need the latest, switching one at each branch
    point and the main path's latest, PTFS none once a version is done.
    """
    count = len(table)
    resumable = {"ptfs": 0, "cpt": 1, "wsd_s": 1, "switching": count + 1}
    size = price.parameters
    return {
        method: {
            "versions": count,
            "resumable": resumable[method],
            "bytes": None if size is None else size * (4 * count + 12 * resumable[method]),
        }
        for method in METHODS
    }


def plan_json(slices: Steps, branch_share: Shares, price: Price) -> dict[str, Any]:
    """Everything that the planner says beyond `cost_table`, as a JSON value."""
    table = cost_table(slices, branch_share)
    rows = method_rows(table, price)
    proxy = price.hours(price.proxy_steps)
    return {
        "price": asdict(price),
        "branch_share": table.branch_share,
        "rows": [asdict(row) for row in rows],
        "totals": {
            method: {
                "steps": sum(r.steps for r in rows if r.method == method),
                "gpu_hours": _sum([r.gpu_hours for r in rows if r.method == method]),
                "money": _sum([r.money for r in rows if r.method == method]),
            }
            for method in METHODS
        },
        "proxy": {"steps": price.proxy_steps, "gpu_hours": proxy, "money": price.money(price.proxy_steps)},
        "what_if": what_if(slices),
        "break_even": break_even(table),
        "storage": storage(table, price),
    }


def _own(row: CostRow, method: str) -> int:
    return {"ptfs": row.ptfs, "switching": row.switching}.get(method, row.cpt)


def _sum(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return math.fsum(known) if len(known) == len(values) else None
