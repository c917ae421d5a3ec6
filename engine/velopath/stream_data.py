"""The data of a sampler: folders of domains, their end-of-text token, their shards mapped by the core."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from velopath import _core
from velopath.cache import raw_path
from velopath.errors import ConfigError, DataError
from velopath.mds import MdsFolder, ShardEntry, load_index, shard_token_column
from velopath.stream_quarantine import BadShard, leave_out_bad

_TYPE_CODES = {"uint8": 8, "uint16": 16, "int16": 17, "uint32": 32, "int32": 33, "uint64": 64, "int64": 65}
_INFLATERS = 8


class DomainData(NamedTuple):
    """One domain: its folder, its documents as the core reads them, a hash of what the index says of them, and the
    shards that were left out."""

    folder: Path
    stream: _core.TokenStream
    fingerprint: str
    bad: tuple[BadShard, ...] = ()


def open_domains(
    folders: Mapping[str, Path],
    eos: int | None,
    *,
    cache: str | Path | None = None,
    bytes_dtype: str = "int64",
    verify: bool = False,
    on_bad_shard: str = "fail",
) -> dict[str, DomainData]:
    """The data of each domain; the arguments are those of `open_sampler`. Raises `DataError`."""
    quarantine = on_bad_shard == "quarantine"
    indexes = {name: load_index(folder, files=not quarantine) for name, folder in folders.items()}
    bad: dict[str, tuple[BadShard, ...]] = {}
    if quarantine:
        indexes, bad = leave_out_bad(indexes, lambda entry: _described(entry, cache, bytes_dtype, True), eos)
    shards = _shards(indexes, cache, bytes_dtype, verify and not quarantine)
    return {
        name: DomainData(
            folder, _core.TokenStream(shards[name], eos), fingerprint(indexes[name]), bad.get(name, ())
        )
        for name, folder in folders.items()
    }


def domain_folders(root: str | Path | Mapping[str, str | Path]) -> dict[str, Path]:
    """Domain -> MDS folder, sorted by name; `root` as in `open_sampler`."""
    if isinstance(root, Mapping):
        if not root:
            raise ConfigError("no domains: the mapping domain -> folder is empty")
        return {name: Path(root[name]) for name in sorted(root)}
    root = Path(root)
    for place in (root, root / "train"):
        try:
            indexes = list(place.glob("*/index.json"))
        except (OSError, ValueError) as error:
            raise DataError(f"cannot be looked into: {error}", path=str(root)[:200]) from error
        found = {p.parent.name: p.parent for p in indexes if not p.parent.name.startswith(".")}
        if found:
            return {name: found[name] for name in sorted(found)}
    if (root / "index.json").is_file():
        raise DataError(
            "this is one MDS folder; give the folder above it, or a mapping domain -> folder", path=root
        )
    raise DataError("no domains: expected sub-folders that each hold an index.json", path=root)


def prepared_table(root: str | Path) -> dict[str, Any]:
    """The domains.json of a prepared folder, with the types that are used checked; empty where there is none.

    Raises `DataError`.
    """
    path = Path(root) / "domains.json"
    if not path.is_file():
        return {}
    try:
        table = json.loads(path.read_bytes())
        domains, codec = table.get("domains", {}), table.get("tokenizer", {})
        numbers = [facts.get("tokens", 0) for facts in domains.values()] + [codec.get("vocab_size", 0) or 0]
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"not a table of domains: {error!r}", path=path) from error
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise DataError("expected whole numbers for tokens and vocab_size", path=path)
    return dict(table)


def end_of_text(folders: Mapping[str, Path], eos: int | None) -> int | None:
    """`eos` as given, or as the domains.json above each folder agree."""
    if eos is None:
        beside = {p / "domains.json" for f in folders.values() for p in list(f.resolve().parents)[:2]}
        found: dict[int | None, Path] = {}
        for path in sorted(p for p in beside if p.is_file()):
            try:
                found[json.loads(path.read_bytes())["eos"]] = path
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                raise DataError(f"not a table of domains with an eos: {error!r}", path=path) from error
        if len(found) > 1:
            raise ConfigError(f"the domains end their documents differently: {found}; give eos")
        eos = next(iter(found), None)
    if eos is not None and (isinstance(eos, bool) or not isinstance(eos, int) or not 0 <= eos < 1 << 31):
        raise ConfigError(f"eos is {eos!r}; expected a token id from 0 to 2147483647, or None")
    return eos


def _shards(
    indexes: Mapping[str, MdsFolder], cache: str | Path | None, bytes_dtype: str, verify: bool
) -> dict[str, list[_core._Shard]]:
    """Shards of each domain as the core takes them; zstd ones are inflated side by side."""
    with ThreadPoolExecutor(_INFLATERS) as pool:
        waiting = {
            name: [pool.submit(_described, entry, cache, bytes_dtype, verify) for entry in index.shards]
            for name, index in indexes.items()
        }
        return {name: [f.result() for f in shards] for name, shards in waiting.items()}


def _described(entry: ShardEntry, cache: str | Path | None, bytes_dtype: str, verify: bool) -> _core._Shard:
    column = shard_token_column(entry, bytes_dtype=bytes_dtype)
    # No sample can be larger than its shard, so a larger fixed size is as good as any too large one.
    sizes = [-1 if s is None else min(s, 1 << 32) for s in entry.columns.sizes]
    code = 0 if column.dtype is None else _TYPE_CODES[column.dtype]
    length = None if column.length is None else min(column.length, 1 << 32)
    path = str(raw_path(entry, cache, verify=verify))
    names = entry.columns.names
    return (path, entry.samples, entry.raw_bytes, names, sizes, column.index, column.plain, code, length)


def fingerprint(index: MdsFolder) -> str:
    """Hash of what the index says about the raw shards; how they are compressed does not matter."""
    shards = [
        [s.samples, s.raw_bytes, sorted(s.raw_hashes.items()), s.columns.names, s.columns.encodings]
        for s in index.shards
    ]
    return hashlib.sha256(json.dumps(shards).encode()).hexdigest()[:32]
