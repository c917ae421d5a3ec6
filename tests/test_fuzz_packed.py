"""R13 for what is computed and kept: bins, which may come from a store, and the journal of shards."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from sampler_reference import write_domain
from test_fuzz_files import changed, damaged, fuzzed, only_ours, text_of
from velopath import open_sampler
from velopath.cache import Cache
from velopath.cli.app import app
from velopath.mds import load_index, read_shard
from velopath.shard_journal import measure


@given(value=st.data())
@fuzzed
def test_the_bins(value: st.DataObject, tmp_path: Path) -> None:
    """Bytes; and heads and bodies with other values whose hash fits again."""
    root = tmp_path / "d"
    if not root.exists():
        write_domain(root / "a", [40, 50, 3, 8, 70, 9], seed=1, size_limit=300)
    options = {"rows": 1, "row_tokens": 8, "packing": "best_fit", "order": "windowed", "threads": 0}
    stored = root / "a" / "best_fit.t8.eos.g1.bins"
    stored.unlink(missing_ok=True)
    with open_sampler(root, cache=tmp_path / "c", **options) as sampler:  # type: ignore[arg-type]
        rows = (sampler.order.bins or {})["a"]
    sound = stored.read_bytes()
    stored.unlink()  # what is mapped must not change
    head, end = json.loads(sound.split(b"\n")[0]), -(-(sound.index(b"\n") + 1) // 64) * 64
    body = np.frombuffer(sound[end:], "<u4").copy()
    kind = value.draw(st.sampled_from(["bytes", "head", "body"]))
    if kind == "head":
        head = value.draw(changed(head))
    for _ in range(3 if kind == "body" else 0):
        extremes = st.sampled_from([0, 1, 2, 2**31, 2**32 - 1]) | st.integers(0, 60)
        body[value.draw(st.integers(0, len(body) - 1))] = value.draw(extremes)
        head["xxh3"] = xxhash.xxh3_64_hexdigest(body.tobytes())
    line = text_of(head) + b"\n"
    content = line.ljust(-(-len(line) // 64) * 64) + body.tobytes()
    stored.write_bytes(value.draw(damaged(sound)) if kind == "bytes" else content)

    def read() -> None:
        with open_sampler(root, cache=tmp_path / "c", **options) as sampler:  # type: ignore[arg-type]
            for _ in range(2 * rows):
                next(sampler)
            sampler.exposure()

    only_ours(read)
    only_ours(
        lambda: CliRunner().invoke(app, ["pack", str(root), "-t", "8", "-g", "1"], catch_exceptions=False)
    )


@given(value=st.data())
@fuzzed
def test_the_journal_of_shards(value: st.DataObject, tmp_path: Path) -> None:
    if not (tmp_path / "d").exists():
        write_domain(tmp_path / "d", [40, 50, 3, 8, 70, 9], seed=1, size_limit=300)
    index, cache = load_index(tmp_path / "d"), Cache(tmp_path / "c")
    lengths = [np.array([len(d) for d in read_shard(entry)], np.uint32) for entry in index.shards]

    def measured() -> list[list[int]]:
        found = measure(
            index, lambda e: lengths[index.shards.index(e)], bytes_dtype="int64", cache=cache, why="in a test"
        )
        return [part.tolist() for part in found if not isinstance(part, str)]

    expected, sound = measured(), tmp_path / "sound"
    (path,) = (tmp_path / "c").glob("*.shards")
    if not sound.exists():  # records stand in the order in which threads read them
        sound.write_bytes(path.read_bytes())
    path.write_bytes(value.draw(damaged(sound.read_bytes())))
    assert measured() == expected and measured() == expected
