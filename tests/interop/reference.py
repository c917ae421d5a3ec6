"""mosaicml-streaming as writer and reader of MDS. Runs in an environment of its own; imports no velopath.

    PYTHON tests/interop/reference.py write OUT     a folder per case and OUT/expected.json
    PYTHON tests/interop/reference.py read ROOT     samples of ROOT/*/ through StreamingDataset, as JSON on stdout

expected.json: {"writer": version, "documents": {set: [[token]]}, "cases": {name: {"documents": set, "column": ..,
"bytes_dtype": ..}}, "refused": [name]}.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import types
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from pathlib import Path
from typing import Any


def stub_torchvision() -> None:
    """Stand in for torchvision, which cannot be imported beside a CPU torch; tokens need nothing of it."""
    tree = (
        "torchvision",
        "torchvision.datasets",
        "torchvision.transforms",
        "torchvision.transforms.functional",
    )
    for name in tree:
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__spec__ = ModuleSpec(name, None)
    for name in ("VisionDataset", "CIFAR10", "ImageFolder"):
        setattr(sys.modules["torchvision.datasets"], name, type(name, (), {}))
    sys.modules["torchvision.transforms.functional"].to_tensor = None  # type: ignore[attr-defined]


stub_torchvision()
import numpy as np  # noqa: E402
from streaming import MDSWriter, StreamingDataset  # noqa: E402
from streaming.base.compression import decompress  # noqa: E402
from streaming.base.hashing import get_hash, get_hashes  # noqa: E402
from streaming.base.util import clean_stale_shared_memory, merge_index  # noqa: E402

ROW = 32
COMPRESSIONS = (None, "zstd:1", "zstd", "zstd:19")
HASHES: tuple[tuple[str, ...], ...] = ((), ("sha1", "xxh64"), ("md5", "sha256"), ("blake2b", "xxh3_128"))
DTYPES = ("uint16", "uint32", "int32", "int64")


def document(seed: int, length: int, limit: int) -> list[int]:
    return [(seed * 104_729 + i * i * 7_919 + i) % limit for i in range(length)]


def document_sets() -> dict[str, list[list[int]]]:
    # 255 and 256: where the stored length gets wider. A plain `bytes` column may also hold an empty document.
    lengths = (1, 2, 255, 256, 60)
    return {
        "short ids": [document(k, n, 1 << 16) for k, n in enumerate(lengths)],
        "long ids": [document(k, n, (1 << 31) - 1) for k, n in enumerate(lengths)],
        "rows": [document(k, ROW, 1 << 15) for k in range(9)],
        "with an empty one": [document(1, 5, 99), [], document(2, 3, 99)],
        "long": [[3] * 65_535, [4] * 65_536],
        "none": [],
    }


class Cases:
    """Writes one folder per case below `out` and keeps what each must read as."""

    def __init__(self, out: Path) -> None:
        self.out, self.documents = out, document_sets()
        self.cases: dict[str, dict[str, Any]] = {}

    def write(
        self, name: str, documents: str, encoding: str, *, column: str = "tokens", dtype: str = "int64",
        others: dict[str, tuple[str, Any]] | None = None, folder: str = "", only: slice = slice(None), **options: Any,
    ) -> None:  # fmt: skip
        """`others`: column -> (encoding, value in every sample); `dtype`: of the arrays given to the writer."""
        others = others or {}
        columns = {column: encoding} | {key: kind for key, (kind, _) in others.items()}
        with MDSWriter(columns=columns, out=str(self.out / (folder or name)), **options) as writer:
            for tokens in self.documents[documents][only]:
                array = np.array(tokens, dtype)
                value = array.tobytes() if encoding == "bytes" else tokens if encoding == "pkl" else array
                writer.write({column: value} | {key: given for key, (_, given) in others.items()})
        self.cases[name] = {"documents": documents, "column": column}
        if encoding == "bytes" and dtype != "int64":
            self.cases[name]["bytes_dtype"] = dtype


def write(out: Path) -> None:
    cases = Cases(out)
    encodings: list[tuple[str, str, str, str]] = []  # label, encoding, dtype, documents
    for dtype in DTYPES:
        ids = "short ids" if dtype == "uint16" else "long ids"
        encodings.append((f"ndarray-{dtype}", f"ndarray:{dtype}", dtype, ids))
        encodings.append((f"ndarray-{dtype}-{ROW}", f"ndarray:{dtype}:{ROW}", dtype, "rows"))
        encodings.append((f"ndarray-untyped-{dtype}", "ndarray", dtype, ids))
        encodings.append((f"bytes-{dtype}", "bytes", dtype, ids))
    for k, (label, encoding, dtype, documents) in enumerate(encodings):
        for c, compression in enumerate(COMPRESSIONS):
            hashes = list(HASHES[(k + c) % len(HASHES)])
            name = f"{label}.{compression or 'raw'}".replace(":", "-")
            column = ("tokens", "input_ids")[(k + c) % 2]
            cases.write(
                name, documents, encoding, column=column, dtype=dtype, compression=compression, hashes=hashes
            )

    # No size of the writer, every hash it knows, many shards, and a first shard without samples: the writer closes
    # an empty shard when its header alone passes the limit.
    u16: dict[str, Any] = {"encoding": "ndarray:uint16", "dtype": "uint16", "documents": "short ids"}
    cases.write("every-hash", **u16, hashes=sorted(get_hashes()), compression="zstd:3")
    cases.write("one-shard", **u16, size_limit=None)
    cases.write("many-shards", **u16, size_limit=400, hashes=["xxh64"])
    cases.write("many-shards-zstd", **u16, size_limit="400b", hashes=["xxh64"], compression="zstd:7")
    cases.write("empty-shards", **u16, size_limit=64, hashes=["sha1"], compression="zstd")
    cases.write("empty-shards-raw", **u16, size_limit=64)
    cases.write("no-samples", "none", "ndarray:uint16", dtype="uint16")
    cases.write("empty-document", "with an empty one", "bytes", hashes=["sha1"])
    cases.write("long", "long", "ndarray:uint16", dtype="uint16", compression="zstd:19", hashes=["sha1"])

    beside = {
        "a": ("int", -7),
        "attention_mask": ("ndarray:uint8", np.ones(300, "uint8")),
        "text": ("str", "Zürich"),
        "score": ("float32", 0.5),
        "meta": ("json", {"url": "x"}),
        "zz": ("ndarray:float16:2,2", np.ones((2, 2), "float16")),
    }
    for dtype in DTYPES:
        for column in ("tokens", "input_ids"):
            name = f"columns-beside.{column}.{dtype}"
            cases.write(
                name,
                "rows",
                f"ndarray:{dtype}",
                column=column,
                dtype=dtype,
                others=beside,
                compression="zstd",
            )
    cases.write("fixed-columns.ints", "rows", f"ndarray:int32:{ROW}", dtype="int32",
                others={"document": ("int", 1 << 40), "part": ("uint8", 3)})  # fmt: skip
    both = {"input_ids": ("ndarray:int32", np.array([1, 2], "int32"))}
    cases.write("tokens-before-input_ids", "rows", "ndarray:uint16", dtype="uint16", others=both)

    # As LLM-foundry's converters: rows of int64 bytes, then of int32 arrays, from several processes merged.
    cases.write("foundry-bytes", "rows", "bytes", compression="zstd", hashes=["sha1"])
    for part in range(3):
        cases.write("foundry-merged", "rows", "ndarray:int32", dtype="int32", folder=f"foundry-merged/{part}",
                    only=slice(3 * part, 3 * part + 3), compression="zstd", hashes=["sha1", "xxh64"])  # fmt: skip
    merge_index(str(out / "foundry-merged"), keep_local=True)

    readable = list(cases.cases)
    cases.write("refused-pkl", "rows", "pkl")
    for compression in ("gz", "gz:3", "br:4", "bz2", "snappy"):
        name = f"refused-{compression}".replace(":", "-")
        cases.write(name, "rows", "ndarray:uint16", dtype="uint16", compression=compression, hashes=["sha1"])
    expected = {
        "writer": f"mosaicml-streaming {version('mosaicml-streaming')}",
        "documents": cases.documents,
        "cases": {name: cases.cases[name] for name in readable},
        "refused": [name for name in cases.cases if name not in readable],
    }
    (out / "expected.json").write_text(json.dumps(expected))


def read(root: Path) -> dict[str, list[list[int]] | str]:
    """Samples of every folder, with the hashes that its index names checked; an error as text."""
    found: dict[str, list[list[int]] | str] = {}
    for folder in sorted(p.parent for p in root.glob("*/index.json")):
        try:
            found[folder.name] = read_folder(folder)
        except Exception as error:  # a finding, whatever it is
            found[folder.name] = repr(error)
    return found


def read_folder(folder: Path) -> list[list[int]]:
    """Tokens of every sample, by number, so that no partition drops or repeats one."""
    for shard in json.loads((folder / "index.json").read_text())["shards"]:
        check_hashes(folder, shard)
    dataset = StreamingDataset(local=str(folder), batch_size=1, shuffle=False)
    samples = []
    for k in range(dataset.num_samples):
        (tokens,) = (v for key, v in dataset[k].items() if key in ("tokens", "input_ids"))
        samples.append(tokens.tolist())
    clean_stale_shared_memory()
    return samples


def check_hashes(folder: Path, shard: dict[str, Any]) -> None:
    """Compare the index with the package's own hashes. Its dataset reads on over bad ones, and only in downloads."""
    info = shard["zip_data"] or shard["raw_data"]
    content = (folder / info["basename"]).read_bytes()
    parts = [(info, content)]
    if shard["zip_data"]:
        parts.append((shard["raw_data"], decompress(shard["compression"], content)))
    for part, data in parts:
        if part["hashes"] != {name: get_hash(name, data) for name in shard["hashes"]}:
            raise ValueError(f"hashes of {part['basename']} differ")


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
    if sys.argv[1] == "write":
        write(Path(sys.argv[2]))
    else:
        print(json.dumps(read(Path(sys.argv[2]))))
