"""Device functions that finish a reduction of a tile [X, R].

``row_*`` reduce R, ``column_*`` X; the dim stays, of size 1.
"""

import triton
import triton.language as tl

from . import mathlib


@triton.jit
def larger(a, b):
    """max(a, b); NaN wins, as in ATen."""
    if a.dtype.is_floating():
        return tl.where((a > b) | (a != a), a, b)
    return tl.where(a > b, a, b)


@triton.jit
def smaller(a, b):
    """min(a, b); NaN wins, as in ATen."""
    if a.dtype.is_floating():
        return tl.where((a < b) | (a != a), a, b)
    return tl.where(a < b, a, b)


@triton.jit
def row_sum(x):
    return tl.sum(x, 1, keep_dims=True)


@triton.jit
def _times(a, b):
    return a * b


@triton.jit
def row_prod(x):
    return tl.reduce(x, 1, _times, keep_dims=True)


@triton.jit
def row_amax(x):
    """Largest of each row; NaN if the row has one."""
    if x.dtype.is_floating():
        bad = tl.max((x != x).to(tl.int32), 1, keep_dims=True)
        return tl.where(bad > 0, float("nan"), tl.max(x, 1, keep_dims=True))
    return tl.max(x, 1, keep_dims=True)


@triton.jit
def row_amin(x):
    """Smallest of each row; NaN if the row has one."""
    if x.dtype.is_floating():
        bad = tl.max((x != x).to(tl.int32), 1, keep_dims=True)
        return tl.where(bad > 0, float("nan"), tl.min(x, 1, keep_dims=True))
    return tl.min(x, 1, keep_dims=True)


@triton.jit
def row_any(x):
    return tl.max(x.to(tl.int32), 1, keep_dims=True) != 0


@triton.jit
def row_all(x):
    return tl.min(x.to(tl.int32), 1, keep_dims=True) != 0


@triton.jit
def column_sum(x):
    return tl.sum(x, 0, keep_dims=True)


@triton.jit
def column_prod(x):
    return tl.reduce(x, 0, _times, keep_dims=True)


@triton.jit
def column_amax(x):
    return tl.trans(row_amax(tl.trans(x)))


@triton.jit
def column_amin(x):
    return tl.trans(row_amin(tl.trans(x)))


@triton.jit
def column_any(x):
    return tl.max(x.to(tl.int32), 0, keep_dims=True) != 0


@triton.jit
def column_all(x):
    return tl.min(x.to(tl.int32), 0, keep_dims=True) != 0


@triton.jit
def row_logsumexp(m, s):
    """log(sum(s * exp(m))) of each row, for running maxima m and sums s."""
    top = row_amax(m)
    base = tl.where(tl.abs(top) == float("inf"), 0.0, top)
    return base + mathlib.log(tl.sum(s * mathlib.exp(m - base), 1, keep_dims=True))


@triton.jit
def row_logsum(m, s):
    """log(sum(s * exp(m - max(m)))) of each row; NaN where the maximum is infinite."""
    top = row_amax(m)
    total = mathlib.log(tl.sum(s * mathlib.exp(m - top), 1, keep_dims=True))
    return tl.where(tl.abs(top) == float("inf"), float("nan"), total)


@triton.jit
def running_logsumexp(m, s, x):
    """One more operand for each lane: (larger maximum, sum rescaled to it)."""
    top = larger(m, x)
    base = tl.where(tl.abs(top) == float("inf"), 0.0, top)
    return top, s * mathlib.exp(m - base) + mathlib.exp(x - base)


@triton.jit
def beats(x, best, LARGEST: tl.constexpr):
    """Whether x replaces best in an argmax (argmin): strictly better, or the first NaN."""
    better = x > best if LARGEST else x < best
    if x.dtype.is_floating():
        better = (better & (best == best)) | ((x != x) & (best == best))
    return better


@triton.jit
def row_argbest(x, place, LARGEST: tl.constexpr):
    """The smallest place where each row of x is best; lanes out of play hold a place of 2**62."""
    if LARGEST:
        best = row_amax(tl.where(place < 2**62, x, best_start(x, LARGEST)))
    else:
        best = row_amin(tl.where(place < 2**62, x, best_start(x, LARGEST)))
    hit = x == best
    if x.dtype.is_floating():
        hit = hit | ((x != x) & (best != best))
    return tl.min(tl.where(hit, place, 2**62), 1, keep_dims=True)


@triton.jit
def best_start(x, LARGEST: tl.constexpr):
    """A value that no operand of x's dtype is worse than."""
    if x.dtype.is_floating():
        if LARGEST:
            return tl.full(x.shape, float("-inf"), x.dtype)
        return tl.full(x.shape, float("inf"), x.dtype)
    bits: tl.constexpr = x.dtype.primitive_bitwidth
    if LARGEST:
        return tl.full(x.shape, -(2 ** (bits - 1)), x.dtype)
    return tl.full(x.shape, 2 ** (bits - 1) - 1, x.dtype)
