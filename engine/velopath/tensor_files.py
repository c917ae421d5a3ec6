"""Named tensors and JSON on disk without pickle, and a folder that appears whole or not at all."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from velopath.durable import make_folder, sync_folder, write_error
from velopath.errors import ConfigError, DataError, WriteError
from velopath.model import bare
from velopath.sharding import fill

MAX_JSON_BYTES = 64 << 20
"""A larger JSON file is refused unread: honest ones hold kilobytes."""


@contextmanager
def staged_folder(folder: Path, *, replace: bool = True) -> Iterator[Path]:
    """Yield an empty hidden sibling of `folder`; when the block ends well, fsync it and rename it to `folder`.

    When the block raises it is deleted and `folder` is untouched. An existing `folder` is moved to
    `<name>.replaced` just before the rename and deleted after it; with `replace=False` it is a `ConfigError`.
    """
    folder = Path(folder).absolute()
    if not replace and folder.exists():
        raise ConfigError(f"{folder} exists already; choose another name or remove it")
    make_folder(folder.parent)
    stage = folder.with_name(f".tmp-{folder.name}-{os.getpid()}")
    try:
        for leftover in folder.parent.iterdir():
            if leftover.name.startswith(f".tmp-{folder.name}-"):
                shutil.rmtree(leftover)
        stage.mkdir()
        yield stage
        for path in stage.iterdir():
            sync_file(path)
        sync_folder(stage)
        aside = folder.with_name(f"{folder.name}.replaced")
        if folder.exists():
            if aside.exists():
                shutil.rmtree(aside)
            os.rename(folder, aside)
        os.rename(stage, folder)
        sync_folder(folder.parent)
        if aside.exists():
            shutil.rmtree(aside)
    except BaseException as error:
        shutil.rmtree(stage, ignore_errors=True)
        if isinstance(error, OSError):
            raise write_error(error, folder) from error
        if isinstance(error, WriteError):  # of a file in the stage, which is gone
            raise WriteError(error.problem, path=folder) from error
        raise


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, a shared tensor once, under any wrapping's bare names."""
    module = bare(model)
    persistent = module.state_dict(keep_vars=True)
    tensors: dict[str, Tensor] = dict(module.named_parameters())
    tensors |= {name: b for name, b in module.named_buffers() if name in persistent}
    return tensors


@torch.no_grad()
def fill_tensors(targets: Mapping[str, Tensor], values: Mapping[str, Tensor], path: Path) -> None:
    """Copy `values`, read from `path`, into `targets`; names and shapes must agree exactly (`DataError`)."""
    for name in sorted(set(targets) ^ set(values)):
        raise DataError(
            f"tensor {name!r} is {'missing' if name in targets else 'unknown to the model'}; "
            "the file is of another model",
            path=path,
        )
    for name, target in targets.items():
        if target.shape != values[name].shape:
            raise DataError(
                f"tensor {name!r} has shape {tuple(values[name].shape)}, the model needs {tuple(target.shape)}",
                path=path,
            )
    for name, target in targets.items():
        fill(target, values[name])


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as safetensors. Raises `WriteError` when the disk refuses."""
    try:
        save_file({n: t.detach().contiguous() for n, t in tensors.items()}, path, metadata={"format": "pt"})
        # safetensors makes files that only their owner can read; an export is shared as its folder is
        os.chmod(path, path.parent.stat().st_mode & 0o666)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        raise write_error(OSError(int(number[1]) if number else 0, str(error)), path) from error
    except OSError as error:
        raise write_error(error, path) from error


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file onto the CPU. Raises `DataError` when it is missing or not safetensors."""
    try:
        return load_file(path, device="cpu")
    except (SafetensorError, OSError, ValueError) as error:
        raise DataError(f"not a readable safetensors file: {error}", path=path) from error


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON; NaN and infinity are refused (`ConfigError`)."""
    check_json(value, path.name)
    path.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Parse a JSON file of at most 64 MiB. Raises `DataError` when it is missing, too big or malformed."""
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise DataError(f"{size} bytes; expected at most {MAX_JSON_BYTES}", path=path)
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"not a readable JSON file: {error}", path=path) from error


def check_json(value: Any, where: str) -> None:
    """Raise `ConfigError` naming the place in `value` (called `where`) that JSON would not give back.

    json.dumps silently turns other keys into strings, and writes NaN, which is not JSON.
    """
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ConfigError(f"{where} has the key {key!r}; JSON keys must be strings")
            check_json(item, f"{where}.{key}")
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            check_json(item, f"{where}[{i}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{where} is {value!r}; JSON holds finite numbers only")
    elif not isinstance(value, (str, int, float, bool, type(None))):
        raise ConfigError(f"{where} is a {type(value).__name__}; expected a JSON value")


def sync_file(path: Path) -> None:
    """Make the content of a closed file durable."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
