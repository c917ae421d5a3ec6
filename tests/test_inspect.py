"""Inspect: its numbers against a recount, and --verify against every kind of damage."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
import zstandard
from typer.testing import CliRunner

from small_corpus import make_codec, make_corpus, texts
from velopath.errors import ConfigError, DataError
from velopath.inspection import inspect_data
from velopath.mds import MdsWriter, read_documents
from velopath.prepare import prepare
from velopath.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("prepared")
    (root / "in").mkdir()
    corpus = make_corpus(root / "in")
    out = root / "data"
    prepare(
        corpus,
        out,
        tokenizer=make_codec(root),
        processes=1,
        shard_size=8000,
        licences={"a": "MIT"},
        sources={"a": "x 1.0"},
    )
    return out


@pytest.fixture
def data(prepared: Path, tmp_path: Path) -> Path:
    return shutil.copytree(prepared, tmp_path / "data")


def test_numbers(data: Path) -> None:
    found = inspect_data(data, verify=True, processes=1)
    assert found.problems == ()
    assert (found.dtype, found.vocab_size, found.eos) == ("uint16", 400, 0)
    table = json.loads((data / "domains.json").read_text())["domains"]
    total = sum(e["tokens"] for e in table.values())
    for report in found.domains:
        lengths = np.array([len(d) for d in read_documents(data / "train" / report.name)])
        assert (report.documents, report.lengths.documents) == (len(lengths), len(lengths))
        assert report.tokens == lengths.sum() + len(lengths)
        assert report.share == report.tokens / total
        assert report.bytes_per_token == table[report.name]["bytes"] / lengths.sum()
        assert (report.lengths.mean, report.lengths.median) == (lengths.mean(), np.median(lengths))
        assert report.lengths.longest == lengths.max()
        for power, count in enumerate(report.lengths.histogram):
            assert count == ((lengths >= 2**power) & (lengths < 2 ** (power + 1))).sum()
        assert sum(report.lengths.histogram) == len(lengths)
        assert report.heldout_documents == table[report.name]["heldout_documents"]
    assert [(d.licence, d.source) for d in found.domains] == [("MIT", "x 1.0"), (None, None)]
    assert json.loads(json.dumps(found.to_json()))["domains"][0]["name"] == "a"


def test_samples_are_documents(data: Path) -> None:
    found = inspect_data(data, domain="b", samples=3)
    (report,) = found.domains
    assert len(report.samples) == 3
    assert set(report.samples) <= set(texts(150, 2))
    with pytest.raises(ConfigError, match="unknown domain 'c'; the domains are a, b"):
        inspect_data(data, domain="c")


def test_lengths_of_the_first_shards_where_there_are_many(tmp_path: Path) -> None:
    with MdsWriter(tmp_path / "d", size_limit=400) as writer:
        for k in range(1, 60):
            writer.write(np.full(100, k))
    (report,) = inspect_data(tmp_path).domains
    assert (report.lengths.shards, report.documents) == (8, 59)
    assert report.lengths.of > 8
    assert report.tokens is None
    assert report.share is None
    assert inspect_data(tmp_path, verify=True).domains[0].lengths.documents == 59
    assert inspect_data(tmp_path / "d", samples=1).domains[0].samples == (" ".join(["1"] * 100),)


def edit_table(data: Path, change: Callable[[Any], None]) -> None:
    table = json.loads((data / "domains.json").read_text())
    change(table)
    (data / "domains.json").write_text(json.dumps(table))


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def rewrite_raw(data: Path, change: Callable[[bytearray], None]) -> None:
    """Change the raw bytes of a's first train shard, with an index that fits: sizes right, hashes gone."""
    folder = data / "train/a"
    index = json.loads((folder / "index.json").read_text())
    entry = index["shards"][0]
    path = folder / entry["zip_data"]["basename"]
    raw = bytearray(zstandard.decompress(path.read_bytes()))
    change(raw)
    path.write_bytes(zstandard.compress(bytes(raw)))
    entry["zip_data"].update(bytes=path.stat().st_size, hashes={})
    entry["raw_data"]["hashes"] = {}
    (folder / "index.json").write_text(json.dumps(index))


def big_token(raw: bytearray) -> None:
    raw[-2:] = struct.pack("<H", 400)


def add_counts(table: Any) -> None:
    table["domains"]["a"]["documents"] += 1
    table["domains"]["b"]["heldout_tokens"] += 5


DAMAGE: list[tuple[str, Callable[[Path], None], list[str]]] = [
    ("hash", lambda d: flip(d / "train/a/shard.00001.mds.zstd", 40), ["shard.00001.mds.zstd field 'hashes': xxh64 is"]),
    ("held out", lambda d: flip(d / "heldout/b/shard.00000.mds.zstd", -1), ["b/shard.00000.mds.zstd field 'hashes'"]),
    ("id", lambda d: rewrite_raw(d, big_token), ["token id 400 is not below the vocabulary's size, 400"]),
    ("bounds", lambda d: rewrite_raw(d, lambda r: r.__setitem__(slice(8, 12), b"\xff" * 4)), ["offsets fall from"]),
    ("counts", lambda d: edit_table(d, add_counts),
     ["domain a: train has 280 documents, domains.json says 281", "domain b: heldout has "]),
    ("tokenizer", lambda d: (d / "tokenizer.json").unlink(), ["tokenizer.json: cannot be read"]),
    ("tokenizer hash", lambda d: edit_table(d, lambda t: t["tokenizer"].update(sha256="0")),
     ["another tokenizer than the one of domains.json"]),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "messages"), [d[1:] for d in DAMAGE], ids=[d[0] for d in DAMAGE])
def test_verify_finds(data: Path, damage: Callable[[Path], None], messages: list[str]) -> None:
    damage(data)
    problems = inspect_data(data, verify=True, processes=1).problems
    assert problems is not None
    assert len(problems) == len(messages)
    for problem, message in zip(problems, messages, strict=True):
        assert message in problem


def test_damage_is_an_error_without_verify(data: Path) -> None:
    flip(data / "train/a/shard.00001.mds.zstd", 40)
    with pytest.raises(DataError, match=r"shard.00001.mds.zstd field 'hashes'.*--verify lists everything"):
        inspect_data(data, processes=1)


def test_not_data(data: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no domains.json, no index.json, and no sub-folder with one"):
        inspect_data(tmp_path / "empty")
    edit_table(data, lambda t: t["domains"]["a"].update(tokens="9"))
    with pytest.raises(
        DataError, match=r"domains.json field 'tokens': tokens of domain 'a' is '9'; expected a whole number"
    ):
        inspect_data(data)
    edit_table(data, lambda t: (t["domains"]["a"].update(tokens=9), t.pop("tokenizer")))
    with pytest.raises(DataError, match="not a domains.json of prepare: KeyError"):
        inspect_data(data)


@pytest.fixture(scope="module")
def app() -> typer.Typer:
    from velopath.cli.inspect import inspect
    from velopath.cli.prepare import prepare as prepare_command

    made = typer.Typer()
    made.command("prepare")(prepare_command)
    made.command("inspect")(inspect)
    return made


def run(app: typer.Typer, *arguments: object) -> Any:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result


def test_commands(app: typer.Typer, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    corpus = make_corpus(tmp_path / "in")
    options = [
        "--input",
        tmp_path / "in",
        "--tokenizer",
        "train:300",
        "--processes",
        1,
        "--out",
        tmp_path / "data",
    ]
    dry = run(app, "prepare", *options, "--dry-run")
    assert "would make" in dry.stdout
    assert not (tmp_path / "data").exists()
    more = ["--domain", f"c={corpus['a']}", "--licence", "a=MIT", "--source", "a=x 1.0"]
    assert "300 tokenizer entries" in run(app, "prepare", *options, *more).stdout
    assert "is up to date" in run(app, "prepare", *options, *more).stdout
    shown = run(
        app, "inspect", tmp_path / "data", "--verify", "--samples", 1, "--characters", 20, "--processes", 1
    ).stdout
    assert "verified: every hash, bound, token id and count is right" in shown
    assert "MIT" in shown
    assert "c: documents by length in tokens" in shown
    assert "█" in shown
    assert "commonest: " in shown
    assert "a and c share 280 documents, 100 % of the smaller one" in " ".join(shown.split())
    assert "a and c use nearly the same tokens (0.000 bits apart)" in " ".join(shown.split())
    found = json.loads(run(app, "inspect", tmp_path / "data", "--json", "-d", "a").stdout)
    assert [d["name"] for d in found["domains"]] == ["a"]
    assert load_tokenizer(tmp_path / "data").vocab_size == 300
    flip(tmp_path / "data/train/a/shard.00000.mds.zstd", 50)
    with pytest.raises(DataError, match=r"1 problems, the first: .*shard.00000.mds.zstd"):
        run(app, "inspect", tmp_path / "data", "--verify", "--processes", 1)


def test_separator_of_the_command_line(app: typer.Typer, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("\n\n\n".join(texts(80, 9)))
    options = ["--tokenizer", "train:300", "--processes", 1, "--out", tmp_path / "data"]
    run(app, "prepare", "-d", f"x={tmp_path / 'x.txt'}", "--separator", r"\n\n\n", *options)
    report = inspect_data(tmp_path / "data").domains[0]
    assert report.documents + (report.heldout_documents or 0) == 80


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--domain", "code"], "--domain 'code'; expected NAME=PATH, such as code=src.jsonl"),
        (["--domain", "a=b", "--licence", "MIT"], "--licence 'MIT'; expected NAME=TEXT"),
        ([], "no text; give --domain NAME=PATH, once per domain, or --input FOLDER"),
        (["--input", "nowhere"], "--input nowhere is no folder"),
    ],
)
def test_wrong_arguments(app: typer.Typer, tmp_path: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(app, "prepare", "--out", tmp_path / "out", "--tokenizer", "train:300", *arguments)
