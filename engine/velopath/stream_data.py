"""The data of a sampler: folders of domains, their end-of-text token, their shards mapped by the core."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from velopath import _core, remote
from velopath.cache import Cache
from velopath.config import DataConfig
from velopath.errors import ConfigError, DataError
from velopath.mds import MdsFolder, ShardEntry, load_index, shard_token_column
from velopath.remote import FetchPolicy
from velopath.shard_journal import Lengths
from velopath.stream_quarantine import BadShard, faults_of, leave_out
from velopath.stream_remote import RemoteShards
from velopath.stream_shards import shard_of
from velopath.urls import below, is_url, parent, redact

_INFLATERS = 8


class DomainData(NamedTuple):
    """One domain: its folder (a path, or a URL), its documents as the core reads them, a hash of what the index says of
    them, the tokens of each document, its end-of-text token included, the shards that were left out, and those of a
    remote domain, which a `Feed` fetches. To call `lengths` of a remote domain may fetch all of it, once; `doubt` is to
    be called with the number of a remote shard that was found sound when the domain was opened and is not."""

    folder: str | Path
    stream: _core.TokenStream
    fingerprint: str
    lengths: Callable[[], Lengths]
    bad: tuple[BadShard, ...] = ()
    remote: tuple[ShardEntry, ...] = ()
    doubt: Callable[[int], None] | None = None


def open_domains(
    folders: Mapping[str, str | Path],
    eos: int | None,
    *,
    cache: Cache | str | Path | None = None,
    bytes_dtype: str = "int64",
    verify: bool = False,
    on_bad_shard: str = "fail",
) -> dict[str, DomainData]:
    """The data of each domain; the arguments are those of `open_sampler`, or a `Cache` that keeps the marks of
    what is in use. Nothing of a remote domain is mapped: its stream is to be fed. Raises `DataError`."""
    quarantine = on_bad_shard == "quarantine"
    held = cache if isinstance(cache, Cache) else Cache(cache)
    indexes = {name: load_index(folder, files=not quarantine) for name, folder in folders.items()}
    far = {
        name: RemoteShards(index, eos, held, bytes_dtype)
        for name, index in indexes.items()
        if is_url(index.folder)
    }
    bad: dict[str, tuple[BadShard, ...]] = {}
    if quarantine:
        look = {
            name: far[name].faults if name in far else partial(faults_of, index, held, bytes_dtype)
            for name, index in indexes.items()
        }
        faults = {name: find() for name, find in look.items()}
        indexes, bad = leave_out(indexes, faults)
        far = {name: shards.without(faults[name]) for name, shards in far.items()}
    near = {name: index for name, index in indexes.items() if name not in far}
    mapped = _shards(near, held, bytes_dtype, verify and not quarantine)
    data = {}
    for name, folder in folders.items():
        if name in far:
            data[name] = _remote_data(far[name], quarantine, bad.get(name, ()))
        else:
            stream = _core.TokenStream(mapped[name], eos)
            lengths = partial(_lengths_of, stream)
            data[name] = DomainData(folder, stream, near[name].fingerprint, lengths, bad.get(name, ()))
    return data


def _lengths_of(stream: _core.TokenStream) -> Lengths:
    return stream.lengths


def _remote_data(shards: RemoteShards, checked: bool, bad: tuple[BadShard, ...]) -> DomainData:
    """A domain whose shards are fetched when they are needed: only their tokens are known."""
    counts, index = shards.counts(checked), shards.index
    return DomainData(
        index.folder,
        shards.stream(counts),
        index.fingerprint,
        partial(shards.lengths, counts),
        bad,
        index.shards,
        shards.doubt if checked else None,
    )


def domain_folders(root: str | Path | Mapping[str, str | Path]) -> dict[str, str | Path]:
    """Domain -> MDS folder (a path, or a URL), sorted by name; `root` as in `open_sampler`."""
    if isinstance(root, Mapping):
        if not root:
            raise ConfigError("no domains: the mapping domain -> folder is empty")
        return {name: root[name] if is_url(root[name]) else Path(root[name]) for name in sorted(root)}
    if isinstance(root, str) and is_url(root):
        return _remote_folders(root)
    root = Path(root)
    for place in (root, root / "train"):
        try:
            indexes = list(place.glob("*/index.json"))
        except (OSError, ValueError) as error:
            raise DataError(f"cannot be looked into: {error}", path=str(root)[:200]) from error
        found: dict[str, str | Path] = {
            p.parent.name: p.parent for p in indexes if not p.parent.name.startswith(".")
        }
        if found:
            return {name: found[name] for name in sorted(found)}
    if (root / "index.json").is_file():
        raise DataError(
            "this is one MDS folder; give the folder above it, or a mapping domain -> folder", path=root
        )
    raise DataError("no domains: expected sub-folders that each hold an index.json", path=root)


def _remote_folders(root: str) -> dict[str, str | Path]:
    table = read_table(root)
    if table is not None and "domains" in table:
        return {name: below(root, "train", name) for name in sorted(table["domains"])}
    found = remote.folders(root)
    place: str | Path = root
    if "train" in found and not remote.has(str(below(root, "train", "index.json"))):
        place = below(root, "train")
        found = remote.folders(str(place))
    if not found:
        raise DataError("no domains: expected sub-folders that each hold an index.json", path=redact(root))
    return {name: below(place, name) for name in found if not name.startswith(".")}


def read_table(root: str | Path) -> dict[str, Any] | None:
    """The `domains.json` of a folder that `velopath prepare` wrote, local or remote; None where there is none.

    Raises `DataError` where it is there and malformed.
    """
    path = below(root, "domains.json")
    if isinstance(path, str):
        content = remote.read_if_there(path)
    else:
        content = path.read_bytes() if path.is_file() else None
    if content is None:
        return None
    try:
        table: dict[str, Any] = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"not a table of domains: {error!r}", path=redact(str(path))) from error
    check_table(table, redact(str(path)))
    return table


COUNTS = ("tokens", "documents", "bytes", "heldout_tokens", "heldout_documents")
"""Of each domain in a table, whole numbers."""


def check_table(table: Any, path: str) -> None:
    """Raise `DataError` where a field that is read anywhere has another type than `velopath prepare` writes."""
    domains = table.get("domains", {}) if isinstance(table, dict) else None
    if not isinstance(domains, dict) or not all(isinstance(facts, dict) for facts in domains.values()):
        raise DataError("not a table of domains: expected an object of domains", path=path)
    eos, codec = table.get("eos"), table.get("tokenizer") or {}
    if eos is not None and not (type(eos) is int and 0 <= eos < 1 << 31):
        raise DataError(f"eos is {str(eos)[:40]!r}; expected a token id or null", path=path, field="eos")
    if not isinstance(codec, dict):
        raise DataError("not a table of domains: expected an object", path=path, field="tokenizer")
    counts = [(name, key, facts.get(key)) for name, facts in domains.items() for key in COUNTS]
    for name, key, count in [*counts, ("", "vocab_size", codec.get("vocab_size"))]:
        if count is not None and not (type(count) is int and 0 <= count < 1 << 63):
            where = f" of domain {name!r}" if name else ""
            raise DataError(
                f"{key}{where} is {str(count)[:40]!r}; expected a whole number", path=path, field=key
            )


def heldout_names(root: str | Path) -> list[str]:
    """Domains of prepared data, local or remote, that have a held-out split; sorted."""
    if not is_url(root):
        return sorted(p.parent.name for p in (Path(root) / "heldout").glob("*/index.json"))
    table = read_table(root)
    if table is None or "domains" not in table:
        return remote.folders(str(below(root, "heldout")))
    return sorted(name for name, entry in table["domains"].items() if entry.get("heldout_documents"))


def end_of_text(folders: Mapping[str, str | Path], eos: int | None) -> int | None:
    """`eos` as given, or as the domains.json above each folder agree."""
    if eos is None:
        above = {place for folder in folders.values() for place in _above(folder)}
        found: dict[int | None, str] = {}
        for place in sorted(above, key=str):
            if (table := read_table(place)) is not None:
                path = redact(str(below(place, "domains.json")))
                if "eos" not in table:
                    raise DataError("not a table of domains with an eos", path=path)
                found[table["eos"]] = path
        if len(found) > 1:
            raise ConfigError(f"the domains end their documents differently: {found}; give eos")
        eos = next(iter(found), None)
    if eos is not None and (isinstance(eos, bool) or not isinstance(eos, int) or not 0 <= eos < 1 << 31):
        raise ConfigError(f"eos is {eos!r}; expected a token id from 0 to 2147483647, or None")
    return eos


def _above(folder: str | Path) -> Sequence[str | Path]:
    """The two folders above a domain's."""
    if isinstance(folder, str):
        return [place for place in (parent(folder), parent(parent(folder))) if is_url(place)]
    return list(folder.resolve().parents)[:2]


def _shards(
    indexes: Mapping[str, MdsFolder], cache: Cache, bytes_dtype: str, verify: bool
) -> dict[str, list[_core._Shard]]:
    """Shards of each domain as the core takes them; zstd ones are inflated side by side."""
    with ThreadPoolExecutor(_INFLATERS) as pool:
        waiting = {
            name: [pool.submit(_described, entry, cache, bytes_dtype, verify) for entry in index.shards]
            for name, index in indexes.items()
        }
        return {name: [f.result() for f in shards] for name, shards in waiting.items()}


def _described(entry: ShardEntry, cache: Cache, bytes_dtype: str, verify: bool) -> _core._Shard:
    shard_token_column(entry, bytes_dtype=bytes_dtype)  # refused before anything is inflated
    return shard_of(entry, bytes_dtype, cache.hold(entry, verify=verify))


def read_settings(data: DataConfig) -> dict[str, Any]:
    """Keywords of `open_sampler` that say where shards are kept and how patiently they are fetched."""
    policy = FetchPolicy(attempts=data.fetch_attempts, stall_seconds=data.fetch_stall_seconds)
    return {"cache": data.cache, "cache_limit": data.cache_limit, "fetch": policy}
