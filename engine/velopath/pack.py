"""Rows of whole documents: best-fit-decreasing bins, computed once and stored beside the shards.

A row holds W = T + 1 tokens: T inputs and T labels, as everywhere. The bins of a domain are a pure function of its
documents' lengths, so that every process finds the same ones. They reach over the whole domain, or the documents of a
bin come from one group of `bin_shards` neighbouring shards that hold tokens: then few shards are read at a time.

Their file is one JSON line, padded to whole 64 bytes, then `starts` (uint64), the first bin of each group (uint64, none
where bins reach over all) and `pieces` (uint32 x 3), as `best_fit_groups` returns them, little-endian; the line names
the version, T, the end-of-text token, `bin_shards`, the data (the hash of their index) and a hash of what follows. A
file that does not fit in any of these is computed anew.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from velopath import _core
from velopath.cache import default_cache
from velopath.durable import durable, locked, make_folder
from velopath.errors import ConfigError, DataError, WriteError
from velopath.stream_data import DomainData
from velopath.stream_options import RowChoice

_VERSION = 1
_ALIGNED = 64


@dataclass(frozen=True)
class Bins:
    """The bins of one domain: `starts` (bins + 1,), `pieces` (P, 3) = (document, first token, tokens), `groups` the
    first bin of each group of shards, none where bins reach over the whole domain.

    `documents` are those that hold tokens (an end-of-text token counts), `truncated` those cut because they are
    longer than a row, `tokens` what the bins hold without padding. `cut_by_concat` is the share of documents that
    `concat` is expected to cut at the bounds of rows: the mean of min(1, (length - 1) / T).
    """

    path: Path
    row_tokens: int
    documents: int
    truncated: int
    tokens: int
    cut_by_concat: float
    starts: NDArray[np.uint64]
    groups: NDArray[np.uint64]
    pieces: NDArray[np.uint32]

    @property
    def rows(self) -> int:
        """Rows of an epoch: the bins."""
        return len(self.starts) - 1

    @property
    def truncated_share(self) -> float:
        """Documents cut, of all that hold tokens."""
        return self.truncated / self.documents

    @property
    def padding_share(self) -> float:
        """Padding, of all tokens of an epoch's rows."""
        return 1 - self.tokens / (self.rows * (self.row_tokens + 1))

    @property
    def packing(self) -> _core.Packing:
        """For the core's sampler."""
        return _core.Packing(
            self.starts,
            self.pieces,
            width=self.row_tokens + 1,
            path=str(self.path),
            groups=self.groups.tolist(),
        )


def load_bins(
    domain: DomainData,
    row_tokens: int,
    eos: int | None,
    *,
    bin_shards: int = 0,
    cache: str | Path | None = None,
) -> Bins:
    """The bins of a domain for rows of T = `row_tokens`: from their file, or computed and stored.

    `bin_shards`: the neighbouring shards that the documents of a bin come from, 0: all.
    The file stands beside the shards, or in `cache` where that folder cannot be written. Processes that ask at once
    wait for the one that computes. Raises `DataError` where no document holds a token, `ConfigError` where neither
    place can be written.
    """
    group = f".g{bin_shards}" if bin_shards else ""
    name = f"best_fit.t{row_tokens}.eos{'' if eos is None else eos}{group}.bins"
    facts: dict[str, Any] = {
        "format": "velopath.bins",
        "version": _VERSION,
        "row_tokens": row_tokens,
        "eos": eos,
        "fingerprint": domain.fingerprint,
        "stream_documents": domain.stream.documents,
        "stream_tokens": domain.stream.tokens,
    }
    if bin_shards:
        facts["bin_shards"] = bin_shards
    other = Path(cache) if cache is not None else default_cache()
    places = [Path(domain.folder) / name, other / f"{domain.fingerprint}.{name}"]
    for path in places:
        if (found := _read(path, facts)) is not None:
            return found
    problems = []
    for path in places:
        try:
            make_folder(path.parent)
            with locked(path.with_suffix(".lock")):
                found = _read(path, facts)  # another process may have computed it while this one waited
                if found is None:
                    _write(path, facts, domain.stream)
                    found = _read(path, facts)
            if found is not None:
                return found
        except OSError as error:
            problems.append(f"{path.parent} ({error.strerror})")
        except WriteError as error:
            problems.append(f"{path.parent} ({error.problem})")
    raise ConfigError(f"the bins of best_fit cannot be stored in {' nor in '.join(problems)}; choose a cache")


def bins_of(
    data: Mapping[str, DomainData],
    choice: RowChoice,
    row_tokens: int,
    eos: int | None,
    cache: str | Path | None,
) -> list[Bins]:
    """The bins of each domain; none where rows are no bins."""
    if choice.packing == "concat":
        return []
    return [
        load_bins(domain, row_tokens, eos, bin_shards=choice.bin_shards, cache=cache)
        for domain in data.values()
    ]


def window_parts(
    choice: RowChoice, streams: Sequence[_core.TokenStream], bins: Sequence[Bins]
) -> tuple[tuple[int, ...], ...]:
    """Where what a window counts begins in each domain: shards in the stream, groups in the bins; none if it is 0."""
    if choice.window == 0:
        return ()
    if bins:
        return tuple(tuple(b.groups.tolist()) for b in bins)
    return tuple(tuple(stream.shard_positions.tolist()) for stream in streams)


def whole_padding_share(lengths: NDArray[np.uint32], row_tokens: int) -> float:
    """The `padding_share` of bins that reach over the whole domain, to compare those of groups with; not stored."""
    from velopath.pack_bins import best_fit_bins

    starts, pieces, _ = best_fit_bins(lengths, row_tokens + 1)
    return 1 - int(pieces[:, 2].sum(dtype=np.int64)) / ((len(starts) - 1) * (row_tokens + 1))


def _read(path: Path, facts: dict[str, Any]) -> Bins | None:
    """The bins in a file, or None where it is missing, damaged or of other facts."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        content = np.memmap(path, np.uint8, "r")
        line = bytes(content[: 1 << 16]).split(b"\n", 1)[0]
        head = json.loads(line)
        begin = -(-(len(line) + 1) // _ALIGNED) * _ALIGNED
        body = content[begin:]
        starts_bytes, groups_bytes = 8 * (head["bins"] + 1), 8 * head.get("groups", 0)
        pieces_at = starts_bytes + groups_bytes
        fits = all(head[name] == value for name, value in facts.items())
        fits &= ("bin_shards" in facts) == (groups_bytes > 0)
        if fits and len(body) == pieces_at + 12 * head["pieces"] and _hash(body) == head["xxh3"]:
            return Bins(
                path,
                facts["row_tokens"],
                head["documents"],
                head["truncated"],
                head["tokens"],
                head["cut_by_concat"],
                np.asarray(body[:starts_bytes]).view("<u8"),
                np.asarray(body[starts_bytes:pieces_at]).view("<u8"),
                np.asarray(body[pieces_at:]).view("<u4").reshape(-1, 3),
            )
    return None


def _write(path: Path, facts: dict[str, Any], stream: _core.TokenStream) -> None:
    """Compute the bins and store them."""
    from velopath.pack_bins import best_fit_groups  # numba; not needed where the file is there

    lengths = stream.lengths
    if len(lengths) >= 1 << 32:
        raise DataError(f"{len(lengths)} documents; best_fit takes fewer than 2^32", path=path.parent)
    row_tokens = facts["row_tokens"]
    step = facts.get("bin_shards", 0)
    firsts = stream.shard_documents[::step].tolist() if step else [0]
    starts, groups, pieces, truncated = best_fit_groups(lengths, firsts, row_tokens + 1)
    groups = groups if step else groups[:0]
    held = lengths[lengths > 0].astype(np.int64)
    parts = starts.astype("<u8"), groups.astype("<u8"), pieces.astype("<u4").reshape(-1)
    body = np.concatenate([part.view(np.uint8) for part in parts])
    head = facts | {
        "bins": len(starts) - 1,
        "pieces": len(pieces),
        **({"groups": len(groups)} if step else {}),
        "documents": len(held),
        "truncated": truncated,
        "tokens": int(pieces[:, 2].sum(dtype=np.int64)),
        "cut_by_concat": float(np.minimum(1, (held - 1) / row_tokens).mean()),
        "xxh3": _hash(body),
    }
    line = json.dumps(head).encode() + b"\n"
    with durable(path) as file:
        file.write(line.ljust(-(-len(line) // _ALIGNED) * _ALIGNED, b" "))
        file.write(body.data)


def _hash(body: NDArray[np.uint8]) -> str:
    return xxhash.xxh3_64_hexdigest(np.ascontiguousarray(body).data)
