"""The plan and the learning-rate paths that a configuration describes. Pure."""

from __future__ import annotations

from velopath.config import RunConfig
from velopath.errors import ConfigError
from velopath.plan import CostTable, Plan, cost_table, make_plan, token_steps
from velopath.plan_lengths import Length, plan_lengths
from velopath.schedule import LrPath


def in_steps(config: RunConfig, tokens_per_step: int) -> RunConfig:
    """`config` with every length in steps: those given in tokens become `token_steps` (no warm-up stays none).

    `tokens_per_step` are those of all ranks. A run does this once, when it is first opened, and records the steps.
    """
    slices = {
        name: entry
        if entry.tokens is None
        else entry.model_copy(update={"steps": token_steps(entry.tokens, tokens_per_step), "tokens": None})
        for name, entry in config.data.slices.items()
    }
    path, warmup = config.path, config.path.warmup_tokens
    if warmup is not None:
        steps = token_steps(warmup, tokens_per_step) if warmup else 0
        path = path.model_copy(update={"warmup_steps": steps, "warmup_tokens": None})
    data = config.data.model_copy(update={"slices": slices})
    return config.model_copy(update={"data": data, "path": path})


def lengths_of(config: RunConfig, tokens_per_step: int) -> list[Length]:
    """The lengths of a configuration: as it gives them, and what a run with so many tokens a step makes of them."""
    resolved = in_steps(config, tokens_per_step)
    asked = {name: entry.tokens for name, entry in config.data.slices.items()}
    warmup = config.path.warmup_tokens, main_path(resolved).warmup_steps
    return plan_lengths(plan_of(resolved), tokens_per_step, asked, warmup)


def slice_steps(config: RunConfig) -> dict[str, int]:
    """The slices in reading order with their steps T_i. Raises `ConfigError` where a length is still in tokens."""
    return {name: _steps(f"data.slices.{name}", entry.steps) for name, entry in config.data.slices.items()}


def _steps(key: str, steps: int | None) -> int:
    if steps is None:
        raise ConfigError(
            f"{key} has a length in tokens, and nothing says how many a step has; a run folder's config.yaml has steps"
        )
    return steps


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
    warmup = _steps("path.warmup_tokens", config.path.warmup_steps)
    return LrPath.main(config.path.peak, warmup, config.path.changes)


def branch_path(
    config: RunConfig, slice_name: str, at_step: int, steps: int, shape: str | None = None
) -> LrPath:
    """The path of a branch of `steps` that leaves the main path at `at_step`, in a slice; `shape` None: the slice's."""
    shape = branch_shape(config, slice_name) if shape is None else shape
    return main_path(config).branch(at_step=at_step, steps=steps, shape=shape, floor=config.path.floor)


def _shares(config: RunConfig) -> dict[str, float]:
    return {name: branch_share(config, name) for name in config.data.slices}
