"""mosaicml-streaming as a peer in the sampler's benchmark. Runs in an environment of its own; imports no velopath.

    PYTHON benchmarks/mosaic_peer.py DOCUMENTS ROWS ROW_COUNT ROW_TOKENS SEPARATE_WORKERS SHARES

Reads `NAME SECONDS` lines from stdin and answers each with `{"tokens":..,"seconds":..,"cpu_seconds":..}`. NAME is
`documents` (StreamingDataset over the documents, packed into rows as LLM-foundry's ConcatTokensDataset does),
`documents-workers` (the same in DataLoader worker processes) or `rows` (rows packed offline, one per sample).
The mix is static: `Stream(proportion=...)`. A batch is int64 (ROW_COUNT, ROW_TOKENS + 1).
"""

import json
import sys
import tempfile
import time
import types
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any


def stub_torchvision() -> None:
    """Stand in for torchvision, which cannot be imported beside a CPU torch; text needs nothing of it."""
    for name in (
        "torchvision",
        "torchvision.datasets",
        "torchvision.transforms",
        "torchvision.transforms.functional",
    ):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__spec__ = ModuleSpec(name, None)
    for name in ("VisionDataset", "CIFAR10", "ImageFolder"):
        setattr(sys.modules["torchvision.datasets"], name, type(name, (), {}))
    sys.modules["torchvision.transforms.functional"].to_tensor = None  # type: ignore[attr-defined]


stub_torchvision()
import numpy as np  # noqa: E402
import torch  # noqa: E402
from streaming import Stream, StreamingDataset  # noqa: E402


class ConcatTokens(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
    """Rows of `width` tokens from concatenated documents, without end; LLM-foundry's way."""

    def __init__(self, documents: StreamingDataset, width: int) -> None:
        self.documents, self.width = documents, width

    def __iter__(self) -> Iterator[Any]:
        buffer = np.empty(0, np.int64)
        while True:
            for sample in self.documents:
                buffer = np.concatenate([buffer, sample["tokens"].astype(np.int64)])
                while len(buffer) >= self.width:
                    yield torch.from_numpy(buffer[: self.width])
                    buffer = buffer[self.width :]


class Rows(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
    """Samples that are rows already."""

    def __init__(self, rows: StreamingDataset) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Any]:
        while True:
            for sample in self.rows:
                yield torch.from_numpy(sample["tokens"].astype(np.int64))


def dataset(root: str, shares: dict[str, float], batch: int) -> StreamingDataset:
    streams = [Stream(local=str(Path(root) / name), proportion=share) for name, share in shares.items()]
    return StreamingDataset(streams=streams, batch_size=batch, shuffle=True, shuffle_seed=0)


def main() -> None:
    documents, rows, count, row_tokens, workers, shares = sys.argv[1:]
    batch, width, mix = int(count), int(row_tokens) + 1, json.loads(shares)

    def loader(source: Any, processes: int = 0) -> Iterator[Any]:
        return iter(torch.utils.data.DataLoader(source, batch_size=batch, num_workers=processes))

    makers = {
        "documents": lambda: loader(ConcatTokens(dataset(documents, mix, batch), width)),
        "documents-workers": lambda: loader(
            ConcatTokens(dataset(documents, mix, batch), width), int(workers)
        ),
        "rows": lambda: loader(Rows(dataset(rows, mix, batch))),
    }
    torch.set_num_threads(1)
    running: dict[str, Iterator[Any]] = {}
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        name, seconds = line.split()
        if name not in running:
            running[name] = makers[name]()
            for _ in range(8):
                next(running[name])
        batches, start, cpu = 0, time.perf_counter(), time.process_time()
        while time.perf_counter() - start < float(seconds):
            tokens = next(running[name])
            assert tokens.shape == (batch, width)
            batches += 1
        spent = time.perf_counter() - start
        answer = {
            "tokens": batches * batch * int(row_tokens),
            "seconds": spent,
            "cpu_seconds": time.process_time() - cpu,
        }
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    # Worker processes may still write there when the peer is told to end.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        tempfile.tempdir = scratch
        main()
