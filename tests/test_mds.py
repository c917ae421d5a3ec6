"""MDS: encodings against hand-built bytes, what the writer writes, and every malformed index and shard refused."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from mds_builder import write_folder
from velopath.errors import ConfigError, DataError
from velopath.mds import MdsWriter, load_index, read_documents, token_column
from velopath.mds.format import Columns, fixed_size

TOKENS = [5, 60000, 7]


def test_example_of_the_format(tmp_path: Path) -> None:
    # The design notes' example: 3 tokens as ndarray:uint16 are `04 03` and 6 bytes.
    with MdsWriter(tmp_path, compression=None) as writer:
        writer.write(TOKENS)
    raw = (tmp_path / "shard.00000.mds").read_bytes()
    assert raw.endswith(struct.pack("<I", 8) + b"\x04\x03" + struct.pack("<3H", *TOKENS))


VALUE_CODES = {
    "uint8": 8,
    "int8": 9,
    "uint16": 16,
    "int16": 17,
    "uint32": 32,
    "int32": 33,
    "uint64": 64,
    "int64": 65,
}
FORMATS = {
    "uint8": "B",
    "uint16": "H",
    "int16": "h",
    "uint32": "I",
    "int32": "i",
    "uint64": "Q",
    "int64": "q",
}


@pytest.mark.parametrize("name", ["tokens", "input_ids"])
@pytest.mark.parametrize("dtype", list(FORMATS))
@pytest.mark.parametrize("form", ["plain ndarray", "dtype", "dtype and shape", "wide length"])
def test_every_token_encoding(tmp_path: Path, name: str, dtype: str, form: str) -> None:
    documents = [[1, 2, 3], [4, 100, 6], [7, 8, 127]]  # same length: a fixed shape holds them too
    bodies = [struct.pack(f"<3{FORMATS[dtype]}", *d) for d in documents]
    encoding, values, size = {
        "plain ndarray": ("ndarray", [bytes([VALUE_CODES[dtype], 4, 3]) + b for b in bodies], None),
        "dtype": (f"ndarray:{dtype}", [b"\x04\x03" + b for b in bodies], None),
        "dtype and shape": (f"ndarray:{dtype}:3", bodies, len(bodies[0])),
        "wide length": (f"ndarray:{dtype}", [b"\x07" + struct.pack("<Q", 3) + b for b in bodies], None),
    }[form]
    write_folder(tmp_path, [[v] for v in values], {name: (encoding, size)})
    got = list(read_documents(tmp_path))
    assert [g.tolist() for g in got] == documents
    assert all(g.dtype == np.dtype(dtype) and g.flags.aligned and g.flags.writeable for g in got)


@pytest.mark.parametrize("dtype", list(FORMATS))
def test_bytes_columns(tmp_path: Path, dtype: str) -> None:
    documents = [[1, 2, 3], [], [4]]
    write_folder(
        tmp_path,
        [[struct.pack(f"<{len(d)}{FORMATS[dtype]}", *d)] for d in documents],
        {"tokens": ("bytes", None)},
    )
    assert [d.tolist() for d in read_documents(tmp_path, bytes_dtype=dtype)] == documents
    if dtype == "int64":
        assert [d.tolist() for d in read_documents(tmp_path)] == documents


@pytest.mark.parametrize("zstd", [False, True])
def test_columns_beside_the_tokens(tmp_path: Path, zstd: bool) -> None:
    columns: dict[str, tuple[str, int | None]] = {
        "a": ("str", None),
        "id": ("int", 8),
        "tokens": ("ndarray:uint16", None),
        "z": ("json", None),
        "zz": ("ndarray:float32:2,2", 16),
    }
    samples = [
        [
            b"x" * k,
            struct.pack("<q", k),
            b"\x04" + bytes([k]) + struct.pack(f"<{k}H", *range(k)),
            b"{}",
            b"\0" * 16,
        ]
        for k in (3, 0, 200)
    ]
    write_folder(tmp_path, samples, columns, zstd=zstd, hashes=("sha1", "md5"))
    assert [d.tolist() for d in read_documents(tmp_path)] == [list(range(k)) for k in (3, 0, 200)]


def test_shards_without_samples_are_legal(tmp_path: Path) -> None:
    write_folder(tmp_path, [], {"tokens": ("ndarray:uint16", None)}, zstd=True)
    assert list(read_documents(tmp_path)) == []
    assert load_index(tmp_path).samples == 0


def test_merged_index_with_subfolders(tmp_path: Path) -> None:
    # What merging the indexes of sub-folders gives: basenames like "0/shard.00000.mds".
    shards = []
    for k in range(2):
        index = write_folder(
            tmp_path / str(k), [[b"\x04\x01" + struct.pack("<H", k)]], {"tokens": ("ndarray:uint16", None)}
        )
        index["shards"][0]["raw_data"]["basename"] = f"{k}/shard.00000.mds"
        shards += index["shards"]
    (tmp_path / "index.json").write_text(json.dumps({"version": 2, "shards": shards}))
    assert [d.tolist() for d in read_documents(tmp_path)] == [[0], [1]]


def decode_like_the_reference(folder: Path) -> list[list[int]]:
    """Samples as mosaicml-streaming 0.13 reads them (MDSReader.get_sample_data, decode_sample, NDArray.decode)."""
    documents = []
    for entry in json.loads((folder / "index.json").read_text())["shards"]:
        info = entry["zip_data"] or entry["raw_data"]
        raw = (folder / info["basename"]).read_bytes()
        if entry["zip_data"]:
            raw = zstandard.decompress(raw)
        for idx in range(entry["samples"]):
            begin, end = np.frombuffer(raw[(1 + idx) * 4 : (1 + idx) * 4 + 8], np.uint32)
            data = raw[begin:end]
            (size,) = np.frombuffer(data[:4], np.uint32)
            value = data[4 : 4 + size]
            width = 2 ** (value[0] % 4)
            shape = np.frombuffer(value[1 : 1 + (value[0] >> 2) * width], f"uint{8 * width}")
            dtype = entry["column_encodings"][0].split(":")[1]
            documents.append(
                np.frombuffer(value[1 + (value[0] >> 2) * width :], dtype).reshape(shape).tolist()
            )
    return documents


@pytest.mark.parametrize("compression", [None, "zstd", "zstd:1", "zstd:22"])
@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_writer_writes_what_the_reference_reads(tmp_path: Path, compression: str | None, dtype: str) -> None:
    # 255/256 and 65,535/65,536: the lengths where the shape gets wider.
    documents = [list(range(n % 1000)) or [9] for n in (1, 255, 256, 999)] + [[3] * 65_535, [4] * 65_536]
    with MdsWriter(
        tmp_path, dtype=dtype, compression=compression, hashes=("xxh64", "sha1"), size_limit=2048
    ) as writer:
        for document in documents:
            writer.write(np.array(document))
    assert (writer.documents, writer.tokens) == (len(documents), sum(map(len, documents)))
    assert decode_like_the_reference(tmp_path) == documents
    assert [d.tolist() for d in read_documents(tmp_path)] == documents
    index = json.loads((tmp_path / "index.json").read_text())
    assert index["version"] == 2
    assert len(index["shards"]) > 3
    for number, entry in enumerate(index["shards"]):
        # The fields, and the order of hash names, that the reference's writer gives.
        assert set(entry) == {
            "version", "format", "compression", "hashes", "size_limit", "column_names", "column_encodings",
            "column_sizes", "samples", "raw_data", "zip_data",
        }  # fmt: skip
        assert entry["hashes"] == ["sha1", "xxh64"]
        assert entry["raw_data"]["basename"] == f"shard.{number:05d}.mds"
        config = {k: v for k, v in entry.items() if k not in ("samples", "raw_data", "zip_data")}
        info = entry["zip_data"] or entry["raw_data"]
        stored = (tmp_path / info["basename"]).read_bytes()
        assert info["bytes"] == len(stored)
        assert info["hashes"] == {
            "sha1": hashlib.sha1(stored).hexdigest(),
            "xxh64": xxhash.xxh64_hexdigest(stored),
        }
        raw = zstandard.decompress(stored) if entry["zip_data"] else stored
        (count,) = struct.unpack("<I", raw[:4])
        (first,) = struct.unpack("<I", raw[4:8])
        assert json.loads(raw[4 + 4 * (count + 1) : first]) == config
        assert raw[4 + 4 * (count + 1) : first] == json.dumps(config, sort_keys=True).encode()


@settings(max_examples=40, deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(0, 65_535), min_size=1, max_size=40), max_size=30),
    limit=st.integers(600, 2000),
    compression=st.sampled_from([None, "zstd"]),
)
def test_round_trip(
    tmp_path_factory: Any, documents: list[list[int]], limit: int, compression: str | None
) -> None:
    folder = tmp_path_factory.mktemp("mds") / "x"
    with MdsWriter(folder, compression=compression, size_limit=limit) as writer:
        for document in documents:
            writer.write(document)
    assert [d.tolist() for d in read_documents(folder)] == documents
    assert all(e.raw_bytes <= limit or e.samples == 1 for e in load_index(folder).shards)


def test_writer_leaves_no_index_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="stop"), MdsWriter(tmp_path, size_limit=400) as writer:
        for _ in range(100):
            writer.write([1, 2, 3])
        raise RuntimeError("stop")
    assert not (tmp_path / "index.json").exists()
    assert not list(tmp_path.glob("*.tmp"))
    with pytest.raises(DataError, match="no such file; expected a folder of MDS shards"):
        load_index(tmp_path)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([], "expected 1-D, integers, not empty"),
        ([[1, 2]], r"shape \(1, 2\) .* expected 1-D"),
        ([1.5], "type float64"),
        ([65_536], r"sample 1: token id 65536 does not fit uint16 \(0 to 65535\); choose a wider dtype"),
        ([-1], "token id -1 does not fit uint16"),
    ],
)
def test_writer_refuses_documents(tmp_path: Path, document: list[Any], message: str) -> None:
    with MdsWriter(tmp_path) as writer:
        writer.write([1])
        with pytest.raises(DataError, match=message):
            writer.write(document)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compression": "gz"}, "compression is 'gz'; expected none, zstd or zstd:LEVEL with LEVEL 1 to 22"),
        ({"compression": "zstd:23"}, "compression is 'zstd:23'"),
        ({"dtype": "float32"}, "dtype is 'float32'; expected one of uint8"),
        ({"hashes": ("crc9",)}, "hash 'crc9' is not known to hashlib or xxhash"),
        ({"size_limit": 1 << 32}, "size_limit is 4294967296; expected 1 to 4294967295 bytes"),
    ],
)
def test_writer_refuses_settings(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        MdsWriter(tmp_path, **options)


def test_writer_refuses_a_finished_folder(tmp_path: Path) -> None:
    with MdsWriter(tmp_path) as writer:
        writer.write([1])
    with pytest.raises(ConfigError, match=r"holds an index.json already"):
        MdsWriter(tmp_path)


def test_damage_is_found_by_its_hash(tmp_path: Path) -> None:
    with MdsWriter(tmp_path, compression=None, hashes=("xxh3_64", "sha256")) as writer:
        writer.write([1, 2, 3])
    file = tmp_path / "shard.00000.mds"
    content = bytearray(file.read_bytes())
    content[-2] ^= 1  # a token: every bound still holds
    file.write_bytes(content)
    with pytest.raises(
        DataError, match=r"shard.00000.mds field 'hashes': (sha256|xxh3_64) is .* the file is damaged"
    ):
        list(read_documents(tmp_path))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            Columns(("text",), ("str",), (None,)),
            r"no column of tokens among \['text'\]; expected one named tokens",
        ),
        (Columns(("tokens",), ("str",), (None,)), "encoding 'str' holds no token array"),
        (Columns(("tokens",), ("int",), (8,)), "encoding 'int' holds no token array"),
        (
            Columns(("tokens",), ("ndarray:float32",), (None,)),
            "encoding 'ndarray:float32' holds no token array",
        ),
        (Columns(("tokens",), ("ndarray:uint16:2,3",), (12,)), "has more than one axis"),
    ],
)
def test_columns_that_hold_no_tokens(columns: Columns, message: str) -> None:
    with pytest.raises(DataError, match=message):
        token_column(columns)


def test_tokens_come_before_input_ids() -> None:
    columns = Columns(("input_ids", "tokens"), ("bytes", "ndarray:uint16:7"), (None, 14))
    found = token_column(columns)
    assert (found.index, found.dtype, found.length, found.plain) == (1, "uint16", 7, False)


@pytest.mark.parametrize(("encoding", "size"), [("int", 8), ("uint8", 1), ("float64", 8), ("ndarray:int32:2,3", 24),
                                                ("ndarray", None), ("ndarray:int32", None), ("str", None)])  # fmt: skip
def test_fixed_sizes(encoding: str, size: int | None) -> None:
    assert fixed_size(encoding) == size
