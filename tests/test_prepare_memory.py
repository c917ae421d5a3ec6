"""Memory of prepare: it follows the number of documents (some 0.2 kB each) and Parquet's row groups, not the files."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from small_corpus import make_codec, texts

SMALL, LARGE = 200, 2000  # documents of 18 kB: 4 and 37 MB
GROWTH_MB = 16
PEAKS = """
import json, re, sys
from pathlib import Path
from velopath.prepare import prepare

peaks = []
if __name__ == "__main__":
    for inputs in json.loads(sys.argv[1]):
        prepare(inputs, sys.argv[2], tokenizer=sys.argv[3], separator="\\f", processes=1, dry_run=True)
        status = Path("/proc/self/status").read_text()  # not ru_maxrss: that holds the parent's peak too
        peaks.append(int(re.search(r"VmHWM:\\s*(\\d+)", status)[1]) / 1024)
    print(json.dumps(peaks))
"""


def write_all(folder: Path, count: int) -> dict[str, str]:
    """The same documents in every form of input."""
    folder.mkdir()
    body = " ".join(texts(130, 1))
    documents = [f"{k} {body}" for k in range(count)]
    lines = "".join(json.dumps({"text": d}) + "\n" for d in documents).encode()
    (folder / "x.jsonl").write_bytes(lines)
    (folder / "x.jsonl.gz").write_bytes(gzip.compress(lines, 1))
    (folder / "x.txt").write_text("\f".join(documents))
    pq.write_table(
        pa.table({"text": documents}), folder / "x.parquet", row_group_size=100, compression="zstd"
    )
    return {
        name.replace(".", "_"): str(folder / name) for name in ("x.jsonl", "x.jsonl.gz", "x.txt", "x.parquet")
    }


@pytest.mark.skipif(sys.platform != "linux", reason="reads peak memory from /proc")
def test_memory_does_not_grow_with_the_files(tmp_path: Path) -> None:
    given = json.dumps([write_all(tmp_path / str(count), count) for count in (SMALL, LARGE)])
    (tmp_path / "peaks.py").write_text(PEAKS)
    command = [
        sys.executable,
        str(tmp_path / "peaks.py"),
        given,
        str(tmp_path / "out"),
        str(make_codec(tmp_path)),
    ]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    small, large = json.loads(done.stdout)
    size = sum(p.stat().st_size for p in (tmp_path / str(LARGE)).iterdir() if p.suffix != ".gz")
    assert size > 4 * GROWTH_MB << 20
    assert large - small < GROWTH_MB, (small, large)
