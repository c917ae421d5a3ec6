"""Rows whose columns are sharded over ranks, in Triton: statistics of a shard, then its gradient from whole rows'.

Reference: the torch form in `velopath.loss.backends`; bound to it by tests/test_kernels.py. Between the two the
ranks sum up (`velopath.loss.sharded`), so the logits are read twice and written once.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# (the arguments of a kernel are pointers and integers that only Triton knows)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from velopath.kernels import on_device_of
from velopath.kernels.rows import LOG2E, padded_columns
from velopath.kernels.shape import shaped, slope

NOT_COUNTED = tl.constexpr(-2)
STATISTICS = 7


@triton.jit
def shard_statistics(
    LOGITS,  # (rows, >= n_load)
    TARGETS,  # (rows,) int64, counted from the shard's first column
    OUT,  # (7, rows) fp32, written
    stride_row,
    n_cols,
    n_load,
    LOGIT_SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    row, rows = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    X = LOGITS + row * stride_row
    target = tl.load(TARGETS + row)
    own = (target >= 0) & (target < n_cols)
    given_target = tl.load(X + tl.where(own, target, 0)).to(tl.float32)
    x_target = shaped(given_target, LOGIT_SCALE, SOFTCAP)
    tile = tl.arange(0, BLOCK // VECTOR)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    m_lane = tl.full([BLOCK // VECTOR], float("-inf"), tl.float32)
    top_lane = tl.full([BLOCK // VECTOR], float("-inf"), tl.float32)
    left_lane = tl.full([BLOCK // VECTOR], float("-inf"), tl.float32)
    d_lane = tl.zeros([BLOCK // VECTOR], tl.float32)
    sum_lane = tl.zeros([BLOCK // VECTOR], tl.float32)
    for start in range(0, n_load, BLOCK):
        cols = start + tile
        x = tl.load(X + cols, mask=cols < n_load, other=float("-inf")).to(tl.float32)
        x = tl.where(cols < n_cols, x, float("-inf"))
        top_lane = tl.maximum(top_lane, tl.max(x, 1))
        left_lane = tl.maximum(left_lane, tl.max(tl.where(cols < target, x, float("-inf")), 1))
        x = shaped(x, LOGIT_SCALE, SOFTCAP)
        sum_lane += tl.sum(tl.where(cols < n_cols, x, 0.0), 1)
        x = tl.where(cols < n_cols, x, float("-inf"))
        higher = tl.maximum(m_lane, tl.max(x, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # -inf - -inf would be NaN
        d_lane *= tl.exp2((m_lane - base) * LOG2E)
        d_lane += tl.sum(tl.exp2((x - base[:, None]) * LOG2E), 1)
        m_lane = higher
    m = tl.max(m_lane, 0)
    base = tl.where(m == float("-inf"), 0.0, m)
    tl.store(OUT + row, m)
    tl.store(OUT + rows + row, tl.max(top_lane, 0))
    tl.store(OUT + 2 * rows + row, tl.max(left_lane, 0))
    tl.store(OUT + 3 * rows + row, tl.sum(d_lane * tl.exp2((m_lane - base) * LOG2E), 0))
    tl.store(OUT + 4 * rows + row, tl.where(own, x_target, 0.0))
    tl.store(OUT + 5 * rows + row, tl.where(own, given_target, 0.0))
    tl.store(OUT + 6 * rows + row, tl.sum(sum_lane, 0))


@triton.jit
def shard_gradient(
    LOGITS,  # (rows, >= n_load), overwritten
    TARGETS,  # (rows,) int64, counted from the shard's first column
    FACTORS,  # (4, rows) fp32: m, a, b, t
    stride_row,
    n_cols,
    n_load,
    LOGIT_SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, rows = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    X = LOGITS + row * stride_row
    target = tl.load(TARGETS + row)
    m, a = tl.load(FACTORS + row), tl.load(FACTORS + rows + row)
    b, t = tl.load(FACTORS + 2 * rows + row), tl.load(FACTORS + 3 * rows + row)
    for start in range(0, n_load, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x = tl.load(X + cols, mask=cols < n_load, other=float("-inf")).to(tl.float32)
        x = shaped(x, LOGIT_SCALE, SOFTCAP)
        g = tl.exp2((x - m) * LOG2E) * a - b
        g = slope(tl.where(cols == target, g - t, g), x, LOGIT_SCALE, SOFTCAP)
        # Chosen, not multiplied by 0: an ignored row may hold a NaN, the padding anything.
        g = tl.where((cols < n_cols) & (target != NOT_COUNTED), g, 0.0)
        tl.store(X + cols, g.to(X.dtype.element_ty), mask=cols < n_load)


def statistics(
    logits: Tensor, local: Tensor, logit_scale: float, softcap: float, *, padded: bool = False
) -> Tensor:
    """(7, rows) fp32; `velopath.loss.backends.statistics` says of what."""
    rows, vocab = logits.shape
    columns = padded_columns(vocab) if padded else vocab
    out = torch.empty(STATISTICS, rows, dtype=torch.float32, device=logits.device)
    with on_device_of(logits):
        shard_statistics[(rows,)](
            logits,
            local,
            out,
            logits.stride(0),
            vocab,
            columns,
            LOGIT_SCALE=logit_scale,
            SOFTCAP=softcap,
            **shard_config(columns, logits.element_size()),
        )
    return out


def write_gradient(
    logits: Tensor,
    local: Tensor,
    factors: Tensor,
    logit_scale: float,
    softcap: float,
    *,
    padded: bool = False,
) -> None:
    """Write a shard's gradient over its logits; `velopath.loss.backends.write_gradient` has the formula."""
    rows, vocab = logits.shape
    columns = padded_columns(vocab) if padded else vocab
    config = shard_config(columns, logits.element_size())
    with on_device_of(logits):
        shard_gradient[(rows,)](
            logits,
            local,
            factors.contiguous(),
            logits.stride(0),
            vocab,
            columns,
            LOGIT_SCALE=logit_scale,
            SOFTCAP=softcap,
            BLOCK=config["BLOCK"],
            num_warps=config["num_warps"],
        )


def shard_config(n_load: int, itemsize: int) -> dict[str, int]:
    """Block sizes and warps of both kernels: 256 threads with two vectors of 16 bytes each."""
    vector = 16 // itemsize
    block = min(512 * vector, max(triton.next_power_of_2(n_load), 128))
    return {"BLOCK": block, "VECTOR": vector, "num_warps": 8 if block == 512 * vector else 4}
