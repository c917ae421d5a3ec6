"""Paths in a configuration: relative to its file. URLs are left alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from velopath.errors import ConfigError
from velopath.urls import is_url


def absolute_paths(tree: dict[Any, Any], base: Path) -> dict[Any, Any]:
    """Anchor path-valued settings at the config file's folder, so that no run depends on the cwd."""

    def anchor(node: Any, key: str) -> None:
        if isinstance(node, dict) and isinstance(node.get(key), str) and not is_url(node[key]):
            try:
                node[key] = str((base / Path(node[key]).expanduser()).resolve())
            except (OSError, ValueError, RuntimeError) as error:  # too long, a zero byte, an unknown ~user
                raise ConfigError(f"{key} is {node[key][:80]!r}; expected a path ({error})") from error

    data = tree.get("data")
    if isinstance(data, dict):
        anchor(data, "heldout")
        anchor(data, "cache")
        slices = data.get("slices")
        for entry in slices.values() if isinstance(slices, dict) else ():
            anchor(entry, "root")
    proxy = tree.get("proxy")
    siblings = proxy.get("siblings") if isinstance(proxy, dict) else None
    for name in siblings if isinstance(siblings, dict) else ():
        anchor(siblings, name)
    anchor(tree.get("model"), "hf")
    anchor(tree.get("control"), "targets")
    anchor(tree.get("control"), "plugin")
    return tree
