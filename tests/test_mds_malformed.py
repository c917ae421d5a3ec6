"""Malformed MDS: every index and shard that is wrong is refused by an error that names file, shard and field."""

from __future__ import annotations

import copy
import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard

from mds_builder import pack, raw_shard, write_folder
from velopath.errors import DataError
from velopath.mds import load_index, read_documents


def change(*path: Any, to: Any) -> Callable[[Any], Any]:
    def apply(index: Any) -> Any:
        place = index
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = to
        return index

    return apply


def shard(*path: Any, to: Any) -> Callable[[Any], Any]:
    return change("shards", 0, *path, to=to)


def twice(index: Any) -> Any:
    index["shards"].append(copy.deepcopy(index["shards"][0]))
    return index


def no_columns(index: Any) -> Any:
    for part in ("names", "encodings", "sizes"):
        index["shards"][0][f"column_{part}"] = []
    return index


MALFORMED_INDEXES: list[tuple[str, Callable[[Any], Any], str]] = [
    ("not an object", lambda i: [i], "version is None; expected MDS version 2"),
    ("version", change("version", to=1), "version is 1; expected MDS version 2"),
    ("no shards", change("shards", to=None), "shards is None; expected a list"),
    ("shard type", change("shards", 0, to=7), "shards[0] is 7; expected an object"),
    ("shard version", shard("version", to=3), "shards[0].version is 3; expected 2"),
    ("format", shard("format", to="csv"), "shards[0].format is 'csv'; expected 'mds'"),
    ("samples negative", shard("samples", to=-1), "shards[0].samples is -1; expected a whole number, 0 or more"),
    ("samples float", shard("samples", to=1.0), "shards[0].samples is 1.0"),
    ("samples bool", shard("samples", to=True), "shards[0].samples is True"),
    ("samples missing", shard("samples", to=None), "shards[0].samples is None"),
    ("samples too many", shard("samples", to=10**9), "shards[0].samples is 1000000000; expected what fits"),
    ("raw_data type", shard("raw_data", to="x"), "shards[0].raw_data is 'x'; expected an object"),
    ("bytes negative", shard("raw_data", "bytes", to=-5), "shards[0].raw_data.bytes is -5"),
    ("bytes text", shard("raw_data", "bytes", to="9"), "shards[0].raw_data.bytes is '9'"),
    ("4 GiB", shard("raw_data", "bytes", to=1 << 32), "less than 4 GiB, offsets are 32 bits wide"),
    ("huge", shard("raw_data", "bytes", to=10**30), "less than 4 GiB"),
    ("parent", shard("raw_data", "basename", to="../x.mds"), "shards[0].raw_data.basename is '../x.mds'; expected"),
    ("inner parent", shard("raw_data", "basename", to="a/../../x"), "expected the name of a file inside the folder"),
    ("absolute", shard("raw_data", "basename", to="/etc/passwd"), "expected the name of a file inside the folder"),
    ("drive", shard("raw_data", "basename", to="C:\\x"), "expected the name of a file inside the folder"),
    ("drive slash", shard("raw_data", "basename", to="C:/x"), "expected the name of a file inside the folder"),
    ("name null byte", shard("raw_data", "basename", to="a\0b"), "expected the name of a file inside the folder"),
    ("name empty", shard("raw_data", "basename", to=""), "expected the name of a file inside the folder"),
    ("name dot", shard("raw_data", "basename", to="."), "expected the name of a file inside the folder"),
    ("name number", shard("raw_data", "basename", to=3), "shards[0].raw_data.basename is 3"),
    ("hashes type", shard("raw_data", "hashes", to=[1]), "shards[0].raw_data.hashes is [1]; expected an object"),
    ("hash unknown", shard("raw_data", "hashes", to={"crc9": "0"}), "'crc9'; expected a hash of hashlib or xxhash"),
    ("hash value", shard("raw_data", "hashes", to={"md5": 7}), "expected an object of hash name to hex text"),
    ("gz", shard("compression", to="gz"), "shards[0].compression is 'gz'; expected null, 'zstd' or"),
    ("compression type", shard("compression", to=5), "shards[0].compression is 5; expected null, 'zstd'"),
    ("zip without compression", shard("compression", to=None), "expected null where compression is null"),
    ("no zip", shard("zip_data", to=None), "shards[0].zip_data is None; expected a file, as compression is 'zstd'"),
    ("zip parent", shard("zip_data", "basename", to="../y"), "shards[0].zip_data.basename is '../y'"),
    ("pkl", shard("column_encodings", to=["pkl"]), "column 'tokens': encoding 'pkl' runs code when it is read"),
    ("encoding unknown", shard("column_encodings", to=["blob"]), "encoding 'blob' is not one of MDS version 2"),
    ("encoding dtype", shard("column_encodings", to=["ndarray:uint17"]), "encoding 'ndarray:uint17' is not one"),
    ("encoding axis", shard("column_encodings", to=["ndarray:uint16:0"]), "has an axis of length 0"),
    ("encoding type", shard("column_encodings", to=[3]), "shards[0].column_encodings is 3; expected text"),
    ("columns type", shard("column_names", to="tokens"), "shards[0].column_names is 'tokens'; expected a list"),
    ("columns count", shard("column_names", to=["a", "b"]), "(2, 1, 1); expected as many names as encodings and sizes"),
    ("no columns", no_columns, "expected as many names as encodings and sizes, 1 or more"),
    ("size given", shard("column_sizes", to=[6]), "shards[0].column_sizes is 6; expected None for 'tokens'"),
    ("size missing", shard("column_encodings", to=["int"]), "shards[0].column_sizes is None; expected 8 for 'tokens'"),
    ("same file twice", twice, "expected another file than that of shards[0]"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("alter", "message"), [m[1:] for m in MALFORMED_INDEXES], ids=[m[0] for m in MALFORMED_INDEXES]
)
def test_malformed_index(tmp_path: Path, alter: Callable[[Any], Any], message: str) -> None:
    index = write_folder(tmp_path, [[b"\x04\x01\x05\x00"]], {"tokens": ("ndarray:uint16", None)}, zstd=True)
    assert len(list(read_documents(tmp_path))) == 1  # sound before the change
    (tmp_path / "index.json").write_text(json.dumps(alter(copy.deepcopy(index))))
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        load_index(tmp_path)
    assert str(tmp_path / "index.json") in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "{", '{"version": 2, "shards": [', "\x00", '{"version": 2}x', "[" * 100_000], ids=range(6)
)
def test_index_that_is_no_json(tmp_path: Path, text: str) -> None:
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(DataError, match=r"index.json: not valid JSON"):
        load_index(tmp_path)
    (tmp_path / "index.json").write_bytes(b'{"version": "\xff"}')
    with pytest.raises(DataError, match=r"index.json: not valid JSON"):
        load_index(tmp_path)


def test_link_out_of_the_folder(tmp_path: Path) -> None:
    write_folder(tmp_path / "a", [[b"\x04\x01\x05\x00"]], {"tokens": ("ndarray:uint16", None)})
    (tmp_path / "a/shard.00000.mds").rename(tmp_path / "outside.mds")
    (tmp_path / "a/shard.00000.mds").symlink_to(tmp_path / "outside.mds")
    with pytest.raises(DataError, match=r"shards\[0\].raw_data.basename.*but it links to .*outside.mds"):
        load_index(tmp_path / "a")
    (tmp_path / "a/shard.00000.mds").unlink()
    (tmp_path / "outside.mds").rename(tmp_path / "a/other.mds")
    (tmp_path / "a/shard.00000.mds").symlink_to("other.mds")  # a link within the folder is fine
    assert len(list(read_documents(tmp_path / "a"))) == 1


def test_missing_shard_is_found_at_once(tmp_path: Path) -> None:
    write_folder(tmp_path, [[b"\x04\x01\x05\x00"]], {"tokens": ("ndarray:uint16", None)})
    (tmp_path / "shard.00000.mds").unlink()
    with pytest.raises(DataError, match=r"shard.00000.mds: the file of shards\[0\] is missing"):
        load_index(tmp_path)
    assert load_index(tmp_path, files=False).samples == 1


def test_shard_cut_short(tmp_path: Path) -> None:
    write_folder(tmp_path, [[b"\x04\x01\x05\x00"]], {"tokens": ("ndarray:uint16", None)})
    file = tmp_path / "shard.00000.mds"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"the file has \d+ bytes, shards\[0\] of its index says \d+"):
        load_index(tmp_path)


ONE = pack([b"\x04\x01\x05\x00"], [None])
GOOD = raw_shard([ONE, ONE])
TABLE_END = struct.unpack("<I", GOOD[4:8])[0]


def patched(at: int, value: int) -> bytes:
    return GOOD[:at] + struct.pack("<I", value) + GOOD[at + 4 :]


def with_value(value: bytes) -> bytes:
    return raw_shard([ONE, pack([value], [None])])


U16 = "ndarray:uint16"
MALFORMED_SHARDS = [
    ("count", patched(0, 3), U16, "the shard holds 3 samples, its index says 2"),
    ("count huge", patched(0, 0xFFFFFFFF), U16, "the shard holds 4294967295 samples"),
    ("first offset", patched(4, 3), U16, "the first offset, 3, lies inside the table, which ends at 16"),
    ("falling", patched(8, 1 << 31), U16, "sample 1 field 'offset': offsets fall from 2147483648"),
    ("end", patched(12, len(GOOD) + 1), U16, f"the last sample ends at {len(GOOD) + 1}, the shard at"),
    ("column size", patched(TABLE_END, 5), U16, "the columns need 9 bytes, the sample has 8"),
    ("column huge", patched(TABLE_END, 0xFFFFFFFF), U16, "the columns need 4294967299 bytes"),
    ("no size", raw_shard([ONE, b"ab"]), U16, "sample 1 field 'tokens': the sample has 2 bytes, the sizes"),
    ("length", with_value(b"\x04\x02\x05\x00"), U16, "2 values of uint16 do not fit the 2 bytes"),
    ("length huge", with_value(b"\x07" + b"\xff" * 8), U16, "18446744073709551615 values of uint16 do not fit"),
    ("axes", with_value(b"\x08\x01\x01\x05\x00"), U16, "the array has 2 axes; expected 1"),
    ("scalar", with_value(b"\x00\x05\x00"), U16, "the array has 0 axes; expected 1"),
    ("no shape", with_value(b""), U16, "the array ends before its shape"),
    ("half shape", with_value(b"\x06\x01\x00"), U16, "the array ends inside its shape"),
    ("code", with_value(b"\x63\x04\x01\x05\x00"), "ndarray", "type code 4 is not one of integers"),
    ("float code", with_value(b"\x22\x04\x01\0\0\0\0"), "ndarray", "type code 4 is not one of integers"),
    ("bytes", with_value(b"1234567"), "bytes", "bytes are no whole number of int64 values"),
    ("negative", raw_shard([pack([b"\x04\x01\xff\xff"], [None])] * 2), "ndarray:int16", "token id -1 is negative"),
    ("too short", b"\x00" * 12, U16, "the shard holds 0 samples, its index says 2"),
]  # fmt: skip


@pytest.mark.parametrize("zstd", [False, True])
@pytest.mark.parametrize(
    ("raw", "encoding", "message"), [m[1:] for m in MALFORMED_SHARDS], ids=[m[0] for m in MALFORMED_SHARDS]
)
def test_malformed_shard(tmp_path: Path, raw: bytes, encoding: str, message: str, zstd: bool) -> None:
    index = write_folder(tmp_path, [[b""], [b""]], {"tokens": (encoding, None)}, zstd=zstd)
    entry = index["shards"][0]
    stored = zstandard.compress(raw) if zstd else raw
    info = entry["zip_data"] or entry["raw_data"]
    (tmp_path / info["basename"]).write_bytes(stored)
    entry["raw_data"]["bytes"], info["bytes"] = len(raw), len(stored)
    (tmp_path / "index.json").write_text(json.dumps(index))
    if len(raw) < 16:
        message = "expected what fits a shard of 12 bytes"
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        list(read_documents(tmp_path))
    assert str(tmp_path) in str(caught.value)
