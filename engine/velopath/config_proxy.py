"""The part of a run's configuration that says where target losses come from."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from velopath.config_watch import PositiveInt, Share, Tree


class ProxyConfig(Tree):
    """The points that target losses are fitted on: constant rate, weights that do not move."""

    source: Literal["trunk", "main"] = Field(
        "trunk",
        description="a proxy trunk of its own, or the first steps of the main path itself, whose controller then "
        "begins after them",
    )
    steps: PositiveInt = Field(350, description="how far the points reach")
    points: Annotated[int, Field(ge=4)] = Field(
        7, description="evaluations the law is fitted on, spread evenly in log steps"
    )
    first: Share = Field(
        0.1, description="first point, as a share of steps; after the warm-up at the earliest"
    )
    law: Literal["auto", "two", "three", "prior"] = "auto"
    shares: Literal["slice", "natural", "uniform"] | dict[str, float] = Field(
        "slice",
        description="shares the trunk is read at, which targets then assume: the slice's first weights, its token "
        "shares, equal ones, or given by domain",
    )
    decay: Share | None = Field(
        None,
        description="read each point after a short decay of this share of its steps, in a branch of its own: targets "
        "of a decayed model, see control.decay_gain; null: undecayed ones",
    )
    siblings: dict[str, str] = Field(
        default_factory=dict,
        description="name -> targets.json of a smaller model on the same data: adds a size term A / N^a to the law",
    )
    size_exponent: Annotated[float, Field(gt=0)] = Field(
        0.34, description="a of the size term (0.34: Hoffmann et al. 2022)"
    )

    @model_validator(mode="after")
    def _fits_together(self) -> ProxyConfig:
        if self.source == "main" and self.shares != "slice":
            raise ValueError(
                f"proxy.source main reads the main path's own first weights; proxy.shares is {self.shares!r}: set the "
                "slice's weights, or proxy.source trunk"
            )
        if self.siblings and self.law != "auto":
            raise ValueError(
                f"proxy.siblings fit a law with a size term; proxy.law is {self.law!r}, leave it auto"
            )
        return self
