"""Stores other than S3 and the web: Google's and Azure's protocols, and whatever fsspec opens."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from object_server import serving
from test_remote import OPTIONS, QUICK, SIZES, same_steps, write_folders
from velopath import open_sampler
from velopath.mds import load_index
from velopath.remote import MissingError


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("store")
    write_folders(root / "bucket" / "data")
    return root


@pytest.fixture(autouse=True)
def no_own_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """What this machine's user has set does not count."""
    for name in [n for n in os.environ if n.startswith(("AWS_", "GOOGLE_", "AZURE_"))]:
        monkeypatch.delenv(name)


@pytest.mark.parametrize("scheme", ["gs", "az"])
def test_the_other_object_stores(
    bucket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    """Google's and Azure's protocols, as their emulators are reached; the server checks no signature of theirs."""
    root = tmp_path / "store"
    place = root / {"gs": "bucket", "az": "devstoreaccount1/bucket"}[scheme] / "data"
    shutil.copytree(bucket / "bucket" / "data", place)
    with serving(root) as server:
        key = {"client_email": "", "private_key": "", "private_key_id": ""}
        account = key | {"gcs_base_url": server.url, "disable_oauth": True}
        (tmp_path / "account.json").write_text(json.dumps(account))
        for name, value in {
            "GOOGLE_SERVICE_ACCOUNT": str(tmp_path / "account.json"),
            "GOOGLE_ALLOW_HTTP": "true",
            "AZURE_STORAGE_USE_EMULATOR": "true",
            "AZURITE_BLOB_STORAGE_URL": server.url,
        }.items():
            monkeypatch.setenv(name, value)
        places = {name: f"{scheme}://bucket/data/{name}" for name in SIZES}
        server.faults["*"] = [503, "reset", "short", "ok"]
        with (
            open_sampler(
                places, cache=tmp_path / "cache", fetch=replace(QUICK, attempts=6), **OPTIONS
            ) as far,
            open_sampler(bucket / "bucket" / "data", order="windowed", **OPTIONS) as near,
        ):
            same_steps(far, near, 30)
        with pytest.raises(MissingError, match=f"{scheme}://bucket/data/c/index.json: no such file"):
            load_index(f"{scheme}://bucket/data/c")


def test_other_schemes_go_through_fsspec(bucket: Path, tmp_path: Path) -> None:
    import fsspec

    system = fsspec.filesystem("memory")
    for file in sorted((bucket / "bucket/data/a").iterdir()):
        system.pipe(f"/data/a/{file.name}", file.read_bytes())
    with (
        open_sampler("memory://data", rows=2, row_tokens=32, cache=tmp_path) as far,
        open_sampler({"a": bucket / "bucket/data/a"}, rows=2, row_tokens=32, order="windowed") as near,
    ):
        same_steps(far, near, 40)
    with pytest.raises(MissingError, match="memory://data/b/index.json: no such file"):
        load_index("memory://data/b")
