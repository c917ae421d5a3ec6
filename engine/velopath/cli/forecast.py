"""`velopath forecast`: what a version would reach if it were cut now."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from velopath.errors import ConfigError

ALPHAS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)


def forecast(
    run: Annotated[Path, typer.Argument(help="run folder with at least one version")],
    alpha: Annotated[
        float | None, typer.Option(help="branch share to show; default the present slice's")
    ] = None,
    target: Annotated[
        float | None, typer.Option(help="choose the shortest branch whose mean loss (nats) reaches this")
    ] = None,
    budget: Annotated[
        int | None, typer.Option(help="choose the longest branch of so many steps", min=1)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of the tables")] = False,
) -> None:
    """Predict each domain's loss if a branch were cut from the main path as it stands, and choose its length.

    The law: the main path's loss on the current slice, continued on ln(its steps), less a decay gain measured on the
    versions cut so far. Its error on each of those, predicted from the ones before, is shown with it.

    Example: velopath forecast runs/2026 --target 2.31
    """
    from velopath.plan import share_steps
    from velopath.runfolder import RunFolder
    from velopath.runhealth import present_share, run_forecast

    if sum(choice is not None for choice in (alpha, target, budget)) > 1:
        raise ConfigError("--alpha, --target and --budget exclude each other; give one")
    if alpha is not None and not 0 < alpha <= 4:
        raise ConfigError(f"--alpha is {alpha}; expected a share of the slice in (0, 4]")
    folder = RunFolder(run)
    folder.check_is_run()
    found = run_forecast(folder)
    chosen: float | None = alpha if alpha is not None else present_share(folder)
    if budget is not None:
        chosen = budget / found.reference
    if target is not None:
        steps = range(1, found.reference + 1)
        chosen = next((n / found.reference for n in steps if found.mean(n).loss <= target), None)
    rows = [(a, max(1, share_steps(found.reference, a))) for a in ALPHAS]
    value: dict[str, Any] = {
        "law": found.to_json(),
        "alphas": [{"alpha": a, "steps": n, **_json(found.mean(n))} for a, n in rows],
        "chosen": None,
    }
    if chosen is not None:
        steps_chosen = max(1, share_steps(found.reference, chosen))
        domains = {name: _json(p) for name, p in found.predict(steps_chosen).items()}
        mean = _json(found.mean(steps_chosen))
        value["chosen"] = {"alpha": chosen, "steps": steps_chosen, "mean": mean, "domains": domains}
    if as_json:
        import json

        typer.echo(json.dumps(value, indent=2))
    else:
        _show(value, target)


def _json(prediction: Any) -> dict[str, float]:
    return {"loss": prediction.loss, "low": prediction.low, "high": prediction.high}


def _show(value: dict[str, Any], target: float | None) -> None:
    from velopath.cli.show import table

    law, chosen = value["law"], value["chosen"]
    errors = [abs(e) for row in law["errors"].values() for e in row.values()]
    trust = (
        f"error on the versions cut so far, each predicted from those before: {sum(errors) / len(errors):.3f} nats"
        if errors
        else "only one version was cut: the law has not been tested yet"
    )
    table(
        f"If a branch were cut at step {law['step']:,}: mean held-out loss, nats per token",
        ["alpha", "steps", "loss", "90 % interval"],
        [[f"{r['alpha']:g}", f"{r['steps']:,}", f"{r['loss']:.4f}", _interval(r)] for r in value["alphas"]],
        f"gain grows as length ^ {law['power']:.2f}; {trust}",
    )
    if chosen is None:
        typer.echo(f"no branch of up to a whole slice reaches {target:g} nats")
        return
    table(
        f"alpha {chosen['alpha']:.3g}: {chosen['steps']:,} steps",
        ["domain", "now", "predicted", "90 % interval"],
        [
            [name, f"{law['now'][name]:.4f}", f"{p['loss']:.4f}", _interval(p)]
            for name, p in chosen["domains"].items()
        ],
    )


def _interval(prediction: dict[str, float]) -> str:
    return f"{prediction['low']:.3f} .. {prediction['high']:.3f}"
