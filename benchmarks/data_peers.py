"""Megatron-core, litdata, grain and Hugging Face datasets as peers of the sampler. Imports no velopath.

    PYTHON benchmarks/data_peers.py FOLDER ROWS ROW_TOKENS WORKERS SHARES LIBRARY

FOLDER holds for each domain `NAME.bin`, its uint16 tokens, and `NAME.lengths.npy`, the lengths of its documents. The
library's own files are written there first. `benchmarks.peer_serving` says how it is asked; the names are those of
`LIBRARIES`, in settings that each library offers for speed. Each shuffles and mixes by its own means.
"""

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from peer_serving import Makers, endless, serve

MANY_ROWS = 400_000
"""Rows that a library which wants to know beforehand is told it will be asked for."""


class Setting(NamedTuple):
    """What all makers share."""

    folder: Path
    rows: int
    row_tokens: int
    workers: int
    shares: dict[str, float]

    def tokens(self, name: str) -> Any:
        return np.memmap(self.folder / f"{name}.bin", np.uint16, "r")

    def packed(self, name: str) -> Any:
        """Rows of T + 1 tokens, packed offline."""
        width, tokens = self.row_tokens + 1, self.tokens(name)
        return tokens[: len(tokens) // width * width].reshape(-1, width)

    def loader(self, data: Any, workers: int, **options: Any) -> Iterator[Any]:
        def make() -> Any:
            return torch.utils.data.DataLoader(
                data, batch_size=self.rows, num_workers=workers, drop_last=True, **options
            )

        return endless(make)


def megatron(s: Setting) -> Makers:
    """GPTDataset over IndexedDataset files, mixed by BlendedDataset, without the attention mask, which is quadratic.

    Each document ends with a token of its own, as its preprocessing does, by which `resets` finds where it begins.
    """
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    # As in training; it asks for its rank.
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)

    class Ids:
        vocab_size, eod, eos, pad = 50_001, 50_000, 50_000, -1
        unique_identifiers = {"class": "Ids"}

    for name in s.shares:
        builder = IndexedDatasetBuilder(str(s.folder / f"{name}.megatron.bin"), dtype=np.uint16)
        lengths = np.load(s.folder / f"{name}.lengths.npy")
        for document in np.split(s.tokens(name), np.cumsum(lengths)[:-1]):
            builder.add_item(torch.from_numpy(np.append(document, np.uint16(Ids.eod)).astype(np.int32)))
            builder.end_document()
        builder.finalize(str(s.folder / f"{name}.megatron.idx"))

    def dataset(resets: bool) -> Any:
        paths = [str(s.folder / f"{name}.megatron") for name in s.shares]
        config = GPTDatasetConfig(
            random_seed=0,
            sequence_length=s.row_tokens,
            blend=(paths, list(s.shares.values())),
            split="1,0,0",
            path_to_cache=str(s.folder / "megatron"),
            tokenizer=Ids(),
            reset_position_ids=resets,
            reset_attention_mask=resets,
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        return BlendedMegatronDatasetBuilder(GPTDataset, [MANY_ROWS, 0, 0], lambda: True, config).build()[0]

    def tokens(workers: int, resets: bool = False) -> Iterator[Any]:
        return (batch["tokens"] for batch in s.loader(dataset(resets), workers))

    return {
        "plain": lambda: tokens(0),
        "workers": lambda: tokens(s.workers),
        "resets": lambda: tokens(0, resets=True),
    }


def litdata(s: Setting) -> Makers:
    """CombinedStreamingDataset over chunks of tokens; StreamingDataLoader."""
    os.environ["LITDATA_DISABLE_VERSION_CHECK"] = "1"
    from litdata import (
        CombinedStreamingDataset,
        StreamingDataLoader,
        StreamingDataset,
        TokensLoader,
        optimize,
    )

    block = s.row_tokens + 1
    for name in s.shares:
        optimize(
            fn=_Stretches(s.folder / f"{name}.bin", block),
            inputs=[0],
            output_dir=str(s.folder / f"{name}.litdata"),
            chunk_bytes="64MB",
            item_loader=TokensLoader(),
            num_workers=1,
            verbose=False,
        )

    def loader(workers: int) -> Iterator[Any]:
        parts = [
            StreamingDataset(
                str(s.folder / f"{name}.litdata"), item_loader=TokensLoader(block_size=block), shuffle=True
            )
            for name in s.shares
        ]
        mixed = CombinedStreamingDataset(
            parts, seed=0, weights=list(s.shares.values()), iterate_over_all=False
        )
        made = StreamingDataLoader(mixed, batch_size=s.rows, num_workers=workers, drop_last=True)
        return (batch.long() for batch in endless(lambda: made))

    return {"plain": lambda: loader(0), "workers": lambda: loader(s.workers)}


class _Stretches:
    """Yields the stream of a file in stretches of whole blocks, as litdata's writer takes them."""

    def __init__(self, path: Path, block: int) -> None:
        self.path, self.block = path, block

    def __call__(self, index: int) -> Iterator[Any]:
        tokens = np.memmap(self.path, np.uint16, "r")
        step = self.block * 512
        for begin in range(0, len(tokens), step):
            yield torch.from_numpy(tokens[begin : begin + step].copy())


def grain(s: Setting) -> Makers:
    """MapDataset.mix over shuffled, repeated rows: from a memmap, and from its own ArrayRecord files."""
    from array_record.python.array_record_module import ArrayRecordWriter
    from grain import MapDataset, ReadOptions
    from grain.sources import ArrayRecordDataSource

    for name in s.shares:
        writer = ArrayRecordWriter(str(s.folder / f"{name}.array_record"), "group_size:1,uncompressed")
        for row in s.packed(name):
            writer.write(row.tobytes())
        writer.close()

    def mixed(source: Callable[[str], Any], threads: int) -> Iterator[Any]:
        parts = [MapDataset.source(source(name)).seed(0).shuffle().repeat() for name in s.shares]
        rows = MapDataset.mix(parts, list(s.shares.values()))
        if source is records:
            rows = rows.map(lambda record: np.frombuffer(record, np.uint16))
        batches = rows.batch(s.rows).map(lambda batch: batch.astype(np.int64))
        return iter(batches.to_iter_dataset(ReadOptions(threads, threads)))

    def records(name: str) -> Any:
        return ArrayRecordDataSource(str(s.folder / f"{name}.array_record"))

    return {
        "memmap": lambda: mixed(s.packed, 0),
        "memmap-threads": lambda: mixed(s.packed, s.workers),
        "records": lambda: mixed(records, 0),
        "records-threads": lambda: mixed(records, 16),
    }


def datasets(s: Setting) -> Makers:
    """Rows packed offline in Arrow files, mixed by interleave_datasets; map-style and iterable."""
    import pyarrow as pa
    from datasets import Dataset, interleave_datasets, load_from_disk
    from datasets.table import InMemoryTable

    for name in s.shares:
        rows = s.packed(name)
        column = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), rows.shape[1])
        Dataset(InMemoryTable(pa.table({"tokens": column}))).save_to_disk(str(s.folder / f"{name}.arrow"))

    def parts() -> list[Any]:
        return [load_from_disk(str(s.folder / f"{name}.arrow")).with_format("numpy") for name in s.shares]

    shares = list(s.shares.values())

    def stacked(rows: Any) -> Any:
        return torch.from_numpy(np.stack([r["tokens"] for r in rows]).astype(np.int64))

    def mixed() -> Any:
        # Until a domain is used up, then again: what is mixed is an index made beforehand.
        shuffled = [part.shuffle(seed=0) for part in parts()]
        return interleave_datasets(shuffled, probabilities=shares, seed=0).with_format("numpy")

    def sliced() -> Iterator[Any]:
        rows = mixed()

        def batches() -> Iterator[Any]:
            for begin in range(0, len(rows) - s.rows + 1, s.rows):
                yield rows[begin : begin + s.rows]["tokens"].astype(np.int64)

        return endless(batches)

    def iterable(workers: int) -> Iterator[Any]:
        each = [
            part.to_iterable_dataset(num_shards=max(1, workers)).shuffle(seed=0, buffer_size=256)
            for part in parts()
        ]
        rows = interleave_datasets(each, probabilities=shares, seed=0).with_format("numpy")
        return s.loader(rows, workers, collate_fn=stacked)

    return {
        "map": lambda: s.loader(mixed(), 0, collate_fn=stacked),
        "map-slices": sliced,
        "map-workers": lambda: s.loader(mixed(), s.workers, collate_fn=stacked),
        "iterable": lambda: iterable(0),
        "iterable-workers": lambda: iterable(s.workers),
    }


LIBRARIES = {"megatron": megatron, "litdata": litdata, "grain": grain, "datasets": datasets}


def main() -> None:
    folder, rows, row_tokens, workers, shares, library = sys.argv[1:]
    setting = Setting(Path(folder), int(rows), int(row_tokens), int(workers), json.loads(shares))
    torch.set_num_threads(1)
    serve(LIBRARIES[library](setting), setting.rows, setting.row_tokens)


if __name__ == "__main__":
    # Worker processes may still write there when the peer is told to end.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        os.environ |= {"TMPDIR": scratch, "HF_HOME": scratch, "HF_HUB_OFFLINE": "1"}
        tempfile.tempdir = scratch
        main()
