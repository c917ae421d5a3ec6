"""The parts of a run's configuration that watch and judge it: alarms, evaluations, health. They change no result."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

PositiveInt = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(gt=0, le=1)]
Pair = tuple[float, float]


class Tree(BaseModel):
    """A frozen part of the configuration; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class AlarmsConfig(Tree):
    """Limits of the alarms, see `velopath.alarms`; null switches a rule off. They change no result."""

    one_hot: Share | None = Field(0.9, description="largest share of a domain")
    starved: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        0.01, description="share of a domain, 3 controls long"
    )
    oscillation: Share | None = Field(0.05, description="mean move of a share that goes to and fro")
    epochs: Annotated[float, Field(gt=0)] | None = Field(
        4.0, description="epochs of a domain read in a slice"
    )
    regression: Annotated[float, Field(ge=0)] | None = Field(
        0.1, description="nats above the first loss, and at least 2 standard errors"
    )
    stalled: PositiveInt | None = Field(8, description="updates without a fall of a velocity")
    negative_gap: bool = Field(True, description="first loss at or below the target")
    on_alarm: str = Field(
        "log",
        description="log; stop (with a checkpoint, exit code 6); else a shell command that gets JSON on stdin",
    )


class EvaluateConfig(Tree):
    """Evaluations for the record (versions, `velopath eval`); the controller has its own smaller sample."""

    tokens: PositiveInt = Field(16384, description="held-out tokens per domain")
    batch_rows: PositiveInt = Field(16, description="rows per forward pass")
    old_domains: bool = Field(
        True, description="also measure the domains that only earlier slices have: what is being forgotten"
    )
    command: str | None = Field(
        None,
        description="run on each exported version; {model} {name} {run} {out}; its JSON scores go into the lineage",
    )


class HealthConfig(Tree):
    """Limits of `velopath health`, each as [warn, stop]; in nats per token unless said otherwise, see
    `velopath.health.Limits`."""

    window: PositiveInt = Field(5, description="evaluations over which a trend is taken")
    rise: Pair = Field((0.05, 0.2), description="a domain's loss over that of `window` evaluations before")
    from_best: Pair = Field((0.1, 0.4), description="a domain's loss over its best so far")
    spike: Pair = Field((0.5, 2.0), description="a training loss over the median of the 50 before")
    gradient: Pair = Field((5.0, 50.0), description="a gradient norm over that median, a factor")
    diversity: Pair = Field((0.3, 0.1), description="effective share of the domains read; alarms below")
    epochs: Pair = Field((4.0, 40.0), description="passes over a domain's data")
    regression: Pair = Field(
        (0.02, 0.2), description="a version over its main checkpoint and its predecessor"
    )
    payback: Pair = Field((0.5, 0.0), description="gain of a decay over the expected one; alarms below")
    command: str | None = Field(None, description="told of a warn or stop: the findings as JSON on its input")
    halt: bool = Field(False, description="`velopath run` stops at a verdict of stop")
