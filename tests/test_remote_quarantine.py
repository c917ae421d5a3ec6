"""R6 on remote data: what local data would leave out is left out, and what passed once is not read again."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from damage import Folder
from object_server import ObjectServer, serving
from test_quarantine import DAMAGE, epoch, flip
from velopath import open_sampler
from velopath.audit import read_log
from velopath.errors import ConfigError, DataError, WriteError
from velopath.mds import MdsWriter
from velopath.remote import DeniedError, FetchError, FetchPolicy
from velopath.stream import Sampler
from velopath.stream_quarantine import QuarantineWarning

QUICK = FetchPolicy(attempts=2, stall_seconds=0.5, backoff_seconds=0.01)


@pytest.fixture
def web(tmp_path: Path) -> Iterator[ObjectServer]:
    (tmp_path / "d").mkdir()
    with serving(tmp_path / "d") as server:
        yield server


def opened(server: ObjectServer, cache: Path, **options: Any) -> Sampler:
    settings = {"rows": 1, "row_tokens": 2, "exhaustion": "stop", "cache": cache, "fetch": QUICK}
    return open_sampler({"a": f"{server.url}/a"}, **(settings | {"on_bad_shard": "quarantine"} | options))


def quietly(server: ObjectServer, cache: Path, **options: Any) -> Sampler:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QuarantineWarning)
        return opened(server, cache, **options)


def shard_gets(server: ObjectServer) -> dict[str, int]:
    return {path: n for path, n in server.gets.items() if "shard" in path}


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
@pytest.mark.parametrize(("name", "variant", "damage", "why", "bad"), DAMAGE, ids=[row[0] for row in DAMAGE])
def test_what_local_data_leave_out(
    web: ObjectServer,
    tmp_path: Path,
    name: str,
    variant: str,
    damage: Callable[[Folder], object],
    why: str,
    bad: list[int],
    packing: str,
) -> None:
    folder = Folder(tmp_path / "d" / "a", variant)
    files = [folder.file(k).name for k in range(3)]
    damage(folder)
    options = {"packing": packing, "row_tokens": 2 if packing == "concat" else 50}
    with pytest.warns(QuarantineWarning, match=rf"{len(bad)} shards are left out: a/{files[bad[0]]} \("):
        far = opened(web, tmp_path / "cache", audit=tmp_path / "far.jsonl", **options)
    local = options | {"rows": 1, "exhaustion": "stop", "order": "windowed", "on_bad_shard": "quarantine"}
    with pytest.warns(QuarantineWarning):
        near = open_sampler(tmp_path / "d", cache=tmp_path / "near", audit=tmp_path / "near.jsonl", **local)  # type: ignore[arg-type]
    with far, near:
        assert [(b.domain, b.shard) for b in far.quarantined] == [("a", files[k]) for k in bad]
        assert [b[:2] for b in far.quarantined] == [b[:2] for b in near.quarantined]
        assert far.order == near.order and epoch(far) == epoch(near)
        mine, other = far.state_dict(), near.state_dict()
        assert mine == other and mine["quarantined"] == {"a": [files[k] for k in bad]}
    records = [read_log(tmp_path / f"{side}.jsonl")[1] for side in ("far", "near")]
    assert [[s["shard"] for s in r["details"]["shards"]] for r in records] == [[files[k] for k in bad]] * 2


@pytest.mark.parametrize("variant", ["raw", "zstd", "bare"])
def test_sound_data_are_read_alike_under_both_policies(
    web: ObjectServer, tmp_path: Path, variant: str
) -> None:
    Folder(tmp_path / "d" / "a", variant)
    found = []
    for policy in ("fail", "quarantine"):
        with opened(web, tmp_path / policy, on_bad_shard=policy) as sampler:
            found.append(([batch.tokens.tolist() for batch in sampler], sampler.state_dict()))
    assert found[0] == found[1]


def test_what_passed_is_not_read_again_and_what_did_not_is(web: ObjectServer, tmp_path: Path) -> None:
    folder, cache = Folder(tmp_path / "d" / "a", "raw"), tmp_path / "cache"
    sound = folder.file(1).read_bytes()
    flip(-1)(folder)
    paths = [f"/a/{folder.file(k).name}" for k in range(3)]
    with quietly(web, cache) as sampler:
        rows = epoch(sampler)
    assert shard_gets(web) == {paths[0]: 1, paths[1]: 2, paths[2]: 1}  # a wrong hash is fetched once more
    for path in cache.glob("*.mds"):
        path.unlink()
    web.gets.clear()
    with quietly(web, cache):
        pass
    assert shard_gets(web).pop(paths[1]) == 2
    folder.file(1).write_bytes(sound)
    web.gets.clear()
    with opened(web, cache, order="full") as sampler:  # repaired
        assert not sampler.quarantined and set(epoch(sampler)) > set(rows)
    assert shard_gets(web)[paths[1]] == 1
    with opened(web, tmp_path / "other") as sampler:
        assert not sampler.quarantined


def test_shards_without_a_hash_are_read_at_every_start(web: ObjectServer, tmp_path: Path) -> None:
    """Nothing would tell that their bytes are others; their journal does not grow by that."""
    Folder(tmp_path / "d" / "a", "bare")
    sizes = []
    for _ in range(3):
        web.gets.clear()
        with opened(web, tmp_path / "cache"):
            assert len(shard_gets(web)) >= 3 or sizes  # in the cache by then
        for path in (tmp_path / "cache").glob("*.mds"):
            path.unlink()
        (journal,) = (tmp_path / "cache").glob("*.shards")
        sizes.append(journal.stat().st_size)
    assert len(shard_gets(web)) == 3
    assert len(set(sizes)) == 1


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [(500, FetchError, "2 attempts failed"), ("stall", FetchError, "2 attempts failed"), (403, DeniedError, "denied")],
)  # fmt: skip
def test_a_network_or_a_store_that_refuses_says_nothing_about_a_shard(
    web: ObjectServer, tmp_path: Path, fault: object, error: type[Exception], message: str
) -> None:
    folder = Folder(tmp_path / "d" / "a", "raw")
    web.faults[f"/a/{folder.file(1).name}"] = [fault, "..."]
    with pytest.raises(error, match=rf"shard.00001.mds: .*{message}"):
        opened(web, tmp_path / "cache")
    web.faults.clear()
    with opened(web, tmp_path / "cache") as sampler:
        assert not sampler.quarantined


def test_what_goes_bad_later_is_an_error_and_left_out_by_the_next_start(
    web: ObjectServer, tmp_path: Path
) -> None:
    folder, cache = Folder(tmp_path / "d" / "a", "raw"), tmp_path / "cache"
    with opened(web, cache) as sampler:
        next(sampler)
        state = sampler.state_dict()
    for path in cache.glob("*.mds"):  # evicted
        path.unlink()
    flip(-1)(folder)
    with opened(web, cache) as sampler:  # believed: nothing is fetched to open
        sampler.load_state_dict(state)
        with pytest.raises(DataError, match="shard.00001.mds.* field 'hashes': sha1 is"):
            epoch(sampler)
    with pytest.warns(QuarantineWarning, match=r"1 shards are left out: a/shard.00001.mds"):
        sampler = opened(web, cache)
    with sampler:
        wrong = r"made without the shards \[\] of domain 'a', this sampler leaves out \['shard.00001.mds'\]"
        with pytest.raises(ConfigError, match=wrong):
            sampler.load_state_dict(state)
        assert len(epoch(sampler)) > 0


def test_a_damaged_copy_in_the_cache_is_no_bad_shard(web: ObjectServer, tmp_path: Path) -> None:
    folder, cache = Folder(tmp_path / "d" / "a", "raw"), tmp_path / "cache"
    with open_sampler({"a": f"{web.url}/a"}, rows=1, row_tokens=2, cache=cache) as sampler:
        for _ in range(200):
            next(sampler)
    content = folder.file(1).read_bytes()
    (copy,) = (p for p in cache.glob("*.mds") if p.read_bytes() == content)
    copy.write_bytes(content[:-1] + b"\xff")
    with opened(web, cache) as sampler:
        assert not sampler.quarantined
    assert copy.read_bytes() == content


def test_a_resume_on_another_node_leaves_out_the_same(web: ObjectServer, tmp_path: Path) -> None:
    folder = Folder(tmp_path / "d" / "a", "zstd")
    content = folder.file(2).read_bytes()
    folder.file(2).unlink()
    one, two = ({"cache": tmp_path / name, "exhaustion": "repeat"} for name in ("one", "two"))
    with quietly(web, **one) as sampler:
        for _ in range(7):
            next(sampler)
        state = json.loads(json.dumps(sampler.state_dict()))
        rows = [next(sampler).tokens.tolist() for _ in range(60)]
    with quietly(web, **two) as sampler:
        sampler.load_state_dict(state)
        assert [next(sampler).tokens.tolist() for _ in range(60)] == rows
    folder.file(2).write_bytes(content)
    for policy in ("fail", "quarantine"):
        with (
            opened(web, tmp_path / "one", exhaustion="repeat", on_bad_shard=policy) as sampler,
            pytest.raises(ConfigError, match="made without the shards"),
        ):
            sampler.load_state_dict(state)
    shutil.rmtree(tmp_path / "d" / "a")
    folder = Folder(tmp_path / "d" / "a", "raw")
    for k in range(3):
        folder.file(k).write_bytes(bytes(folder.file(k).stat().st_size))
    with pytest.raises(
        DataError, match=rf"^{web.url}/a: all 3 shards of domain 'a' are bad; the first: .*sha1 is"
    ):
        opened(web, tmp_path / "three")


def test_a_full_cache_is_no_bad_shard(
    web: ObjectServer, tmp_path: Path, limited: Callable[[int], None]
) -> None:
    with MdsWriter(tmp_path / "d" / "a") as writer:
        writer.write(np.zeros(200_000, "uint16"))
    limited(100_000)
    with pytest.raises(WriteError, match=r"cache/.*\.mds: the file would be larger than"):
        opened(web, tmp_path / "cache")
