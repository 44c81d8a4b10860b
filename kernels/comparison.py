"""Comparisons, logic, bits, and choosing by a condition."""

# ruff: noqa: RET505 - Triton compiles what follows a static if, a return in it or not
from __future__ import annotations

import triton
import triton.language as tl

from . import mathlib
from .op import ALL, INTS, NUMBERS, T, call, pointwise

X = T(4, 33, low=-3, high=4)  # integers that often tie
ROW = T(33, low=-3, high=4)
COLUMN = T(4, 1, low=-3, high=4)
BOOL = T(4, 33, dtype="bool")
BITS = (*INTS, "bool")
SHIFT = T(4, 33, low=0, high=9)
COMPARED = (call(X, X), call(X, ROW), call(COLUMN, ROW), call(X, 1), call(X, T(low=-3, high=4)))
LOGICAL = (call(X, X), call(X, ROW), call(COLUMN, ROW))


@pointwise("aten.eq.Tensor", "aten.eq.Scalar", dtypes=ALL, samples=COMPARED)
@triton.jit
def eq(x, y):
    """x == y."""
    return mathlib.number(x) == mathlib.number(y)


@pointwise("aten.ne.Tensor", "aten.ne.Scalar", dtypes=ALL, samples=COMPARED)
@triton.jit
def ne(x, y):
    """x != y."""
    return mathlib.number(x) != mathlib.number(y)


@pointwise("aten.lt.Tensor", "aten.lt.Scalar", dtypes=ALL, samples=COMPARED)
@triton.jit
def lt(x, y):
    """x < y."""
    return mathlib.number(x) < mathlib.number(y)


@pointwise("aten.le.Tensor", "aten.le.Scalar", dtypes=ALL, samples=COMPARED)
@triton.jit
def le(x, y):
    """x <= y."""
    return mathlib.number(x) <= mathlib.number(y)


@pointwise("aten.gt.Tensor", "aten.gt.Scalar", dtypes=ALL, samples=COMPARED)
@triton.jit
def gt(x, y):
    """x > y."""
    return mathlib.number(x) > mathlib.number(y)


@pointwise("aten.ge.Tensor", "aten.ge.Scalar", dtypes=ALL, samples=COMPARED)
@triton.jit
def ge(x, y):
    """x >= y."""
    return mathlib.number(x) >= mathlib.number(y)


@pointwise("aten.logical_and.default", dtypes=ALL, samples=LOGICAL)
@triton.jit
def logical_and(x, y):
    """x != 0 and y != 0."""
    return mathlib.truth(x) & mathlib.truth(y)


@pointwise("aten.logical_or.default", dtypes=ALL, samples=LOGICAL)
@triton.jit
def logical_or(x, y):
    """x != 0 or y != 0."""
    return mathlib.truth(x) | mathlib.truth(y)


@pointwise("aten.logical_xor.default", dtypes=ALL, samples=LOGICAL)
@triton.jit
def logical_xor(x, y):
    """x != 0 xor y != 0."""
    return mathlib.truth(x) ^ mathlib.truth(y)


@pointwise("aten.logical_not.default", dtypes=ALL, samples=[call(X)])
@triton.jit
def logical_not(x):
    """x == 0."""
    return mathlib.number(x) == 0


@pointwise(
    "aten.bitwise_and.Tensor",
    "aten.bitwise_and.Scalar",
    "aten.bitwise_and.Scalar_Tensor",
    dtypes=BITS,
    samples=[*LOGICAL, call(X, True), call(True, X)],
)
@triton.jit
def bitwise_and(x, y):
    """x & y."""
    x, y = mathlib.tiles(x, y)
    return x & y


@pointwise(
    "aten.bitwise_or.Tensor",
    "aten.bitwise_or.Scalar",
    "aten.bitwise_or.Scalar_Tensor",
    dtypes=BITS,
    samples=[*LOGICAL, call(X, True), call(True, X)],
)
@triton.jit
def bitwise_or(x, y):
    """x | y."""
    x, y = mathlib.tiles(x, y)
    return x | y


@pointwise(
    "aten.bitwise_xor.Tensor",
    "aten.bitwise_xor.Scalar",
    "aten.bitwise_xor.Scalar_Tensor",
    dtypes=BITS,
    samples=[*LOGICAL, call(X, True), call(True, X)],
)
@triton.jit
def bitwise_xor(x, y):
    """x ^ y."""
    x, y = mathlib.tiles(x, y)
    return x ^ y


@pointwise("aten.bitwise_not.default", dtypes=BITS, samples=[call(X)])
@triton.jit
def bitwise_not(x):
    """~x; of a truth value, not."""
    return ~x


@pointwise(
    "aten.bitwise_left_shift.Tensor",
    "aten.bitwise_left_shift.Tensor_Scalar",
    "aten.bitwise_left_shift.Scalar_Tensor",
    "aten.__lshift__.Tensor",
    "aten.__lshift__.Scalar",
    dtypes=INTS,
    samples=[call(X, SHIFT), call(X, 3), call(2, SHIFT), call(X, T(33, low=-2, high=70))],
)
@triton.jit
def bitwise_left_shift(x, y):
    """x << y; 0 where y is negative or as wide as x."""
    x, y = mathlib.tiles(x, y)
    fits = (y >= 0) & (y < x.dtype.primitive_bitwidth)
    return tl.where(fits, x << tl.where(fits, y, 0), 0)


@pointwise(
    "aten.bitwise_right_shift.Tensor",
    "aten.bitwise_right_shift.Tensor_Scalar",
    "aten.bitwise_right_shift.Scalar_Tensor",
    "aten.__rshift__.Tensor",
    "aten.__rshift__.Scalar",
    dtypes=INTS,
    samples=[call(X, SHIFT), call(X, 3), call(-99, SHIFT), call(X, T(33, low=-2, high=70))],
)
@triton.jit
def bitwise_right_shift(x, y):
    """x >> y, keeping the sign; -1 or 0 where y is negative or as wide as x."""
    x, y = mathlib.tiles(x, y)
    last = x.dtype.primitive_bitwidth - 1
    return x >> tl.where((y >= 0) & (y < last), y, last)


@pointwise("aten.isnan.default", dtypes=ALL, samples=[call(X)])
@triton.jit
def isnan(x):
    """Whether x is NaN."""
    return x != x


@pointwise("aten.isinf.default", dtypes=ALL, samples=[call(X)])
@triton.jit
def isinf(x):
    """Whether x is infinite."""
    if x.dtype.is_floating():
        return tl.abs(x) == float("inf")
    else:
        return x != x


@pointwise("aten.isposinf.default", dtypes=ALL, samples=[call(X)])
@triton.jit
def isposinf(x):
    """Whether x is +inf."""
    if x.dtype.is_floating():
        return x == float("inf")
    else:
        return x != x


@pointwise("aten.isneginf.default", dtypes=ALL, samples=[call(X)])
@triton.jit
def isneginf(x):
    """Whether x is -inf."""
    if x.dtype.is_floating():
        return x == float("-inf")
    else:
        return x != x


@pointwise(
    "aten.where.self",
    dtypes=ALL,
    samples=[call(BOOL, X, X), call(BOOL, ROW, COLUMN), call(T(4, 1, dtype="bool"), X, T())],
    truth=("condition",),
)
@triton.jit
def where(condition, x, y):
    """x where the condition holds, else y."""
    x, y = mathlib.tiles(x, y)
    return tl.where(condition, x, y)


@pointwise(
    "aten.masked_fill.Scalar",
    "aten.masked_fill.Tensor",
    dtypes=ALL,
    samples=[call(X, BOOL, 1), call(X, T(33, dtype="bool"), 0), call(X, BOOL, T())],
    truth=("mask",),
)
@triton.jit
def masked_fill(x, mask, value):
    """value where the mask holds, else x."""
    return tl.where(mask, mathlib.like(value, x), x)


@pointwise("aten.heaviside.default", dtypes=NUMBERS, samples=[call(X, X), call(X, ROW)])
@triton.jit
def heaviside(x, values):
    """0 for negative x, 1 for positive, ``values`` at 0."""
    return tl.where(x == 0, values, (x > 0).to(x.dtype))


@pointwise(
    "aten.copysign.Tensor",
    "aten.copysign.Scalar",
    samples=[call(X, X), call(X, ROW), call(X, -2.0)],
)
@triton.jit
def copysign(x, y):
    """|x| with y's sign."""
    x, y = mathlib.tiles(x, y)
    return mathlib.copysign(x, y)


@pointwise("aten.signbit.default", dtypes=NUMBERS, samples=[call(X)])
@triton.jit
def signbit(x):
    """Whether x is negative, a zero or a NaN included."""
    if x.dtype.is_floating():
        return mathlib.signbit(x)
    else:
        return mathlib.number(x) < 0


def _dtype_maximum_missing(x, nan=None, posinf=None, neginf=None):
    """A body sees float32 and cannot name the largest float16."""
    narrow = "16" in str(getattr(x, "dtype", "16"))
    if narrow and (posinf is None or neginf is None):
        return "infinities become the extrema of a 16-bit dtype, which the kernel does not know"
    return None


@pointwise(
    "aten.nan_to_num.default",
    dtypes=("float32",),
    samples=[call(X), call(X, 1.0, 2.0, -2.0)],
    declines=_dtype_maximum_missing,
)
@triton.jit
def nan_to_num(x, nan, posinf, neginf):
    """x, with NaN as ``nan`` (0) and infinities as the given numbers (the dtype's extrema)."""
    if x.dtype.is_floating():
        largest = 3.4028234663852886e38 if x.dtype == tl.float32 else 1.7976931348623157e308
        y = tl.where(x != x, 0.0 if nan is None else nan, x)
        y = tl.where(x == float("inf"), largest if posinf is None else posinf, y)
        return tl.where(x == float("-inf"), -largest if neginf is None else neginf, y)
    else:
        return x
