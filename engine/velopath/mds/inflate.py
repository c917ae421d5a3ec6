"""A zstd shard as its raw bytes, checked on the way."""

from __future__ import annotations

import io
from collections.abc import Iterator

import zstandard

from velopath.errors import DataError
from velopath.mds.format import ShardEntry, check_hashes, compare_hash, hasher

_BLOCK_BYTES = 1 << 20


def inflate(entry: ShardEntry) -> Iterator[bytes]:
    """Blocks of the raw bytes of a zstd shard, at most 1 MiB each.

    Every hash and size of the index is checked; a zstd file that would give more than the index's raw bytes
    is stopped there, whatever its header claims. Raises `DataError` at the first sign of damage; a caller
    keeps what it got only when the iterator ends.
    """
    path = entry.zip_path
    if path is None or not path.is_file():
        raise DataError(
            "the shard is missing; fetch it or remove it from index.json", path=path or entry.path
        )
    yield from inflate_bytes(path.read_bytes(), entry)


def inflate_bytes(zipped: bytes, entry: ShardEntry) -> Iterator[bytes]:
    """The same, where the bytes of the zstd file are at hand."""
    path = entry.place
    if entry.zip_bytes is not None and len(zipped) != entry.zip_bytes:
        raise DataError(
            f"the file has {len(zipped)} bytes, its index says {entry.zip_bytes}",
            path=path,
            field="zip_data.bytes",
        )
    check_hashes(zipped, entry.zip_hashes, path)
    running = {name: make() for name in entry.raw_hashes if (make := hasher(name)) is not None}
    total = 0
    try:
        # A second frame or garbage behind the first one is an error here: by size, or by its unknown magic.
        reader = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(zipped), read_across_frames=True)
        while block := reader.read(_BLOCK_BYTES):
            total += len(block)
            if total > entry.raw_bytes:
                raise DataError(
                    f"the file inflates to more than the {entry.raw_bytes} bytes of its index",
                    path=path,
                    field="raw_data.bytes",
                )
            for hash_ in running.values():
                hash_.update(block)
            yield block
    except zstandard.ZstdError as error:
        raise DataError(f"not a sound zstd file ({error}); fetch or write it again", path=path) from error
    if total != entry.raw_bytes:
        raise DataError(
            f"the file inflates to {total} bytes, its index says {entry.raw_bytes}; it may be cut short",
            path=path,
            field="raw_data.bytes",
        )
    for name, hash_ in running.items():
        compare_hash(name, hash_.hexdigest(), entry.raw_hashes[name], path)
