"""The table of corruptions: what is damaged in a sound folder, and the error that each reader gives.

Columns: name, variant of the sound folder (`tests/damage.py`), damage, error of `read_documents`, and the error of the
sampler where it has its own.
"""

from __future__ import annotations

import os
import struct

from damage import (
    Case,
    as_directory,
    as_pipe,
    bomb,
    bomb_in_index,
    entry,
    false_size,
    index,
    linked,
    linked_folder,
    no_file,
    patch,
    second_frame,
    short_frame,
    sizes_wrap,
    swapped,
    swapped_entries,
    text,
    trailing_garbage,
    truncated_frame,
    u32,
    values,
    wide_window,
)
from mds_builder import pack

GOOD = b"\x04\x02\x05\x00\x06\x00"
NAME = "expected the name of a file inside the folder"
JSON = r"index\.json: not valid JSON"
# A shard of these is 4 + 4 * 5 bytes of table, the JSON, and 4 samples of 4 + 2 + 80 bytes at the end.
SAMPLE = 86
INDEXES = [
    Case("index missing", "raw", no_file(lambda p: None), "no such file; expected a folder of MDS shards"),
    Case("index a directory", "raw", no_file(lambda p: p.mkdir()), "not a file; expected a folder of MDS"),
    Case("index a pipe", "raw", no_file(os.mkfifo), "not a file; expected a folder of MDS shards"),
    Case(
        "index a link to itself", "raw", no_file(lambda p: p.symlink_to(p)), "not a file; expected a folder"
    ),
    Case("index empty", "raw", text(""), JSON),
    Case("index cut short", "raw", lambda f: text((f.path / "index.json").read_bytes()[:-40])(f), JSON),
    Case("index not UTF-8", "raw", text(b'{"version": "\xff\xfe"}'), JSON),
    Case("index nested deeply", "raw", text("[" * 200_000), JSON),
    Case("objects nested deeply", "raw", text('{"shards":' * 200_000), JSON),
    Case("entry nested deeply", "raw", text('{"version":2,"shards":[' + "[" * 150_000), JSON),
    Case("number of 5000 digits", "raw", text('{"version": 2, "shards": [' + "9" * 5000 + "]}"), JSON),
    Case("index a list", "raw", text("[]"), "version is None; expected MDS version 2"),
    Case("version 1", "raw", index("version", to=1), "version is 1; expected MDS version 2"),
    Case("shards an object", "raw", index("shards", to={}), r"shards is \{\}; expected a list"),
    Case("entry null", "raw", index("shards", 1, to=None), r"shards\[1\] is None; expected an object"),
    Case("format csv", "raw", entry("format", to="csv"), r"shards\[1\]\.format is 'csv'; expected 'mds'"),
    Case("samples NaN", "raw", entry("samples", to=float("nan")), r"samples is nan; expected a whole number"),
    Case("samples 2^40", "raw", entry("samples", to=1 << 40), "expected what fits a shard of"),
    Case("bytes 2^64 + 1", "raw", entry("raw_data", "bytes", to=(1 << 64) + 1), "less than 4 GiB"),
    Case("bytes -1", "raw", entry("raw_data", "bytes", to=-1), "bytes is -1; expected a whole number"),
    Case("bytes other", "raw", entry("raw_data", "bytes", to=600), r"shards\[1\] of its index says 600"),
    Case("shard twice", "raw", swapped_entries, r"expected another file than that of shards\[1\]"),
    Case("name of parent", "raw", entry("raw_data", "basename", to="../a/shard.00001.mds"), NAME),
    Case("name absolute", "raw", entry("raw_data", "basename", to="/etc/passwd"), NAME),
    Case("zip name of parent", "zstd", entry("zip_data", "basename", to="x/../../y"), NAME),
    Case("name with a zero byte", "raw", entry("raw_data", "basename", to="a\0b"), NAME),
    Case("name of 5000 letters", "raw", entry("raw_data", "basename", to="x" * 5000), NAME),
    Case("name a lone surrogate", "raw", entry("raw_data", "basename", to="\ud800"), NAME),
    Case("shard links out", "raw", linked, r"it links to .*outside\.mds"),
    Case("folder links out", "raw", linked_folder, r"it links to .*outside"),
    Case(
        "pkl column", "raw", entry("column_encodings", to=["pkl"]), "encoding 'pkl' runs code when it is read"
    ),
    Case("br, no raw file", "zstd", entry("compression", to="br"), "brotli -d -k -o shard.00001.mds"),
    Case(
        "unknown encoding",
        "raw",
        entry("column_encodings", to=["blob"]),
        "'blob' is not one of MDS version 2",
    ),
    Case(
        "shape of 10^30",
        "raw",
        entry("column_encodings", to=[f"ndarray:uint16:{10**30}"]),
        "column_sizes is None",
    ),
    Case(
        "column size", "raw", entry("column_sizes", to=[80]), "column_sizes is 80; expected None for 'tokens'"
    ),
    Case(
        "no tokens",
        "raw",
        entry("column_names", to=["text"]),
        r"shard\.00001\.mds.*no column of tokens among",
    ),
    Case("float tokens", "raw", entry("column_encodings", to=["ndarray:float32"]), "holds no token array"),
    Case(
        "hash unknown", "raw", entry("raw_data", "hashes", to={"crc9": "0"}), "expected a hash of hashlib or"
    ),
    Case(
        "hash false",
        "raw",
        entry("raw_data", "hashes", to={"sha1": "0" * 40}),
        "sha1 is .* the index says 000",
    ),
    Case(
        "zip hash false", "zstd", entry("zip_data", "hashes", to={"md5": "1"}), "md5 is .* the index says 1"
    ),
]
FILES = [
    Case("shard missing", "raw", lambda f: f.file().unlink(), r"the file of shards\[1\] is missing"),
    Case("shard a directory", "raw", as_directory, r"the file of shards\[1\] is missing"),
    Case("shard a pipe", "raw", as_pipe, r"the file of shards\[1\] is missing"),
    Case("shard empty", "raw", lambda f: f.file().write_bytes(b""), r"the file has 0 bytes, shards\[1\]"),
    Case(
        "shard cut short",
        "raw",
        lambda f: f.file().write_bytes(f.file().read_bytes()[:-1]),
        "of its index says",
    ),
    Case(
        "shard longer",
        "raw",
        lambda f: f.file().write_bytes(f.file().read_bytes() + b"\0"),
        "of its index says",
    ),
    Case("shards swapped", "raw", swapped, "sha1 is .*: the file is damaged; fetch or write it again"),
    Case("header flipped", "raw", patch(30, b"\xff"), "sha1 is .*: the file is damaged"),
    Case("payload flipped", "raw", patch(-1, b"\x7f"), "sha1 is .*: the file is damaged"),
    Case("zstd flipped", "zstd", patch(-9, b"\x7f\x7f"), "xxh64 is .*: the file is damaged"),
    Case("zstd cut short", "zstd", truncated_frame, "inflates to .* bytes|not a sound zstd file"),
    Case("zstd with garbage", "zstd", trailing_garbage, "not a sound zstd file"),
    Case("zstd of two frames", "zstd", second_frame, "inflates to more than the"),
    Case("zstd of fewer bytes", "zstd", short_frame, "inflates to .* bytes, its index says"),
    Case("not zstd", "zstd", lambda f: f.replace(bytes(64)), "not a sound zstd file"),
    Case("zip bomb", "zstd", bomb, "inflates to more than the"),
    Case(
        "zip bomb in the index", "zstd", bomb_in_index, "inflates to 1048600 bytes, its index says 4294967295"
    ),
    Case("zstd of false size", "zstd", false_size, "inflates to 0 bytes|not a sound zstd file"),
    Case("zstd of 2 GiB window", "zstd", wide_window, "not a sound zstd file"),
]
SHARDS = [
    Case(
        "count",
        "bare",
        patch(0, u32(5)),
        "holds 5 samples, its index says 4",
        "says 5 samples, index.json says 4",
    ),
    Case("count 2^32 - 1", "bare", patch(0, u32(0xFFFFFFFF)), "4294967295 samples"),
    Case(
        "first offset in the table",
        "bare",
        patch(4, u32(8)),
        "first offset, 8, lies inside",
        "offset 0 is 8, inside",
    ),
    Case(
        "offsets fall",
        "bare",
        patch(8, u32(1 << 31)),
        "offsets fall from 2147483648",
        "before it begins at 2147483648",
    ),
    Case(
        "end beyond the file", "bare", patch(20, u32(9999)), "last sample ends at 9999", "last offset is 9999"
    ),
    Case(
        "sample too short",
        "bare",
        lambda f: f.samples([pack([GOOD], [None]), b"ab"]),
        "sample has 2 bytes",
        "has 2 bytes, its columns need at least 4",
    ),
    Case(
        "column size",
        "bare",
        patch(-SAMPLE, u32(83)),
        "the columns need 87 bytes",
        "do not sum to its 86 bytes",
    ),
    Case(
        "column size 2^32 - 1",
        "bare",
        patch(-SAMPLE, u32(0xFFFFFFFF)),
        "columns need 4294967299",
        "do not sum",
    ),
    Case("sizes that wrap", "bare", sizes_wrap, "columns need 4294967", "do not sum"),
    Case("axes", "bare", patch(4 - SAMPLE, b"\x08"), "the array has 2 axes", "array of 2 dimensions"),
    Case(
        "length",
        "bare",
        patch(5 - SAMPLE, b"\x29"),
        "41 values of uint16 do not fit",
        "shape of 41 values in 80",
    ),
    Case(
        "length 2^64 - 1",
        "bare",
        values(GOOD, b"\x07" + b"\xff" * 8 + b"\0\0\0"),
        "18446744073709551615 values",
        "shape of 18446744073709551615 values",
    ),
    Case(
        "length that wraps",
        "bare",
        values(b"\x10\x07" + struct.pack("<Q", (1 << 63) + 1) + b"\5\0", encoding="ndarray"),
        "9223372036854775809 v",
        "shape of 9223372036854775809 values",
    ),
    Case(
        "no shape",
        "bare",
        values(GOOD, b""),
        "ends before its shape",
        "whole number of 2-byte values|no shape",
    ),
    Case(
        "half a value",
        "bare",
        values(GOOD, GOOD[:-1]),
        "2 values of uint16 do not fit",
        "whole number of 2-byte",
    ),
    Case(
        "type code",
        "bare",
        values(b"\x63" + GOOD, encoding="ndarray"),
        "type code 99",
        "no known integer type",
    ),
    Case(
        "half an int64",
        "bare",
        values(b"1234567", encoding="bytes"),
        "no whole number of int64",
        "8-byte values",
    ),
    Case(
        "negative id",
        "bare",
        values(b"\4\1\xff\xff\xff\xff" * 1, encoding="ndarray:int32"),
        "token id -1 is negative",
        "token 0 is -1; expected an id",
    ),
]
CORRUPTIONS = INDEXES + FILES + SHARDS
