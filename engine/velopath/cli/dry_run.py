"""`velopath train --dry-run`: what a run would do, from its config and data alone. Trains and writes nothing."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from velopath.cli.show import length_table, show_plan, table
from velopath.config import RunConfig
from velopath.configured_plan import branch_path, costs_of, lengths_of, main_path, plan_of, slice_steps
from velopath.plan import Plan
from velopath.runconfig import planned_config, slice_folders
from velopath.stream import open_sampler
from velopath.stream_data import read_settings, read_table

MIXTURE_STEPS = 100


def show_dry_run(config: RunConfig, folder: Path) -> None:
    """Print the resolved config, the plan, the mixture as the sampler realises it, the rates and an estimate."""
    out = Console()
    given = config
    config, tokens_per_step = planned_config(config, folder)
    out.rule("resolved config")
    out.print(config.to_yaml(), highlight=False, markup=False)
    out.print(
        f"run folder {folder}{' (exists: train resumes it)' if (folder / 'config.yaml').exists() else ''}"
    )
    plan = plan_of(config)
    show_plan(costs_of(config), plan)
    lengths = [asdict(length) for length in lengths_of(given, tokens_per_step)]
    table(*length_table(lengths, tokens_per_step))
    _mixture(config)
    _rates(config, plan)
    _estimate(config, plan.steps)


def _mixture(config: RunConfig) -> None:
    """Rows per domain of the first steps of each slice at its initial weights, and the epochs of a whole slice."""
    train = config.train
    for name, steps in slice_steps(config).items():
        with open_sampler(
            slice_folders(config, name),
            rows=train.rows,
            row_tokens=train.row_tokens,
            seed=config.seed,
            weights=config.data.slices[name].weights,
            exhaustion=config.data.exhaustion,
            **read_settings(config.data),
            on_bad_shard=config.data.on_bad_shard,
            threads=0,
            domain_key_salt=name,
            **config.row_options,
        ) as sampler:
            counts = sampler.plan(min(MIXTURE_STEPS, steps))
            given, asked = counts.sum(axis=0), dict(sampler.weights)
            possible = len(sampler.plan(steps))
            if possible < steps:
                Console().print(
                    f"{name}: the data ends after {possible:,} of {steps:,} steps at these weights "
                    f"(exhaustion {config.data.exhaustion!r}): train would stop there",
                    style="yellow",
                )
            rows = []
            for k, domain in enumerate(sampler.names):
                tokens = sampler.table.tokens[k]
                read = asked[domain] * steps * sampler.global_rows * sampler.row_tokens
                shares = [f"{asked[domain]:.4f}", f"{given[k] / given.sum():.4f}"]
                rows.append([domain, f"{tokens:,}", *shares, f"{read / tokens:.2f}"])
        table(
            f"{name}: initial mixture (one rank), {_rows_words(config)}",
            ["domain", "tokens", "asked share", f"share in {len(counts)} steps", "epochs in the slice"],
            rows,
        )


def _rows_words(config: RunConfig) -> str:
    """How rows are made and read, for people."""
    data = config.data
    words = "rows of joined documents" if data.packing == "concat" else "rows of whole documents (best fit)"
    if data.bin_shards is not None:
        words += f" of {data.bin_shards} shards each"
    if data.order == "windowed":
        words += f", shuffled within {data.window} shards"
    return words + (", attention inside documents" if config.train.document_mask else "")


def _rates(config: RunConfig, plan: Plan) -> None:
    path, main = config.path, main_path(config)
    marks = sorted({0, max(main.warmup_steps - 1, 0), plan.main_steps - 1})
    rows = [["main", ", ".join(f"{step}: {main.rate(step):.2e}" for step in marks)]]
    for planned in plan.branches:
        start, steps = planned.start_step, planned.steps
        branch = branch_path(config, planned.slice, start, steps)
        marks = [start, start + steps // 4, start + steps // 2, start + 3 * steps // 4, start + steps - 1]
        words = ", ".join(f"{step}: {branch.rate(step):.2e}" for step in marks)
        rows.append([f"{planned.name}, {branch.shape}", words])
    table(f"Learning rate at steps (branches fall to {path.floor:g})", ["path", "step: rate"], rows)


def _estimate(config: RunConfig, steps: int) -> None:
    """Memory from parameter counts, time from FLOPs at a stated speed: a figure to plan with, not a promise."""
    from velopath.hf import read_config
    from velopath.model import preset

    train = config.train
    if config.model.hf:
        shape = read_config(config.model.hf)
    else:
        first = read_table(next(iter(config.data.slices.values())).root) or {}
        size = first.get("tokenizer", {}).get("vocab_size")
        shape = preset(
            config.model.preset, **({"vocab_size": size} if size else {}) | dict(config.model.overrides)
        )
    micro = train.micro_rows or train.rows
    states = 16 * shape.n_params  # fp32 weights, gradients and two AdamW moments
    width = 2 if train.precision == "bf16" else 4
    # Kept per layer and token: about 34 bytes per hidden unit in 16 bit (Korthikanti et al. 2022), with no
    # attention matrix.
    kept = 1 if train.activation_checkpointing == "full" else 17  # the layer's input, and nothing of it
    activations = kept * width * micro * train.row_tokens * shape.hidden_size * shape.num_hidden_layers
    tokens = steps * train.rows * train.row_tokens
    flops = tokens * shape.flops_per_token(train.row_tokens)
    table(
        "Estimate for one rank",
        ["what", "value"],
        [
            ["parameters", f"{shape.n_params / 1e6:,.2f} M"],
            ["tokens (main and branches)", f"{tokens:,}"],
            ["memory: weights, gradients, moments", f"{states / 2**30:,.2f} GiB"],
            ["memory: activations, about", f"{activations / 2**30:,.2f} GiB"],
            ["compute", f"{flops:.2e} FLOPs, {shape.flops_per_token(train.row_tokens):.3g} a token"],
            ["hours at 400 TFLOP/s (a well-fed H100 in bf16)", f"{flops / 4e14 / 3600:,.3f}"],
            ["hours at 20 GFLOP/s (a CPU core, tiny models)", f"{flops / 2e10 / 3600:,.3f}"],
        ],
        "evaluations, proxies and checkpoints come on top",
    )
