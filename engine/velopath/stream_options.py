"""Options of a sampler, checked; and how its rows are made and ordered, resolved from several of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from velopath.errors import ConfigError

PACKINGS = ("concat", "best_fit")
ORDERS = ("full", "windowed")


class RowChoice(NamedTuple):
    """How rows are made and ordered.

    `window` are the shards of a window of the order, 0 where it is over the whole domain. `bin_shards` are the
    neighbouring shards that the documents of a bin come from, 0 where they come from all, and of concat.
    """

    packing: str
    window: int
    bin_shards: int

    @property
    def window_parts(self) -> int:
        """What a window of the core's order counts: shards, of bins groups of `bin_shards` shards."""
        return self.window // (self.bin_shards or 1)


def check_number(name: str, value: object, least: int) -> None:
    """Raise `ConfigError` unless `value` is a whole number from `least` on that fits 63 bits."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 1 << 63:
        raise ConfigError(f"{name} is {value!r}; expected a whole number, {least} or more")


def check_choice(name: str, value: object, known: Sequence[str]) -> None:
    """Raise `ConfigError` unless `value` is one of `known`."""
    if value not in known:
        raise ConfigError(f"{name} is {value!r}; expected one of {', '.join(known)}")


def choose_rows(
    packing: str, order: str | None, window: int, bin_shards: int | None, *, remote: bool
) -> RowChoice:
    """The choice that these options of `open_sampler` mean. Raises `ConfigError` where they do not fit each other."""
    check_choice("packing", packing, PACKINGS)
    check_number("window", window, 1)
    if order is None:
        order = "windowed" if remote else "full"
    check_choice("order", order, ORDERS)
    windowed = order == "windowed"
    if bin_shards is not None:
        check_number("bin_shards", bin_shards, 1)
        if packing != "best_fit":
            raise ConfigError(
                f"bin_shards is {bin_shards}, but packing {packing!r} has no bins; leave it out"
            )
        if windowed and bin_shards > window:
            raise ConfigError(
                f"bin_shards is {bin_shards}, more than the window of {window} shards that is read at a time; "
                "choose a smaller one, or a larger window"
            )
    groups = (bin_shards or int(windowed)) if packing == "best_fit" else 0
    return RowChoice(packing, window if windowed else 0, groups)
