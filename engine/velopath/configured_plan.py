"""The plan and the learning-rate paths that a configuration describes. Pure."""

from __future__ import annotations

from velopath.config import RunConfig
from velopath.plan import CostTable, Plan, cost_table, make_plan
from velopath.schedule import LrPath


def slice_steps(config: RunConfig) -> dict[str, int]:
    """The slices in reading order with their steps T_i."""
    return {name: entry.steps for name, entry in config.data.slices.items()}


def plan_of(config: RunConfig) -> Plan:
    """What a run with this configuration executes. Raises `ConfigError` as `make_plan` does."""
    return make_plan(slice_steps(config), config.path.branch_share)


def costs_of(config: RunConfig) -> CostTable:
    """What its versions cost under each method."""
    return cost_table(slice_steps(config), config.path.branch_share)


def main_path(config: RunConfig) -> LrPath:
    """The path of the main path: the configured peak after its warm-up, and what was overridden since."""
    return LrPath.main(config.path.peak, config.path.warmup_steps, config.path.changes)


def branch_path(config: RunConfig, at_step: int, steps: int, shape: str | None = None) -> LrPath:
    """The path of a branch of `steps` that leaves the main path at `at_step`; `shape` None: the configured one."""
    return main_path(config).branch(
        at_step=at_step, steps=steps, shape=shape or config.path.shape, floor=config.path.floor
    )
