"""Shards in the C++ core: every token encoding of MDS, and damage that must be an error, never a crash."""

import json
import struct

import numpy as np
import pytest

from velopath import open_sampler
from velopath.errors import DataError
from velopath.mds import read_documents

CODES = {"uint8": 8, "uint16": 16, "int16": 17, "uint32": 32, "int32": 33, "uint64": 64, "int64": 65}


def ndarray(values, *, code=False, shape=True, log_width=None):
    values = np.asarray(values)
    head = bytes([CODES[str(values.dtype)]]) if code else b""
    if shape:
        log_width = (
            (0 if len(values) < 256 else 1 if len(values) < 65536 else 2) if log_width is None else log_width
        )
        head += bytes([(1 << 2) | log_width]) + len(values).to_bytes(1 << log_width, "little")
    return head + values.tobytes()


def write_raw(folder, samples, names=("tokens",), encodings=("ndarray:uint16",), sizes=(None,)):
    """One raw shard: `samples` hold the payloads of the columns."""
    folder.mkdir(parents=True, exist_ok=True)
    bodies = []
    for payloads in samples:
        head = b"".join(struct.pack("<I", len(p)) for p, s in zip(payloads, sizes, strict=True) if s is None)
        bodies.append(head + b"".join(payloads))
    config = b"{}"
    first = 4 + 4 * (len(bodies) + 1) + len(config)
    offsets = first + np.concatenate([[0], np.cumsum([len(b) for b in bodies])])
    raw = struct.pack("<I", len(bodies)) + offsets.astype("<u4").tobytes() + config + b"".join(bodies)
    (folder / "shard.00000.mds").write_bytes(raw)
    entry = {
        "version": 2, "format": "mds", "column_names": list(names), "column_encodings": list(encodings),
        "column_sizes": list(sizes), "compression": None, "hashes": [], "size_limit": 1 << 26, "samples": len(bodies),
        "raw_data": {"basename": "shard.00000.mds", "bytes": len(raw), "hashes": {}}, "zip_data": None,
    }  # fmt: skip
    (folder / "index.json").write_text(json.dumps({"version": 2, "shards": [entry]}))
    return folder / "shard.00000.mds"


def one_epoch(root, row_tokens=4, **options):
    """The stream as the sampler reads it: every token of one epoch, in order."""
    with open_sampler(
        root, rows=1, row_tokens=row_tokens, exhaustion="stop", threads=0, **options
    ) as sampler:
        rows = {int(b.row_ids[0]): b.tokens[0, :-1].copy() for b in sampler}
    return np.concatenate([rows[i] for i in range(len(rows))])


def same_circle(found, stream, row_tokens=4):
    """Whether `found` is a run of the circular stream that leaves out fewer than row_tokens tokens."""
    assert len(found) == len(stream) // row_tokens * row_tokens
    return any(np.array_equal(np.roll(stream, -k)[: len(found)], found) for k in range(len(stream)))


LENGTHS = (3, 255, 256, 1, 700)  # around the widths of the stored shape


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "uint32", "int32", "uint64", "int64"])
@pytest.mark.parametrize("form", ["typed", "untyped", "bytes"])
def test_every_encoding_of_tokens_is_read(tmp_path, dtype, form):
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 120, n).astype(dtype) for n in LENGTHS]
    encoding = {"typed": f"ndarray:{dtype}", "untyped": "ndarray", "bytes": "bytes"}[form]
    payload = {
        "typed": ndarray,
        "untyped": lambda d: ndarray(d, code=True),
        "bytes": lambda d: d.tobytes(),
    }[form]
    write_raw(tmp_path / "a", [(payload(d),) for d in documents], encodings=(encoding,))
    found = one_epoch(tmp_path, bytes_dtype=dtype)
    assert same_circle(found, np.concatenate(documents))


@pytest.mark.parametrize("token_encoding", ["ndarray:uint16", "ndarray", "bytes"])
def test_the_token_column_is_found_among_others(tmp_path, token_encoding):
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 1 << 15, n).astype("uint16") for n in LENGTHS]
    payload = {
        "ndarray": lambda d: ndarray(d, code=True),
        "bytes": lambda d: d.astype("int64").tobytes(),
    }.get(token_encoding, ndarray)
    samples = [
        (b"x" * (i * 7), struct.pack("<q", i), payload(d), b"url" * i) for i, d in enumerate(documents)
    ]
    write_raw(
        tmp_path / "a",
        samples,
        names=("attr", "number", "tokens", "url"),
        encodings=("bytes", "int", token_encoding, "str"),
        sizes=(None, 8, None, None),
    )
    assert same_circle(one_epoch(tmp_path), np.concatenate(documents))


def test_a_fixed_shape_and_fixed_columns_are_read(tmp_path):
    documents = [np.arange(5, dtype="uint32") + 10 * i for i in range(6)]
    write_raw(
        tmp_path / "a",
        [(ndarray(d, shape=False), struct.pack("<q", 1)) for d in documents],
        names=("input_ids", "z"),
        encodings=("ndarray:uint32:5", "int"),
        sizes=(20, 8),
    )
    assert same_circle(one_epoch(tmp_path), np.concatenate(documents))


def test_shards_without_samples_and_documents_without_tokens_are_legal(tmp_path):
    write_raw(tmp_path / "a", [(ndarray(np.arange(9, dtype="uint16")),), (ndarray(np.array([], "uint16")),)])
    index = json.loads((tmp_path / "a" / "index.json").read_text())
    empty = json.loads(json.dumps(index["shards"][0]))
    config = b"{}"
    raw = struct.pack("<II", 0, 8 + len(config)) + config
    empty["samples"], empty["raw_data"] = 0, {"basename": "empty.mds", "bytes": len(raw), "hashes": {}}
    (tmp_path / "a" / "empty.mds").write_bytes(raw)
    index["shards"] = [
        empty,
        *index["shards"],
        {**empty, "raw_data": {**empty["raw_data"], "basename": "e2.mds"}},
    ]
    (tmp_path / "a" / "e2.mds").write_bytes(raw)
    (tmp_path / "a" / "index.json").write_text(json.dumps(index))
    assert same_circle(one_epoch(tmp_path), np.arange(9))
    assert sorted(one_epoch(tmp_path, eos=77, row_tokens=1).tolist()) == [*range(9), 77, 77]


def put(path, at, values):
    content = bytearray(path.read_bytes())
    content[at : at + len(values)] = values
    path.write_bytes(content)


def u32(value):
    return struct.pack("<I", value)


@pytest.fixture
def shard(tmp_path):
    return write_raw(tmp_path / "a", [(ndarray(np.arange(50, dtype="uint16") + 100 * i),) for i in range(5)])


# The samples of `shard` are 106 bytes from byte 30 on: size, shape byte, length byte, 100 bytes of values.
@pytest.mark.parametrize(
    ("damage", "message", "sample"),
    [
        (lambda p: put(p, 0, u32(4)), "says 4 samples, index.json says 5", None),
        (lambda p: put(p, 0, u32(0xFFFFFFFF)), "4294967295 samples", None),
        (lambda p: put(p, 4, u32(8)), "offset 0 is 8, inside the offset table", None),
        (lambda p: put(p, 12, u32(40)), "ends at byte 40, before it begins at 136", 1),
        (lambda p: put(p, 24, u32(10_000)), "last offset is 10000, the file has 560 bytes", None),
        (lambda p: put(p, 24, u32(559)), "last offset is 559", None),
        (lambda p: put(p, 16, u32(349)), "whole number of 2-byte values", 2),
        (lambda p: put(p, 12, u32(138)), "has 2 bytes, its columns need at least 4", 1),
        (lambda p: put(p, 30 + 106, u32(101)), "do not sum to its 106 bytes", 1),
        (lambda p: put(p, 30 + 106, u32(0xFFFFFFFF)), "do not sum", 1),
        (lambda p: put(p, 30 + 106 + 4, b"\x08"), "array of 2 dimensions", 1),
        (lambda p: put(p, 30 + 106 + 4, b"\x00"), "array of 0 dimensions", 1),
        (lambda p: put(p, 30 + 106 + 4, b"\x07"), "shape of", 1),
        (lambda p: put(p, 30 + 106 + 5, b"\x31"), "shape of 49 values in 100 bytes", 1),
    ],
)
def test_a_damaged_shard_is_an_error_that_names_it(shard, damage, message, sample):
    damage(shard)
    with pytest.raises(DataError, match=message) as caught:
        one_epoch(shard.parents[1])
    assert str(shard) in str(caught.value)
    assert caught.value.sample == sample


def test_a_damaged_untyped_sample_is_an_error(tmp_path):
    for payload, message in [
        (b"", "no known integer type"),
        (b"\x12\x04\x01\x00\x00", "no known integer type"),  # float16
        (b"\x0a\x04\x01\x00", "no known integer type"),
        (b"\x10", "stores no shape"),
        (b"\x10\x07\x01\x00", "stores no shape"),
    ]:
        shard = write_raw(
            tmp_path / "a",
            [(ndarray(np.arange(9, dtype="uint16"), code=True),), (payload,)],
            encodings=("ndarray",),
        )
        with pytest.raises(DataError, match=message) as caught:
            one_epoch(tmp_path)
        assert (caught.value.path, caught.value.sample, caught.value.field) == (str(shard), 1, "tokens")


def test_truncated_and_missing_files_are_errors(shard):
    content = shard.read_bytes()
    for size in (0, 3, 10, len(content) - 1):
        shard.write_bytes(content[:size])
        with pytest.raises(DataError, match=f"the file has {size} bytes"):
            one_epoch(shard.parents[1])
    shard.unlink()
    with pytest.raises(DataError, match="missing"):
        one_epoch(shard.parents[1])


@pytest.mark.parametrize("dtype", ["int16", "uint32", "int32", "uint64", "int64"])
def test_a_token_id_that_is_none_names_shard_and_sample(tmp_path, dtype):
    documents = [np.arange(20).astype(dtype) for _ in range(4)]
    documents[2][7] = np.iinfo(dtype).min if np.iinfo(dtype).min < 0 else np.iinfo(dtype).max
    shard = write_raw(tmp_path / "a", [(ndarray(d),) for d in documents], encodings=(f"ndarray:{dtype}",))
    with pytest.raises(
        DataError, match=rf"token 7 is {documents[2][7]}; expected an id from 0 to 2147483647"
    ) as caught:
        one_epoch(tmp_path)
    assert (caught.value.path, caught.value.sample) == (str(shard), 2)


def test_flipped_bytes_never_crash(shard):
    """Every flip of a bit in table and headers is an error or read as the reference reader reads it."""
    content = shard.read_bytes()
    rng = np.random.default_rng(0)
    places = [*range(30), 136, 137, 138, 139, 140, 141]
    for at in places:
        for bit in rng.choice(8, 3, replace=False):
            damaged = bytearray(content)
            damaged[at] ^= 1 << int(bit)
            shard.write_bytes(damaged)
            try:
                found = one_epoch(shard.parents[1])
            except DataError:
                continue
            assert same_circle(found, np.concatenate(list(read_documents(shard.parent))))


def test_a_domain_smaller_than_a_row_is_refused(shard):
    with pytest.raises(DataError, match=r"domain 'a' has 250 tokens, fewer than one row of 251"):
        open_sampler(shard.parents[1], row_tokens=251)
    assert len(one_epoch(shard.parents[1], row_tokens=250)) == 250
