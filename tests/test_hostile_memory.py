"""R12: what hostile shards take of memory, measured in a process of its own: at most twice what the index declares."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import zstandard

from commands import start
from damage import Folder, bomb, bomb_in_index, false_size, wide_window
from velopath.errors import DataError
from velopath.mds import MdsWriter, load_index

MEASURED = """
import json, sys
from pathlib import Path
from velopath import open_sampler
from velopath.errors import DataError
from velopath.mds import read_documents

def status(name):
    return int(next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name)).split()[1])

def sampled(folder):
    with open_sampler({{"a": folder}}, rows=1, row_tokens=2, cache=cache, threads=0) as sampler:
        next(sampler)

cache = {cache!r}
grown = {{}}
for folder in {folders!r}:
    for reader in (lambda f: all(d is not None for d in read_documents(f)), sampled):
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = status("VmRSS")
        try:
            reader(folder)
            end = "read"
        except DataError:
            end = "refused"
        grown.setdefault(folder, []).append([end, (status("VmHWM") - before) / 1024])
print(json.dumps(grown))
"""
BLOCKS_MIB = 12
"""What blocks of 1 MiB, a zstd window of 8 MiB at most and the like take besides."""


def test_memory_stays_within_twice_what_is_declared(tmp_path: Path) -> None:
    folders: dict[str, tuple[float, str]] = {}
    for damage in (bomb, bomb_in_index, false_size, wide_window):
        folder = Folder(tmp_path / damage.__name__, "zstd")
        damage(folder)
        folders[str(folder.path)] = (1 / 1024, "refused")
    honest = tmp_path / "honest"
    with MdsWriter(honest) as writer:
        for _ in range(24):
            writer.write(np.zeros(1 << 19, "uint16"))
    folders[str(honest)] = (24, "read")
    greedy = tmp_path / "greedy"  # 24 MiB are declared, 1 GiB comes
    with MdsWriter(greedy) as writer:
        for _ in range(24):
            writer.write(np.zeros(1 << 19, "uint16"))
    index = json.loads((greedy / "index.json").read_text())
    zipped = b"".join([zstandard.ZstdCompressor(19).compress(bytes(1 << 26))] * 16)
    (greedy / "shard.00000.mds.zstd").write_bytes(zipped)
    index["shards"][0]["zip_data"].update({"bytes": len(zipped), "hashes": {}})
    (greedy / "index.json").write_text(json.dumps(index))
    folders[str(greedy)] = (24, "refused")
    done = start(code=MEASURED.format(cache=str(tmp_path / "cache"), folders=list(folders))).wait()
    assert done.code == 0, done
    for folder, readers in json.loads(done.out).items():
        declared, expected = folders[folder]
        for end, mib in readers:
            assert end == expected, (folder, end)
            assert mib <= 2 * declared + BLOCKS_MIB, (folder, mib)


@pytest.mark.parametrize(
    "place", ["s3://bucket/x", "http://host/x", "file:///etc/passwd", "C:\\x", "//host/share/x"]
)
@pytest.mark.parametrize("which", ["raw_data", "zip_data"])
def test_an_index_names_no_other_place(tmp_path: Path, place: str, which: str) -> None:

    folder = Folder(tmp_path / "a", "zstd")
    folder.index["shards"][1][which]["basename"] = place
    folder.save()
    with pytest.raises(DataError, match="expected the name of a file inside the folder"):
        load_index(folder.path)
