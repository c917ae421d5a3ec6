"""The parts of a run's configuration whose lengths may be given in tokens: the slices and the learning-rate path."""

from __future__ import annotations

from decimal import Decimal, InvalidOperation
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from velopath.config_watch import PositiveInt, Share, Tree
from velopath.errors import ConfigError

MAX_TOKENS = 10**18
Shape = Literal["cosine", "linear", "sqrt", "knee", "multistep", "exponential"]


def whole_tokens(value: Any) -> int:
    """A number of tokens as people write it: 2000000000, 2_000_000_000, 2e9, or "2e9" (which YAML reads as text).

    Raises `ConfigError` where it is no whole number from 0 to 10^18; nothing is rounded.
    """
    try:
        if isinstance(value, (str, int, float)) and not isinstance(value, bool):
            number = Decimal(value.replace("_", "") if isinstance(value, str) else value)
            if 0 <= number <= MAX_TOKENS and number == number.to_integral_value():
                return int(number)
    except InvalidOperation:  # no number at all, or NaN
        pass
    raise ConfigError(f"{value!r} is no number of tokens; expected a whole one, such as 2e9 or 2_000_000_000")


Tokens = Annotated[int, BeforeValidator(whole_tokens)]


class SliceConfig(Tree):
    """One version's new data: a prepared folder and how much of it the main path reads, in steps or in tokens."""

    root: str = Field(
        description="prepared data (see `velopath prepare`): a folder, or its URL (s3://, https:// ...)"
    )
    steps: PositiveInt | None = Field(
        None, description="T_i: optimiser steps of the main path on this slice; or give tokens"
    )
    tokens: Annotated[Tokens, Field(gt=0)] | None = Field(
        None,
        description="in the place of steps: tokens of the main path on this slice, such as 2e9; a run records the "
        "steps that its tokens per step make of them",
    )
    weights: dict[str, float] | None = Field(
        None, description="initial shares; null: the slice's token shares"
    )
    replay: dict[str, str] = Field(
        default_factory=dict,
        description="further domains read here -> the earlier slice whose data of them is read again",
    )
    branch_share: Share | None = Field(
        None, description="alpha_i of the version cut here; null: path.branch_share"
    )
    shape: Shape | None = Field(None, description="decay of that version; null: path.shape")

    @model_validator(mode="after")
    def _has_one_length(self) -> SliceConfig:
        if self.steps is not None and self.tokens is not None:
            raise ValueError(
                f"steps {self.steps} and tokens {self.tokens} are both given; give one of them (as an override, "
                "steps=null or tokens=null takes the other out)"
            )
        if self.steps is None and self.tokens is None:
            raise ValueError("it has no length; give steps, or tokens such as 2e9")
        return self


class PathConfig(Tree):
    """The learning-rate path: constant main path, branches with a complete decay."""

    peak: Annotated[float, Field(gt=0)] = Field(3e-4, description="rate of the main path")
    warmup_steps: Annotated[int, Field(ge=0)] | None = Field(
        100, description="steps of the main path's warm-up; or give warmup_tokens"
    )
    warmup_tokens: Tokens | None = Field(
        None,
        description="in the place of warmup_steps: tokens of the warm-up, such as 5e8; a run records the steps",
    )
    branch_share: Share = Field(
        0.6, description="alpha: branch length / T of its slice, for slices without their own"
    )
    shape: Shape = Field("cosine", description="decay of a branch, for slices without their own")
    floor: Annotated[float, Field(ge=0)] = Field(0.0, description="rate at the end of a branch")
    changes: dict[int, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict,
        description="step -> peak from there on; written by `velopath override`, with the reason in the lineage",
    )

    @model_validator(mode="before")
    @classmethod
    def _tokens_replace_the_default(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("warmup_tokens") is not None:
            return {"warmup_steps": None, **given}
        return given

    @model_validator(mode="after")
    def _has_one_warmup(self) -> PathConfig:
        if self.warmup_steps is not None and self.warmup_tokens is not None:
            raise ValueError(
                f"warmup_steps {self.warmup_steps} and warmup_tokens {self.warmup_tokens} are both given; give one of "
                "them (as an override, path.warmup_steps=null or path.warmup_tokens=null takes the other out)"
            )
        if self.warmup_steps is None and self.warmup_tokens is None:
            raise ValueError("it has no warm-up; give warmup_steps (0: none), or warmup_tokens such as 5e8")
        return self
