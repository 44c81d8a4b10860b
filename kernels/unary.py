"""Elementary functions of one tile, and of two."""

# ruff: noqa: RET505 - Triton compiles what follows a static if, a return in it or not
from __future__ import annotations

import triton
import triton.language as tl

from . import mathlib
from .op import NUMBERS, T, call, pointwise

X = T(4, 33)
ROW = T(33)
COLUMN = T(4, 1)
POSITIVE = T(4, 33, low=0.1, high=9)
UNIT = T(4, 33, low=-0.95, high=0.95)
BETWEEN = T(4, 33, low=0.05, high=0.95)
HALVES = T(4, 33, low=-9, high=9)


@pointwise("aten.exp.default", samples=[call(X)], quick=mathlib.quick_exp)
@triton.jit
def exp(x):
    """e ** x."""
    return mathlib.exp(x)


@pointwise("aten.exp2.default", samples=[call(X)])
@triton.jit
def exp2(x):
    """2 ** x."""
    return mathlib.exp2(x)


@pointwise("aten.expm1.default", samples=[call(X)])
@triton.jit
def expm1(x):
    """e ** x - 1, accurate near 0."""
    return mathlib.expm1(x)


@pointwise("aten.log.default", samples=[call(POSITIVE)])
@triton.jit
def log(x):
    """The natural logarithm."""
    return mathlib.log(x)


@pointwise("aten.log2.default", samples=[call(POSITIVE)])
@triton.jit
def log2(x):
    """The logarithm to base 2."""
    return mathlib.log2(x)


@pointwise("aten.log10.default", samples=[call(POSITIVE)])
@triton.jit
def log10(x):
    """The logarithm to base 10."""
    return mathlib.log10(x)


@pointwise("aten.log1p.default", samples=[call(POSITIVE)])
@triton.jit
def log1p(x):
    """log(1 + x), accurate near 0."""
    return mathlib.log1p(x)


@pointwise("aten.sin.default", samples=[call(X)])
@triton.jit
def sin(x):
    """The sine."""
    return mathlib.sin(x)


@pointwise("aten.cos.default", samples=[call(X)])
@triton.jit
def cos(x):
    """The cosine."""
    return mathlib.cos(x)


@pointwise("aten.tan.default", samples=[call(UNIT)])
@triton.jit
def tan(x):
    """The tangent."""
    return mathlib.tan(x)


@pointwise("aten.asin.default", samples=[call(UNIT)])
@triton.jit
def asin(x):
    """The arc sine."""
    return mathlib.asin(x)


@pointwise("aten.acos.default", samples=[call(UNIT)])
@triton.jit
def acos(x):
    """The arc cosine."""
    return mathlib.acos(x)


@pointwise("aten.atan.default", samples=[call(X)], quick=mathlib.quick_atan)
@triton.jit
def atan(x):
    """The arc tangent."""
    return mathlib.atan(x)


@pointwise("aten.sinh.default", samples=[call(X)])
@triton.jit
def sinh(x):
    """The hyperbolic sine."""
    return mathlib.sinh(x)


@pointwise("aten.cosh.default", samples=[call(X)])
@triton.jit
def cosh(x):
    """The hyperbolic cosine."""
    return mathlib.cosh(x)


@pointwise("aten.tanh.default", samples=[call(X)])
@triton.jit
def tanh(x):
    """The hyperbolic tangent."""
    return mathlib.tanh(x)


@pointwise("aten.asinh.default", samples=[call(X)])
@triton.jit
def asinh(x):
    """The inverse of sinh."""
    return mathlib.asinh(x)


@pointwise("aten.acosh.default", samples=[call(T(4, 33, low=1.5, high=9))])
@triton.jit
def acosh(x):
    """The inverse of cosh."""
    return mathlib.acosh(x)


@pointwise("aten.atanh.default", samples=[call(UNIT)])
@triton.jit
def atanh(x):
    """The inverse of tanh."""
    return mathlib.atanh(x)


@pointwise("aten.erf.default", samples=[call(X)])
@triton.jit
def erf(x):
    """The error function."""
    return mathlib.erf(x)


@pointwise("aten.erfc.default", samples=[call(UNIT)])
@triton.jit
def erfc(x):
    """1 - erf(x)."""
    return mathlib.erfc(x)


@pointwise("aten.erfinv.default", samples=[call(UNIT)])
@triton.jit
def erfinv(x):
    """The inverse of erf."""
    return mathlib.erfinv(x)


@pointwise("aten.lgamma.default", samples=[call(T(4, 33, low=2.5, high=9))])
@triton.jit
def lgamma(x):
    """log |gamma(x)|."""
    return mathlib.lgamma(x)


@pointwise("aten.sqrt.default", samples=[call(POSITIVE)])
@triton.jit
def sqrt(x):
    """The square root."""
    return mathlib.sqrt(x)


@pointwise("aten.rsqrt.default", samples=[call(POSITIVE)])
@triton.jit
def rsqrt(x):
    """1 / sqrt(x)."""
    return mathlib.rsqrt(x)


@pointwise("aten.floor.default", dtypes=NUMBERS, samples=[call(HALVES)])
@triton.jit
def floor(x):
    """The largest integer not above x."""
    if x.dtype.is_floating():
        return tl.floor(x)
    else:
        return x


@pointwise("aten.ceil.default", dtypes=NUMBERS, samples=[call(HALVES)])
@triton.jit
def ceil(x):
    """The smallest integer not below x."""
    if x.dtype.is_floating():
        return tl.ceil(x)
    else:
        return x


@pointwise("aten.trunc.default", dtypes=NUMBERS, samples=[call(HALVES)])
@triton.jit
def trunc(x):
    """x without its fraction."""
    if x.dtype.is_floating():
        return mathlib.trunc(x)
    else:
        return x


@pointwise("aten.round.default", dtypes=NUMBERS, samples=[call(HALVES)])
@triton.jit
def round(x):
    """The nearest integer, even at a tie."""
    if x.dtype.is_floating():
        return mathlib.rint(x)
    else:
        return x


@triton.jit
def round_to_int8(x, nvidia):
    """clamp(round(x), -128, 127) as int8; NaN is 0. On NVIDIA's GPUs, of four floats at a time."""
    if nvidia:
        return tl.inline_asm_elementwise(
            """{
            .reg .s32 a, b, c, d, upper;
            cvt.rni.s32.f32 a, $1;
            cvt.rni.s32.f32 b, $2;
            cvt.rni.s32.f32 c, $3;
            cvt.rni.s32.f32 d, $4;
            cvt.pack.sat.s8.s32.b32 upper, d, c, 0;
            cvt.pack.sat.s8.s32.b32 $0, b, a, upper;
            }""",
            "=r,r,r,r,r",
            [x],
            dtype=tl.int8,
            is_pure=True,
            pack=4,
        )
    else:
        whole = mathlib.minimum(mathlib.maximum(round(x), -128), 127)
        return whole.to(tl.int8)


@pointwise(
    "aten.round.decimals",
    samples=[call(X, decimals=n) for n in (0, 2)]
    + [call(T(4, 33, low=-999, high=999), decimals=-1)],
    name="round_decimals",
)
@triton.jit
def round_decimals(x, decimals):
    """x to the nearest multiple of 10 ** -decimals."""
    if decimals == 0:
        return mathlib.rint(x)
    elif decimals > 0:
        scale = mathlib.like(10.0**decimals, x)
        return mathlib.div(mathlib.rint(x * scale), scale)
    else:
        scale = mathlib.like(10.0**-decimals, x)
        return mathlib.rint(mathlib.div(x, scale)) * scale


@pointwise("aten.frac.default", samples=[call(X)])
@triton.jit
def frac(x):
    """x - trunc(x)."""
    return x - mathlib.trunc(x)


@pointwise("aten.sigmoid.default", samples=[call(X)], quick=mathlib.quick_sigmoid)
@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x))."""
    return mathlib.sigmoid(x)


@pointwise("aten.logit.default", samples=[call(BETWEEN), call(UNIT, 0.1)])
@triton.jit
def logit(x, eps):
    """log(x / (1 - x)), with x clamped to [eps, 1 - eps]."""
    z = _clamp_unit(x, eps)
    return mathlib.log(mathlib.div(z, 1.0 - z))


@triton.jit
def _clamp_unit(x, eps):
    if eps is None or eps < 0:
        return x
    else:
        lo = mathlib.like(eps, x)
        hi = 1.0 - lo
        return tl.where(x < lo, lo, tl.where(x > hi, hi, x))


@pointwise("aten.logit_backward.default", samples=[call(X, BETWEEN), call(X, UNIT, 0.1)])
@triton.jit
def logit_backward(dy, x, eps):
    """dy / (x * (1 - x)); 0 where logit clamped, NaN outside [0, 1] where it did not."""
    dx = mathlib.div(dy, x * (1.0 - x))
    if eps is None or eps < 0:
        return tl.where((x < 0) | (x > 1), float("nan"), dx)
    else:
        lo = mathlib.like(eps, x)
        return tl.where((x < lo) | (x > 1.0 - lo), 0.0, dx)


@pointwise("aten.sigmoid_backward.default", samples=[call(X, BETWEEN)])
@triton.jit
def sigmoid_backward(dy, y):
    """dy * (1 - y) * y."""
    return dy * (1.0 - y) * y


@pointwise("aten.tanh_backward.default", samples=[call(X, UNIT)])
@triton.jit
def tanh_backward(dy, y):
    """dy * (1 - y ** 2)."""
    return dy * mathlib.muladd(mathlib.neg(y), y, mathlib.like(1.0, y))


@pointwise("aten.sinc.default", samples=[call(X)])
@triton.jit
def sinc(x):
    """sin(pi x) / (pi x), 1 at 0."""
    angle = x * 3.141592653589793
    return tl.where(x == 0, 1.0, mathlib.div(mathlib.sin(angle), angle))


@triton.jit
def _reciprocal(x, quick: tl.constexpr):
    if quick:
        return mathlib.quick_div(mathlib.like(1.0, x), x)
    else:
        return mathlib.div(1.0, x)


@triton.jit
def _digamma(x, quick: tl.constexpr):
    # psi(1 - x) - psi(x) = pi / tan(pi x), which float32 would spoil near the integers
    wide = x if quick else x.to(tl.float64)
    fraction = wide - mathlib.trunc(wide)
    cotangent = (3.141592653589793 / mathlib.tan(fraction * 3.141592653589793)).to(x.dtype)
    mirrored = x < 0
    y = tl.where(mirrored, 1.0 - x, x)
    result = tl.where(mirrored, mathlib.neg(cotangent), 0.0)
    for _ in tl.static_range(10):
        small = y < 10.0
        result = result - tl.where(small, _reciprocal(y, quick), 0.0)
        y = tl.where(small, y + 1.0, y)
    z = _reciprocal(y * y, quick)
    series = z * 8.33333333333333333333e-2 - 2.10927960927960927961e-2
    series = series * z + 7.57575757575757575758e-3
    series = series * z - 4.16666666666666666667e-3
    series = series * z + 3.96825396825396825397e-3
    series = series * z - 8.33333333333333333333e-3
    series = series * z + 8.33333333333333333333e-2
    tail = tl.where(y < 1.0e17, series * z, 0.0)
    result = result + mathlib.log(y) - _reciprocal(y, quick) * 0.5 - tail
    pole = mirrored & (fraction == 0)
    result = tl.where(pole, float("nan"), result)
    # at -0.0 and 0.0: infinity of the other sign
    return tl.where(x == 0, mathlib.neg(mathlib.div(1.0, x)), result)


@triton.jit
def quick_digamma(x):
    """Of a number of 16 bits, which float32 holds with bits to spare."""
    return _digamma(x, True)


@pointwise(
    "aten.digamma.default",
    samples=[call(T(4, 33, low=0.5, high=15)), call(T(33, low=-0.9, high=-0.1))],
    quick=quick_digamma,
)
@triton.jit
def digamma(x):
    """The derivative of lgamma: reflected to x >= 0.5, raised to 10, then Bernoulli's series.

    Source: Cephes psi.c, as ATen.
    """
    return _digamma(x, False)


@pointwise("aten.special_entr.default", samples=[call(POSITIVE), call(X)])
@triton.jit
def special_entr(x):
    """-x log(x); 0 at 0, -inf below."""
    inside = tl.where(x == 0, 0.0, mathlib.neg(x) * mathlib.log(x))
    return tl.where(x != x, x, tl.where(x < 0, float("-inf"), inside))


@pointwise("aten.atan2.default", samples=[call(X, X), call(X, ROW), call(COLUMN, ROW)])
@triton.jit
def atan2(y, x):
    """The angle of the point (x, y)."""
    y, x = mathlib.tiles(y, x)
    return mathlib.atan2(y, x)


@pointwise("aten.hypot.default", samples=[call(X, X), call(COLUMN, ROW)])
@triton.jit
def hypot(x, y):
    """sqrt(x ** 2 + y ** 2), without overflow between."""
    x, y = mathlib.tiles(x, y)
    return mathlib.hypot(x, y)


@pointwise("aten.logaddexp.default", samples=[call(X, X), call(COLUMN, ROW)])
@triton.jit
def logaddexp(x, y):
    """log(e ** x + e ** y)."""
    x, y = mathlib.tiles(x, y)
    sum = mathlib.maximum(x, y) + mathlib.log1p(mathlib.exp(mathlib.neg(tl.abs(x - y))))
    return tl.where((tl.abs(x) == float("inf")) & (x == y), x, sum)


@pointwise("aten.logaddexp2.default", samples=[call(X, X), call(COLUMN, ROW)])
@triton.jit
def logaddexp2(x, y):
    """log2(2 ** x + 2 ** y)."""
    x, y = mathlib.tiles(x, y)
    tail = mathlib.log1p(mathlib.exp2(mathlib.neg(tl.abs(x - y)))) * 1.4426950408889634
    sum = mathlib.maximum(x, y) + tail
    return tl.where((tl.abs(x) == float("inf")) & (x == y), x, sum)


@pointwise(
    "aten.xlogy.Tensor",
    "aten.xlogy.Scalar_Self",
    "aten.xlogy.Scalar_Other",
    samples=[call(X, POSITIVE), call(COLUMN, POSITIVE), call(2, POSITIVE), call(X, 3.0)],
)
@triton.jit
def xlogy(x, y):
    """x log(y); 0 where x is 0, unless y is NaN."""
    x, y = mathlib.tiles(x, y)
    product = x * mathlib.log(y)
    return tl.where(y != y, float("nan"), tl.where(x == 0, 0.0, product))


@pointwise(
    "aten.special_xlog1py.default",
    "aten.special_xlog1py.self_scalar",
    "aten.special_xlog1py.other_scalar",
    samples=[call(X, POSITIVE), call(COLUMN, POSITIVE), call(2, POSITIVE), call(X, 3.0)],
)
@triton.jit
def special_xlog1py(x, y):
    """x log(1 + y); 0 where x is 0, unless y is NaN."""
    x, y = mathlib.tiles(x, y)
    product = x * mathlib.log1p(y)
    return tl.where(y != y, float("nan"), tl.where(x == 0, 0.0, product))
