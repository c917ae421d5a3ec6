"""mosaicml-streaming as a peer of the sampler. Runs in an environment of its own; imports no velopath.

    PYTHON benchmarks/mosaic_peer.py FOLDER ROWS ROW_TOKENS WORKERS SHARES

`benchmarks.peer_serving` says how it is asked. `documents` is StreamingDataset over the documents of FOLDER/raw, packed
into rows as LLM-foundry's ConcatTokensDataset does, `rows` over FOLDER/rows, packed offline, one row per sample;
`-workers` the same in DataLoader worker processes. The mix is static: `Stream(proportion=...)`.
"""

import json
import sys
import tempfile
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

from peer_serving import serve  # noqa: E402


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
    folder, rows, row_tokens, workers, shares = sys.argv[1:]
    batch, width, mix = int(rows), int(row_tokens) + 1, json.loads(shares)

    def documents(processes: int) -> Iterator[Any]:
        return loader(ConcatTokens(dataset(f"{folder}/raw", mix, batch), width), processes)

    def packed(processes: int) -> Iterator[Any]:
        return loader(Rows(dataset(f"{folder}/rows", mix, batch)), processes)

    def loader(source: Any, processes: int) -> Iterator[Any]:
        return iter(torch.utils.data.DataLoader(source, batch_size=batch, num_workers=processes))

    makers = {
        "documents": lambda: documents(0),
        "documents-workers": lambda: documents(int(workers)),
        "rows": lambda: packed(0),
        "rows-workers": lambda: packed(int(workers)),
    }
    torch.set_num_threads(1)
    serve(makers, batch, int(row_tokens))


if __name__ == "__main__":
    # Worker processes may still write there when the peer is told to end.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        tempfile.tempdir = scratch
        main()
