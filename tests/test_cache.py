"""The cache of inflated shards: checked, capped, shared by processes, unharmed by leftovers."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest
import zstandard

from velopath.cache import Cache, default_cache, parse_size, raw_path
from velopath.durable import locked, write_durably
from velopath.errors import ConfigError, DataError
from velopath.mds import MdsWriter, ShardEntry, load_index
from velopath.mds.inflate import inflate


def make_folder(
    folder: Path, *, hashes: tuple[str, ...] = ("xxh64",), compression: str | None = "zstd"
) -> ShardEntry:
    rng = np.random.default_rng(0)
    with MdsWriter(folder, compression=compression, hashes=hashes) as writer:
        for _ in range(200):
            writer.write(rng.integers(0, 50_000, 300).astype(np.uint16))
    return load_index(folder).shards[0]


def replace_zip(folder: Path, content: bytes, *, keep_hashes: bool = False) -> ShardEntry:
    """Put other bytes in the place of the zstd file, and an index that fits them in size."""
    index = json.loads((folder / "index.json").read_text())
    info = index["shards"][0]["zip_data"]
    (folder / info["basename"]).write_bytes(content)
    info["bytes"] = len(content)
    if not keep_hashes:
        info["hashes"] = {}
    (folder / "index.json").write_text(json.dumps(index))
    return load_index(folder).shards[0]


def test_inflates_once(tmp_path: Path) -> None:
    entry = make_folder(tmp_path / "a")
    first = raw_path(entry, tmp_path / "cache")
    assert entry.zip_path is not None
    assert first.read_bytes() == zstandard.decompress(entry.zip_path.read_bytes())
    stamp = first.stat().st_mtime_ns
    assert raw_path(entry, tmp_path / "cache", verify=True) == first
    assert first.stat().st_mtime_ns == stamp


def test_raw_shard_is_its_own_path(tmp_path: Path) -> None:
    entry = make_folder(tmp_path / "a", compression=None)
    assert raw_path(entry, tmp_path / "cache", verify=True) == entry.path
    assert not (tmp_path / "cache").exists()
    content = bytearray(entry.path.read_bytes())
    content[-1] ^= 1
    entry.path.write_bytes(content)
    assert raw_path(entry, tmp_path / "cache") == entry.path
    with pytest.raises(DataError, match=r"shard.00000.mds field 'hashes': xxh64 is .* the file is damaged"):
        raw_path(entry, tmp_path / "cache", verify=True)
    entry.path.write_bytes(content[:-1])
    with pytest.raises(DataError, match=r"the file has \d+ bytes, its index says \d+"):
        raw_path(entry, tmp_path / "cache")


def test_other_content_gets_another_name(tmp_path: Path) -> None:
    for hashes in ((), ("sha1",)):
        paths = []
        for k in range(2):
            folder = tmp_path / f"x{len(hashes)}"
            with MdsWriter(folder, hashes=hashes) as writer:
                writer.write([k, k, k])
            paths.append(raw_path(load_index(folder).shards[0], tmp_path / "cache"))
            (folder / "index.json").unlink()
        assert paths[0] != paths[1]
        assert paths[0].read_bytes() != paths[1].read_bytes()


def test_zip_bomb_is_stopped(tmp_path: Path) -> None:
    entry = make_folder(tmp_path / "a")
    bomb = zstandard.ZstdCompressor().compressobj()  # no content size in the header
    zeros = bytes(1 << 20)
    content = b"".join(bomb.compress(zeros) for _ in range(300)) + bomb.flush()
    assert len(content) < 1 << 17
    entry = replace_zip(tmp_path / "a", content)
    taken = 0
    with pytest.raises(
        DataError, match=r"zstd field 'raw_data.bytes': the file inflates to more than the \d+ bytes"
    ):
        for block in inflate(entry):
            taken += len(block)
    assert taken <= entry.raw_bytes
    with pytest.raises(DataError, match="inflates to more"):
        raw_path(entry, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.mds*"))


def test_damage(tmp_path: Path) -> None:
    entry = make_folder(tmp_path / "a")
    assert entry.zip_path is not None
    sound = entry.zip_path.read_bytes()
    raw = zstandard.decompress(sound)
    flipped = bytearray(raw)
    flipped[-1] ^= 1
    table = [
        (sound[: len(sound) // 2], "it may be cut short|not a sound zstd file"),
        (b"not zstd at all", "not a sound zstd file"),
        (b"", "inflates to 0 bytes"),
        (sound + b"garbage", "not a sound zstd file"),
        (sound + sound, "inflates to more than"),
        (zstandard.compress(raw[:-1]), "it may be cut short"),
        (zstandard.compress(bytes(flipped)), "field 'hashes': xxh64 is"),
    ]
    for content, message in table:
        damaged = replace_zip(tmp_path / "a", content)
        with pytest.raises(DataError, match=message):
            raw_path(damaged, tmp_path / "cache")
    assert [p.suffix for p in (tmp_path / "cache").iterdir() if p.suffix != ".lock"] == []
    make_folder(tmp_path / "b")
    entry = replace_zip(tmp_path / "b", sound + b"\0", keep_hashes=True)
    with pytest.raises(DataError, match=r"mds.zstd field 'hashes'"):
        raw_path(entry, tmp_path / "cache")


def test_missing_shard(tmp_path: Path) -> None:
    entry = make_folder(tmp_path / "a")
    assert entry.zip_path is not None
    entry.zip_path.unlink()
    with pytest.raises(DataError, match=r"mds.zstd: the shard is missing"):
        raw_path(entry, tmp_path / "cache")


def test_leftovers_are_harmless(tmp_path: Path) -> None:
    entry = make_folder(tmp_path / "a")
    path = raw_path(entry, tmp_path / "cache")
    content = path.read_bytes()
    path.write_bytes(content[:100])  # a disk that lost its end
    leftover = path.with_name(path.name + ".99999.tmp")
    leftover.write_bytes(b"half")
    assert raw_path(entry, tmp_path / "cache") == path
    assert path.read_bytes() == content
    assert not leftover.exists()


def test_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VELOPATH_CACHE", str(tmp_path / "here"))
    assert default_cache() == tmp_path / "here"
    monkeypatch.delenv("VELOPATH_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "velopath"
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="choose one by VELOPATH_CACHE"):
        raw_path(make_folder(tmp_path / "a"), tmp_path / "file/cache")


def _fill(folder: str, cache: str, answers: multiprocessing.Queue[str]) -> None:
    answers.put(str(raw_path(load_index(folder).shards[0], cache)))


def test_many_processes_share_it(tmp_path: Path) -> None:
    entry = make_folder(tmp_path / "a")
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    workers = [
        context.Process(target=_fill, args=(str(tmp_path / "a"), str(tmp_path / "cache"), answers))
        for _ in range(3)
    ]
    for worker in workers:
        worker.start()
    paths = {answers.get(timeout=60) for _ in workers}
    for worker in workers:
        worker.join()
    assert paths == {str(raw_path(entry, tmp_path / "cache", verify=True))}
    assert sorted(p.suffix for p in (tmp_path / "cache").iterdir() if p.name != "marks.lock") == [
        ".lock",
        ".mds",
    ]


def test_lock_is_held_against_others_and_freed(tmp_path: Path) -> None:
    with locked(tmp_path / "lock") as held, locked(tmp_path / "lock", wait=False) as again:
        assert held
        assert not again
    with locked(tmp_path / "lock", wait=False) as held:
        assert held


def test_durable_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_durably(path, b"old")
    with pytest.raises(TypeError):
        write_durably(path, "text")  # type: ignore[arg-type]
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x"]


def test_sizes() -> None:
    given = {"50GB": 50 * 10**9, "1.5 tb": 1500 * 10**9, "512MiB": 512 << 20, "4096": 4096, 7: 7, "2k": 2000}
    assert {text: parse_size(text) for text in given} == given
    for wrong in ("", "GB", "-1", "0", "5 parsecs", "1e9"):
        with pytest.raises(ConfigError, match="cache_limit is .*expected a size such as 50GB"):
            parse_size(wrong)


def test_a_file_renamed_while_the_folder_is_listed_counts_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard that was just finished: listed by the name it was written under, by both names, or by its own."""
    key = "0" * 32
    (tmp_path / f"{key}.mds").write_bytes(bytes(1000))
    for listed in ([f"{key}.mds.77.tmp"], [f"{key}.mds.77.tmp", f"{key}.mds"], [f"{key}.mds"]):
        with Cache(tmp_path, limit=1500) as cache, monkeypatch.context() as patch:
            cache._marks.add(key)  # in use, so that nothing is evicted
            patch.setattr(os, "listdir", lambda folder, names=listed: names)
            assert cache.has_room(500)
            assert not cache.has_room(501)
