"""Prepare from real corpora: tables and MDS, pieces of one file, filters, near-duplicates; all by their results."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from small_corpus import WORDS, make_codec, same_tree, texts, write_jsonl
from velopath.errors import ConfigError, DataError
from velopath.inspection import inspect_data
from velopath.mds import MdsWriter, read_documents
from velopath.prepare import filters, plan, prepare
from velopath.prepare.documents import scan
from velopath.prepare.filters import Filters
from velopath.prepare.near_duplicates import near_copies, sketcher
from velopath.prepare.sources import Reading, cut_file
from velopath.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_codec(tmp_path_factory.mktemp("codec"))


def write_dataset(folder: Path, documents: list[str], files: int = 2, rows: int = 7) -> Path:
    """What `datasets.Dataset.save_to_disk` writes: Arrow stream files and a state.json that lists them."""
    folder.mkdir(parents=True)
    names = [f"data-{k:05d}-of-{files:05d}.arrow" for k in range(files)]
    for k, name in enumerate(names):
        table = pa.table({"id": range(len(documents[k::files])), "text": documents[k::files]})
        with pa.OSFile(str(folder / name), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table, max_chunksize=rows)
    state = {"_data_files": [{"filename": n} for n in names], "_fingerprint": "0", "_split": "train"}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")
    (folder / "cache-0.arrow").write_bytes(b"made by datasets for itself")
    return folder


def write_text_mds(folder: Path, documents: list[str], packed: bool) -> Path:
    """MDS with columns id (int), text (str) and tokens, as mosaicml-streaming lays them out."""
    folder.mkdir(parents=True)
    head = {
        "version": 2, "format": "mds", "compression": "zstd" if packed else None, "hashes": [],
        "size_limit": 1 << 26, "column_names": ["id", "text", "tokens"],
        "column_encodings": ["int", "str", "bytes"], "column_sizes": [8, None, None],
    }  # fmt: skip
    shards = []
    for number, part in enumerate((documents[:20], documents[20:])):
        samples = []
        for k, text in enumerate(part):
            raw, ids = text.encode(), np.arange(k, k + 3 + number, dtype="<i8").tobytes()
            sizes = len(raw).to_bytes(4, "little") + len(ids).to_bytes(4, "little")
            samples.append(sizes + k.to_bytes(8, "little") + raw + ids)
        config = json.dumps(head, sort_keys=True).encode()
        first = 4 + 4 * (len(samples) + 1) + len(config)
        offsets = first + np.cumsum([0, *map(len, samples)])
        shard = (
            len(samples).to_bytes(4, "little") + offsets.astype("<u4").tobytes() + config + b"".join(samples)
        )
        name = f"shard.{number:05d}.mds"
        entry: dict[str, Any] = {**head, "samples": len(samples), "zip_data": None}
        entry["raw_data"] = {"basename": name, "bytes": len(shard), "hashes": {}}
        if packed:
            content = zstandard.compress(shard)
            entry["zip_data"] = {"basename": f"{name}.zstd", "bytes": len(content), "hashes": {}}
            (folder / f"{name}.zstd").write_bytes(content)
        else:
            (folder / name).write_bytes(shard)
        shards.append(entry)
    (folder / "index.json").write_text(json.dumps({"version": 2, "shards": shards}))
    return folder


def test_tables_and_mds_give_the_same_as_lines(
    codec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "PIECE_BYTES", 900)  # several pieces of every input
    documents = [*texts(60, 4), "naïve Ünïcode — 東京\n"]
    source = tmp_path / "in"
    inputs: dict[str, Any] = {"lines": write_jsonl(source / "x.jsonl", documents)}
    table = pa.table({"id": range(len(documents)), "text": documents, "nested": [[1]] * len(documents)})
    inputs["parquet"] = source / "x.parquet"
    pq.write_table(table, inputs["parquet"], row_group_size=10)
    inputs["dictionary"] = source / "y.parquet"
    pq.write_table(table.set_column(1, "text", table["text"].dictionary_encode()), inputs["dictionary"])
    inputs["dataset"] = write_dataset(source / "saved/train", documents)
    inputs["splits"] = source / "saved"
    inputs["mds"] = write_text_mds(source / "mds", documents, packed=False)
    inputs["mds_zstd"] = write_text_mds(source / "mds_zstd", documents, packed=True)
    inputs["mds_index"] = source / "mds/index.json"
    options: dict[str, Any] = {"tokenizer": codec, "heldout_percent": 10}
    made = prepare(inputs, tmp_path / "out", processes=2, **options)
    dry = prepare(inputs, tmp_path / "dry", processes=1, dry_run=True, **options)
    assert {p.name: p.tokens for p in dry.plans} == {p.name: p.tokens for p in made.plans}
    assert {p.name: p.files for p in made.plans if p.files > 1} == {"dataset": 2, "splits": 2}
    assert all(len(p.sources) > 1 for p in made.plans if p.name != "dictionary")
    for name in inputs:
        assert same_tree(tmp_path / "out/train/lines", tmp_path / "out/train" / name), name
        assert same_tree(tmp_path / "out/heldout/lines", tmp_path / "out/heldout" / name), name


def test_tokens_pass_through(codec: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(codec)
    ids = [x.astype(np.int64) for x in tokenizer.encode(texts(80, 8))]
    for name, column, dtype in (("u16", "tokens", "uint16"), ("i64", "input_ids", "int64")):
        with MdsWriter(tmp_path / name, dtype=dtype, column=column, size_limit=2000) as writer:
            for k, document in enumerate(ids):
                writer.write([*document, 0] if k % 2 else document)  # 0 ends a text
    inputs = {n: tmp_path / n for n in ("u16", "i64")}
    made = prepare(inputs, tmp_path / "out", tokenizer=codec, processes=1, heldout_percent=10)
    found = [d.tolist() for s in ("train", "heldout") for d in read_documents(tmp_path / "out" / s / "i64")]
    assert sorted(found) == sorted(d.tolist() for d in ids)
    assert same_tree(tmp_path / "out/train/u16", tmp_path / "out/train/i64")
    assert made.table is not None
    assert made.table["domains"]["u16"]["bytes"] == 0
    assert inspect_data(tmp_path / "out", verify=True).problems == ()


def test_tokens_of_llm_foundry(codec: Path, tmp_path: Path) -> None:
    """Its `bytes` column holds int64 tokens."""
    write_text_mds(tmp_path / "in", texts(50, 3), packed=True)
    prepare({"d": tmp_path / "in"}, tmp_path / "out", tokenizer=codec, processes=1, field="other")
    found = {tuple(d) for s in ("train", "heldout") for d in read_documents(tmp_path / "out" / s / "d")}
    assert found == {tuple(range(k, k + 3)) for k in range(20)} | {tuple(range(k, k + 4)) for k in range(30)}


def test_tokens_of_another_tokenizer(codec: Path, tmp_path: Path) -> None:
    with MdsWriter(tmp_path / "in") as writer:
        for k in range(30):
            writer.write([1, 2, 400 + k])
    inputs = {"d": tmp_path / "in"}
    with pytest.raises(DataError, match=r"token id 4\d\d is not below the tokenizer's 400 entries; give the"):
        prepare(inputs, tmp_path / "out", tokenizer=codec, processes=1)
    with pytest.raises(ConfigError, match="'d' holds tokens already; give the tokenizers file that made"):
        prepare(inputs, tmp_path / "out2", tokenizer="train:300", processes=1)
    with pytest.raises(ConfigError, match="'d' holds tokens .*; length and language filters need text"):
        prepare(inputs, tmp_path / "out2", tokenizer=codec, processes=1, min_chars=5)
    write_jsonl(tmp_path / "in/x.jsonl", ["text"])
    with pytest.raises(ConfigError, match=r"'d' mixes text with tokens \(.*index.json\); make two domains"):
        prepare(inputs, tmp_path / "out2", tokenizer=codec, processes=1)


def bad_tables(folder: Path) -> list[tuple[str, str]]:
    """Write bad tables; returns names and messages."""
    folder.mkdir()
    good = pa.table({"text": ["a", "b"]})
    pq.write_table(pa.table({"body": ["a"]}), folder / "column.parquet")
    pq.write_table(pa.table({"text": [1, 2]}), folder / "type.parquet")
    pq.write_table(pa.table({"text": ["a", None]}), folder / "null.parquet")
    pq.write_table(good, folder / "cut.parquet")
    (folder / "cut.parquet").write_bytes((folder / "cut.parquet").read_bytes()[:-9])
    pq.write_table(
        pa.table({"text": [t * 9 for t in texts(99, 1)]}), folder / "page.parquet", compression="zstd"
    )
    content = bytearray((folder / "page.parquet").read_bytes())
    content[50:900] = b"\xff" * 850
    (folder / "page.parquet").write_bytes(content)
    (folder / "none.arrow").write_bytes(b"not arrow at all, but some text that is long enough")
    write_dataset(folder / "missing", texts(9, 1))
    (folder / "missing/data-00001-of-00002.arrow").unlink()
    return [
        ("column.parquet", r"column.parquet field 'text': no such column; the columns are: body"),
        ("type.parquet", r"type.parquet field 'text': the column is of type int64; expected text"),
        ("null.parquet", r"null.parquet sample 1 field 'text': the value is of type NoneType; expected text"),
        ("cut.parquet", r"cut.parquet: not a sound Parquet file"),
        ("page.parquet", r"page.parquet: not a sound Parquet file"),
        ("none.arrow", r"none.arrow: not a sound Arrow file"),
        ("missing", r"state.json: the data file 'data-00001-of-00002.arrow' that it lists is missing"),
    ]


def test_bad_tables(codec: Path, tmp_path: Path) -> None:
    for name, message in bad_tables(tmp_path / "in"):
        with pytest.raises(DataError, match=message):
            prepare({"d": tmp_path / "in" / name}, tmp_path / "out", tokenizer=codec, processes=1)
        assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    ("package", "options"),
    [("pyarrow", {}), ("datasketch", {"near_duplicates": 0.8}), ("py3langid.langid", {"languages": ["en"]})],
)
def test_missing_package(
    codec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, options: dict[str, Any]
) -> None:
    pq.write_table(pa.table({"text": texts(9, 1)}), tmp_path / "x.parquet")
    plain = builtins.__import__

    def without(name: str, *given: Any) -> Any:
        if name == package:
            raise ImportError(name)
        return plain(name, *given)

    monkeypatch.setattr(builtins, "__import__", without)
    for cached in (sketcher, filters._language_teller):
        cached.cache_clear()
    with pytest.raises(
        ConfigError, match=rf"needs {package.split('.')[0]}.*: pip install 'velopath\[corpora\]'"
    ):
        prepare({"d": tmp_path / "x.parquet"}, tmp_path / "out", tokenizer=codec, processes=1, **options)


@pytest.mark.parametrize("separator", ["\f", "\n\n\n", "aba", "\n"])
@pytest.mark.parametrize("seed", range(4))
def test_pieces_of_a_text_file(tmp_path: Path, separator: str, seed: int) -> None:
    """Whatever the size of a piece, the documents are those of `str.split`, also where separators overlap."""
    rng = np.random.default_rng(seed)
    letters = list({*separator, "a", "b", "é"})
    content = "".join(rng.choice(letters, 700)) + separator
    path = tmp_path / "x.txt"
    path.write_bytes(content.encode())
    reading = Reading(separator=separator)
    expected = [p for p in content.split(separator) if p.strip()]
    for piece_bytes in (1, 7, 64, 1 << 20):
        found: list[str] = []
        for source in cut_file(path, reading, piece_bytes):
            documents = scan(source, 0, reading, Filters(), None).documents
            raw = path.read_bytes()
            found += [raw[d["begin"] : d["begin"] + d["stored"]].decode() for d in documents]
        assert found == expected


def test_lines_of_errors_in_later_pieces(
    codec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "PIECE_BYTES", 500)
    path = write_jsonl(tmp_path / "x.jsonl", texts(50, 1))
    with open(path, "ab") as file:
        file.write(b'{"text": 5}\n')
    with pytest.raises(DataError, match=r"x.jsonl:51 field 'text': the value is of type int"):
        prepare({"d": path}, tmp_path / "out", tokenizer=codec, processes=1)


def test_length_and_language(codec: Path, tmp_path: Path) -> None:
    english = [f"This is a document in plain English, and it has the number {k} in it." for k in range(30)]
    german = [
        f"Dies ist ein Text in deutscher Sprache, und er trägt die Nummer {k} bei sich." for k in range(9)
    ]
    path = write_jsonl(
        tmp_path / "x.jsonl", [*english, *german, "ab", "abc", *[english[0] * 20], " ", english[3]]
    )
    made = prepare(
        {"d": path},
        tmp_path / "out",
        tokenizer=codec,
        processes=1,
        min_chars=3,
        max_chars=999,
        languages=["en"],
    )
    assert made.table is not None
    dropped = made.table["domains"]["d"]["dropped"]
    assert (dropped["short"], dropped["long"], dropped["empty"], dropped["duplicates"]) == (1, 1, 1, 1)
    assert dropped["language"] in (9, 10)  # three letters may be of any language
    decoded = {load_tokenizer(codec).decode(d) for s in ("train", "heldout")
               for d in read_documents(tmp_path / "out" / s / "d")}  # fmt: skip
    assert decoded - {"abc"} == set(english)
    for wrong, message in (
        ({"min_chars": -1}, "min_chars is -1"),
        ({"min_chars": 5, "max_chars": 4}, "max_chars is 4; expected 5 or more"),
        ({"languages": ["english"]}, "unknown language 'english'; expected some of ace, af"),
        ({"near_duplicates": 3}, "near_duplicates is 3; expected a similarity of 0.1 to 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            prepare({"d": path}, tmp_path / "o", tokenizer=codec, processes=1, **wrong)


def long_texts(count: int, words: int) -> list[list[str]]:
    rng = np.random.default_rng(5)
    return [[f"{w}{n}" for w, n in zip(rng.choice(WORDS, words), rng.integers(0, 99, words), strict=True)]
            for _ in range(count)]  # fmt: skip


def jaccard(a: list[str], b: list[str]) -> float:
    runs = [{tuple(x[k : k + 5]) for k in range(len(x) - 4)} for x in (a, b)]
    return len(runs[0] & runs[1]) / len(runs[0] | runs[1])


def test_near_duplicates_by_their_similarity() -> None:
    """Of pairs made alike to all degrees, those well over the threshold go and those well under it stay."""
    rng = np.random.default_rng(6)
    made = sketcher(0.8)
    right = wrong = 0
    for words in long_texts(150, 300):
        changed = list(words)
        for at in rng.integers(0, 300, int(rng.integers(0, 25))):
            changed[at] = "other"
        similar = jaccard(words, changed)
        pairs = [made.sketch(" ".join(w)) for w in (words, changed)]
        keys, sketches = (np.array([p[k] for p in pairs]) for k in range(2))
        dropped = near_copies(keys, lambda places, all_=sketches: all_[places], 0.8)
        assert not dropped[0]
        if abs(similar - 0.8) > 0.1:  # 128 permutations tell a similarity to about 0.04
            right += dropped[1] == (similar > 0.8)
            wrong += dropped[1] != (similar > 0.8)
    assert right > 60
    assert wrong <= 1


def test_near_duplicates_are_dropped_in_any_order_and_process(
    codec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "PIECE_BYTES", 20_000)
    originals = [" ".join(w) for w in long_texts(60, 120)]
    copies = [t.upper() + " once more" for t in originals[:25]]
    first = write_jsonl(tmp_path / "1.jsonl", [*originals, *copies])
    second = write_jsonl(tmp_path / "2.jsonl", [*copies[::-1], *originals[::-1]])
    for name, path, processes in (("a", first, 1), ("b", second, 1), ("c", first, 2)):
        made = prepare(
            {"d": path}, tmp_path / name, tokenizer=codec, processes=processes, near_duplicates=0.8
        )
        assert made.table is not None
        assert made.table["domains"]["d"]["dropped"]["near_duplicates"] == 25
        assert made.table["domains"]["d"]["documents"] + made.table["domains"]["d"]["heldout_documents"] == 60
        assert same_tree(tmp_path / "a", tmp_path / name)
    dry = prepare(
        {"d": first}, tmp_path / "x", tokenizer=codec, processes=1, near_duplicates=0.8, dry_run=True
    )
    assert dry.plans[0].dropped["near_duplicates"] == 25
