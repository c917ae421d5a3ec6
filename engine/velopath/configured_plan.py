"""The plan and the learning-rate paths that a configuration describes. Pure."""

from __future__ import annotations

from velopath.config import RunConfig
from velopath.plan import CostTable, Plan, cost_table, make_plan
from velopath.schedule import LrPath


def slice_steps(config: RunConfig) -> dict[str, int]:
    """The slices in reading order with their steps T_i."""
    return {name: entry.steps for name, entry in config.data.slices.items()}


def branch_share(config: RunConfig, slice_name: str) -> float:
    """alpha_i of the version that is cut in a slice: the slice's own, else the path's."""
    own = config.data.slices[slice_name].branch_share
    return config.path.branch_share if own is None else own


def branch_shape(config: RunConfig, slice_name: str) -> str:
    """The shape of that version's decay: the slice's own, else the path's."""
    return config.data.slices[slice_name].shape or config.path.shape


def plan_of(config: RunConfig) -> Plan:
    """What a run with this configuration executes. Raises `ConfigError` as `make_plan` does."""
    shapes = [branch_shape(config, name) for name in config.data.slices]
    return make_plan(slice_steps(config), _shares(config), shapes=shapes)


def costs_of(config: RunConfig) -> CostTable:
    """What its versions cost under each method."""
    return cost_table(slice_steps(config), _shares(config))


def main_path(config: RunConfig) -> LrPath:
    """The path of the main path: the configured peak after its warm-up, and what was overridden since."""
    return LrPath.main(config.path.peak, config.path.warmup_steps, config.path.changes)


def branch_path(
    config: RunConfig, slice_name: str, at_step: int, steps: int, shape: str | None = None
) -> LrPath:
    """The path of a branch of `steps` that leaves the main path at `at_step`, in a slice; `shape` None: the slice's."""
    shape = branch_shape(config, slice_name) if shape is None else shape
    return main_path(config).branch(at_step=at_step, steps=steps, shape=shape, floor=config.path.floor)


def _shares(config: RunConfig) -> dict[str, float]:
    return {name: branch_share(config, name) for name in config.data.slices}
