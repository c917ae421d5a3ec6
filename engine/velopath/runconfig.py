"""The configuration of a run folder, and the changes to it that are recorded: new slices and overridden rates."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from velopath.config import RunConfig, load_config, validate_config
from velopath.configured_plan import in_steps, plan_of
from velopath.errors import ConfigError, DataError
from velopath.plan import token_steps
from velopath.runchange import PENDING, change, pending
from velopath.runfolder import RunFolder
from velopath.runlineage import kept_steps
from velopath.stream_data import domain_folders, heldout_names, read_table
from velopath.urls import below, is_url, redact

OVERRIDES = ("path.peak", "path.floor", "path.shape")
"""What `override` may change: the main path's peak from its present step on; the floor of later branches, and the
shape of those whose slice has none of its own."""


def recorded_config(folder: RunFolder) -> RunConfig:
    """The configuration of the run in `folder`. Raises `DataError` where it is no run folder."""
    path = folder.path / "config.yaml"
    if not path.exists():
        raise DataError("not a run folder: it has no config.yaml", path=folder.path)
    begun = pending(folder)
    if (
        begun is not None and begun["config"] is not None
    ):  # as it will be once the next writer has completed it
        return validate_config(yaml.safe_load(begun["config"]), where=PENDING)
    return load_config(path)


def has_begun(folder: RunFolder) -> bool:
    """Whether the run in `folder` has a configuration and a step that was recorded or saved: something to continue."""
    if not (folder.path / "config.yaml").exists():
        return False
    saved = kept_steps(folder.path / "checkpoints" / "main")
    return bool(saved) or any(r.get("kind") == "step" for r in folder.records())


def recorded_rows(folder: RunFolder) -> tuple[int, int] | None:
    """Rows of a step of the run in `folder`, all ranks together, and the ranks that read them last; None before it was
    opened for the first time. Raises `DataError`."""
    about = folder.read_json("run.json")
    if about is None or (isinstance(about, dict) and "global_rows" not in about):
        return None
    found = [about.get(key) for key in ("global_rows", "world")] if isinstance(about, dict) else [about]
    if not all(type(number) is int and number >= 1 for number in found) or not isinstance(about, dict):
        raise DataError(
            f"global_rows and world are {str(found)[:60]}; expected whole numbers, 1 or more",
            path=folder.path / "run.json",
        )
    return about["global_rows"], about["world"]


def recorded_tokens_per_step(folder: RunFolder) -> int | None:
    """Tokens of a step of the run in `folder`, all ranks together; None before it was opened for the first time."""
    rows = recorded_rows(folder)
    return None if rows is None else rows[0] * recorded_config(folder).train.row_tokens


def planned_config(config: RunConfig, path: Path) -> tuple[RunConfig, int]:
    """`config` with lengths in steps, and the tokens of a step, all ranks together, that make them so.

    These are the recorded ones of the run in `path`, where one has begun, else those of `config` on one rank.
    """
    folder = RunFolder(path) if path.is_dir() else None
    recorded = recorded_tokens_per_step(folder) if folder is not None and has_begun(folder) else None
    tokens = recorded or config.train.rows * config.train.row_tokens
    return in_steps(config, tokens), tokens


def slice_folders(config: RunConfig, name: str) -> dict[str, str | Path]:
    """Domain -> MDS folder (a path or URL) of slice `name`, by sorted name: its own domains, then those it replays."""
    entry = config.data.slices[name]
    found = domain_folders(entry.root)
    for domain, source in entry.replay.items():
        if domain in found:
            raise ConfigError(
                f"slice {name!r} replays {domain!r}, which its own folder {redact(entry.root)} has too"
            )
        earlier = slice_folders(config, source)
        if domain not in earlier:
            raise ConfigError(f"slice {name!r} replays {domain!r} of {source!r}, which has no such domain")
        found[domain] = earlier[domain]
    return {domain: found[domain] for domain in sorted(found)}


def older_domains(config: RunConfig, name: str) -> tuple[str, ...]:
    """The domains that slices before `name` have and it has not, sorted."""
    before: set[str] = set()
    for known in config.data.slices:
        if known == name:
            break
        before |= set(slice_folders(config, known))
    return tuple(sorted(before - set(slice_folders(config, name))))


def slice_table(config: RunConfig, name: str) -> dict[str, Any] | None:
    """The slice's domains.json with the entries of the domains it replays; None where `prepare` wrote none."""
    entry = config.data.slices[name]
    table = read_table(entry.root)
    for domain, source in entry.replay.items() if table is not None else ():
        earlier = slice_table(config, source) or {}
        if table is not None and domain in earlier.get("domains", {}):
            table.setdefault("domains", {})[domain] = earlier["domains"][domain]
    return table


def add_slice(
    folder: RunFolder,
    name: str,
    root: str | Path,
    *,
    steps: int | None = None,
    tokens: int | None = None,
    replay: float = 0.0,
    targets: Mapping[str, float] | None = None,
    branch_share: float | None = None,
    shape: str | None = None,
) -> RunConfig:
    """Append slice `name` of `steps` steps, or of the steps that read `tokens`: the domains of `root`, and a share
    `replay` of the domains that only earlier slices have, from the newest that has each.

    Within both parts the shares are those of the tokens. `targets` are target losses by domain for the controller.
    `branch_share` and `shape` are those of the version cut here (None: the run's). The same slice again changes
    nothing. Raises `ConfigError` and `DataError` on what could not be trained on.
    """
    config = recorded_config(folder)
    _check_name(folder, config, name)
    root = root if is_url(root) else Path(root).expanduser().resolve()
    own = {"branch_share": branch_share, "shape": shape}
    entry = _new_slice(config, root, _length(folder, steps, tokens), replay) | {
        k: v for k, v in own.items() if v is not None
    }
    event = {
        "event": "slice",
        "name": name,
        "slice": {**entry, "root": redact(entry["root"]) if is_url(entry["root"]) else entry["root"]},
        "replay_share": replay,
        "targets": dict(targets or {}),
    }
    if name in config.data.slices:
        known = [e for e in folder.events() if e.get("event") == "slice" and e["name"] == name]
        if known and {k: known[-1][k] for k in event} == event:
            return config
        raise ConfigError(f"slice {name!r} exists already with other settings; choose another name")
    _check_data(config, name, entry)
    tree = config.model_dump(mode="json")
    tree["data"]["slices"][name] = entry
    if targets:
        if isinstance(tree["control"]["targets"], str):
            raise ConfigError(
                "the run's targets come from a file (control.targets); add the new domains' there"
            )
        tree["control"]["targets"] = {**(tree["control"]["targets"] or {}), **targets}
    return _apply(folder, event, tree)


def override(folder: RunFolder, setting: str, value: str, reason: str) -> RunConfig:
    """Change a rate of a run that has begun, with its reason in the lineage; see `OVERRIDES`.

    The peak changes from the main path's latest checkpoint on. Raises `ConfigError`.
    """
    if setting not in OVERRIDES:
        raise ConfigError(f"{setting} cannot be overridden; expected one of {', '.join(OVERRIDES)}")
    if not reason.strip():
        raise ConfigError("an override needs a reason: it stands in the lineage for whoever asks later")
    config = recorded_config(folder)
    step = max(kept_steps(folder.path / "checkpoints" / "main"), default=0)
    given = yaml.safe_load(value)
    if isinstance(given, str):  # YAML reads 3e-4 as text
        with suppress(ValueError):
            given = float(given)
    key = setting.partition(".")[2]
    before: Any = getattr(config.path, key)
    if key == "peak" and config.path.changes:
        before = config.path.changes[max(config.path.changes)]
    if given == before:
        return config
    tree = config.model_dump(mode="json")
    if key == "peak" and step > 0:
        tree["path"]["changes"][step] = given
    else:
        tree["path"][key] = given
    event = {"event": "override", "setting": setting, "step": step, "old": before, "new": given}
    return _apply(folder, {**event, "reason": reason.strip()}, tree)


def _apply(folder: RunFolder, event: Mapping[str, Any], tree: dict[str, Any]) -> RunConfig:
    changed = validate_config(tree, where=f"the {event['event']}")
    plan_of(changed)  # refuses a branch of no steps
    change(folder, event, config=changed.to_yaml())
    return changed


def _new_slice(config: RunConfig, root: str | Path, steps: int, replay: float) -> dict[str, Any]:
    """The new slice's part of the configuration."""
    if not 0 <= replay < 1:
        raise ConfigError(f"the replay share is {replay}; expected a share of the slice's tokens in [0, 1)")
    own = domain_folders(root)
    sources: dict[str, str] = {}
    for name in config.data.slices:
        sources |= {
            domain: name for domain in domain_folders(config.data.slices[name].root) if domain not in own
        }
    if replay and not sources:
        raise ConfigError(
            f"nothing to replay: every earlier domain has data of its own in {redact(str(root))}; leave --replay "
            "out, or prepare the new data without the domains to be replayed"
        )
    if not replay:
        return {"root": str(root), "steps": steps, "weights": None, "replay": {}}
    tokens = _tokens(root, list(own))
    old = {d: _tokens(config.data.slices[s].root, [d])[d] for d, s in sources.items()}
    weights = {d: (1 - replay) * n / sum(tokens.values()) for d, n in tokens.items()}
    weights |= {d: replay * n / sum(old.values()) for d, n in old.items()}
    return {"root": str(root), "steps": steps, "weights": weights, "replay": sources}


def _length(folder: RunFolder, steps: int | None, tokens: int | None) -> int:
    """The new slice's steps; those of a length in tokens by the run's own tokens per step, which never change."""
    if steps is not None and tokens is None:
        return steps
    if steps is not None or tokens is None:
        raise ConfigError(f"steps {steps} and tokens {tokens} were given for the slice; expected one of them")
    per_step = recorded_tokens_per_step(folder)
    if per_step is None:
        raise ConfigError(f"the run has not been opened yet, so {tokens} tokens are no steps; give its steps")
    return token_steps(tokens, per_step)


def _tokens(root: str | Path, domains: list[str]) -> dict[str, int]:
    table = read_table(root) or {}
    try:
        return {domain: int(table["domains"][domain]["tokens"]) for domain in domains}
    except (TypeError, KeyError, ValueError) as error:
        raise DataError(
            "a replay share needs the tokens of every domain in domains.json, which `velopath prepare` writes",
            path=redact(str(below(root, "domains.json"))),
        ) from error


def _check_name(folder: RunFolder, config: RunConfig, name: str) -> None:
    if (
        not name
        or name.startswith((".", "-"))
        or not name.replace("-", "").replace("_", "").replace(".", "").isalnum()
    ):
        raise ConfigError(f"slice name {name!r}; expected letters, digits, '-', '_' or '.'")
    if name not in config.data.slices and folder.audit("main", name).exists():
        raise ConfigError(f"a slice {name!r} was read before it was rolled back; choose another name")


def _check_data(config: RunConfig, name: str, entry: Mapping[str, Any]) -> None:
    """The new slice fits the run: the same tokenizer, and a held-out set for every domain it brings."""
    roots = [s.root for s in config.data.slices.values()]
    new = str(entry["root"])
    first, table = (read_table(r) or {} for r in (roots[0], new))
    for key in ("eos", "tokenizer"):
        if key in first and key in table and first[key] != table[key]:
            raise DataError(
                f"its {key} is {table[key]!r}, that of the run's first slice {first[key]!r}; prepare the new data with "
                "the run's tokenizer",
                path=redact(str(below(new, "domains.json"))),
            )
    held = [config.data.heldout] if config.data.heldout is not None else [*roots, new]
    judged = {domain for root in held for domain in heldout_names(root)}
    for domain in domain_folders(new):
        if domain not in judged:
            raise DataError(
                f"domain {domain!r} of slice {name!r} has no held-out documents, by which it would be judged; prepare "
                "them" + (", and put them into data.heldout" if config.data.heldout is not None else ""),
                path=redact(str(below(held[-1], "heldout", domain))),
            )
