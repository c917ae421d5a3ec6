"""Cache of inflated shards: zstd files are inflated once, checked, and kept as raw files that can be mapped."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import xxhash

from velopath.durable import TEMPORARY, durable, locked, make_folder
from velopath.errors import ConfigError, DataError, WriteError
from velopath.mds.format import ShardEntry, compare_hash, hasher
from velopath.mds.inflate import inflate

_BLOCK_BYTES = 1 << 20


def default_cache() -> Path:
    """`$VELOPATH_CACHE`, else `~/.cache/velopath` (under `$XDG_CACHE_HOME` where that is set)."""
    chosen = os.environ.get("VELOPATH_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "velopath"


def raw_path(entry: ShardEntry, cache_dir: str | Path | None = None, *, verify: bool = False) -> Path:
    """Path of the shard's raw file: the file itself, or the zstd shard inflated into the cache.

    A zstd shard is inflated by the first process that asks and checked on the way: size and hashes of both
    the zstd file and the raw bytes. A raw file, and one found in the cache, is checked for its size only;
    `verify=True` hashes it too. A file of the cache that does not pass is inflated again. Raises `DataError` naming
    the file when it is missing, does not fit its index or is damaged, `WriteError` when the cache cannot be written;
    nothing stays in the cache then.
    """
    if entry.path.is_file():
        _check_size(entry.path, entry.raw_bytes)
        if verify:
            check_file(entry.path, entry.raw_hashes)
        return entry.path
    zip_path = entry.zip_path
    if zip_path is None or not zip_path.is_file():
        raise DataError(
            "the shard is missing; fetch it or remove it from index.json", path=zip_path or entry.path
        )
    folder = Path(cache_dir) if cache_dir is not None else default_cache()
    target = folder / f"{_key(entry, zip_path)}.mds"
    if not _is_whole(target, entry, verify):
        try:
            make_folder(folder)
        except WriteError as error:
            raise ConfigError(
                f"the cache {folder} cannot be made ({error.problem.split(';')[0]}); choose one by VELOPATH_CACHE"
            ) from error
        with locked(target.with_suffix(".lock")):
            if not _is_whole(
                target, entry, verify
            ):  # another process may have filled it while this one waited
                for leftover in folder.glob(f"{target.name}.*{TEMPORARY}"):
                    leftover.unlink(missing_ok=True)
                with durable(target) as file:
                    for block in inflate(entry):
                        file.write(block)
    return target


def check_file(path: Path, expected: Mapping[str, str]) -> None:
    """Hash the file in blocks; raise `DataError` unless it has every hash of `expected` (algorithm -> hex)."""
    running = {name: make() for name in expected if (make := hasher(name)) is not None}
    if not running:
        return
    with open(path, "rb") as file:
        while block := file.read(_BLOCK_BYTES):
            for hash_ in running.values():
                hash_.update(block)
    for name, hash_ in running.items():
        compare_hash(name, hash_.hexdigest(), expected[name], path)


def _check_size(path: Path, expected: int) -> None:
    found = path.stat().st_size
    if found != expected:
        raise DataError(
            f"the file has {found} bytes, its index says {expected}", path=path, field="raw_data.bytes"
        )


def _is_whole(target: Path, entry: ShardEntry, verify: bool) -> bool:
    if not target.is_file() or target.stat().st_size != entry.raw_bytes:
        return False
    try:
        check_file(target, entry.raw_hashes if verify else {})
    except DataError:
        return False
    return True


def _key(entry: ShardEntry, zip_path: Path) -> str:
    """Name of the shard in the cache: other content under the same path gets another name."""
    parts = [str(zip_path.resolve()), str(entry.raw_bytes), str(entry.zip_bytes)]
    parts += [
        f"{k}={v}" for hashes in (entry.raw_hashes, entry.zip_hashes) for k, v in sorted(hashes.items())
    ]
    if not entry.raw_hashes and not entry.zip_hashes:
        parts.append(str(zip_path.stat().st_mtime_ns))
    return xxhash.xxh3_128_hexdigest("\0".join(parts).encode())
