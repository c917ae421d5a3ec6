"""Scale and softcap of logits inside Triton kernels: x = c tanh(s r / c), and its derivative.

Reference: `velopath.loss.reference.shaped`; bound to it by tests/test_kernels.py. tanh is Cephes' tanhf, because
neither the interpreter nor every backend of Triton has one.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# (the arguments of a kernel are pointers and integers that only Triton knows)

from __future__ import annotations

import triton
import triton.language as tl

TWO_LOG2E = tl.constexpr(2.8853900817779268)


@triton.jit
def tanh(y):
    size = tl.abs(y)
    t = tl.exp2(size * -TWO_LOG2E)
    large = (1.0 - t) / (1.0 + t)
    z = y * y
    p = z * -5.70498872745e-3 + 2.06390887954e-2
    p = p * z - 5.37397155531e-2
    p = p * z + 1.33314422036e-1
    p = p * z - 3.33332819422e-1
    return tl.where(size < 0.625, y + y * z * p, tl.where(y < 0, -large, large))


@triton.jit
def shaped(r, LOGIT_SCALE: tl.constexpr, SOFTCAP: tl.constexpr):
    x = r
    if LOGIT_SCALE != 1.0:
        x = x * LOGIT_SCALE
    if SOFTCAP > 0.0:
        x = tanh(x * (1.0 / SOFTCAP)) * SOFTCAP
    return x


@triton.jit
def slope(g, x, LOGIT_SCALE: tl.constexpr, SOFTCAP: tl.constexpr):
    """g, a derivative by x, as one by r."""
    if LOGIT_SCALE != 1.0:
        g = g * LOGIT_SCALE
    if SOFTCAP > 0.0:
        share = x * (1.0 / SOFTCAP)
        g = g * (1.0 - share * share)
    return g
