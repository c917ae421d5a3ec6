"""What may change between two commands on one run folder, and what would make it another run."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from velopath.config import RunConfig
from velopath.errors import ConfigError

FREE = (
    "title",
    "alarms",
    "data.cache",
    "data.cache_limit",
    "data.fetch_attempts",
    "data.fetch_stall_seconds",
    "data.on_bad_shard",
    "control.shadow",
    "evaluate",
    "health",
    "train.device",
    "train.activation_checkpointing",
    "train.compile",
    "train.parallel",
    "train.peak_flops",
    "train.threads",
    "train.log_every",
    "train.checkpoint_every",
    "train.keep_last",
)
"""Settings that change no result (which shards were left out is part of a state), and `control.shadow`, so that a
controller that was watched may be let loose on the same run; the log of weights says from where. Everything else may
only be added to (a new slice), never altered. The rows per rank follow the number of ranks, see `split_rows`."""


def check_unchanged(recorded: RunConfig, given: RunConfig, where: Path, world: int = 1) -> None:
    """Raise `ConfigError` with a diff where `given` would continue another run than `recorded`.

    Allowed: the settings in `FREE`, and slices behind the recorded ones. Both are as for `world` ranks.
    """
    old, new = recorded.shown(), given.shown()
    names, given_names = list(old["data"]["slices"]), list(new["data"]["slices"])
    lines = []
    if given_names[: len(names)] == names:
        new["data"]["slices"] = {n: new["data"]["slices"][n] for n in names}
    elif set(names) <= set(given_names):  # a map compares equal in any order, the main path does not
        lines.append(f"  data.slices: in the order {names} -> {given_names}")
        old["data"]["slices"] = new["data"]["slices"] = {}
    lines += [
        f"  {key}: {before!r} -> {after!r}{_rows_a_step(key, before, after, world)}"
        for key, before, after in differences(old, new)
        if not any(key == free or key.startswith(f"{free}.") for free in FREE)
    ]
    if lines:
        rates = any(line.startswith("  path.") for line in lines)
        raise ConfigError(
            f"this configuration differs from the one the run was started with ({where}):\n"
            + "\n".join(lines)
            + "\nuse the recorded values, or start another run folder"
            + ("; `velopath override` changes a rate on record" if rates else "")
        )


def _rows_a_step(key: str, before: Any, after: Any, world: int) -> str:
    if key != "train.rows" or world == 1:
        return ""
    return f" on {world} ranks: {before * world} -> {after * world} rows a step"


def split_rows(
    recorded: RunConfig, global_rows: int, before: int, world: int, micro_rows: int | None = None
) -> RunConfig:
    """`recorded` on `world` ranks instead of `before`: `train.rows` such that a step still has `global_rows` rows.

    Where that changes the rows, `train.micro_rows` is the one given, or else the largest number that divides both the
    recorded one and the new rows. Raises `ConfigError` naming both shapes where the rows cannot be divided.
    """
    train = recorded.train
    rows, rest = divmod(global_rows, world)
    if rest:
        raise ConfigError(
            f"the run has {global_rows // before} rows x {before} ranks = {global_rows} rows a step, which {world} "
            f"ranks cannot share equally; use a number of ranks that divides {global_rows}"
        )
    if rows == train.rows:
        return recorded
    if micro_rows is None and train.micro_rows is not None:
        micro_rows = math.gcd(train.micro_rows, rows)
    split = train.model_copy(update={"rows": rows, "micro_rows": micro_rows})
    return recorded.model_copy(update={"train": split})


def differences(old: Any, new: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, old, new) of every leaf in which two trees of maps and lists of one length differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in old | new:
            yield from differences(old.get(name), new.get(name), f"{key}.{name}" if key else str(name))
    elif isinstance(old, (list, tuple)) and isinstance(new, (list, tuple)) and len(old) == len(new):
        for number, (before, after) in enumerate(zip(old, new, strict=True)):
            yield from differences(before, after, f"{key}.{number}")
    elif old != new:
        yield key, old, new
