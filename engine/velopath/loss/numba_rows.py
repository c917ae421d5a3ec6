"""Cross-entropy rows in numba: the CPU form where velopath was installed without its C++ core.

The same blocks as csrc/cross_entropy.cpp: maximum, then exp(x - m) stored over x, then one product per
block. exp is Cephes' polynomial, because LLVM does not vectorise libm's. fp32 only.
"""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np
from numba.core import types
from numba.extending import intrinsic
from numpy.typing import NDArray

F = np.float32
_config: Any = numba.config
BLOCK = 2048
MAGIC = F(12582912.0)
"""1.5 * 2^23: added to a small float it leaves the nearest integer in the low bits."""
MAGIC_BITS = np.int32(0x4B400000 - 127)


def _bitcast(typing_context: Any, value: Any) -> Any:
    """The same 32 bits as the other type: a float for an integer, an integer for a float."""
    to = types.int32 if value == types.float32 else types.float32

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], context.get_value_type(to))

    return to(value), build


_same_bits: Any = intrinsic(_bitcast)


# No reassociation here: it would cancel (x + MAGIC) - MAGIC.
@numba.njit(fastmath={"contract"})
def _exp(x: Any) -> Any:
    """exp(x) for x <= 0, about 1 ulp; 0 below -87.3; NaN stays NaN."""
    low = F(-87.3)
    clamped = low if x < low else x
    shifted = clamped * F(1.44269504) + MAGIC
    n = shifted - MAGIC
    f = clamped - n * F(0.693359375)
    f = f + n * F(2.12194440e-4)
    p = f * F(1.9875691500e-4) + F(1.3981999507e-3)
    p = p * f + F(8.3334519073e-3)
    p = p * f + F(4.1665795894e-2)
    p = p * f + F(1.6666665459e-1)
    p = p * f + F(5.0000001201e-1)
    p = (p * (f * f) + f) + F(1.0)
    power = _same_bits(np.int32(np.int32(_same_bits(shifted) - MAGIC_BITS) << np.int32(23)))
    return F(0.0) if x < low else p * power


# LLVM vectorises none of these loops over slices (arrays of unknown stride), over signed bounds (an index
# might be negative and count from the end), or where source and destination may overlap. Hence whole rows,
# unsigned [start, stop), and two functions for exp.
@numba.njit(fastmath={"contract"})
def _exp_in_place(x: Any, start: Any, stop: Any, m: Any) -> None:
    for j in range(start, stop):
        x[j] = _exp(x[j] - m)


@numba.njit(fastmath={"contract"})
def _exp_into(terms: Any, x: Any, start: Any, stop: Any, m: Any) -> None:
    for j in range(stop - start):
        terms[j] = _exp(x[start + j] - m)


# Reassociation lets LLVM keep several partial sums; their number depends on the machine, not on the threads.
@numba.njit(fastmath={"reassoc", "nsz"})
def _sum(terms: Any, start: Any, stop: Any) -> Any:
    total = F(0.0)
    for j in range(start, stop):
        total += terms[j]
    return total


@numba.njit
def _multiply(x: Any, start: Any, stop: Any, factor: Any) -> None:
    for j in range(start, stop):
        x[j] *= factor


@numba.njit
def _ordered(bits: Any) -> Any:
    """The bits of a float as an integer of the same order, and back."""
    return np.int32(bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF)))


# Of integers, because LLVM vectorises a float's maximum only where it may assume that there is no NaN. A
# NaN here may win or lose: exp makes its row NaN either way.
@numba.njit
def _maximum(x: Any, start: Any, stop: Any, m: Any) -> Any:
    best = _ordered(_same_bits(m))
    for j in range(start, stop):
        best = max(best, _ordered(_same_bits(x[j])))
    return _same_bits(_ordered(best))


@numba.njit(error_model="numpy")
def _row(x: Any, target: Any, scale: Any, gradient: Any) -> Any:
    at_target = np.float64(x[target])
    blocks = (x.size + BLOCK - 1) // BLOCK
    maxima = np.empty(blocks, np.float64)
    terms = np.empty(0 if gradient else BLOCK, np.float32)
    m = F(-np.inf)
    total = np.float64(0.0)
    for k in range(blocks):
        start, stop = np.uint64(k * BLOCK), np.uint64(min((k + 1) * BLOCK, x.size))
        higher = _maximum(x, start, stop, m)
        if higher > m:
            total *= math.exp(np.float64(m) - np.float64(higher))
            m = higher
        if gradient:
            _exp_in_place(x, start, stop, m)
            total += _sum(x, start, stop)
        else:
            _exp_into(terms, x, start, stop, m)
            total += _sum(terms, np.uint64(0), stop - start)
        maxima[k] = m
    top = np.float64(m)
    if gradient:
        for k in range(blocks):
            factor = F(math.exp(maxima[k] - top) * scale / total)
            _multiply(x, np.uint64(k * BLOCK), np.uint64(min((k + 1) * BLOCK, x.size)), factor)
        x[target] = F((math.exp(at_target - top) / total - 1.0) * scale)
    return F((top - at_target) + math.log(total))


@numba.njit(parallel=True, error_model="numpy")
def _rows(logits: Any, targets: Any, nats: Any, scale: Any, ignore_index: Any, gradient: Any) -> None:
    for r in numba.prange(logits.shape[0]):
        if targets[r] == ignore_index:
            nats[r] = F(0.0)
            if gradient:
                logits[r, :] = F(0.0)
        else:
            nats[r] = _row(logits[r], targets[r], scale, gradient)


def cross_entropy_rows(
    logits: NDArray[np.float32],
    targets: NDArray[np.int64],
    nats: NDArray[np.float32],
    *,
    scale: float,
    ignore_index: int,
    gradient: bool,
    threads: int,
) -> None:
    """Write each row's loss in nats and, with `gradient`, scale * (softmax - one hot) over the fp32 logits.

    As `velopath._core.cross_entropy_rows`, which says what the arguments are; targets are checked by the
    caller. The first call compiles for some seconds.
    """
    before = numba.get_num_threads()
    numba.set_num_threads(max(1, min(threads, _config.NUMBA_NUM_THREADS)))
    try:
        _rows(logits, targets, nats, np.float64(scale), np.int64(ignore_index), gradient)
    finally:
        numba.set_num_threads(before)
