"""Input of prepare: every form of it gives the same, and every bad one is refused by file and line."""

from __future__ import annotations

import gzip
import os
from pathlib import Path
from typing import Any

import pytest
import zstandard

from small_corpus import make_codec, make_corpus, same_tree, texts, write_jsonl
from velopath.errors import ConfigError, DataError
from velopath.prepare import prepare


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_codec(tmp_path_factory.mktemp("codec"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def test_forms_of_input_give_the_same(codec: Path, tmp_path: Path) -> None:
    documents = texts(60, 4)
    plain = write_jsonl(tmp_path / "in/plain.jsonl", documents)
    inputs: dict[str, Any] = {"plain": plain, "glob": str(tmp_path / "in/pl*.jsonl"), "list": [plain, plain]}
    inputs["gz"] = tmp_path / "in/x.jsonl.gz"
    inputs["gz"].write_bytes(gzip.compress(plain.read_bytes()))
    inputs["zst"] = tmp_path / "in/y.jsonl.zst"
    half = len(plain.read_bytes()) // 2
    pieces = plain.read_bytes()[:half], plain.read_bytes()[half:]
    inputs["zst"].write_bytes(
        b"".join(zstandard.compress(p) for p in pieces)
    )  # two frames, cut inside a line
    inputs["mark"] = tmp_path / "in/z.jsonl"
    inputs["mark"].write_bytes(b"\xef\xbb\xbf" + plain.read_bytes().replace(b"\n", b"\r\n\r\n"))
    inputs["parts"] = tmp_path / "in/parts.txt"
    inputs["parts"].write_text("\f".join(documents) + "\f \n\f")
    (tmp_path / "in/files/deep").mkdir(parents=True)
    for i, text in enumerate(documents):
        (tmp_path / "in/files" / ("deep" if i % 2 else "") / f"{i}.txt").write_text(text)
    (tmp_path / "in/files/.hidden.txt").write_bytes(b"\xff")
    (tmp_path / "in/files/image.png").write_bytes(b"\xff")
    inputs["files"] = tmp_path / "in/files"
    out = tmp_path / "out"
    options: dict[str, Any] = {"tokenizer": codec, "separator": "\f", "processes": 1, "heldout_percent": 10}
    dry = prepare(inputs, out, dry_run=True, **options)
    made = prepare(inputs, out, **options)
    assert {p.name: p.tokens for p in dry.plans} == {p.name: p.tokens for p in made.plans}
    assert {p.name: n for p in made.plans if (n := p.dropped["empty"])} == {"parts": 1}
    assert made.table is not None
    assert len({e["hash"] for e in made.table["domains"].values()}) == 1
    for name in inputs:
        assert same_tree(out / "train/plain", out / "train" / name), name


BAD_TEXT: list[tuple[str, str, bytes, str]] = [
    ("utf-8", "x.txt", b"one\ntwo\nbad \xff here", r"x.txt:3: not UTF-8: byte 0xff \(invalid start byte\)"),
    ("utf-8 in a line", "x.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', r"x.jsonl:2: not UTF-8: byte 0xe9"),
    ("empty", "x.txt", b"", r"x.txt: the file is empty"),
    ("empty lines file", "x.jsonl", b"", r"x.jsonl: the file is empty"),
    ("json", "x.jsonl", b'{"text": "a"}\n\n{"text": \n', r"x.jsonl:3: not valid JSON: Expecting value"),
    ("no object", "x.jsonl", b'["a"]\n', r"x.jsonl:1: the line holds a list; expected an object with a field 'text'"),
    ("field", "x.jsonl", b'{"body": "a", "id": 1}\n',
     r"x.jsonl:1 field 'text': no such field; the fields there are: body, id"),
    ("type", "x.jsonl", b'{"text": "a"}\n{"text": 5}\n', r"x.jsonl:2 field 'text': the value is of type int"),
    ("null", "x.jsonl", b'{"text": null}\n', r"x.jsonl:1 field 'text': the value is of type NoneType"),
    ("half a pair", "x.jsonl", b'{"text": "\\ud83d"}\n', r"x.jsonl:1: the text holds half a surrogate pair \(.ud83d\)"),
    ("deep json", "x.jsonl", b"[" * 200_000 + b"\n", r"x.jsonl:1: not valid JSON"),
    ("blank only", "x.jsonl", b'{"text": "  "}\n\n', r"domain 'd' has no document: 1 are empty"),
    ("gz cut", "x.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 999)[:-9], r"x.jsonl.gz: not a sound compressed file"),
    ("gz none", "x.txt.gz", b"plain", r"x.txt.gz: not a sound compressed file"),
    ("zst cut", "x.txt.zst", zstandard.compress(os.urandom(200_000))[:150_000], r"zst: not a sound .*cut short"),
    ("zst none", "x.txt.zst", b"plain", r"x.txt.zst: not a sound compressed file"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content", "message"), [b[1:] for b in BAD_TEXT], ids=[b[0] for b in BAD_TEXT]
)
def test_bad_text(codec: Path, tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        prepare({"d": tmp_path / "in"}, tmp_path / "out", tokenizer=codec, processes=1)
    assert sorted(os.listdir(tmp_path)) == ["in"]


def test_error_of_a_worker_process_is_whole(codec: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "good.jsonl", texts(50, 5))
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": 5}\n')
    inputs = {"bad": tmp_path / "bad.jsonl", "good": tmp_path / "good.jsonl"}
    with pytest.raises(DataError, match=r"bad.jsonl:2 field 'text': the value is of type int") as caught:
        prepare(inputs, tmp_path / "out", tokenizer=codec, processes=2)
    assert (caught.value.line, caught.value.field) == (2, "text")


def test_file_that_changes_meanwhile(codec: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", texts(50, 6))

    def change(stage: str, done: int, total: int) -> None:
        if stage == "scan" and done == total:
            path.write_text(path.read_text().replace("cat", "CAT"))

    with pytest.raises(DataError, match=r"x.jsonl: the document at byte \d+ changed since it was scanned"):
        prepare({"d": path}, tmp_path / "out", tokenizer=codec, processes=1, progress=change)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heldout_percent": 100}, "heldout_percent is 100; expected 0 or more and less than 100"),
        ({"separator": ""}, "the separator is empty"),
        ({"dtype": "int16"}, "dtype is 'int16'; expected uint16 or uint32"),
        ({"compression": "lz4"}, "compression is 'lz4'; expected none, zstd or zstd:LEVEL"),
        ({"shard_size": 5}, "shard_size is 5; expected 1024 bytes to less than 4 GiB"),
        ({"processes": 0}, "processes is 0; expected 1 or more"),
        ({"licences": {"c": "MIT"}}, "licence given for unknown domain 'c'; the domains are a, b"),
        ({"tokenizer": "train:many"}, "tokenizer is 'train:many'; expected a file or train:SIZE"),
        ({"eos": "<nope>"}, "the tokenizer has no end-of-text token '<nope>'"),
    ],
)
def test_wrong_settings(
    corpus: dict[str, Path], codec: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        prepare(corpus, tmp_path / "out", **({"tokenizer": codec, "processes": 1} | options))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "no domains: name at least one"),
        ({"../x": "a"}, "domain name '../x' can be no folder"),
        ({"a": "nothing/here"}, "domain 'a': no such file or folder: nothing/here"),
        ({"a": "nothing/*.txt"}, r"domain 'a': no such file or folder: nothing/\*.txt"),
        (
            {"a": __file__},
            "test_prepare_input.py is of no known kind; expected one of .txt, .txt.gz, .txt.zst, .jsonl",
        ),
        ({"a": Path(__file__).parent}, "tests has none of .txt, .*; it holds .*.py"),
    ],
)
def test_wrong_inputs(codec: Path, tmp_path: Path, inputs: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prepare(inputs, tmp_path / "out", tokenizer=codec, processes=1)
