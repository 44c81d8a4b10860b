"""Sums, products, quotients, powers, extrema and their kin."""

# ruff: noqa: RET505 - Triton compiles what follows a static if, a return in it or not
from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from . import mathlib, quotient
from .op import ALL, FLOATS, NUMBERS, T, call, pointwise

X = T(4, 33)
ROW = T(33)
COLUMN = T(4, 1)
POSITIVE = T(4, 33, low=0.5, high=3)
INTEGER = T(4, 33, low=-20, high=20)  # small enough for float16 and int32 alike
DIVISOR = T(4, 33, low=1, high=7)
BINARY = (call(X, X), call(X, ROW), call(COLUMN, ROW), call(X, T()))


@pointwise(
    "aten.add.Tensor",
    "aten.add.Scalar",
    dtypes=NUMBERS,
    samples=[*BINARY, call(X, X, alpha=2), call(X, COLUMN, alpha=3), call(X, 2)],
)
@triton.jit
def add(x, y, alpha):
    """x + alpha * y; of truth values, or."""
    x, y = mathlib.tiles(x, y)
    if x.dtype == tl.int1:
        return x | (y & (alpha != 0))
    elif alpha == 1:
        return x + y
    else:
        return mathlib.muladd(alpha, y, x)


@pointwise(
    "aten.sub.Tensor",
    "aten.sub.Scalar",
    dtypes=NUMBERS,
    samples=[*BINARY, call(X, X, alpha=2), call(X, COLUMN, alpha=3), call(X, 2)],
)
@triton.jit
def sub(x, y, alpha):
    """x - alpha * y."""
    x, y = mathlib.tiles(x, y)
    if alpha == 1:
        return x - y
    else:
        return mathlib.muladd(-alpha, y, x)


@pointwise(
    "aten.rsub.Tensor",
    "aten.rsub.Scalar",
    dtypes=NUMBERS,
    samples=[*BINARY, call(X, X, alpha=2), call(X, 1), call(X, 3, alpha=2)],
)
@triton.jit
def rsub(x, y, alpha):
    """y - alpha * x."""
    x, y = mathlib.tiles(x, y)
    if alpha == 1:
        return y - x
    else:
        return mathlib.muladd(-alpha, x, y)


@pointwise("aten.mul.Tensor", "aten.mul.Scalar", dtypes=ALL, samples=[*BINARY, call(X, 3)])
@triton.jit
def mul(x, y):
    """x * y; of truth values, and."""
    x, y = mathlib.tiles(x, y)
    if x.dtype == tl.int1:
        return x & y
    else:
        return x * y


@triton.jit
def _quotient(x, y):
    """x / y as eager computes it: CUDA multiplies by the reciprocal of a literal."""
    if isinstance(y, tl.tensor) or mathlib.INTERPRETED:
        return mathlib.div(x, y)
    else:
        return x * mathlib.div(1.0, mathlib.like(y, x))


@triton.jit
def _floor_quotient(x, y):
    """floor(x / y): of integers exactly; of floats by c10's formula, which corrects fmod's."""
    a, b = mathlib.tiles(x, y)
    if a.dtype.is_floating():
        mod = mathlib.fmod(a, b)
        div = _quotient(a - mod, y)
        div = tl.where((mod != 0) & ((b < 0) != (mod < 0)), div - 1.0, div)
        floor = tl.floor(div)
        floor = tl.where(div - floor > 0.5, floor + 1.0, floor)
        ratio = _quotient(a, y)
        zero = mathlib.copysign(ratio * 0.0, ratio)
        return tl.where(b == 0, ratio, tl.where(div != 0, floor, zero))
    else:
        div = a // b
        mod = a - div * b
        return tl.where((mod != 0) & ((b < 0) != (mod < 0)), div - 1, div)


@pointwise(
    "aten.div.Tensor",
    "aten.div.Scalar",
    dtypes=NUMBERS,
    samples=[
        call(X, DIVISOR),
        call(X, T(33, low=1, high=7)),
        call(X, 3),
        call(X, 0.7),
        call(X, T(low=1, high=7)),
    ],
)
@triton.jit
def div(x, y, nvidia=False):
    """x / y. ``nvidia``: the kernel is one for NVIDIA's GPUs."""
    if nvidia and isinstance(x, tl.tensor) and isinstance(y, tl.tensor):
        if x.dtype == tl.float32 and quotient.of_rows(x.shape, y.shape):
            return quotient.quotient(x, y)
        else:
            return _quotient(x, y)
    else:
        return _quotient(x, y)


@pointwise(
    "aten.div.Tensor_mode",
    "aten.div.Scalar_mode",
    dtypes=NUMBERS,
    samples=[
        *(call(INTEGER, DIVISOR, rounding_mode=mode) for mode in ("trunc", "floor")),
        *(call(INTEGER, 3, rounding_mode=mode) for mode in ("trunc", "floor")),
        call(INTEGER, DIVISOR, rounding_mode=None),
    ],
    name="div_mode",
)
@triton.jit
def div_mode(x, y, rounding_mode):
    """x / y, then as it is, towards zero ("trunc") or down ("floor")."""
    if rounding_mode is None:
        return _quotient(x, y)
    elif rounding_mode == "floor":
        return _floor_quotient(x, y)
    else:
        a, b = mathlib.tiles(x, y)
        if a.dtype.is_floating():
            return mathlib.trunc(_quotient(a, y))
        else:
            return a // b


@triton.jit
def quick_floor_divide(x, y):
    """floor(x / y) of floats: the rounded quotient's, less one where that is above. It is the
    nearest one below beyond 2 ** 24."""
    ratio = mathlib.div(x, y)
    floor = tl.floor(ratio)
    left = tl.fma(mathlib.neg(floor), y, x)
    floor = tl.where((left != 0) & ((left < 0) != (y < 0)), floor - 1.0, floor)
    # what is infinite leaves everything, and nothing
    below = tl.where((x != 0) & ((x < 0) != (y < 0)), -1.0, 0.0)
    floor = tl.where(tl.abs(y) == float("inf"), below, floor)
    floor = tl.where(tl.abs(x) == float("inf"), float("nan"), floor)
    floor = tl.where(floor == 0, mathlib.copysign(floor * 0.0, ratio), floor)
    return tl.where((y == 0) | (ratio != ratio), ratio, floor)


@pointwise(
    "aten.floor_divide.default",
    "aten.floor_divide.Scalar",
    dtypes=NUMBERS,
    samples=[call(INTEGER, DIVISOR), call(INTEGER, T(33, low=-7, high=-1)), call(INTEGER, 3)],
    quick=quick_floor_divide,
)
@triton.jit
def floor_divide(x, y):
    """floor(x / y)."""
    return _floor_quotient(x, y)


@pointwise(
    "aten.remainder.Tensor",
    "aten.remainder.Scalar",
    "aten.remainder.Scalar_Tensor",
    dtypes=NUMBERS,
    samples=[
        call(INTEGER, DIVISOR),
        call(INTEGER, T(33, low=-7, high=-1)),
        call(INTEGER, 3),
        call(7, DIVISOR),
    ],
)
@triton.jit
def remainder(x, y):
    """x - y * floor(x / y), which has y's sign."""
    x, y = mathlib.tiles(x, y)
    mod = mathlib.fmod(x, y) if x.dtype.is_floating() else x % y
    return tl.where((mod != 0) & ((y < 0) != (mod < 0)), mod + y, mod)


@pointwise(
    "aten.fmod.Tensor",
    "aten.fmod.Scalar",
    dtypes=NUMBERS,
    samples=[call(INTEGER, DIVISOR), call(INTEGER, T(33, low=-7, high=-1)), call(INTEGER, 3)],
)
@triton.jit
def fmod(x, y):
    """x - y * trunc(x / y), which has x's sign."""
    x, y = mathlib.tiles(x, y)
    if x.dtype.is_floating():
        return mathlib.fmod(x, y)
    else:
        return x % y


@triton.jit
def _integer_power(x, y):
    """x ** y by squaring, wrapping; a negative y leaves 0, 1 or -1."""
    base = x + y * 0
    left = tl.maximum(y, 0) + x * 0
    result = base * 0 + 1
    for _ in range(x.dtype.primitive_bitwidth - 1):
        result = tl.where((left & 1) != 0, result * base, result)
        base = base * base
        left = left >> 1
    odd = (y & 1) != 0
    inverse = tl.where(x == 1, 1, tl.where(x == -1, tl.where(odd, -1, 1), 0))
    return tl.where(y < 0, inverse.to(x.dtype), result)


@triton.jit
def _literal_power(x, exponent):
    """x ** exponent with eager CUDA's special cases."""
    if exponent == 0:
        return mathlib.spread(1, x)
    elif exponent == 1:
        return x
    elif exponent == 2:
        return x * x
    elif exponent == 3:
        return x * x * x
    elif x.dtype.is_floating():
        if exponent == 0.5:
            return mathlib.sqrt(x)
        elif exponent == -0.5:
            return mathlib.rsqrt(x)
        elif exponent == -1:
            return mathlib.div(1.0, x)
        elif exponent == -2:
            return mathlib.div(1.0, x * x)
        else:
            return mathlib.pow(x, mathlib.like(exponent, x))
    else:
        return _integer_power(x, mathlib.like(exponent, x))


@pointwise(
    "aten.pow.Tensor_Scalar",
    "aten.pow.Tensor_Tensor",
    "aten.pow.Scalar",
    dtypes=NUMBERS,
    samples=[
        *(call(X, n) for n in (0, 1, 2, 3)),
        call(T(4, 33, low=1, high=3), 5),
        call(T(4, 33, low=1, high=3), T(4, 33, low=0, high=4)),
        call(2, T(33, low=0, high=5)),
        *(call(T(4, 33, dtype="float32", low=0.5, high=3), n) for n in (0.5, -0.5, -1, -2, 1.7)),
    ],
    quick=mathlib.quick_pow,
)
@triton.jit
def pow(x, exponent):
    """x ** exponent."""
    if isinstance(exponent, tl.tensor):
        base = mathlib.like(x, exponent)
        if exponent.dtype.is_floating():
            return mathlib.pow(base, exponent)
        else:
            return _integer_power(base, exponent)
    else:
        return _literal_power(x, exponent)


@pointwise("aten.neg.default", dtypes=NUMBERS, samples=[call(X)])
@triton.jit
def neg(x):
    """-x."""
    return mathlib.neg(x)


@pointwise("aten.abs.default", dtypes=NUMBERS, samples=[call(X)])
@triton.jit
def abs(x):
    """|x|."""
    return tl.abs(x)


@pointwise("aten.sign.default", "aten.sgn.default", dtypes=ALL, samples=[call(X)])
@triton.jit
def sign(x):
    """1, 0 or -1: 0 for NaN; a truth value is its own sign."""
    if x.dtype == tl.int1:
        return x
    else:
        return (x > 0).to(x.dtype) - (x < 0).to(x.dtype)


@pointwise("aten.reciprocal.default", dtypes=FLOATS, samples=[call(POSITIVE)])
@triton.jit
def reciprocal(x):
    """1 / x."""
    return mathlib.div(1.0, x)


@pointwise("aten.maximum.default", dtypes=ALL, samples=BINARY)
@triton.jit
def maximum(x, y):
    """The larger one; NaN if either is."""
    return mathlib.maximum(x, y)


@pointwise("aten.minimum.default", dtypes=ALL, samples=BINARY)
@triton.jit
def minimum(x, y):
    """The smaller one; NaN if either is."""
    return mathlib.minimum(x, y)


@pointwise("aten.fmax.default", dtypes=ALL, samples=BINARY)
@triton.jit
def fmax(x, y):
    """The larger one; a number rather than NaN."""
    x, y = mathlib.tiles(x, y)
    if x.dtype.is_floating():
        return tl.where((x >= y) | (y != y), x, y)
    else:
        return mathlib.maximum(x, y)


@pointwise("aten.fmin.default", dtypes=ALL, samples=BINARY)
@triton.jit
def fmin(x, y):
    """The smaller one; a number rather than NaN."""
    x, y = mathlib.tiles(x, y)
    if x.dtype.is_floating():
        return tl.where((x <= y) | (y != y), x, y)
    else:
        return mathlib.minimum(x, y)


@pointwise(
    "aten.addcmul.default",
    dtypes=NUMBERS,
    samples=[call(X, X, X), call(X, X, X, value=2), call(X, COLUMN, ROW, value=3)],
)
@triton.jit
def addcmul(x, tensor1, tensor2, value):
    """x + value * (tensor1 * tensor2)."""
    if value == 1:
        return mathlib.muladd(tensor1, tensor2, x)
    else:
        return mathlib.muladd(value, tensor1 * tensor2, x)


@pointwise(
    "aten.addcdiv.default",
    samples=[
        call(X, X, POSITIVE),
        call(X, X, POSITIVE, value=0.5),
        call(X, COLUMN, T(33, low=0.5, high=3), value=2),
    ],
)
@triton.jit
def addcdiv(x, tensor1, tensor2, value):
    """x + value * (tensor1 / tensor2)."""
    ratio = mathlib.div(tensor1, tensor2)
    if value == 1:
        return x + ratio
    else:
        return mathlib.muladd(value, ratio, x)


@pointwise(
    "aten.lerp.Scalar",
    "aten.lerp.Tensor",
    samples=[
        call(X, X, 0.3),
        call(X, X, 0.75),
        call(X, ROW, -0.25),
        call(X, X, T(4, 33, low=0, high=1)),
        call(X, ROW, T(4, 1, low=0, high=1)),
    ],
)
@triton.jit
def lerp(x, end, weight):
    """x + weight * (end - x), computed from the nearer end."""
    weight = mathlib.like(weight, x)
    diff = end - x
    from_x = mathlib.muladd(weight, diff, x)
    from_end = mathlib.muladd(weight - 1.0, diff, end)
    return tl.where(tl.abs(weight) < 0.5, from_x, from_end)


def nan_bound(x: Any, *bounds: Any) -> str | None:
    """ATen clamps to a NaN on a CPU and ignores it on a GPU."""
    if any(isinstance(b, float) and b != b for b in bounds):
        return "a bound is NaN"
    return None


@pointwise(
    "aten.clamp.default",
    "aten.clamp.Tensor",
    dtypes=NUMBERS,
    declines=nan_bound,
    samples=[
        call(X, -1, 1),
        call(X, min=0),
        call(X, max=1),
        call(X, X, X),
        call(X, min=ROW),
        call(X, max=COLUMN),
    ],
)
@triton.jit
def clamp(x, lo, hi):
    """min(max(x, lo), hi); NaN if any is."""
    if lo is None:
        return mathlib.minimum(x, hi)
    elif hi is None:
        return mathlib.maximum(x, lo)
    else:
        return mathlib.minimum(mathlib.maximum(x, lo), hi)


@pointwise(
    "aten.clamp_min.default",
    "aten.clamp_min.Tensor",
    dtypes=NUMBERS,
    declines=nan_bound,
    samples=[call(X, 0), call(X, X), call(X, ROW)],
)
@triton.jit
def clamp_min(x, lo):
    """max(x, lo); NaN if either is."""
    return mathlib.maximum(x, lo)


@pointwise(
    "aten.clamp_max.default",
    "aten.clamp_max.Tensor",
    dtypes=NUMBERS,
    declines=nan_bound,
    samples=[call(X, 0), call(X, X), call(X, ROW)],
)
@triton.jit
def clamp_max(x, hi):
    """min(x, hi); NaN if either is."""
    return mathlib.minimum(x, hi)


@pointwise(
    "aten.native_dropout_backward.default",
    samples=[call(X, T(4, 33, dtype="bool"), 1.25)],
    truth=("mask",),
)
@triton.jit
def native_dropout_backward(dy, mask, scale):
    """dy * mask * scale."""
    return dy * tl.where(mask, mathlib.like(scale, dy), mathlib.like(0.0, dy))


@pointwise("aten.deg2rad.default", samples=[call(T(4, 33, low=-180, high=180))])
@triton.jit
def deg2rad(x):
    """x * pi / 180."""
    return x * 0.017453292519943295


@pointwise("aten.rad2deg.default", samples=[call(X)])
@triton.jit
def rad2deg(x):
    """x * 180 / pi."""
    return x * 57.29577951308232
