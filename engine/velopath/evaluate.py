"""Held-out loss per domain: fixed, seeded chunks of the hold-out, summed exactly, with standard errors.

K domains, T tokens a row, R rows of a sample, B rows a forward pass, N = B T.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from velopath.dist import Dist
from velopath.domains import DomainLoss
from velopath.errors import ConfigError, DataError
from velopath.loss import linear_domain_cross_entropy
from velopath.mds import read_documents
from velopath.model import bare
from velopath.sharding import reshard
from velopath.stream_data import heldout_names, read_table
from velopath.train_step import IGNORED
from velopath.urls import below, redact

Tokens = NDArray[np.uint16] | NDArray[np.int32]


class Ranks(Protocol):
    """What an evaluation needs to know of the other processes; `velopath.dist.Dist` is one, embedders pass theirs."""

    @property
    def rank(self) -> int: ...
    @property
    def world(self) -> int: ...
    @property
    def device(self) -> torch.device: ...
    def all_reduce_sum(self, tensor: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Sample:
    """R rows of held-out text: `inputs` (R, T) int32, `targets` (R, T) int64 (-100: not counted), `domains` (R,).

    `documents` (R, T) number the documents of a stream, -1 behind its end; `positions` (R, T) count from 0 in the part
    of a document that a row holds.
    """

    inputs: NDArray[np.int32]
    targets: NDArray[np.int64]
    domains: NDArray[np.int64]
    documents: NDArray[np.int64]
    positions: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class HeldOut:
    """The hold-out of K domains as one token stream each, cut into chunks of `row_tokens` predicted tokens.

    Chunk c predicts tokens cT+1 ... cT+T of its domain's stream, so every token but the first is in exactly one
    chunk. `sample` takes chunks at random over the whole hold-out, never its beginning only (one odd document
    there moves a domain's loss by half a nat).
    """

    names: tuple[str, ...]
    streams: tuple[Tokens, ...]
    row_tokens: int
    seed: int = 0
    starts: tuple[NDArray[np.int64], ...] | None = None
    """Where each stream's documents begin, for attention inside documents; None: each stream is one document."""

    def __post_init__(self) -> None:
        if self.row_tokens < 1:
            raise ConfigError(f"row_tokens is {self.row_tokens}; expected 1 or more")
        if not self.names or len(self.names) != len(self.streams):
            raise ConfigError(
                f"{len(self.names)} names for {len(self.streams)} held-out streams; expected a pair each"
            )
        for name, stream in zip(self.names, self.streams, strict=True):
            if len(stream) < 2:
                raise DataError(
                    f"the hold-out of domain {name!r} has {len(stream)} tokens; expected 2 or more"
                )

    @classmethod
    def open(
        cls, root: str | Path, *, row_tokens: int, seed: int = 0, names: Sequence[str] | None = None
    ) -> HeldOut:
        """Read `root`/heldout/<domain> of a prepared folder; `names` None takes all domains there, sorted.

        Documents are joined by the end-of-text token of `root`/domains.json, where it has one. Raises `DataError`
        on a domain without a hold-out and on ids that are no int32.
        """
        folder = redact(str(below(root, "heldout")))
        found = heldout_names(root)
        if not found:
            raise DataError(
                "holds no domain with an index.json; run velopath prepare with a held-out share", path=folder
            )
        missing = sorted(set(names or ()) - set(found))
        if missing:
            raise DataError(
                f"no hold-out for domain {missing[0]!r}; there are {', '.join(found)}", path=folder
            )
        chosen = tuple(names) if names is not None else tuple(found)
        eos = _end_of_text(root)
        streams, starts = zip(*(_stream(below(root, "heldout", name), eos) for name in chosen), strict=True)
        return cls(chosen, streams, row_tokens, seed, starts)

    def chunks(self, name: str) -> int:
        """C: the chunks of a domain, ceil((tokens - 1) / T)."""
        return -(-(len(self.streams[self.names.index(name)]) - 1) // self.row_tokens)

    def sample(self, tokens_per_domain: int | None = None, rotation: int = 0) -> Sample:
        """min(C, max(2, ceil(tokens / T))) chunks of every domain, without repetition; None takes all of them.

        A pure function of (seed, domain, rotation): the same rotation gives the same rows, a smaller budget the
        first of them, another rotation an independent draw.
        """
        if tokens_per_domain is not None and tokens_per_domain < 1:
            raise ConfigError(f"tokens_per_domain is {tokens_per_domain}; expected 1 or more")
        inputs, targets, domains, documents, positions = [], [], [], [], []
        span = np.arange(self.row_tokens + 1)
        for k, (name, stream) in enumerate(zip(self.names, self.streams, strict=True)):
            count = total = self.chunks(name)
            if tokens_per_domain is not None:
                count = min(total, max(2, -(-tokens_per_domain // self.row_tokens)))
            at = _order(total, self.seed, name, rotation)[:count, None] * self.row_tokens + span
            inside = at < len(stream)
            rows = np.where(inside, stream[np.minimum(at, len(stream) - 1)].astype(np.int64), 0)
            inputs.append(rows[:, :-1].astype(np.int32))
            targets.append(np.where(inside, rows, IGNORED)[:, 1:])
            domains.append(np.full(count, k, dtype=np.int64))
            starts = self.starts[k] if self.starts is not None else np.zeros(1, np.int64)
            of_token = np.searchsorted(starts, at[:, :-1], side="right") - 1
            documents.append(np.where(inside[:, :-1], of_token, -1))
            positions.append(at[:, :-1] - np.maximum(starts[of_token], at[:, :1]))
        return Sample(*(np.concatenate(x) for x in (inputs, targets, domains, documents, positions)))

    @property
    def largest_token(self) -> int:
        """The largest token id in the hold-out."""
        return max(int(stream.max()) for stream in self.streams)


def evaluate(
    model: nn.Module,
    heldout: HeldOut,
    *,
    tokens_per_domain: int | None = None,
    rotation: int = 0,
    batch_rows: int = 16,
    dist: Ranks | None = None,
    bf16: bool = False,
    document_mask: bool = False,
) -> DomainLoss:
    """Mean loss of `model` on a sample of each domain's hold-out, in nats per token, with standard errors.

    l[k] = sum of nats / sum of tokens over the sampled chunks of domain k. The standard error is that of a ratio
    of chunk sums, sqrt(R/(R-1) sum_i (x_i - l t_i)^2) / sum_i t_i for R chunks with x_i nats and t_i tokens: chunks,
    not tokens, are the independent draws. 0 where R is 1.

    `model` maps tokens (B, T) to hidden states (B, T, D) and has `unembed_weight` (V, D), as `Decoder` does,
    compiled or wrapped by DDP too; with `document_mask`, which keeps attention inside documents, it takes `positions`
    and `documents`. Rows are chunks of the joined documents however training packs, so that losses compare. The
    batches are shared out over the ranks of `dist`; the result is the same bits on all ranks and for any number of
    them. Batches all have one shape, so a compiled model compiles once.
    """
    if batch_rows < 1:
        raise ConfigError(f"batch_rows is {batch_rows}; expected 1 or more")
    dist = dist or Dist()
    inner: Any = bare(model)
    vocabulary = len(inner.unembed_weight)
    if heldout.largest_token >= vocabulary:
        raise DataError(
            f"the hold-out has token id {heldout.largest_token}, the model's vocabulary {vocabulary} entries"
        )
    sample = heldout.sample(tokens_per_domain, rotation)
    rows, device = len(sample.inputs), dist.device
    # As many on every rank, because the ranks of a sharded model run it together: the last ones may be empty.
    batches = -(-rows // (batch_rows * dist.world)) * dist.world
    # One slot per row: ranks fill their own, and a sum with zeros is exact, whatever the world size.
    sums = torch.zeros(2, batches * batch_rows, dtype=torch.float64, device=device)
    slots = torch.arange(batch_rows, device=device)
    with _evaluating(model), torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        for batch in range(dist.rank, batches, dist.world):
            first = batch * batch_rows
            inputs = _padded(sample.inputs[first : first + batch_rows], batch_rows, 0).to(device)
            targets = _padded(sample.targets[first : first + batch_rows], batch_rows, IGNORED).to(device)
            within = {}
            if document_mask:
                for key, value, padding in (
                    ("documents", sample.documents, -1),
                    ("positions", sample.positions, 0),
                ):
                    within[key] = _padded(value[first : first + batch_rows], batch_rows, padding).to(device)
            hidden = model(inputs, **within)
            weight = inner.unembed_weight  # after the forward pass, which makes a sharded one whole
            # Rows take the place of domains: their sums are what the standard error needs, and add up exactly.
            _, part = linear_domain_cross_entropy(
                hidden.flatten(0, 1), weight, targets.flatten(), slots, n_domains=batch_rows
            )
            sums[:, first : first + batch_rows] = part
    reshard(inner)
    nats_R, tokens_R = dist.all_reduce_sum(sums).cpu().numpy()[:, :rows]
    return _domain_loss(heldout.names, nats_R, tokens_R, sample.domains)


def _domain_loss(
    names: tuple[str, ...], nats_R: NDArray[Any], tokens_R: NDArray[Any], domains_R: NDArray[np.int64]
) -> DomainLoss:
    nats, tokens, errors = [], [], []
    for k in range(len(names)):
        x, t = nats_R[domains_R == k], tokens_R[domains_R == k]
        nats.append(math.fsum(x))
        tokens.append(round(math.fsum(t)))
        spread = math.fsum((x - nats[-1] / tokens[-1] * t) ** 2)
        errors.append(math.sqrt(spread * len(x) / (len(x) - 1)) / tokens[-1] if len(x) > 1 else 0.0)
    return DomainLoss(names, tuple(nats), tuple(tokens), tuple(errors))


def _order(count: int, seed: int, name: str, rotation: int) -> NDArray[np.int64]:
    """A permutation of 0 ... count-1. Philox's raw output is the same in every version of numpy, unlike the
    distributions of its Generator."""
    key = hashlib.sha256(f"{seed}/{rotation}/{name}".encode()).digest()
    raw = np.random.Philox(key=int.from_bytes(key[:16], "little")).random_raw(count)
    return np.argsort(raw, kind="stable")


def _stream(folder: str | Path, eos: int | None) -> tuple[Tokens, NDArray[np.int64]]:
    """The joined documents, and where each begins; an end-of-text token belongs to the document that it ends."""
    starts, length = [], 0
    parts: list[NDArray[np.integer[Any]]] = []
    for document in read_documents(folder):
        starts.append(length)
        length += len(document) + (eos is not None)
        parts.append(document)
        if eos is not None:
            fits = eos <= np.iinfo(document.dtype).max
            parts.append(np.array([eos], dtype=document.dtype if fits else np.int64))
    stream = np.concatenate(parts) if parts else np.zeros(0, np.uint16)
    low, high = (int(stream.min()), int(stream.max())) if len(stream) else (0, 0)
    if low < 0 or high >= 1 << 31:
        raise DataError(f"token ids from {low} to {high}; expected 0 to 2^31 - 1", path=redact(str(folder)))
    narrow: Tokens = stream.astype(np.uint16) if high < 1 << 16 else stream.astype(np.int32)
    return narrow, np.array(starts, np.int64)


def _end_of_text(root: str | Path) -> int | None:
    eos: int | None = (read_table(root) or {}).get("eos")
    return eos


def _padded(rows: NDArray[Any], count: int, value: int) -> Tensor:
    padding = np.full((count - len(rows), rows.shape[1]), value, dtype=rows.dtype)
    return torch.from_numpy(np.concatenate((rows, padding)))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block, the former mode after it."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
