"""Device functions that finish a reduction of a tile [X, R].

``row_*`` reduce R, ``column_*`` X; the dim stays, of size 1.
"""

import triton
import triton.language as tl

from . import mathlib

# ruff: noqa: RET505 - Triton compiles what follows a static if, a return in it or not

NAN_WINS = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit
def larger(a, b):
    """max(a, b); NaN wins, as in ATen."""
    if a.dtype.is_floating():
        return tl.maximum(a, b, propagate_nan=NAN_WINS)
    else:
        return tl.where(a > b, a, b)


@triton.jit
def smaller(a, b):
    """min(a, b); NaN wins, as in ATen."""
    if a.dtype.is_floating():
        return tl.minimum(a, b, propagate_nan=NAN_WINS)
    else:
        return tl.where(a < b, a, b)


@triton.jit
def row_sum(x):
    return tl.sum(x, 1, keep_dims=True)


@triton.jit
def _add_both(a, b, c, d):
    return a + c, b + d


@triton.jit
def row_sums(x, y):
    """The sums of each row of two tiles, which meet other warps' together."""
    return tl.reduce((x, y), 1, _add_both, keep_dims=True)


@triton.jit
def _times(a, b):
    return a * b


@triton.jit
def row_prod(x):
    return tl.reduce(x, 1, _times, keep_dims=True)


@triton.jit
def row_amax(x):
    """Largest of each row; NaN if the row has one. (Triton's is of 32 bits at least.)"""
    if x.dtype.is_floating():
        return tl.reduce(x, 1, larger, keep_dims=True)
    else:
        return tl.max(x, 1, keep_dims=True).to(x.dtype)


@triton.jit
def row_amin(x):
    """Smallest of each row; NaN if the row has one."""
    if x.dtype.is_floating():
        return tl.reduce(x, 1, smaller, keep_dims=True)
    else:
        return tl.min(x, 1, keep_dims=True).to(x.dtype)


@triton.jit
def row_any(x):
    return tl.max(x.to(tl.int32), 1, keep_dims=True) != 0


@triton.jit
def row_all(x):
    return tl.min(x.to(tl.int32), 1, keep_dims=True) != 0


@triton.jit
def only(x):
    """The one element of a tile [1, 1], as a number."""
    return tl.sum(tl.sum(x, 1), 0).to(x.dtype)


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
def _finite(top):
    """What is subtracted from exponents of at most ``top``: inf - inf would be NaN."""
    return tl.where(tl.abs(top) == float("inf"), 0.0, top)


@triton.jit
def _term(x):
    """e ** x within 2**-23 * (1 + |x|) of itself, in a third of ``exp``'s instructions, which would
    bound the loop: the terms of a large -x do not matter to a sum that is at least 1."""
    if x.dtype == tl.float32:
        return mathlib.quick_exp(x)
    else:
        return mathlib.exp(x)


@triton.jit
def row_logsumexp(m, s):
    """log(sum(s * exp(m))) of each row, for running maxima m and sums s."""
    base = _finite(row_amax(m))
    return base + mathlib.log(tl.sum(s * mathlib.exp(m - base), 1, keep_dims=True))


@triton.jit
def row_expsum(m, s):
    """sum(s * exp(m - max(m))) of each row; NaN where the maximum is infinite."""
    top = row_amax(m)
    total = tl.sum(s * mathlib.exp(m - top), 1, keep_dims=True)
    return tl.where(tl.abs(top) == float("inf"), float("nan"), total)


@triton.jit
def row_logsum(m, s):
    """log(sum(s * exp(m - max(m)))) of each row; NaN where the maximum is infinite."""
    return mathlib.log(row_expsum(m, s))


@triton.jit
def running_logsumexp(m, s, x):
    """More operands for the lanes of m and s, as many for each: (larger maximum, sum rescaled to
    it). One exponential for each operand, and one for each lane."""
    EACH: tl.constexpr = x.shape[1] // m.shape[1]
    if EACH == 1:
        top = larger(m, x)
        base = _finite(top)
        step = _term(x - base)
    else:
        x = tl.reshape(x, [x.shape[0], EACH, m.shape[1]])
        top = larger(m, tl.reduce(x, 1, larger))
        base = _finite(top)
        step = tl.sum(_term(x - tl.expand_dims(base, 1)), 1)
    return top, s * _term(m - base) + step


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
    bits: tl.constexpr = x.dtype.primitive_bitwidth
    # one return: Triton compiles what follows a return of a branch that is taken, too
    if x.dtype.is_floating():
        best: tl.constexpr = float("-inf") if LARGEST else float("inf")
    elif x.dtype.is_int_unsigned():
        best: tl.constexpr = 0 if LARGEST else 2**bits - 1  # type: ignore[no-redef]
    else:
        least: tl.constexpr = -(2 ** (bits - 1))
        best: tl.constexpr = least if LARGEST else -1 - least  # type: ignore[no-redef]
    return tl.full(x.shape, best, x.dtype)
