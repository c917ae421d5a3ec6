"""R6: a bad shard is an error that names it, or left out on record; a resume must leave out the same."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from commands import velopath
from conftest import write_data
from damage import Folder, raw_of, swapped, truncated_frame
from small_run import write_config
from velopath import open_sampler
from velopath.audit import read_log, verify, weights_log
from velopath.errors import ConfigError, DataError, WriteError
from velopath.mds import MdsWriter, read_documents
from velopath.stream import Sampler
from velopath.stream_quarantine import QuarantineWarning


def opened(root: Path, cache: Path, **options: object) -> Sampler:
    settings = {"rows": 1, "row_tokens": 2, "exhaustion": "stop", "cache": cache, "threads": 1}
    return open_sampler(root, **(settings | {"on_bad_shard": "quarantine"} | options))  # type: ignore[arg-type]


def epoch(sampler: Sampler) -> list[int]:
    return sorted(t for batch in sampler for t in batch.tokens[0, :-1].tolist())


def flip(at: int) -> Callable[[Folder], None]:
    return lambda f: f.patch(at, bytes([f.file().read_bytes()[at] ^ 1]))


def fall(folder: Folder) -> None:
    folder.patch(8, (1 << 31).to_bytes(4, "little"))


def false_shape(folder: Folder) -> None:
    folder.patch(-81, bytes([41]))  # the last document says that it has one token more


DAMAGE: list[tuple[str, str, Callable[[Folder], object], str, list[int]]] = [
    ("header", "raw", flip(30), "sha1 is", [1]),
    ("offset", "raw", flip(8), "sha1 is", [1]),
    ("payload", "raw", flip(-1), "sha1 is", [1]),
    ("zipped payload", "zstd", flip(-9), "xxh64 is", [1]),
    ("truncated", "raw", lambda f: f.file().write_bytes(f.file().read_bytes()[:-1]), "bytes, its index", [1]),
    ("truncated zstd", "zstd", truncated_frame, "inflates to|not a sound zstd", [1]),
    ("not zstd", "zstd", lambda f: f.replace(bytes(64)), "not a sound zstd file", [1]),
    ("missing", "raw", lambda f: f.file().unlink(), "the shard is missing", [1]),
    ("missing zstd", "zstd", lambda f: f.file().unlink(), "the shard is missing", [1]),
    ("swapped", "raw", swapped, "sha1 is", [1, 2]),
    ("no hash, offsets fall", "bare", fall, "before it begins", [1]),
    ("no hash, false shape", "bare", false_shape, "sample 3 field 'tokens': stores a shape of 41", [1]),
]


@pytest.mark.parametrize(("name", "variant", "damage", "why", "bad"), DAMAGE, ids=[row[0] for row in DAMAGE])
def test_bad_shards_are_refused_or_left_out(
    tmp_path: Path, name: str, variant: str, damage: Callable[[Folder], object], why: str, bad: list[int]
) -> None:
    folder = Folder(tmp_path / "d" / "a", variant)
    sound = [d.tolist() for d in read_documents(folder.path)]
    files = [folder.file(k).name for k in range(3)]
    damage(folder)
    root, cache = tmp_path / "d", tmp_path / "cache"
    with pytest.raises(DataError), opened(root, cache, on_bad_shard="fail", verify=True) as sampler:
        epoch(sampler)
    with pytest.warns(QuarantineWarning, match=rf"{len(bad)} shards are left out: a/{files[bad[0]]} \("):
        sampler = opened(root, cache, audit=tmp_path / "audit.jsonl")
    with sampler:
        assert [(b.domain, b.shard) for b in sampler.quarantined] == [("a", files[k]) for k in bad]
        assert all(np.any([w in b.reason for w in why.split("|")]) for b in sampler.quarantined)
        left = [d for k in range(3) if k not in bad for d in sound[4 * k : 4 * k + 4]]
        assert epoch(sampler) == sorted(t for d in left for t in d)
    opening, record = read_log(tmp_path / "audit.jsonl")
    assert [s["shard"] for s in record["details"]["shards"]] == [files[k] for k in bad]
    assert (opening["kind"], record["kind"]) == ("start", "quarantine")
    assert opening["details"]["tokens"] == {"a": 40 * len(left)}
    assert weights_log(tmp_path / "audit.jsonl").order.tokens == {"a": 40 * len(left)}


def test_sound_data_are_read_alike_under_both_policies(tmp_path: Path) -> None:
    Folder(tmp_path / "d" / "a", "raw")
    rows, states = [], []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for policy in ("fail", "quarantine"):
            with opened(tmp_path / "d", tmp_path / "cache", on_bad_shard=policy) as sampler:
                rows.append([batch.tokens.tolist() for batch in sampler])
                states.append(sampler.state_dict())
    assert rows[0] == rows[1] and states[0] == states[1]
    with pytest.raises(ConfigError, match="on_bad_shard is 'skip'; expected one of fail, quarantine"):
        opened(tmp_path / "d", tmp_path, on_bad_shard="skip")


def test_what_says_nothing_about_a_shard_is_an_error(tmp_path: Path) -> None:
    """A malformed index, a domain without a sound shard, a cache that cannot be written."""
    folder = Folder(tmp_path / "d" / "a", "zstd")
    sound = json.dumps(folder.index)
    (tmp_path / "cache").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"the cache .* cannot be made .*; choose one"):
        opened(tmp_path / "d", tmp_path / "file" / "cache")
    folder.index["shards"][1]["raw_data"]["basename"] = "../x"
    folder.save()
    with pytest.raises(DataError, match="expected the name of a file inside the folder"):
        opened(tmp_path / "d", tmp_path / "cache")
    (folder.path / "index.json").write_text(sound)
    for k in range(3):
        folder.file(k).write_bytes(b"")
    with pytest.raises(DataError, match="all 3 shards of domain 'a' are bad; the first: .*shard.00000"):
        opened(tmp_path / "d", tmp_path / "cache")


def test_a_damaged_copy_in_the_cache_is_no_bad_shard(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "d" / "a", "zstd")
    raw = raw_of(folder)
    with opened(tmp_path / "d", tmp_path / "cache") as sampler:
        expected = epoch(sampler)
    (copy,) = (p for p in (tmp_path / "cache").glob("*.mds") if p.read_bytes() == raw)
    copy.write_bytes(raw[:-1] + b"\xff")
    with opened(tmp_path / "d", tmp_path / "cache") as sampler:
        assert not sampler.quarantined and epoch(sampler) == expected
    assert copy.read_bytes() == raw


def test_a_resume_must_leave_out_the_same(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "d" / "a", "raw")
    with MdsWriter(tmp_path / "d" / "b") as writer:
        writer.write(np.arange(90, dtype="uint16"))
    content = folder.file().read_bytes()
    audit = tmp_path / "audit.jsonl"
    folder.patch(-1, b"\x7f")

    def anew(**options: object) -> Sampler:
        return opened(tmp_path / "d", tmp_path / "cache", exhaustion="repeat", audit=audit, **options)

    with pytest.warns(QuarantineWarning), anew() as sampler:
        for _ in range(5):
            next(sampler)
        state = json.loads(json.dumps(sampler.state_dict()))
        tail = [next(sampler).tokens.tolist() for _ in range(40)]
    assert state["quarantined"] == {"a": ["shard.00001.mds"]}
    with pytest.warns(QuarantineWarning), anew() as sampler:
        sampler.load_state_dict(state)
        assert [next(sampler).tokens.tolist() for _ in range(40)] == tail
    folder.file().write_bytes(content)
    wrong = r"made without the shards \['shard.00001.mds'\] of domain 'a', this sampler leaves out \[\];"
    for policy in ("quarantine", "fail"):
        with anew(on_bad_shard=policy) as sampler, pytest.raises(ConfigError, match=wrong):
            sampler.load_state_dict(state)
    folder.file(2).unlink()
    wrong = r"\['shard.00001.mds'\] of domain 'a', this sampler leaves out \['shard.00002.mds'\];"
    with pytest.warns(QuarantineWarning), anew() as sampler, pytest.raises(ConfigError, match=wrong):
        sampler.load_state_dict(state)
    assert [r["kind"] for r in read_log(audit)] == ["start", "quarantine"] * 2 + ["rewind"]
    verify(audit)


def test_best_fit_bins_are_of_what_is_left(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "d" / "a", "raw")
    with opened(tmp_path / "d", tmp_path / "cache", packing="best_fit", row_tokens=40) as sampler:
        assert sum(1 for _ in sampler) == 12
    folder.file().unlink()
    with pytest.warns(QuarantineWarning):
        sampler = opened(tmp_path / "d", tmp_path / "cache", packing="best_fit", row_tokens=40)
    with sampler:
        assert sum(1 for _ in sampler) == 8


def test_a_run_with_a_bad_shard(tmp_path: Path) -> None:
    """`velopath train`: refused, then left out on record, resumed alike, refused when the file is back."""
    data = write_data(tmp_path / "data", names=("code", "prose"))
    shutil.rmtree(data / "train" / "code")
    with MdsWriter(data / "train" / "code", size_limit=4000) as writer:
        for k in range(200):
            writer.write(np.arange(60, dtype="uint16") % 50 + k % 9)
    path = write_config(
        tmp_path / "run.yaml", data, control__targets={"code": 1.0, "prose": 1.0}, data__cache=str(tmp_path / "c"),
        data__slices__one={"root": str(data), "steps": 40},
    )  # fmt: skip
    shard = data / "train" / "code" / "shard.00002.mds.zstd"
    content = shard.read_bytes()
    shard.write_bytes(content[:-3] + bytes(3))
    run = tmp_path / "run"
    refused = velopath("train", path, "--run", run, "--until", 8)
    assert refused.code == 3 and "shard.00002.mds.zstd" in refused.err and refused.err.count("\n") == 1
    allowed = ("train", path, "data.on_bad_shard=quarantine", "--run", run, "--until")
    first = velopath(*allowed, 8)
    assert first.code == 0, first.err
    assert "QuarantineWarning: 1 shards are left out: code/shard.00002.mds.zstd (" in first.err
    assert "left out code/shard.00002.mds.zstd: " in first.out + first.err
    assert velopath(*allowed, 12).code == 0
    found = velopath("verify", run)
    assert found.code == 0 and "shard left out 1" in found.out, found
    shard.write_bytes(content)
    changed = velopath(*allowed, 16)
    assert changed.code == 2 and "made without the shards ['shard.00002.mds.zstd'] of domain" in changed.err
    assert velopath("verify", run).code == 0


def test_a_full_cache_is_no_bad_shard(tmp_path: Path, limited: Callable[[int], None]) -> None:
    with MdsWriter(tmp_path / "d" / "a") as writer:
        writer.write(np.zeros(200_000, "uint16"))
    limited(100_000)
    with pytest.raises(WriteError, match=r"cache/.*\.mds: the file would be larger than"):
        opened(tmp_path / "d", tmp_path / "cache")
