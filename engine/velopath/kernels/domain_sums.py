"""Sums of the row losses per domain in Triton: a segmented reduction in a fixed order, without float atomics.

Reference: `velopath.loss.reference`; bound to it by tests/test_kernels.py. Stage 1 sums 128 rows for 32
domains per program, stage 2 adds these partial sums in fp64, always in the same order, so that runs are
bitwise equal. It replaces the two reductions (sum, count) that a plain loss would launch, and reads about 20
bytes a row.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# (the arguments of a kernel are pointers and integers that only Triton knows)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from velopath.kernels import on_device_of

ROWS = 128
DOMAINS = 32


@triton.jit
def partial_sums(
    NATS,  # (rows,) fp32
    TARGETS,  # (rows,)
    DOMAINS_OF,  # (rows // repeat,) domain ids
    NATS_PART,  # (blocks, n_domains) fp32, written
    TOKENS_PART,  # (blocks, n_domains) int32, written
    TOTAL_PART,  # (blocks,) fp32, written: nats of all counted rows; NaN where a domain is invalid
    n_rows,
    n_domains,
    repeat,  # rows that share one domain id
    ignore_index,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DOMAINS: tl.constexpr,
    LOSSES=None,  # (rows,) fp32, 0 where ignored: summed into TOTAL_PART in place of NATS
    CORRECT=None,  # (rows,) fp32, 0 or 1
    CORRECT_PART=None,  # (blocks, n_domains) int32, written where CORRECT is given
):
    block = tl.program_id(0)
    rows = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    domains = tl.program_id(1) * BLOCK_DOMAINS + tl.arange(0, BLOCK_DOMAINS)
    there = rows < n_rows
    nats = tl.load(NATS + rows, mask=there, other=0.0)
    counted = there & (tl.load(TARGETS + rows, mask=there, other=ignore_index) != ignore_index)
    of_row = tl.load(DOMAINS_OF + rows // repeat, mask=there, other=0)
    hit = (of_row[:, None] == domains[None, :]) & counted[:, None]
    at = block.to(tl.int64) * n_domains + domains
    tl.store(NATS_PART + at, tl.sum(tl.where(hit, nats[:, None], 0.0), 0), mask=domains < n_domains)
    tl.store(TOKENS_PART + at, tl.sum(hit.to(tl.int32), 0), mask=domains < n_domains)
    if CORRECT is not None:
        correct = tl.load(CORRECT + rows, mask=there, other=0.0) > 0.0
        there_too = hit & correct[:, None]
        tl.store(CORRECT_PART + at, tl.sum(there_too.to(tl.int32), 0), mask=domains < n_domains)
    if tl.program_id(1) == 0:
        if LOSSES is not None:
            nats = tl.load(LOSSES + rows, mask=there, other=0.0)
        invalid = counted & ((of_row < 0) | (of_row >= n_domains))
        # Ignored rows hold 0 nats.
        tl.store(TOTAL_PART + block, tl.sum(tl.where(invalid, float("nan"), nats), 0))


@triton.jit
def total_sums(
    NATS_PART,
    TOKENS_PART,
    TOTAL_PART,
    COUNTED,  # () int64, or None: the total is the loss
    LOSS,  # () fp32, written
    SUMS,  # (2 or 3, n_domains) fp32, written: nats, tokens, correct
    n_blocks,
    n_domains,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DOMAINS: tl.constexpr,
    CORRECT_PART=None,
):
    domains = tl.program_id(0) * BLOCK_DOMAINS + tl.arange(0, BLOCK_DOMAINS)
    nats = tl.zeros([BLOCK_DOMAINS], tl.float64)
    tokens = tl.zeros([BLOCK_DOMAINS], tl.int64)
    for start in range(0, n_blocks, BLOCK_ROWS):
        blocks = start + tl.arange(0, BLOCK_ROWS)
        at = blocks.to(tl.int64)[:, None] * n_domains + domains[None, :]
        there = (blocks < n_blocks)[:, None] & (domains < n_domains)[None, :]
        nats += tl.sum(tl.load(NATS_PART + at, mask=there, other=0.0).to(tl.float64), 0)
        tokens += tl.sum(tl.load(TOKENS_PART + at, mask=there, other=0).to(tl.int64), 0)
    if CORRECT_PART is not None:
        correct = tl.zeros([BLOCK_DOMAINS], tl.int64)
        for start in range(0, n_blocks, BLOCK_ROWS):
            blocks = start + tl.arange(0, BLOCK_ROWS)
            at = blocks.to(tl.int64)[:, None] * n_domains + domains[None, :]
            there = (blocks < n_blocks)[:, None] & (domains < n_domains)[None, :]
            correct += tl.sum(tl.load(CORRECT_PART + at, mask=there, other=0).to(tl.int64), 0)
        tl.store(SUMS + 2 * n_domains + domains, correct.to(tl.float32), mask=domains < n_domains)
    tl.store(SUMS + domains, nats.to(tl.float32), mask=domains < n_domains)
    tl.store(SUMS + n_domains + domains, tokens.to(tl.float32), mask=domains < n_domains)
    if tl.program_id(0) == 0:
        total = tl.zeros([BLOCK_ROWS], tl.float64)
        for start in range(0, n_blocks, BLOCK_ROWS):
            blocks = start + tl.arange(0, BLOCK_ROWS)
            total += tl.load(TOTAL_PART + blocks, mask=blocks < n_blocks, other=0.0).to(tl.float64)
        loss = tl.sum(total, 0)
        if COUNTED is not None:
            counted = tl.load(COUNTED)
            loss = loss / tl.where(counted > 0, counted, 1).to(tl.float64)
        tl.store(LOSS, loss.to(tl.float32))


def reduce_rows(
    nats: Tensor,
    targets: Tensor,
    domains: Tensor,
    counted: Tensor,
    n_domains: int,
    ignore_index: int,
    losses: Tensor | None = None,
    correct: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The sum of nats / counted, or of `losses` where given, and the (2 or 3, n_domains) fp32 sums per domain.

    The sums are of nats, of tokens and, where `correct` is given, of it.
    """
    rows = nats.shape[0]
    blocks, groups = triton.cdiv(rows, ROWS), triton.cdiv(n_domains, DOMAINS)
    nats_part = torch.empty(blocks, n_domains, dtype=torch.float32, device=nats.device)
    tokens_part = torch.empty(blocks, n_domains, dtype=torch.int32, device=nats.device)
    total_part = torch.empty(blocks, dtype=torch.float32, device=nats.device)
    correct_part = None if correct is None else torch.empty_like(tokens_part)
    loss = torch.empty((), dtype=torch.float32, device=nats.device)
    sums = torch.empty(2 if correct is None else 3, n_domains, dtype=torch.float32, device=nats.device)
    repeat = rows // domains.shape[0]
    with on_device_of(nats):
        partial_sums[(blocks, groups)](
            nats,
            targets,
            domains,
            nats_part,
            tokens_part,
            total_part,
            rows,
            n_domains,
            repeat,
            ignore_index,
            BLOCK_ROWS=ROWS,
            BLOCK_DOMAINS=DOMAINS,
            LOSSES=losses,
            CORRECT=correct,
            CORRECT_PART=correct_part,
            num_warps=4,
        )
        total_sums[(groups,)](
            nats_part,
            tokens_part,
            total_part,
            counted if losses is None else None,
            loss,
            sums,
            blocks,
            n_domains,
            BLOCK_ROWS=32,
            BLOCK_DOMAINS=DOMAINS,
            CORRECT_PART=correct_part,
            num_warps=4,
        )
    return loss, sums
