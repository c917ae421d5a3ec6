"""What may change between two commands on one run folder, and what would make it another run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from velopath.config import RunConfig
from velopath.errors import ConfigError

FREE = (
    "title",
    "data.cache",
    "evaluate",
    "train.device",
    "train.compile",
    "train.threads",
    "train.log_every",
    "train.checkpoint_every",
    "train.keep_last",
)
"""Settings that change no result; everything else may only be added to (a new slice), never altered."""


def check_unchanged(recorded: RunConfig, given: RunConfig, where: Path) -> None:
    """Raise `ConfigError` with a diff where `given` would continue another run than `recorded`.

    Allowed: the settings in `FREE`, and slices behind the recorded ones.
    """
    old, new = recorded.model_dump(mode="json"), given.model_dump(mode="json")
    names, given_names = list(old["data"]["slices"]), list(new["data"]["slices"])
    lines = []
    if given_names[: len(names)] == names:
        new["data"]["slices"] = {n: new["data"]["slices"][n] for n in names}
    elif set(names) <= set(given_names):  # a map compares equal in any order, the main path does not
        lines.append(f"  data.slices: in the order {names} -> {given_names}")
        old["data"]["slices"] = new["data"]["slices"] = {}
    lines += [
        f"  {key}: {before!r} -> {after!r}"
        for key, before, after in _differences(old, new)
        if not any(key == free or key.startswith(f"{free}.") for free in FREE)
    ]
    if lines:
        raise ConfigError(
            f"this configuration differs from the one the run was started with ({where}):\n"
            + "\n".join(lines)
            + "\nuse the recorded values, or start another run folder"
        )


def _differences(old: Any, new: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in old | new:
            yield from _differences(old.get(name), new.get(name), f"{key}.{name}" if key else name)
    elif old != new:
        yield key, old, new
