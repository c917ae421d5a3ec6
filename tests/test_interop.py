"""Folders that mosaicml-streaming 0.13 wrote, over a grid of its writer's settings; `make interop` makes them anew.

The package as a reader of what we write, and the archive's own tokens, are checked by `make interop`, in an
environment of its own: its dated results are in tests/interop/results.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from interop.folders import ARCHIVE, unpack
from interop.reading import documents_differ
from velopath import open_sampler
from velopath.errors import DataError
from velopath.mds import load_index, read_documents


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    root = tmp_path_factory.mktemp("mosaic")
    return root, unpack(root)


def test_the_archive_is_small_and_of_the_package() -> None:
    assert ARCHIVE.stat().st_size < 1_000_000


def test_every_layout_reads_as_it_was_written(written: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    root, expected = written
    assert expected["writer"] == "mosaicml-streaming 0.13.0"
    assert len(expected["cases"]) >= 80
    wrong = {}
    for name, case in expected["cases"].items():
        options = {"bytes_dtype": case["bytes_dtype"]} if "bytes_dtype" in case else {}
        documents = expected["documents"][case["documents"]]
        if difference := documents_differ(root / name, documents, **options):
            wrong[name] = difference
    assert not wrong


def test_the_grid_covers_what_the_writer_can_do(written: tuple[Path, dict[str, Any]]) -> None:
    root, expected = written
    shards = {
        name: json.loads((root / name / "index.json").read_text())["shards"] for name in expected["cases"]
    }
    entries = [entry for entries in shards.values() for entry in entries]
    assert {entry["compression"] for entry in entries} >= {None, "zstd", "zstd:1", "zstd:19"}
    encodings = {encoding for entry in entries for encoding in entry["column_encodings"]}
    for dtype in ("uint16", "uint32", "int32", "int64"):
        assert encodings >= {f"ndarray:{dtype}", f"ndarray:{dtype}:32"}
    assert encodings >= {"bytes", "int", "str", "json", "ndarray"}
    assert {h for entry in entries for h in entry["hashes"]} >= {"sha1", "xxh64", "md5", "sha256", "xxh3_128"}
    assert len(shards["many-shards"]) > 1
    assert [entry["samples"] for entry in shards["empty-shards"]][0] == 0
    assert shards["no-samples"] == []
    assert shards["foundry-merged"][2]["raw_data"]["basename"] == "2/shard.00000.mds"


REFUSED = {
    "refused-pkl": "column 'tokens': encoding 'pkl' runs code when it is read and is refused",
    "refused-gz": "gunzip -k shard.00000.mds.gz",
    "refused-gz-3": "gunzip -k shard.00000.mds.gz",
    "refused-br-4": "brotli -d -k -o shard.00000.mds shard.00000.mds.br",
    "refused-bz2": "bunzip2 -k shard.00000.mds.bz2",
    "refused-snappy": "snappy.decompress(open('shard.00000.mds.snappy', 'rb')",
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_what_to_do(written: tuple[Path, dict[str, Any]], name: str) -> None:
    root, expected = written
    assert sorted(REFUSED) == sorted(expected["refused"])
    for read in (
        lambda: list(read_documents(root / name)),
        lambda: open_sampler({"a": root / name}, row_tokens=4),
    ):
        with pytest.raises(DataError, match=re.escape(REFUSED[name])) as caught:
            read()
        assert "shards[0]" in str(caught.value)
    if name.startswith("refused-gz"):
        import gzip

        zipped = root / name / "shard.00000.mds.gz"
        zipped.with_suffix("").write_bytes(gzip.decompress(zipped.read_bytes()))  # what the command does
        try:
            assert documents_differ(root / name, expected["documents"]["rows"]) == ""
            assert load_index(root / name).samples == 9
        finally:
            zipped.with_suffix("").unlink()
