"""The adapter for mosaicml-streaming's users: its definitions, its samples, our sampler's order and live weights."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from interop.folders import unpack
from object_server import serving
from velopath.adapters.mosaic import StreamingDataset
from velopath.errors import ConfigError, DataError, PushRejectedError
from velopath.mds import MdsWriter

ROW = 16


@dataclass
class Stream:
    """The attributes of the package's `Stream` that definitions have; one that is not given is not there."""

    local: str | None = None
    remote: str | None = None
    split: str = ""

    def drawn(self, **share: float) -> Stream:
        for name, value in share.items():
            setattr(self, name, value)
        return self


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two streams of rows; the ids of `code` are even, of `prose` odd, none occurs twice."""
    for k, (name, rows) in enumerate((("code", 40), ("prose", 120))):
        with MdsWriter(tmp_path / name / "train", dtype=("uint16", "int32")[k]) as writer:
            for r in range(rows):
                writer.write(2 * np.arange(r * ROW, (r + 1) * ROW) + k)
    return tmp_path


def streams(root: Path, **shares: dict[str, float]) -> list[Stream]:
    return [
        Stream(remote=str(root / n), local="/nowhere").drawn(**shares.get(n, {})) for n in ("code", "prose")
    ]


def odd(sample: dict[str, Any]) -> int:
    return int(sample["tokens"][0]) & 1


def test_an_epoch_hands_out_every_row_as_the_package_would(root: Path) -> None:
    data = StreamingDataset(
        streams=streams(root),
        split="train",
        batch_size=8,
        shuffle=True,
        predownload=99,
        validate_hash="xxh64",
    )
    samples = list(data)
    assert len(samples) == len(data) == 160
    assert all(s.keys() == {"tokens"} and s["tokens"].shape == (ROW,) for s in samples)
    assert all(s["tokens"].dtype == np.int32 for s in samples)  # uint16 and int32 streams
    assert [sum(map(odd, samples)), len(samples)] == [120, 160]
    tokens = np.concatenate([s["tokens"] for s in samples])
    assert len(np.unique(tokens)) == len(tokens)


def test_remote_streams_are_fetched_into_their_local_folders(root: Path, tmp_path: Path) -> None:
    with serving(root) as server:
        definitions = [
            Stream(remote=f"{server.url}/{name}", local=str(tmp_path / "here" / name))
            for name in ("code", "prose")
        ]
        data = StreamingDataset(
            streams=definitions, split="train", batch_size=8, cache_limit="1gb", download_retry=2
        )
        samples = list(data)
        data.sampler.close()
    tokens = np.concatenate([s["tokens"] for s in samples])
    assert len(np.unique(tokens)) == len(tokens) == 160 * ROW
    assert len(list((tmp_path / "here").glob("*.mds"))) == 2


def test_shares_follow_proportions_repeats_and_choices(root: Path) -> None:
    def odd_part(**shares: dict[str, float]) -> tuple[int, int]:
        data = StreamingDataset(streams=streams(root, **shares), split="train", batch_size=4)
        return sum(map(odd, data)), len(data)

    assert odd_part(code={"proportion": 3}, prose={"proportion": 1}) == (40, 160)
    assert odd_part(code={"repeat": 2}) == (120, 200)
    assert odd_part(code={"choose": 10}, prose={"repeat": 0.5}) == (60, 70)
    with pytest.raises(ConfigError, match="no weight for domain 'prose'"):
        odd_part(code={"proportion": 3})
    with pytest.raises(ConfigError, match="weight of 'code' is -1"):
        odd_part(code={"proportion": -1}, prose={"proportion": 1})


def test_pushed_weights_hold_from_the_next_batch_on(root: Path) -> None:
    data = StreamingDataset(streams=streams(root), split="train", batch_size=4)
    rows = iter(data)
    first = [next(rows) for _ in range(6)]  # into the second batch, which is planned already
    data.push({"code": 1, "prose": 0}, reason="test")
    rest = [next(rows) for _ in range(30)]
    assert sum(map(odd, first)) > 0
    assert not any(map(odd, rest[2:]))
    with pytest.raises(PushRejectedError, match="unknown domain 'verse'"):
        data.push({"verse": 1})
    assert data.sampler.names == ("code", "prose")


def test_resumes_to_the_row(root: Path) -> None:
    def new() -> StreamingDataset:
        return StreamingDataset(streams=streams(root), split="train", batch_size=4)

    for taken in (0, 1, 4, 6, 161):
        data, other = new(), new()
        flow = (s for _ in range(3) for s in data)
        list(islice(flow, taken))
        other.load_state_dict(json.loads(json.dumps(data.state_dict())))
        for ours, theirs in zip(islice(flow, 9), other, strict=False):
            np.testing.assert_array_equal(ours["tokens"], theirs["tokens"])


def test_ranks_share_an_epoch(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    seen: list[int] = []
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        data = StreamingDataset(streams=streams(root), split="train", batch_size=4)
        assert len(data) == 80
        seen += [int(t) for s in data for t in s["tokens"]]
    assert max(Counter(seen).values()) == 1
    assert len(seen) == 160 * ROW


def test_in_a_data_loader(root: Path) -> None:
    data = StreamingDataset(local=str(root / "code"), split="train", batch_size=5, row_tokens=8)
    batches = list(DataLoader(data, batch_size=5))
    assert len(batches) == 16
    assert all(b["tokens"].shape == (5, 8) and b["tokens"].dtype == torch.uint16 for b in batches)
    with pytest.raises(ConfigError, match="num_workers is not 0; give 0"):
        next(iter(DataLoader(data, batch_size=5, num_workers=1)))


def test_folders_of_the_package_itself(tmp_path: Path) -> None:
    expected = unpack(tmp_path)
    stored = {t for d in expected["documents"]["rows"] for t in d}
    samples = list(StreamingDataset(local=str(tmp_path / "foundry-bytes"), batch_size=2))
    assert len(samples) == 9
    assert all(isinstance(s["tokens"], bytes) for s in samples)  # what LLM-foundry reads by np.frombuffer
    found = np.concatenate([np.frombuffer(s["tokens"], np.int64) for s in samples])  # type: ignore[arg-type]
    assert set(found.tolist()) == stored
    (sample, *_) = StreamingDataset(local=str(tmp_path / "columns-beside.input_ids.int64"))
    assert sample["input_ids"].dtype == np.int64  # type: ignore[union-attr]
    assert sample["input_ids"].shape == (32,)  # type: ignore[union-attr]


def test_checks_the_hashes_of_raw_shards_where_asked(tmp_path: Path) -> None:
    with MdsWriter(tmp_path / "a", compression=None) as writer:
        writer.write([1, 2, 3, 4])
    shard = tmp_path / "a/shard.00000.mds"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\1")
    with pytest.raises(DataError, match="xxh64 is .*: the file is damaged"):
        StreamingDataset(local=str(tmp_path / "a"), row_tokens=2, validate_hash="xxh64")


def test_refuses_what_it_cannot_keep(root: Path) -> None:
    local = str(root / "code")
    with pytest.raises(ConfigError, match="give shuffle=True"):
        StreamingDataset(local=local, split="train", shuffle=False)
    with pytest.raises(ConfigError, match="give either streams, or one stream"):
        StreamingDataset()
    with pytest.raises(ConfigError, match="no index.json in .*code; check local and remote"):
        StreamingDataset(local=local)
    with MdsWriter(root / "b") as writer:
        writer.write([1, 2, 3])
        writer.write([4])
    with pytest.raises(ConfigError, match="2 different lengths; give row_tokens"):
        StreamingDataset(local=str(root / "b"))
    with MdsWriter(root / "c", column="input_ids") as writer:
        writer.write([1, 2, 3])
    with pytest.raises(
        ConfigError, match="input_ids as ndarray:uint16, tokens as ndarray:uint16; expected one"
    ):
        StreamingDataset(streams=[Stream(local=str(root / n)) for n in "bc"])
    with pytest.raises(TypeError, match="shufle"):
        StreamingDataset(local=local, split="train", shufle=True)
