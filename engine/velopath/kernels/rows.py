"""Cross-entropy of rows in Triton: loss per row, gradient over the logits in place.

Reference: `velopath.loss.reference`; bound to it by tests/test_kernels.py. With x the row's logits, t its
target, m = max x and d = sum exp(x - m):   nats = (m - x_t) + log d,   gradient = (exp(x - m) / d - [column
= t]) * scale. m stays apart from log d everywhere: m + log d in fp32 would lose four digits at logits of
1e4.

Options (`velopath.loss.options` has the formulas) are constants of the compiled kernel: those not asked for
leave no instruction behind. One program per row. Up to WHOLE_ROW_BYTES the row is kept in registers and
read once. Above it is read twice, with few rows in flight so that the second read should find the cache
(not yet verified on a GPU).
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# (the arguments of a kernel are pointers and integers that only Triton knows)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from velopath.kernels import on_device_of
from velopath.kernels.shape import shaped, slope

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
    SCALES=None,  # (rows,) fp32: multiply loss and gradient, instead of 1 / COUNTED; with it LSE and LOSSES
    LSE=None,  # (rows,) fp32, written
    LOSSES=None,  # (rows,) fp32, written
    CORRECT=None,  # (rows,) fp32, written
    LOGIT_SCALE: tl.constexpr = 1.0,
    SOFTCAP: tl.constexpr = 0.0,
    SMOOTHING: tl.constexpr = 0.0,
    Z_LOSS: tl.constexpr = 0.0,
):
    row = tl.program_id(0).to(tl.int64)
    X = LOGITS + row * stride_row
    target = tl.load(TARGETS + row).to(tl.int64)
    if target == ignore_index:
        tl.store(NATS + row, 0.0)
        if SCALES is not None:
            tl.store(LSE + row, 0.0)
            tl.store(LOSSES + row, 0.0)
        if CORRECT is not None:
            tl.store(CORRECT + row, 0.0)
        if HAS_GRADIENT:
            for start in range(0, n_load, BLOCK):
                cols = start + tl.arange(0, BLOCK)
                tl.store(X + cols, tl.zeros([BLOCK], X.dtype.element_ty), mask=cols < n_load)
        return
    # An invalid target cannot be refused without waiting for the GPU: it makes loss and gradient NaN instead.
    valid = (target >= 0) & (target < n_cols)
    poison = tl.where(valid, 0.0, float("nan"))
    given_target = tl.load(X + tl.where(valid, target, 0)).to(tl.float32)
    x_target = shaped(given_target, LOGIT_SCALE, SOFTCAP)
    if SCALES is None:
        scale = 1.0 / tl.load(COUNTED).to(tl.float32) + poison
    else:
        scale = tl.load(SCALES + row) + poison
    if WHOLE_ROW:
        cols = tl.arange(0, BLOCK)
        x = tl.load(X + cols, mask=cols < n_load, other=float("-inf")).to(tl.float32)
        if CORRECT is not None:
            top = tl.max(tl.where(cols < n_cols, x, float("-inf")), 0)
            left = tl.max(tl.where(cols < target, x, float("-inf")), 0)
        x = tl.where(cols < n_cols, shaped(x, LOGIT_SCALE, SOFTCAP), float("-inf"))
        m = tl.max(x, 0)
        e = tl.exp2((x - m) * LOG2E)
        d = tl.sum(e, 0)
        if SMOOTHING > 0.0:
            sum_x = tl.sum(tl.where(cols < n_cols, x, 0.0), 0)
        if HAS_GRADIENT:
            # The target's column is subtracted in fp32, before the only rounding.
            factor = scale / d
            if Z_LOSS > 0.0:
                factor *= 1.0 + 2.0 * Z_LOSS * (m + tl.log2(d) * LN2)
            g = e * factor
            if SMOOTHING > 0.0:
                g -= scale * SMOOTHING / n_cols
            g = tl.where(cols == target, g - scale * (1.0 - SMOOTHING), g)
            g = slope(g, x, LOGIT_SCALE, SOFTCAP)
            tl.store(X + cols, g.to(X.dtype.element_ty), mask=cols < n_load)
    else:
        # Each thread keeps a maximum and a sum of its own (axis 1 lies within a thread): no barrier in the
        # loop, and rescaling costs one exp for VECTOR logits.
        tile = tl.arange(0, BLOCK // VECTOR)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
        m_lane = tl.full([BLOCK // VECTOR], float("-inf"), tl.float32)
        d_lane = tl.zeros([BLOCK // VECTOR], tl.float32)
        if SMOOTHING > 0.0:
            sum_lane = tl.zeros([BLOCK // VECTOR], tl.float32)
        if CORRECT is not None:
            top_lane = tl.full([BLOCK // VECTOR], float("-inf"), tl.float32)
            left_lane = tl.full([BLOCK // VECTOR], float("-inf"), tl.float32)
        for start in range(0, n_load, BLOCK):
            cols = start + tile
            x = tl.load(X + cols, mask=cols < n_load, other=float("-inf")).to(tl.float32)
            if CORRECT is not None:
                top_lane = tl.maximum(top_lane, tl.max(tl.where(cols < n_cols, x, float("-inf")), 1))
                left_lane = tl.maximum(left_lane, tl.max(tl.where(cols < target, x, float("-inf")), 1))
            x = tl.where(cols < n_cols, shaped(x, LOGIT_SCALE, SOFTCAP), float("-inf"))
            higher = tl.maximum(m_lane, tl.max(x, 1))
            base = tl.where(higher == float("-inf"), 0.0, higher)  # -inf - -inf would be NaN
            d_lane *= tl.exp2((m_lane - base) * LOG2E)
            d_lane += tl.sum(tl.exp2((x - base[:, None]) * LOG2E), 1)
            m_lane = higher
            if SMOOTHING > 0.0:
                sum_lane += tl.sum(tl.where(cols < n_cols, x, 0.0), 1)
        m = tl.max(m_lane, 0)
        d = tl.sum(d_lane * tl.exp2((m_lane - m) * LOG2E), 0)
        if SMOOTHING > 0.0:
            sum_x = tl.sum(sum_lane, 0)
        if CORRECT is not None:
            top = tl.max(top_lane, 0)
            left = tl.max(left_lane, 0)
        if HAS_GRADIENT:
            factor = scale / d
            if Z_LOSS > 0.0:
                factor *= 1.0 + 2.0 * Z_LOSS * (m + tl.log2(d) * LN2)
            for start in range(0, n_load, BLOCK):
                cols = start + tile
                x = tl.load(X + cols, mask=cols < n_load, other=float("-inf"), eviction_policy="evict_first")
                x = shaped(x.to(tl.float32), LOGIT_SCALE, SOFTCAP)
                g = tl.where(cols < n_cols, tl.exp2((x - m) * LOG2E) * factor, 0.0)
                if SMOOTHING > 0.0:
                    g -= scale * SMOOTHING / n_cols
                g = tl.where(cols == target, g - scale * (1.0 - SMOOTHING), g)
                g = slope(g, x, LOGIT_SCALE, SOFTCAP)
                tl.store(X + cols, g.to(X.dtype.element_ty), mask=cols < n_load)
    nats = (m - x_target) + tl.log2(d) * LN2 + poison
    tl.store(NATS + row, nats)
    if SCALES is not None:
        lse = m + tl.log2(d) * LN2 + poison
        loss = nats
        if SMOOTHING > 0.0:
            loss += SMOOTHING * (x_target - sum_x / n_cols)
        if Z_LOSS > 0.0:
            loss += Z_LOSS * lse * lse
        tl.store(LSE + row, lse)
        tl.store(LOSSES + row, loss * scale)
    if CORRECT is not None:
        first = (given_target == top) & (left < top) & (nats == nats)
        tl.store(CORRECT + row, tl.where(first, 1.0, 0.0))


def row_config(n_load: int, itemsize: int, warp: int = 32, *, crowded: bool = False) -> dict[str, int | bool]:
    """Block sizes and warps of `cross_entropy_rows` for rows of `n_load` columns of `itemsize` bytes.

    `warp` is the number of threads in a warp: 64 on AMD. `crowded` says that softcap, smoothing or accuracy need
    registers, too: a quarter of that row then fits into them.
    """
    vector = 16 // itemsize
    block = max(triton.next_power_of_2(n_load), 128)
    if n_load * itemsize <= (WHOLE_ROW_BYTES // 4 if crowded else WHOLE_ROW_BYTES):
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
    scales: Tensor | None = None,
    lse: Tensor | None = None,
    losses: Tensor | None = None,
    correct: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float = 0.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> None:
    """Write each row's loss in nats and, with `gradient`, (softmax - one hot) / counted over the logits.

    `scales` (N,) takes the place of 1 / counted; with it `lse` and `losses` (N,) are written, the loss scaled
    and with its options, and `correct` where given. Each value of an option is a kernel of its own.

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
            SCALES=scales,
            LSE=lse,
            LOSSES=losses,
            CORRECT=correct,
            LOGIT_SCALE=logit_scale,
            SOFTCAP=softcap,
            SMOOTHING=label_smoothing,
            Z_LOSS=z_loss,
            **row_config(
                columns,
                logits.element_size(),
                64 if torch.version.hip else 32,
                crowded=correct is not None or softcap > 0 or label_smoothing > 0,
            ),
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
