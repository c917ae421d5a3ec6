"""`velopath plan`: what N versions cost, before anything is spent; and planned beside real afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from velopath.errors import ConfigError

if TYPE_CHECKING:
    from velopath.config import RunConfig
    from velopath.plan import CostTable, Plan
    from velopath.plan_price import Price


def plan(
    config: Annotated[
        Path | None, typer.Argument(help="run config; its slices and branch shares are the plan")
    ] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="a.b=c overrides of the config")] = None,
    versions: Annotated[
        int | None,
        typer.Option(
            "--versions",
            "-n",
            min=1,
            help="N, without a config; default 4, or as often as --steps, --tokens or --alpha is given",
        ),
    ] = None,
    steps: Annotated[
        list[int] | None,
        typer.Option(
            "--steps", "-t", help="T: steps of one slice; repeat it once per version for unequal slices"
        ),
    ] = None,
    tokens: Annotated[
        list[str] | None,
        typer.Option(
            help="T in tokens, such as 2e9, in the place of --steps; needs --tokens-per-step or --measured"
        ),
    ] = None,
    alpha: Annotated[
        list[float] | None,
        typer.Option(
            help="branch share: branch steps / T; default 0.6; repeat it once per version for shares of their own"
        ),
    ] = None,
    tokens_per_step: Annotated[
        int | None, typer.Option(help="global batch; default the run folder's, or the config's on one rank")
    ] = None,
    tokens_per_second: Annotated[float | None, typer.Option(help="throughput of all GPUs together")] = None,
    measured: Annotated[
        Path | None, typer.Option(help="take batch and throughput from this run folder")
    ] = None,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs that make that throughput")] = 1,
    price: Annotated[float | None, typer.Option(help="money per GPU and hour")] = None,
    parameters: Annotated[
        float | None, typer.Option(help="of the model, for the size of checkpoints: 1.3e9")
    ] = None,
    png: Annotated[Path | None, typer.Option(help="also draw the cost curves into this file")] = None,
    html: Annotated[Path | None, typer.Option(help="also write the tables and curves as one page")] = None,
    csv: Annotated[Path | None, typer.Option(help="also write a row per version and method")] = None,
    actual: Annotated[
        Path | None, typer.Option(help="set this run's plan beside what it really cost")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of the tables")] = False,
) -> None:
    """Print the cost of PTFS, CPT, WSD-S and path switching per version, what-if over alpha, break-even and storage.

    Examples:
      velopath plan --versions 4 --steps 1000 --alpha 0.6 --png plan.png
      velopath plan --steps 1000 --alpha 0.6 --alpha 0.4 --alpha 0.2
      velopath plan --tokens 2e9 --tokens 5e8 --tokens-per-step 131072
      velopath plan run.yaml --measured runs/2026 --gpus 8 --price 2.5 --csv plan.csv
      velopath plan --actual runs/2026
    """
    from dataclasses import asdict

    from velopath.configured_plan import costs_of, in_steps, lengths_of, plan_of
    from velopath.plan import cost_table, make_plan
    from velopath.plan_lengths import plan_lengths
    from velopath.plan_price import plan_json

    if actual is not None:
        _actual(actual, as_json)
        return
    if config is not None:
        if versions or steps or tokens or alpha:
            raise ConfigError(
                "--versions, --steps, --tokens and --alpha are for a plan without a config; give overrides instead, "
                "such as path.branch_share=0.5 or data.slices.NAME.branch_share=0.4"
            )
        given, batch = _loaded(config, overrides or [])
        paid = _price(given, batch, measured, tokens_per_step, tokens_per_second, gpus, price, parameters)
        assert paid.tokens_per_step is not None
        lengths = lengths_of(given, paid.tokens_per_step)
        loaded = in_steps(given, paid.tokens_per_step)
        costs, made = costs_of(loaded), plan_of(loaded)
    else:
        paid = _price(None, None, measured, tokens_per_step, tokens_per_second, gpus, price, parameters)
        slices, shares, asked = _versions(versions, steps, tokens, alpha, paid.tokens_per_step)
        costs, made = cost_table(slices, shares), make_plan(slices, shares)
        lengths = plan_lengths(made, paid.tokens_per_step, asked) if paid.tokens_per_step else []
    value = plan_json(dict(made.slices), made.branch_shares, paid)
    value["lengths"] = [asdict(length) for length in lengths]
    if as_json:
        import json

        typer.echo(json.dumps({"costs": costs.to_json(), "plan": made.to_json(), **value}, indent=2))
    else:
        from velopath.cli.show import show_plan
        from velopath.cli.show_price import show_price

        show_plan(costs, made)
        show_price(value)
    _files(costs, made, value, png, html, csv, as_json)


def _loaded(config: Path, overrides: list[str]) -> tuple[RunConfig, int]:
    """The configuration, and the tokens of a step: those of a run folder, else those of a config on one rank."""
    from velopath.cli.train import resolve
    from velopath.runconfig import recorded_tokens_per_step
    from velopath.runfolder import RunFolder

    loaded, _ = resolve(config, overrides, None)
    recorded = recorded_tokens_per_step(RunFolder(config)) if config.is_dir() else None
    return loaded, recorded or loaded.train.rows * loaded.train.row_tokens


def _versions(
    versions: int | None,
    steps: list[int] | None,
    tokens: list[str] | None,
    alpha: list[float] | None,
    tokens_per_step: int | None,
) -> tuple[dict[str, int], list[float], dict[str, int | None]]:
    """Slices in steps, branch shares and tokens asked for: what is given once holds for all versions."""
    from velopath.config_lengths import whole_tokens
    from velopath.plan import token_steps

    if steps and tokens:
        raise ConfigError("--steps and --tokens exclude each other; give one")
    if tokens and tokens_per_step is None:
        raise ConfigError("--tokens need the tokens of a step: give --tokens-per-step, or --measured RUN")
    asked: list[int | None] = [whole_tokens(text) for text in tokens or []]
    lengths = [token_steps(n, tokens_per_step or 1) for n in asked if n is not None] or steps or [1000]
    shares = alpha or [0.6]
    told = {"--tokens" if tokens else "--steps": len(lengths), "--alpha": len(shares)}
    told = {option: count for option, count in told.items() if count > 1}
    told |= {"--versions": versions} if versions is not None else {}
    if len(set(told.values())) > 1:
        words = ", ".join(f"{option} for {count}" for option, count in told.items())
        raise ConfigError(
            f"the options are for different numbers of versions: {words}; give a length and --alpha once, or once per "
            "version"
        )
    count = next(iter(told.values()), 4)
    names = [f"slice-{i}" for i in range(1, count + 1)]
    lengths, shares = lengths * (count // len(lengths)), shares * (count // len(shares))
    asked = asked * (count // len(asked)) if asked else [None] * count
    return dict(zip(names, lengths, strict=True)), shares, dict(zip(names, asked, strict=True))


def _price(
    config: RunConfig | None,
    batch: int | None,
    measured: Path | None,
    tokens_per_step: int | None,
    tokens_per_second: float | None,
    gpus: int,
    gpu_hour: float | None,
    parameters: float | None,
) -> Price:
    """The price of a step, from the options, the config's batch and evaluations, or a run that was measured."""
    from velopath.configured_plan import in_steps, main_path
    from velopath.controllers import needs_targets
    from velopath.plan_price import Price
    from velopath.proxy_points import training_steps

    facts: dict[str, Any] = {"tokens_per_step": batch}
    if config is not None:
        facts["every"] = config.control.every
        domains = _domains(config)
        facts["evaluation_tokens"] = config.control.heldout_tokens * domains
        facts["version_tokens"] = config.evaluate.tokens * domains
    if measured is not None:
        from statistics import median

        from velopath.runfolder import RunFolder

        records = [r for r in RunFolder(measured).metrics("step") if r.get("tokens_per_second")]
        if not records:
            raise ConfigError(
                f"{measured} has no step with a throughput; train it first, or give --tokens-per-second"
            )
        facts["tokens_per_step"] = int(records[-1]["tokens"])
        # Evaluations and saves have their own time: here only what a training step takes.
        facts["tokens_per_second"] = median(float(r["tokens_per_second"]) for r in records)
    given = {"tokens_per_step": tokens_per_step, "tokens_per_second": tokens_per_second}
    facts |= {name: value for name, value in given.items() if value is not None}
    if config is not None and config.control.targets is None and needs_targets(config.control.controller):
        warmup = main_path(in_steps(config, facts["tokens_per_step"])).warmup_steps
        facts["proxy_steps"] = training_steps(config.proxy, warmup)
    return Price(gpus=gpus, gpu_hour=gpu_hour, parameters=parameters, **facts)


def _domains(config: RunConfig) -> int:
    """Domains of the first slice; 0 where its data is not there yet."""
    from velopath.errors import DataError
    from velopath.runconfig import slice_folders

    try:
        return len(slice_folders(config, next(iter(config.data.slices))))
    except DataError:
        return 0


def _files(
    costs: CostTable,
    made: Plan,
    value: dict[str, Any],
    png: Path | None,
    html: Path | None,
    table: Path | None,
    quiet: bool,
) -> None:
    if png is not None:
        from velopath.plots import plot_plan

        plot_plan(costs, png)
        typer.echo(f"curve: {png}", err=quiet)
    if html is not None:
        from velopath.cli.show_price import price_page

        price_page(costs, made, value, html)
        typer.echo(f"page: {html}", err=quiet)
    if table is not None:
        import csv

        with table.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(value["rows"][0]))
            writer.writeheader()
            writer.writerows(value["rows"])
        typer.echo(f"rows: {table}", err=quiet)


def _actual(run: Path, as_json: bool) -> None:
    from velopath.cli.show_price import show_actual
    from velopath.report.record import read_run
    from velopath.runfolder import RunFolder
    from velopath.runlineage import edge_seconds

    folder = RunFolder(run)
    folder.check_is_run()
    record = read_run(folder)
    made = record.ledger.plan
    if made is None:
        raise ConfigError(
            f"{run} has no plan.json: it was not begun by this program's `train`, `run` or `branch`"
        )
    rows = []
    for name in ("main", *dict.fromkeys((*made.versions, *(s.name for s in record.branches)))):
        planned = made.main_steps if name == "main" else sum(s.steps for s in made.branches if s.name == name)
        ran = record.segments[name].run_steps if name in record.segments else 0
        rows.append(
            {
                "segment": name,
                "planned_steps": planned,
                "actual_steps": ran,
                "tokens": ran * record.row_tokens,
                "seconds": edge_seconds(folder, name, -1, 1 << 62),
            }
        )
    ledger = record.ledger
    value = {
        "rows": rows,
        "planned": {
            "steps": made.steps,
            "of_ptfs": made.planned_over_ptfs,
            "of_cpt": made.steps / made.costs["cpt"],
        },
        "actual": {
            "steps": ledger.actual,
            "of_ptfs": ledger.actual / made.costs["ptfs"],
            "of_cpt": ledger.actual / made.costs["cpt"],
        },
        "beside": {
            "proxy_steps": ledger.proxy_steps,
            "base_steps": ledger.base_steps,
            "evaluation_tokens": ledger.evaluation_tokens,
        },
    }
    if as_json:
        import json

        typer.echo(json.dumps(value, indent=2))
    else:
        show_actual(value)
