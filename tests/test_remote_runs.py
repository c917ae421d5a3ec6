"""Runs on remote data: `data.slices.X.root` is a URL, and nothing else changes; its credentials are kept nowhere."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml

from commands import velopath
from object_server import ACCESS_KEY, REGION, SECRET_KEY, serving
from small_run import in_force, newest, tree
from velopath.config import load_config, validate_config
from velopath.config_change import check_unchanged
from velopath.errors import ConfigError, DataError
from velopath.evaluate import HeldOut
from velopath.inspection import inspect_data
from velopath.mds import load_index
from velopath.prepare.shards import ShardFormat, join_shards, plan_shards, write_shard

SETTINGS = {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY, "AWS_REGION": REGION}


@pytest.fixture
def s3(data: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of the `data` fixture's folder in an object store."""
    with serving(data.parent, s3=True) as server:
        for name, value in (SETTINGS | {"AWS_ENDPOINT_URL": server.url}).items():
            monkeypatch.setenv(name, value)
        yield f"s3://{data.name}"


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_a_run_on_remote_data_reads_what_a_local_one_reads(
    data: Path, s3: str, tmp_path: Path, packing: str
) -> None:
    env = SETTINGS | {
        "AWS_ENDPOINT_URL": os.environ["AWS_ENDPOINT_URL"],
        "VELOPATH_CACHE": str(tmp_path / "cache"),
    }
    for name, root in (("far", s3), ("near", str(data))):
        config = tree(data, data__order="windowed", data__packing=packing, data__cache_limit="1GB")
        config["data"]["slices"] = {"one": config["data"]["slices"]["one"] | {"root": root, "steps": 30}}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config))
        done = velopath("train", tmp_path / f"{name}.yaml", "--run", tmp_path / name, env=env)
        assert done.code == 0, done.err
        assert SECRET_KEY not in done.out + done.err
    far, near = (in_force(tmp_path / name) for name in ("far", "near"))
    assert len([r for r in far if r["kind"] == "step"]) == 12
    assert far == near
    assert newest(tmp_path / "far").keys() == newest(tmp_path / "near").keys()
    assert load_config(tmp_path / "far" / "config.yaml").data.slices["one"].root == s3
    shown = [velopath("inspect", f"{root}/train", "--json", env=env) for root in (s3, data)]
    assert [done.code for done in shown] == [0, 0]
    a, b = (json.loads(done.out) | {"folder": ""} for done in shown)
    assert a == b


def test_held_out_sets_and_inspection(data: Path, s3: str) -> None:
    far, near = (HeldOut.open(root, row_tokens=16) for root in (s3, data))
    assert far.names == near.names
    assert all(np.array_equal(a, b) for a, b in zip(far.streams, near.streams, strict=True))
    found = [inspect_data(f"{root}/train", verify=True) for root in (s3, data)]
    assert found[0].domains == found[1].domains
    assert found[0].problems == found[1].problems == ()
    with pytest.raises(DataError, match=f"{s3}/tokenizer.json: cannot be read .no such file.; expected"):
        inspect_data(s3)


def test_urls_in_a_config_are_left_alone_and_shown_without_credentials(tmp_path: Path, data: Path) -> None:
    url = "https://me:hunter2hunter@host/data?X-Amz-Signature=feed0badcafe"
    config = tree(data, data__heldout=url)
    config["data"]["slices"]["one"]["root"] = url
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    loaded = load_config(tmp_path / "run.yaml")
    assert loaded.data.slices["one"].root == url
    for shown in (loaded.to_yaml(), json.dumps(loaded.shown())):
        assert "hunter2" not in shown
        assert "feed0bad" not in shown
        assert "https://***@host/data?***" in shown
    (tmp_path / "config.yaml").write_text(loaded.to_yaml())
    recorded = load_config(tmp_path / "config.yaml")
    check_unchanged(recorded, loaded, tmp_path)  # the same run, with its credentials given again
    assert recorded.hash == loaded.hash
    with pytest.raises(ConfigError, match=r"data.fetch_attempts: Input should be greater than 0"):
        validate_config(tree(data, data__fetch_attempts=0))


def test_prepare_writes_the_counts(tmp_path: Path) -> None:
    part = tmp_path / "part"
    lengths = np.random.default_rng(0).integers(1, 300, 200)
    with open(part, "wb") as file:
        np.save(file, lengths)
        np.save(file, np.ones(int(lengths.sum()), np.uint16))
    planned = plan_shards(0, [part], tmp_path / "shards", ShardFormat("uint16", "zstd", 6000))
    for task in planned.tasks:
        write_shard(task)
    join_shards(planned.tasks, tmp_path / "out")
    counts = json.loads((tmp_path / "out" / "token_counts.json").read_bytes())
    index = load_index(tmp_path / "out")
    assert len(counts["tokens"]) == len(index.shards) > 5
    assert sum(counts["tokens"]) == planned.tokens == int(lengths.sum())
    assert counts["fingerprint"] == index.fingerprint
