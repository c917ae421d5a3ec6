"""The settings of one call of the GPU suite."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

T = TypeVar("T")


@dataclass
class Bench:
    """The device, the parts to run, and the time there is. `smoke`: tiny shapes, fp32, on a CPU."""

    device: torch.device
    smoke: bool
    quick: bool
    parts: tuple[str, ...]
    minutes: float
    keep: Callable[[dict[str, Any]], None] = lambda part: None
    """Called with what a long part has so far, to be written."""
    start: float = field(default_factory=time.perf_counter)

    @property
    def seconds_left(self) -> float:
        return 60 * self.minutes - (time.perf_counter() - self.start)

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.smoke else torch.bfloat16

    def choose(self, full: Sequence[T], smoke: Sequence[T]) -> Sequence[T]:
        """The shapes of a part: all of `full`, its first with `quick`, those of `smoke` there."""
        return smoke if self.smoke else full[:1] if self.quick else full

    def compiled(self, function: Callable[..., T]) -> Callable[..., T]:
        """`torch.compile`; in smoke without its code generator, which would take longer than all the rest."""
        return torch.compile(function, backend="aot_eager" if self.smoke else "inductor")

    def rounds(self, full: int) -> int:
        return 2 if self.smoke else max(full // 5, 5) if self.quick else full
