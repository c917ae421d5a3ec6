"""Cross-entropy rows in numba: the CPU form where velopath was installed without its C++ core.

The same blocks as csrc/cross_entropy.cpp: maximum, then exp(x - m) stored over x, then one product per
block. exp is Cephes' polynomial, because LLVM does not vectorise libm's. fp32 only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numba
import numpy as np
from numba.core import types
from numba.extending import intrinsic
from numpy.typing import NDArray

F = np.float32
_config: Any = numba.config
BLOCK = 2048
NOT_COUNTED = -2
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


# ---- options and shards -----------------------------------------------------------------------------------


@numba.njit(fastmath={"contract"})
def _tanh(y: Any) -> Any:
    """Cephes' tanhf: a polynomial near 0, where 1 - exp would cancel."""
    size = abs(y)
    t = _exp(F(-2.0) * size)
    large = (F(1.0) - t) / (F(1.0) + t)
    z = y * y
    p = z * F(-5.70498872745e-3) + F(2.06390887954e-2)
    p = p * z - F(5.37397155531e-2)
    p = p * z + F(1.33314422036e-1)
    p = p * z - F(3.33332819422e-1)
    return y + y * z * p if size < F(0.625) else math.copysign(large, y)


@numba.njit(fastmath={"contract"})
def _shape(r: Any, x: Any, scale: Any, cap: Any) -> None:
    """x = cap tanh(scale r / cap), without a cap scale r."""
    if cap > F(0.0):
        inverse = F(1.0) / cap
        for j in range(np.uint64(0), np.uint64(r.size)):
            x[j] = cap * _tanh(r[j] * scale * inverse)
    else:
        for j in range(np.uint64(0), np.uint64(r.size)):
            x[j] = r[j] * scale


@numba.njit(error_model="numpy")
def _statistics(x: Any) -> Any:
    """Of shaped logits: maximum, sum of exp(x - maximum), sum."""
    terms = np.empty(BLOCK, np.float32)
    m = F(-np.inf)
    total, plain = np.float64(0.0), np.float64(0.0)
    for k in range((x.size + BLOCK - 1) // BLOCK):
        start, stop = np.uint64(k * BLOCK), np.uint64(min((k + 1) * BLOCK, x.size))
        higher = _maximum(x, start, stop, m)
        if higher > m:
            total *= math.exp(np.float64(m) - np.float64(higher))
            m = higher
        # Without a finite logit so far: exp(-inf - 0) = 0, not exp(-inf + inf).
        _exp_into(terms, x, start, stop, F(0.0) if m == F(-np.inf) else m)
        total += _sum(terms, np.uint64(0), stop - start)
        plain += _sum(x, start, stop)
    return np.float64(m), total, plain


@numba.njit(fastmath={"contract"})
def _derive(x: Any, gradient: Any, m: Any, a: Any, b: Any, scale: Any, inverse: Any) -> None:
    for j in range(np.uint64(0), np.uint64(x.size)):
        share = x[j] * inverse
        gradient[j] = (_exp(x[j] - m) * a - b) * (F(1.0) - share * share) * scale


@numba.njit(error_model="numpy")
def _write_gradient(
    x: Any, r: Any, target: Any, scale: Any, cap: Any, m: Any, a: Any, b: Any, t: Any
) -> None:
    """(exp(x - m) a - b - [target] t) dx/dr over the logits r, from the shaped ones x."""
    inverse = 1.0 / cap if cap > 0.0 else 0.0
    _derive(x, r, F(m), F(a), F(b), F(scale), F(inverse))
    if 0 <= target < x.size:
        at = np.float64(x[target])
        share = at * inverse
        # Rounded once, from the difference in fp64.
        r[target] = F((math.exp(at - m) * a - b - t) * (1.0 - share * share) * scale)


@numba.njit(error_model="numpy")
def _is_first_largest(r: Any, target: Any) -> Any:
    for j in range(r.size):
        if r[j] > r[target] or (j < target and r[j] == r[target]) or r[j] != r[j]:
            return F(0.0)
    return F(1.0)


@numba.njit(error_model="numpy")
def _detailed_row(r: Any, target: Any, row_scale: Any, gradient: Any, options: Any) -> Any:
    """Nats, lse and scaled loss; `options` as in `RowOptions`."""
    scale, cap, e, z = options
    x = np.empty(r.size, np.float32)
    _shape(r, x, F(scale), F(cap))
    m, d, plain = _statistics(x)
    at_target = np.float64(x[target])
    nats, lse = (m - at_target) + math.log(d), m + math.log(d)
    loss = nats + z * lse * lse
    if e > 0.0:
        loss += e * (at_target - plain / r.size)
    if gradient:
        a, b, t = row_scale * (1.0 + 2.0 * z * lse) / d, row_scale * e / r.size, row_scale * (1.0 - e)
        _write_gradient(x, r, target, scale, cap, m, a, b, t)
    return F(nats), F(lse), F(loss * row_scale)


@numba.njit(parallel=True, error_model="numpy")
def _detailed_rows(
    logits: Any,
    targets: Any,
    nats: Any,
    scales: Any,
    lse: Any,
    losses: Any,
    correct: Any,
    ignore_index: Any,
    gradient: Any,
    options: Any,
) -> None:
    for i in numba.prange(logits.shape[0]):
        if targets[i] == ignore_index:
            nats[i], lse[i], losses[i] = F(0.0), F(0.0), F(0.0)
            if correct.size:
                correct[i] = F(0.0)
            if gradient:
                logits[i, :] = F(0.0)
        else:
            if correct.size:
                correct[i] = _is_first_largest(logits[i], targets[i])
            row_scale = np.float64(scales[i])
            nats[i], lse[i], losses[i] = _detailed_row(logits[i], targets[i], row_scale, gradient, options)


@numba.njit(parallel=True, error_model="numpy")
def _shard_statistics(logits: Any, targets: Any, out: Any, scale: Any, cap: Any) -> None:
    for i in numba.prange(logits.shape[0]):
        r, target = logits[i], targets[i]
        x = np.empty(r.size, np.float32)
        _shape(r, x, F(scale), F(cap))
        own = 0 <= target < r.size
        out[0, i], out[3, i], out[6, i] = _statistics(x)
        zero = np.uint64(0)
        out[1, i] = _maximum(r, zero, np.uint64(r.size), F(-np.inf))
        out[2, i] = _maximum(r, zero, np.uint64(max(target, 0)), F(-np.inf))
        out[4, i] = x[target] if own else 0.0
        out[5, i] = r[target] if own else 0.0


@numba.njit(parallel=True, error_model="numpy")
def _shard_gradient(logits: Any, targets: Any, factors: Any, scale: Any, cap: Any) -> None:
    for i in numba.prange(logits.shape[0]):
        if targets[i] == NOT_COUNTED:
            logits[i, :] = F(0.0)
        else:
            x = np.empty(logits.shape[1], np.float32)
            _shape(logits[i], x, F(scale), F(cap))
            m, a, b, t = factors[0, i], factors[1, i], factors[2, i], factors[3, i]
            _write_gradient(x, logits[i], targets[i], scale, cap, m, a, b, t)


@numba.njit(parallel=True, error_model="numpy")
def _rows(logits: Any, targets: Any, nats: Any, scale: Any, ignore_index: Any, gradient: Any) -> None:
    for r in numba.prange(logits.shape[0]):
        if targets[r] == ignore_index:
            nats[r] = F(0.0)
            if gradient:
                logits[r, :] = F(0.0)
        else:
            nats[r] = _row(logits[r], targets[r], scale, gradient)


@contextmanager
def _threads(wanted: int) -> Iterator[None]:
    before = numba.get_num_threads()
    numba.set_num_threads(max(1, min(wanted, _config.NUMBA_NUM_THREADS)))
    try:
        yield
    finally:
        numba.set_num_threads(before)


def cross_entropy_rows(
    logits: NDArray[np.float32],
    targets: NDArray[np.int64],
    nats: NDArray[np.float32],
    *,
    scale: float,
    ignore_index: int,
    gradient: bool,
    threads: int,
    scales: NDArray[np.float32] | None = None,
    lse: NDArray[np.float32] | None = None,
    losses: NDArray[np.float32] | None = None,
    correct: NDArray[np.float32] | None = None,
    logit_scale: float = 1.0,
    softcap: float = 0.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> None:
    """Write each row's loss in nats and, with `gradient`, scale * (softmax - one hot) over the fp32 logits.

    As `velopath._core.cross_entropy_rows`, which says what the arguments are; targets are checked by the
    caller. The first call compiles for some seconds.
    """
    with _threads(threads):
        if scales is None:
            _rows(logits, targets, nats, np.float64(scale), np.int64(ignore_index), gradient)
            return
        options = (float(logit_scale), float(softcap), float(label_smoothing), float(z_loss))
        seen = np.empty(0, np.float32) if correct is None else correct
        _detailed_rows(
            logits, targets, nats, scales, lse, losses, seen, np.int64(ignore_index), gradient, options
        )


def shard_statistics(
    logits: NDArray[np.float32],
    targets: NDArray[np.int64],
    out: NDArray[np.float64],
    *,
    logit_scale: float,
    softcap: float,
    threads: int,
) -> None:
    """Write the (7, N) statistics of a shard's columns; `velopath.loss.backends.statistics` says of what."""
    with _threads(threads):
        _shard_statistics(logits, targets, out, float(logit_scale), float(softcap))


def shard_gradient(
    logits: NDArray[np.float32],
    targets: NDArray[np.int64],
    factors: NDArray[np.float64],
    *,
    logit_scale: float,
    softcap: float,
    threads: int,
) -> None:
    """Write a shard's gradient over its logits; `velopath.loss.backends.write_gradient` has the formula."""
    with _threads(threads):
        _shard_gradient(logits, targets, factors, float(logit_scale), float(softcap))
