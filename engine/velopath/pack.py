"""Rows of whole documents: best-fit-decreasing bins, computed once and stored beside the shards.

A row holds W = T + 1 tokens: T inputs and T labels, as everywhere. The bins of a domain are a pure function of its
documents' lengths, so that every process finds the same ones. They reach over the whole domain, or the documents of a
bin come from one group of `bin_shards` neighbouring shards that hold tokens: then few shards are read at a time.

Their file is one JSON line, padded to whole 64 bytes, then `starts` (uint64), the first bin of each group (uint64, none
where bins reach over all) and `pieces` (uint32 x 3), as `best_fit_groups` returns them, little-endian; the line names
the version, T, the end-of-text token, `bin_shards`, the data (the hash of their index) and a hash of what follows. A
file that does not fit in any of these is computed anew. It stands beside the shards. That of a remote folder is fetched
from there into the cache; where there is none the documents are measured, which fetches every shard once.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from velopath import _core
from velopath.cache import Cache
from velopath.durable import durable, locked, make_folder
from velopath.errors import ConfigError, DataError, WriteError
from velopath.remote import MissingError, copy
from velopath.shard_journal import tell_wait
from velopath.stream_data import DomainData
from velopath.stream_options import RowChoice
from velopath.urls import below, redact

_VERSION = 1
_ALIGNED = 64

logger = logging.getLogger("velopath.remote")


@dataclass(frozen=True)
class Bins:
    """The bins of one domain: `starts` (bins + 1,), `pieces` (P, 3) = (document, first token, tokens), `groups` the
    first bin of each group of shards, none where bins reach over the whole domain.

    `documents` are those that hold tokens (an end-of-text token counts), `truncated` those cut because they are
    longer than a row, `tokens` what the bins hold without padding. `cut_by_concat` is the share of documents that
    `concat` is expected to cut at the bounds of rows: the mean of min(1, (length - 1) / T). `whole_rows` are the bins
    that there would be if they reached over the whole domain.
    """

    path: Path
    row_tokens: int
    documents: int
    truncated: int
    tokens: int
    cut_by_concat: float
    whole_rows: int
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
    def whole_padding_share(self) -> float:
        """What `padding_share` would be if bins reached over the whole domain; the same documents are cut."""
        return 1 - self.tokens / (self.whole_rows * (self.row_tokens + 1))

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
    cache: Cache | str | Path | None = None,
) -> Bins:
    """The bins of a domain for rows of T = `row_tokens`: from their file, or computed and stored.

    `bin_shards`: the neighbouring shards that the documents of a bin come from, 0: all. The file stands beside the
    shards, or in `cache` where that folder is remote or cannot be written. Processes that ask at once wait for the one
    that computes. Raises `DataError` where no document holds a token, `ConfigError` where neither place can be written,
    and what fetches raise.
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
    held = cache if isinstance(cache, Cache) else Cache(cache)
    if domain.remote:
        place = xxhash.xxh3_128_hexdigest(f"{redact(str(domain.folder))}\0{domain.fingerprint}".encode())
        places = [held.folder / f"{place}.{name}"]
    else:
        places = [Path(domain.folder) / name, held.folder / f"{domain.fingerprint}.{name}"]
    for path in places:
        if (found := _read(path, facts)) is not None:
            return found
    problems = []
    for path in places:
        try:
            make_folder(path.parent)
            with locked(path.with_suffix(".lock"), on_wait=partial(tell_wait, domain.folder)):
                found = _read(path, facts)  # another process may have computed it while this one waited
                if found is None and domain.remote:
                    url = str(below(domain.folder, name))
                    if _fetch(path, url, domain, row_tokens, held) and (found := _read(path, facts)) is None:
                        logger.warning("%s is of other data; the documents are measured", redact(url))
                if found is None:
                    _write(path, facts, domain)
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
    cache: Cache,
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


def _read(path: Path, facts: dict[str, Any]) -> Bins | None:
    """The bins in a file, or None where it is missing, damaged or of other facts."""
    with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        content = np.memmap(path, np.uint8, "r")
        line = bytes(content[: 1 << 16]).split(b"\n", 1)[0]
        head = json.loads(line)
        begin = -(-(len(line) + 1) // _ALIGNED) * _ALIGNED
        body = content[begin:]
        starts_bytes, groups_bytes = 8 * (head["bins"] + 1), 8 * head.get("groups", 0)
        pieces_at = starts_bytes + groups_bytes
        fits = all(head[name] == value for name, value in facts.items())
        fits &= ("bin_shards" in facts) == (groups_bytes > 0)
        numbers = [head[name] for name in ("bins", "pieces", "documents", "tokens")]
        numbers += [head["truncated"] + 1, head["whole_bins"] if groups_bytes else 1]
        fits &= all(type(n) is int and n > 0 for n in numbers) and 0 <= head["cut_by_concat"] <= 1
        if fits and len(body) == pieces_at + 12 * head["pieces"] and _hash(body) == head["xxh3"]:
            return Bins(
                path,
                facts["row_tokens"],
                head["documents"],
                head["truncated"],
                head["tokens"],
                head["cut_by_concat"],
                head["whole_bins"] if groups_bytes else head["bins"],
                np.asarray(body[:starts_bytes]).view("<u8"),
                np.asarray(body[starts_bytes:pieces_at]).view("<u8"),
                np.asarray(body[pieces_at:]).view("<u4").reshape(-1, 3),
            )
    return None


def _fetch(path: Path, url: str, domain: DomainData, row_tokens: int, cache: Cache) -> bool:
    """Copy the file that stands beside a remote folder's shards to `path`; whether there is one."""
    pieces = domain.stream.documents + domain.stream.tokens // row_tokens + 1
    most = (1 << 16) + 20 * pieces + 8 * len(domain.remote)  # as large as bins of these documents can be
    try:
        copy(url, path, most=most, policy=cache.policy, stop=cache.stop)
    except MissingError:
        return False
    return True


def _write(path: Path, facts: dict[str, Any], domain: DomainData) -> None:
    """Compute the bins and store them."""
    from velopath.pack_bins import best_fit_groups, count_bins  # numba; not needed where the file is there

    lengths = domain.lengths()
    if len(lengths) >= 1 << 32:
        raise DataError(f"{len(lengths)} documents; best_fit takes fewer than 2^32", path=path.parent)
    row_tokens = facts["row_tokens"]
    step = facts.get("bin_shards", 0)
    firsts = domain.stream.shard_documents[::step].tolist() if step else [0]
    starts, groups, pieces, truncated = best_fit_groups(lengths, firsts, row_tokens + 1)
    groups = groups if step else groups[:0]
    held = lengths[lengths > 0].astype(np.int64)
    parts = starts.astype("<u8"), groups.astype("<u8"), pieces.astype("<u4").reshape(-1)
    body = np.concatenate([part.view(np.uint8) for part in parts])
    head = facts | {
        "bins": len(starts) - 1,
        "pieces": len(pieces),
        **({"groups": len(groups), "whole_bins": count_bins(lengths, row_tokens + 1)} if step else {}),
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
