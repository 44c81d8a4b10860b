"""Device functions of scans: tiles are [X, R], and R is scanned from its first element on.

A row longer than the tile comes in steps; what each step hands to the next is its last element.
"""

import triton
import triton.language as tl

from . import mathlib
from .reductions import larger, smaller


@triton.jit
def plus(a, b):
    return a + b


@triton.jit
def times(a, b):
    return a * b


@triton.jit
def last(x):
    """The last element of each row, which a NaN or an infinity elsewhere leaves alone."""
    at_end = tl.arange(0, x.shape[1])[None, :] == x.shape[1] - 1
    return tl.sum(tl.where(at_end, x, tl.zeros_like(x)), 1, keep_dims=True).to(x.dtype)


@triton.jit
def running_sum(x):
    return tl.associative_scan(x, 1, plus)


@triton.jit
def running_prod(x):
    return tl.associative_scan(x, 1, times)


@triton.jit
def running_max(x):
    """Largest so far; NaN once there was one."""
    return tl.associative_scan(x, 1, larger)


@triton.jit
def running_min(x):
    """Smallest so far; NaN once there was one."""
    return tl.associative_scan(x, 1, smaller)


@triton.jit
def later_max(x, i, y, j):
    """The larger of two and its place; of equals, and of NaNs, the later one."""
    take = y >= x
    if x.dtype.is_floating():
        take = take | (y != y)
    return tl.where(take, y, x), tl.where(take, j, i)


@triton.jit
def later_min(x, i, y, j):
    """The smaller of two and its place; of equals, and of NaNs, the later one."""
    take = y <= x
    if x.dtype.is_floating():
        take = take | (y != y)
    return tl.where(take, y, x), tl.where(take, j, i)


@triton.jit
def running_argmax(x, place):
    return tl.associative_scan((x, place), 1, later_max)


@triton.jit
def running_argmin(x, place):
    return tl.associative_scan((x, place), 1, later_min)


@triton.jit
def add_exponentials(m, s, n, t):
    """s * exp(m) + t * exp(n) as (larger exponent, sum beside it)."""
    top = larger(m, n)
    base = tl.where(tl.abs(top) == float("inf"), 0.0, top)
    return top, s * mathlib.exp(m - base) + t * mathlib.exp(n - base)


@triton.jit
def running_logsumexp(m, s):
    return tl.associative_scan((m, s), 1, add_exponentials)


@triton.jit
def logarithm(m, s):
    """log(s * exp(m)), which is m where that is infinite."""
    return tl.where(tl.abs(m) == float("inf"), m, m + mathlib.log(s))
