"""Checkpoints: safetensors for tensors, JSON for the rest, a manifest with hashes written last, then one rename.

A checkpoint is a folder `step-NNNNNNNN`:

| file | content |
| --- | --- |
| `model.safetensors` | parameters and persistent buffers under their names in the module |
| `optimizer.safetensors` | the optimiser's tensors as `<key>/<parameter>`: `exp_avg/model.norm.weight` |
| `optimizer.json` | parameter groups: options and parameter names |
| `rng.safetensors` | torch's CPU generator, and the GPU's where there is one |
| `state.json` | the caller's state |
| `manifest.json` | size and sha256 of every other file |

It is staged in a hidden sibling folder, all files and the folder are fsynced, and renamed, so the name appears
with the whole content or not at all. Nothing is pickled, neither here nor by torch.save.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from velopath.errors import ConfigError, DataError
from velopath.model import bare
from velopath.sharding import fill, gathered, placed
from velopath.tensor_files import (
    check_json,
    fill_tensors,
    load_tensors,
    named_tensors,
    read_json,
    save_tensors,
    staged_folder,
    write_json,
)

MANIFEST = "manifest.json"
_FILES = ("model.safetensors", "optimizer.safetensors", "optimizer.json", "rng.safetensors", "state.json")
_STEP = re.compile(r"step-(\d{8,})(\.replaced)?")


def step_folder(root: Path, step: int) -> Path:
    """`root/step-NNNNNNNN`, the name under which `latest_checkpoint` and `prune` find a checkpoint."""
    return root / f"step-{step:08d}"


def save_checkpoint(
    folder: Path,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    write: bool = True,
) -> str:
    """Write the checkpoint `folder` as one atomic, durable act; returns the sha256 of its manifest.

    Saves model, optimiser, torch's random generators and the JSON-able `state`. An existing checkpoint of that
    name stays loadable until the new one stands. Raises `ConfigError` on a state that JSON cannot hold exactly,
    before anything is written.

    To be called on one rank only; where the model is sharded on all of them, with `write` on the one that writes (the
    others return ""). The files hold whole tensors, so any number of ranks can load them.
    """
    check_json(state, "state")
    tensors, groups = _optimizer_tensors(model, optimizer)
    parameters, tensors = gathered(named_tensors(model), write), gathered(tensors, write)
    if not write:
        return ""
    rng = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        rng["cuda"] = torch.cuda.get_rng_state()
    with staged_folder(folder) as stage:
        save_tensors(stage / "model.safetensors", parameters)
        save_tensors(stage / "optimizer.safetensors", tensors)
        save_tensors(stage / "rng.safetensors", rng)
        write_json(stage / "optimizer.json", {"class": type(optimizer).__name__, "groups": groups})
        write_json(stage / "state.json", state)
        entries = {n: {"bytes": (stage / n).stat().st_size, "sha256": _sha256(stage / n)} for n in _FILES}
        write_json(stage / MANIFEST, {"version": 1, "files": entries})
    return _sha256(folder / MANIFEST)


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: the caller's `state`, and tensors that `restore` puts back.

    `digest` is the sha256 of its manifest, which in turn holds the sha256 of every file.
    """

    folder: Path
    state: dict[str, Any]
    digest: str

    def restore(
        self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None, *, rng: bool = False
    ) -> None:
        """Copy the saved values into `model`, on request `optimizer` and torch's generators, in place.

        Bit-exact. Tensors of model and optimiser keep their identity where they exist already, so compiled steps
        and wrappers stay valid. Raises `DataError` naming the file when names or shapes differ, `ConfigError` when
        the optimiser's options (weight decay, betas, eps) are not those of the checkpoint; the rate is restored.
        """
        path = self.folder / "model.safetensors"
        fill_tensors(named_tensors(model), load_tensors(path), path)
        if optimizer is not None:
            self._restore_optimizer(model, optimizer)
        if rng:
            generators = load_tensors(self.folder / "rng.safetensors")
            torch.set_rng_state(generators["cpu"])
            if "cuda" in generators and torch.cuda.is_available():
                torch.cuda.set_rng_state(generators["cuda"])

    def _restore_optimizer(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        path = self.folder / "optimizer.safetensors"
        saved_groups = _saved_groups(self.folder / "optimizer.json")
        names = _parameter_names(model)
        _check_groups(_groups(names, optimizer), saved_groups, self.folder / "optimizer.json")
        by_parameter: dict[str, dict[str, Tensor]] = {}
        for key, value in load_tensors(path).items():
            kind, _, name = key.partition("/")
            by_parameter.setdefault(name, {})[kind] = value
        for group, saved_group in zip(optimizer.param_groups, saved_groups, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(saved_group["options"]["lr"])
            else:
                group["lr"] = saved_group["options"]["lr"]
            on_device = group.get("fused") or group.get("capturable")
            for parameter in group["params"]:
                values = by_parameter.pop(names[parameter], None)
                if values is None:  # never stepped
                    optimizer.state.pop(parameter, None)
                    continue
                current = optimizer.state[parameter]
                if set(current) != set(values):
                    current.clear()
                for kind, value in values.items():
                    if kind != "step" and value.shape != parameter.shape:
                        raise DataError(
                            f"{kind} of {names[parameter]} has shape {tuple(value.shape)}, the parameter "
                            f"{tuple(parameter.shape)}; the checkpoint is of another model",
                            path=path,
                        )
                    if kind in current:
                        fill(current[kind], value)
                    elif kind == "step":
                        # torch keeps the step count on the CPU unless the kernel reads it on the device
                        current[kind] = value.to(parameter.device if on_device else torch.device("cpu"))
                    else:
                        current[kind] = placed(value, parameter)
        if by_parameter:
            raise DataError(f"state of unknown parameter {next(iter(by_parameter))!r}", path=path)


def load_checkpoint(folder: Path) -> Checkpoint:
    """Open the checkpoint `folder` after checking sizes and hashes of all its files.

    Raises `DataError` naming the file that is missing, altered or unexpected.
    """
    manifest = _manifest(folder)
    for name, entry in manifest.items():
        if _sha256(folder / name) != entry["sha256"]:
            raise DataError(
                "the content does not match the sha256 in the manifest: the file was altered or the disk failed; "
                "use an earlier checkpoint",
                path=folder / name,
            )
    state = read_json(folder / "state.json")
    if not isinstance(state, dict):
        raise DataError("expected a JSON object", path=folder / "state.json")
    return Checkpoint(folder, state, _sha256(folder / MANIFEST))


def latest_checkpoint(root: Path) -> Path | None:
    """The complete checkpoint of the highest step under `root`, None without any. Sizes are checked, not hashes."""
    for _, _, folder in sorted(_checkpoints(root), reverse=True):
        if _is_complete(folder):
            return folder
    return None


def prune(root: Path, keep_last: int, keep_steps: set[int] | None = None) -> list[int]:
    """Delete all checkpoints under `root` but the `keep_last` highest steps and `keep_steps`; returns the deleted
    steps. Leftovers of killed saves go too. A folder is renamed away first, so none is ever seen half deleted.
    """
    if keep_last < 1:
        raise ConfigError(f"keep_last is {keep_last}; expected 1 or more, or nothing could be resumed")
    found = _checkpoints(root)
    complete = sorted({step for step, whole, folder in found if whole and _is_complete(folder)})
    kept = set(complete[-keep_last:]) | (keep_steps or set())
    deleted = []
    for step, whole, folder in found:
        if step not in complete or (whole and step in kept):  # damaged ones are left for a person to look at
            continue
        os.rename(folder, folder.with_name(f".tmp-{folder.name}-{os.getpid()}"))
        if whole:
            deleted.append(step)
    for leftover in root.glob(".tmp-step-*"):
        shutil.rmtree(leftover)
    return sorted(deleted)


def _checkpoints(root: Path) -> list[tuple[int, bool, Path]]:
    """(step, True, folder) of every checkpoint name; False for one that a newer save was replacing."""
    found = []
    for folder in root.iterdir() if root.is_dir() else ():
        match = _STEP.fullmatch(folder.name)
        if match and folder.is_dir():
            found.append((int(match[1]), match[2] is None, folder))
    return found


def _manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """The manifest's files, after checking that exactly ours are listed and there, with their sizes."""
    path = folder / MANIFEST
    manifest = read_json(path)
    if not isinstance(manifest, dict) or manifest.get("version") != 1:
        raise DataError("not a manifest of version 1", path=path)
    files = manifest.get("files")
    if not isinstance(files, dict) or set(files) != set(_FILES):
        raise DataError(f"lists {sorted(files or ())}; expected {sorted(_FILES)}", path=path)
    for name, entry in files.items():
        if not isinstance(entry, dict) or set(entry) != {"bytes", "sha256"}:
            raise DataError(f"entry {entry!r}; expected bytes and sha256", path=path, field=name)
        file = folder / name
        if file.is_symlink() or not file.is_file():
            raise DataError("missing, or not a plain file", path=file)
        if file.stat().st_size != entry["bytes"]:
            raise DataError(f"{file.stat().st_size} bytes; the manifest says {entry['bytes']}", path=file)
    return files


def _is_complete(folder: Path) -> bool:
    try:
        _manifest(folder)
    except DataError:
        return False
    return True


def _parameter_names(model: nn.Module) -> dict[Tensor, str]:
    return {parameter: name for name, parameter in bare(model).named_parameters()}


def _groups(names: Mapping[Tensor, str], optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Parameter groups as JSON: options (a tensor rate as a number, tuples as lists) and parameter names."""
    groups = []
    for group in optimizer.param_groups:
        unknown = [p for p in group["params"] if p not in names]
        if unknown:
            shape = tuple(unknown[0].shape)
            raise ConfigError(
                f"the optimiser holds a parameter of shape {shape} that the model does not have"
            )
        options = {k: v.item() if isinstance(v, Tensor) else v for k, v in group.items() if k != "params"}
        options = {k: list(v) if isinstance(v, tuple) else v for k, v in options.items()}
        groups.append({"options": options, "params": [names[p] for p in group["params"]]})
    return groups


def _saved_groups(path: Path) -> list[dict[str, Any]]:
    """The groups of an optimizer.json, with their types checked."""
    saved = read_json(path)
    groups: list[dict[str, Any]] | None = saved.get("groups") if isinstance(saved, dict) else None
    sound = isinstance(groups, list) and all(
        isinstance(g, dict)
        and isinstance(g.get("params"), list)
        and isinstance(g.get("options"), dict)
        and type(g["options"].get("lr")) in (int, float)
        for g in groups
    )
    if groups is None or not sound:
        raise DataError("expected groups of params and options with a rate lr", path=path, field="groups")
    return groups


def _check_groups(here: list[dict[str, Any]], saved: list[dict[str, Any]], path: Path) -> None:
    """Same parameters and same options but for the rate and the choice of kernel, which change no meaning."""
    if [g["params"] for g in here] != [g["params"] for g in saved]:
        raise DataError("the optimiser's parameter groups are not those of the checkpoint", path=path)
    free = {"lr", "foreach", "fused", "capturable", "initial_lr"}
    for mine, old in zip(here, saved, strict=True):
        for key in sorted((set(mine["options"]) & set(old["options"])) - free):
            new_value, old_value = mine["options"][key], old["options"][key]
            if new_value != old_value:
                raise ConfigError(
                    f"optimiser option {key} is {new_value!r}, in {path} it is {old_value!r}; "
                    "resume with the old value"
                )


def _optimizer_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    names = _parameter_names(model)
    groups = _groups(names, optimizer)
    tensors = {}
    for parameter, values in optimizer.state.items():
        for key, value in values.items():
            if not isinstance(value, Tensor):
                raise ConfigError(
                    f"optimiser state {key!r} is a {type(value).__name__}; only tensors can be saved (AdamW's are)"
                )
            tensors[f"{key}/{names[parameter]}"] = value
    return tensors, groups


def _sha256(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"cannot read: {error}", path=path) from error
