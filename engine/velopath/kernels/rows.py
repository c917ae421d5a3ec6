"""Cross-entropy of rows in Triton: loss per row, gradient over the logits in place.

Reference: `velopath.loss.reference`; bound to it by tests/test_kernels.py. With x the row's logits, t its
target, m = max x and d = sum exp(x - m):   nats = (m - x_t) + log d,   gradient = (exp(x - m) / d - [column
= t]) * scale. m stays apart from log d everywhere: m + log d in fp32 would lose four digits at logits of
1e4.

One program per row. Up to WHOLE_ROW_BYTES the row is kept in registers and read once. Above it is read
twice, with few rows in flight so that the second read should find the cache (not yet verified on a GPU).
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# (the arguments of a kernel are pointers and integers that only Triton knows)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from velopath.kernels import on_device_of

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

WHOLE_ROW_BYTES = 65536
"""Rows up to this size (32768 columns of 16 bits) stay in registers."""
PADDING = 64
"""Columns of a buffer of our own are padded to a multiple of this: 128-bit accesses need a multiple of 16."""


@triton.jit
def cross_entropy_rows(
    LOGITS,  # (rows, >= n_load), overwritten with the gradient when HAS_GRADIENT
    TARGETS,  # (rows,) int32 or int64
    NATS,  # (rows,) fp32, written
    COUNTED,  # () int64: rows that are not ignored; the gradient is divided by it
    stride_row,
    n_cols,  # columns of the vocabulary
    n_load,  # columns that may be read and written, >= n_cols; a multiple of 16 makes accesses 128 bits wide
    ignore_index,
    HAS_GRADIENT: tl.constexpr,
    WHOLE_ROW: tl.constexpr,  # BLOCK >= n_load
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,  # columns that one thread loads at once
):
    row = tl.program_id(0).to(tl.int64)
    X = LOGITS + row * stride_row
    target = tl.load(TARGETS + row).to(tl.int64)
    if target == ignore_index:
        tl.store(NATS + row, 0.0)
        if HAS_GRADIENT:
            for start in range(0, n_load, BLOCK):
                cols = start + tl.arange(0, BLOCK)
                tl.store(X + cols, tl.zeros([BLOCK], X.dtype.element_ty), mask=cols < n_load)
        return
    # An invalid target cannot be refused without waiting for the GPU: it makes loss and gradient NaN instead.
    valid = (target >= 0) & (target < n_cols)
    poison = tl.where(valid, 0.0, float("nan"))
    x_target = tl.load(X + tl.where(valid, target, 0)).to(tl.float32)
    scale = 1.0 / tl.load(COUNTED).to(tl.float32) + poison
    if WHOLE_ROW:
        cols = tl.arange(0, BLOCK)
        x = tl.load(X + cols, mask=cols < n_load, other=float("-inf")).to(tl.float32)
        x = tl.where(cols < n_cols, x, float("-inf"))
        m = tl.max(x, 0)
        e = tl.exp2((x - m) * LOG2E)
        d = tl.sum(e, 0)
        if HAS_GRADIENT:
            # The target's column is subtracted in fp32, before the only rounding.
            g = e * (scale / d)
            g = tl.where(cols == target, g - scale, g)
            tl.store(X + cols, g.to(X.dtype.element_ty), mask=cols < n_load)
    else:
        # Each thread keeps a maximum and a sum of its own (axis 1 lies within a thread): no barrier in the
        # loop, and rescaling costs one exp for VECTOR logits.
        tile = tl.arange(0, BLOCK // VECTOR)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
        m_lane = tl.full([BLOCK // VECTOR], float("-inf"), tl.float32)
        d_lane = tl.zeros([BLOCK // VECTOR], tl.float32)
        for start in range(0, n_load, BLOCK):
            cols = start + tile
            x = tl.load(X + cols, mask=cols < n_load, other=float("-inf")).to(tl.float32)
            x = tl.where(cols < n_cols, x, float("-inf"))
            higher = tl.maximum(m_lane, tl.max(x, 1))
            base = tl.where(higher == float("-inf"), 0.0, higher)  # -inf - -inf would be NaN
            d_lane *= tl.exp2((m_lane - base) * LOG2E)
            d_lane += tl.sum(tl.exp2((x - base[:, None]) * LOG2E), 1)
            m_lane = higher
        m = tl.max(m_lane, 0)
        d = tl.sum(d_lane * tl.exp2((m_lane - m) * LOG2E), 0)
        if HAS_GRADIENT:
            factor = scale / d
            for start in range(0, n_load, BLOCK):
                cols = start + tile
                x = tl.load(X + cols, mask=cols < n_load, other=float("-inf"), eviction_policy="evict_first")
                g = tl.where(cols < n_cols, tl.exp2((x.to(tl.float32) - m) * LOG2E) * factor, 0.0)
                g = tl.where(cols == target, g - scale, g)
                tl.store(X + cols, g.to(X.dtype.element_ty), mask=cols < n_load)
    tl.store(NATS + row, (m - x_target) + tl.log2(d) * LN2 + poison)


def row_config(n_load: int, itemsize: int, warp: int = 32) -> dict[str, int | bool]:
    """Block sizes and warps of `cross_entropy_rows` for rows of `n_load` columns of `itemsize` bytes.

    `warp` is the number of threads in a warp: 64 on AMD.
    """
    vector = 16 // itemsize
    block = max(triton.next_power_of_2(n_load), 128)
    if n_load * itemsize <= WHOLE_ROW_BYTES:
        threads = min(max(block // 32, warp), 512)
        return {"WHOLE_ROW": True, "BLOCK": block, "VECTOR": vector, "num_warps": threads // warp}
    # The most threads a program can have: at most two rows are then in flight per multiprocessor.
    return {"WHOLE_ROW": False, "BLOCK": 1024 * vector, "VECTOR": vector, "num_warps": 1024 // warp}


def write_rows(
    logits: Tensor,
    targets: Tensor,
    nats: Tensor,
    counted: Tensor,
    ignore_index: int,
    gradient: bool,
    *,
    padded: bool = False,
) -> None:
    """Write each row's loss in nats and, with `gradient`, (softmax - one hot) / counted over the logits.

    `logits` (N, V) has contiguous columns. `padded` says that it comes from `empty_rows`: then the padding
    may be written too.
    """
    rows, vocab = logits.shape
    columns = padded_columns(vocab) if padded else vocab
    with on_device_of(logits):
        cross_entropy_rows[(rows,)](
            logits,
            targets,
            nats,
            counted,
            logits.stride(0),
            vocab,
            columns,
            ignore_index,
            HAS_GRADIENT=gradient,
            **row_config(columns, logits.element_size(), 64 if torch.version.hip else 32),
        )


@triton.jit
def scale_elements(X, FACTOR, n_elements, BLOCK: tl.constexpr):
    # The usual upstream gradient is 1, which only the GPU knows: then nothing is read or written.
    factor = tl.load(FACTOR).to(tl.float32)
    if factor == 1.0:
        return
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + at, mask=at < n_elements).to(tl.float32)
    tl.store(X + at, (x * factor).to(X.dtype.element_ty), mask=at < n_elements)


def scale_in_place(x: Tensor, factor: Tensor) -> None:
    """Multiply `x` by the scalar tensor `factor` without the host learning its value."""
    if x.numel() == 0:  # a gradient that nobody asked for
        return
    if not x.is_contiguous():
        x.mul_(factor)
        return
    block = 4096
    with on_device_of(x):
        scale_elements[(triton.cdiv(x.numel(), block),)](x, factor, x.numel(), BLOCK=block, num_warps=8)


def padded_columns(vocab: int) -> int:
    """Columns to allocate for a buffer of `vocab` columns so that accesses are 128 bits wide."""
    return vocab if vocab % 16 == 0 else -(-vocab // PADDING) * PADDING


def empty_rows(rows: int, vocab: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised (rows, vocab) buffer whose rows are padded for `write_rows`."""
    return torch.empty(rows, padded_columns(vocab), dtype=dtype, device=device)[:, :vocab]
