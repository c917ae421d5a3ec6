"""Prepare: the numbers of domains.json, determinism, restart after kill -9, and every bad input by file and line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import velopath.prepare as prepare_module
from small_corpus import make_codec, make_corpus, same_tree, texts, write_jsonl
from velopath.durable import locked
from velopath.errors import ConfigError, DataError
from velopath.inspection import inspect_data
from velopath.mds import read_documents
from velopath.prepare import Prepared, prepare
from velopath.prepare import job as prepare_job
from velopath.prepare import shards as prepare_shards
from velopath.prepare import tasks as prepare_tasks
from velopath.prepare.filters import REASONS
from velopath.tokenizer import load_tokenizer, train_bpe


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_codec(tmp_path_factory.mktemp("codec"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def recount(out: Path, split: str, name: str) -> tuple[int, int]:
    documents = list(read_documents(out / split / name))
    return len(documents), sum(len(d) for d in documents)


def test_numbers(corpus: dict[str, Path], codec: Path, tmp_path: Path) -> None:
    out = tmp_path / "data"
    licences, sources = {"a": "MIT"}, {"b": "somewhere 1.0"}
    made = prepare(corpus, out, tokenizer=codec, heldout_percent=10, licences=licences, sources=sources)
    table = json.loads((out / "domains.json").read_text())
    assert made.table == table
    assert sorted(os.listdir(tmp_path)) == ["data"]  # nothing left beside it
    assert sorted(os.listdir(out)) == ["domains.json", "heldout", "prepare.json", "tokenizer.json", "train"]
    assert (table["version"], table["eos"], table["dtype"]) == (1, 0, "uint16")
    tokenizer = load_tokenizer(out)
    assert table["tokenizer"] == {"file": "tokenizer.json", "sha256": tokenizer.sha256, "vocab_size": 400}
    assert (out / "tokenizer.json").read_bytes() == codec.read_bytes()
    for name, given in {"a": texts(300, 1), "b": texts(150, 2)}.items():
        entry = table["domains"][name]
        train, heldout = recount(out, "train", name), recount(out, "heldout", name)
        assert (entry["documents"], entry["tokens"]) == (
            train[0],
            train[1] + train[0],
        )  # one end of text each
        assert (entry["heldout_documents"], entry["heldout_tokens"]) == (heldout[0], heldout[1] + heldout[0])
        assert train[0] + heldout[0] == len(given)
        decoded = {
            s: [tokenizer.decode(d) for d in read_documents(out / s / name)] for s in ("train", "heldout")
        }
        assert sorted(decoded["train"] + decoded["heldout"]) == sorted(given)
        assert not set(decoded["train"]) & set(decoded["heldout"])
        assert entry["bytes"] == sum(len(t.encode()) for t in decoded["train"])
        assert decoded["train"] != [t for t in given if t in set(decoded["train"])]  # shuffled
        assert 0.04 < heldout[0] / len(given) < 0.17
        assert all(0 not in d for d in read_documents(out / "train" / name))  # no end of text is stored
    assert [table["domains"][n]["licence"] for n in "ab"] == ["MIT", None]
    assert [table["domains"][n]["source"] for n in "ab"] == [None, "somewhere 1.0"]
    assert inspect_data(out, verify=True).problems == ()


def test_processes_do_not_change_the_result(
    corpus: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_job, "PART_BYTES", 4000)
    for processes in (1, 2):
        prepare(
            corpus, tmp_path / str(processes), tokenizer="train:300", processes=processes, shard_size=8000
        )
    assert same_tree(tmp_path / "1", tmp_path / "2")
    assert len(list((tmp_path / "1/train/a").glob("*.zstd"))) > 1


def test_parts_do_not_change_the_shards(
    corpus: dict[str, Path], codec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for part_bytes in (700, 3000, 1 << 20):
        monkeypatch.setattr(prepare_job, "PART_BYTES", part_bytes)
        prepare(corpus, tmp_path / str(part_bytes), tokenizer=codec, processes=1)
    assert same_tree(tmp_path / "700", tmp_path / "3000")
    assert same_tree(tmp_path / "700", tmp_path / str(1 << 20))


KILLED = """
import json, os, signal, sys
import velopath.prepare.job as job
from velopath.prepare import prepare
job.PART_BYTES = 2000
inputs, out, codec, stage_of_end, stop = json.loads(sys.argv[1]), *sys.argv[2:5], int(sys.argv[5])
calls = 0
def progress(stage, done, total):
    global calls
    calls += stage == stage_of_end
    if calls == stop:
        os.kill(os.getpid(), signal.SIGKILL)
if __name__ == "__main__":
    prepare(inputs, out, tokenizer=codec, processes=1, shard_size=8000, progress=progress)
"""


def test_restart_after_kill(
    corpus: dict[str, Path], codec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_job, "PART_BYTES", 2000)
    options: dict[str, Any] = {"tokenizer": codec, "processes": 1, "shard_size": 8000}
    prepare(corpus, tmp_path / "whole", **options)
    worked: Counter[str] = Counter()  # what a run does itself: pieces scanned, parts encoded, shards written

    def count(module: Any, name: str) -> None:
        does = getattr(module, name)

        def counting(*given: Any, **named: Any) -> Any:
            worked[name] += 1
            return does(*given, **named)

        monkeypatch.setattr(module, name, counting)

    count(prepare_tasks, "scan")
    count(prepare_tasks, "read_contents")
    count(prepare_shards, "MdsWriter")
    prepare(corpus, tmp_path / "count", **options)
    parts, shards = worked["read_contents"], worked["MdsWriter"]
    assert worked["scan"] == 151
    assert parts > 15
    assert shards > 5
    for stage, stop, reused in (
        ("scan", 1, ()),
        ("encode", 2, ()),
        ("write", 2, ()),
        ("write", shards - 1, ("a",)),
    ):
        out = tmp_path / f"killed {stage} {stop}"
        given = json.dumps({n: str(p) for n, p in corpus.items()})
        (tmp_path / "killed.py").write_text(KILLED)
        command = [sys.executable, str(tmp_path / "killed.py"), given, str(out), str(codec), stage, str(stop)]
        assert subprocess.run(command, check=False, timeout=60).returncode == -signal.SIGKILL
        assert not out.exists()  # nothing looks complete
        worked.clear()
        assert prepare(corpus, out, **options).reused == reused
        # What was done before the kill is not done again.
        assert worked["scan"] == (150 if stage == "scan" else 0)
        assert worked["read_contents"] == {"scan": parts, "encode": parts - stop, "write": 0}[stage]
        assert worked["MdsWriter"] == (shards - stop if stage == "write" else shards)
        assert same_tree(out, tmp_path / "whole")
        assert not list(tmp_path.glob("*.partial"))


def test_killed_run_of_other_settings_is_not_taken(
    corpus: dict[str, Path], codec: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"

    def fail(stage: str, done: int, total: int) -> None:
        if stage == "encode" and done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(corpus, out, tokenizer=codec, processes=1, progress=fail)
    assert (tmp_path / "out.partial").is_dir()
    made = prepare(corpus, out, tokenizer=codec, processes=1, heldout_percent=30)
    assert made.reused == ()
    assert inspect_data(out, verify=True).problems == ()
    prepare(corpus, tmp_path / "fresh", tokenizer=codec, processes=1, heldout_percent=30)
    assert same_tree(out, tmp_path / "fresh")


def test_copies_are_dropped_and_fall_on_one_side(codec: Path, tmp_path: Path) -> None:
    documents = texts(200, 3)
    write_jsonl(tmp_path / "a/1.jsonl", [*documents, *documents[:50]])
    write_jsonl(tmp_path / "a/2.jsonl", documents[:10])
    write_jsonl(tmp_path / "b.jsonl", documents[::-1])
    made = prepare(
        {"a": tmp_path / "a", "b": tmp_path / "b.jsonl"}, tmp_path / "out", tokenizer=codec, processes=1
    )
    first, second = made.plans
    assert (first.dropped["duplicates"], second.dropped["duplicates"]) == (60, 0)
    dropped = {reason: 60 if reason == "duplicates" else 0 for reason in REASONS}
    assert json.loads((tmp_path / "out/prepare.json").read_text())["left_out"]["a"] == dropped
    assert json.loads((tmp_path / "out/domains.json").read_text())["domains"]["a"]["dropped"] == dropped
    for split in ("train", "heldout"):  # the same text falls on the same side, in the same place
        a, b = (list(read_documents(tmp_path / "out" / split / n)) for n in "ab")
        assert [x.tolist() for x in a] == [x.tolist() for x in b]


def test_split_without_documents(codec: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", ["one document"])
    with pytest.raises(
        DataError, match=r"domain 'd': (none of its 1 documents is|all of its 1 documents are) held out"
    ):
        prepare({"d": path}, tmp_path / "out", tokenizer=codec, processes=1)
    made = prepare({"d": path}, tmp_path / "out", tokenizer=codec, processes=1, heldout_percent=0)
    assert made.table is not None
    assert made.table["domains"]["d"]["heldout_documents"] == 0
    assert not (tmp_path / "out/heldout").exists()
    assert inspect_data(tmp_path / "out", verify=True).problems == ()


def test_without_end_of_text(codec: Path, tmp_path: Path, corpus: dict[str, Path]) -> None:
    made = prepare({"a": corpus["a"]}, tmp_path / "out", tokenizer=codec, processes=1, eos="")
    assert made.table is not None
    assert made.table["eos"] is None
    assert made.table["domains"]["a"]["tokens"] == recount(tmp_path / "out", "train", "a")[1]
    assert inspect_data(tmp_path / "out", verify=True).problems == ()


def test_trained_tokenizer_reads_train_documents_only(corpus: dict[str, Path], tmp_path: Path) -> None:
    made = prepare(
        {"a": corpus["a"]}, tmp_path / "out", tokenizer="train:300", processes=1, heldout_percent=20
    )
    again = train_bpe(
        [load_tokenizer(tmp_path / "out").decode(d) for d in read_documents(tmp_path / "out/train/a")], 300
    )
    assert made.vocab_size == 300
    assert again.json == (tmp_path / "out/tokenizer.json").read_text()


def test_out_with_other_content(corpus: dict[str, Path], codec: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()

    def run(**options: Any) -> Prepared:
        return prepare({"a": corpus["a"]}, out, tokenizer=codec, processes=1, **options)

    (out / "thesis.tex").write_text("")
    for force in (False, True):
        with pytest.raises(ConfigError, match="holds other files and was not made by prepare"):
            run(force=force)
    (out / "thesis.tex").unlink()
    run(licences={"a": "MIT"})
    before = (out / "train/a/index.json").stat().st_ino
    again = run(sources={"a": "here"})  # nothing but a note is new
    assert again.reused == ("a",)
    assert again.table == json.loads((out / "domains.json").read_text())
    assert (again.table["domains"]["a"]["licence"], again.table["domains"]["a"]["source"]) == ("MIT", "here")
    assert (out / "train/a/index.json").stat().st_ino == before
    with pytest.raises(
        ConfigError, match="was prepared from other inputs or settings; use force or another folder"
    ):
        run(heldout_percent=20)
    assert not (tmp_path / "out.partial").exists()
    run(heldout_percent=20, force=True)
    assert inspect_data(out, verify=True).problems == ()
    assert os.listdir(tmp_path) == ["out"]


def test_dry_run_writes_nothing(corpus: dict[str, Path], codec: Path, tmp_path: Path) -> None:
    dry = prepare(corpus, tmp_path / "deep/out", tokenizer=codec, processes=1, dry_run=True)
    assert os.listdir(tmp_path) == []
    assert dry.table is None
    made = prepare(corpus, tmp_path / "deep/out", tokenizer=codec, processes=1)
    assert made.table is not None
    for plan in dry.plans:
        assert plan.tokens == pytest.approx(made.table["domains"][plan.name]["tokens"], rel=0.05)
        assert len(plan.train) == made.table["domains"][plan.name]["documents"]
    assert dry.disk_needed == sum(2 * 2 * p.tokens for p in dry.plans)
    assert dry.disk_free > 0


def test_disk_that_is_too_full(
    corpus: dict[str, Path], codec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_module, "_disk_free", lambda out: 1000)
    with pytest.raises(DataError, match=r"about [\d,]+ bytes of disk are needed, 1,000 are free"):
        prepare(corpus, tmp_path / "out", tokenizer=codec, processes=1)


def test_two_at_once(corpus: dict[str, Path], codec: Path, tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    with (
        locked(tmp_path / "out.partial/lock"),
        pytest.raises(ConfigError, match="another prepare is writing .*out; wait for it"),
    ):
        prepare(corpus, tmp_path / "out", tokenizer=codec, processes=1)
    prepare(corpus, tmp_path / "out", tokenizer=codec, processes=1)
