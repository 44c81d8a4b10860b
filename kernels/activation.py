"""Activations and their gradients, by ATen's CUDA formulas."""

# ruff: noqa: RET505 - Triton compiles what follows a static if, a return in it or not
from __future__ import annotations

import triton
import triton.language as tl

from . import mathlib
from .op import NUMBERS, T, call, pointwise

X = T(4, 33)
WIDE = T(4, 33, low=-8, high=8)  # beyond every bend of the pieces below


@pointwise("aten.relu.default", dtypes=NUMBERS, samples=[call(X), call(T(5))])
@triton.jit
def relu(x):
    """max(x, 0); NaN stays."""
    return mathlib.maximum(x, 0)


@pointwise(
    "aten.threshold.default",
    dtypes=NUMBERS,
    samples=[call(WIDE, 1, 3), call(WIDE, 0, 0)],
)
@triton.jit
def threshold(x, threshold, value):
    """x above the threshold, else value."""
    return tl.where(x <= threshold, mathlib.like(value, x), x)


@pointwise(
    "aten.threshold_backward.default",
    samples=[call(X, X, 0), call(X, WIDE, 1)],
)
@triton.jit
def threshold_backward(dy, x, threshold):
    """dy where x is above the threshold, else 0."""
    return tl.where(x <= threshold, mathlib.like(0, dy), dy)


@triton.jit
def quick_silu(x):
    return mathlib.quick_div(x, mathlib.quick_exp(x * -1.0) + 1.0)


@pointwise("aten.silu.default", samples=[call(WIDE)], quick=quick_silu)
@triton.jit
def silu(x):
    """x / (1 + exp(-x))."""
    return mathlib.div(x, mathlib.exp(mathlib.neg(x)) + 1.0)


@triton.jit
def quick_gelu(x, approximate, nvidia=False):
    """Of small results too: 1 + erf and 1 + tanh cancel left of zero, these do not."""
    if approximate == "tanh":
        return mathlib.quick_div(x, tl.exp2(_tanh_exponent(x)) + 1.0)
    else:
        phi, _ = _normal(x, nvidia)
        return x * phi


@triton.jit
def _tanh_exponent(x):
    """-2 / log(2) * _gelu_inner(x): (1 + tanh(u)) / 2 is 1 / (1 + exp(-2 u))."""
    return x * tl.fma(x * x, -0.1029432397, tl.full([], -2.3022081988, tl.float32))


@triton.jit
def _normal(x, nvidia):
    """The normal distribution's Phi(x), and exp(-x * x / 2).

    Phi(-|x|) is exp(-x * x / 2) * t * P(t) with t = 1 / (1 + 0.36 |x|), as in Abramowitz and Stegun
    7.1.26; P is the minimax polynomial for |x| < 14, whose relative error is 9e-7.
    """
    t = mathlib.quick_reciprocal(tl.fma(tl.abs(x), 0.36, tl.full([], 1.0, tl.float32)), nvidia)
    bell = tl.exp2(x * x * -0.7213475204444817)
    p = tl.fma(t, 0.04705621, -0.17976446)
    p = tl.fma(p, t, 0.1809537)
    p = tl.fma(p, t, 0.02654953)
    p = tl.fma(p, t, 0.1397192)
    p = tl.fma(p, t, 0.14177246)
    p = tl.fma(p, t, 0.14371304)
    tail = p * (t * bell)
    return tl.where(x < 0, tail, 1.0 - tail), bell


@pointwise(
    "aten.gelu.default",
    samples=[call(WIDE), call(WIDE, approximate="tanh")],
    quick=quick_gelu,
)
@triton.jit
def gelu(x, approximate):
    """x * Phi(x): exact through erf, or the tanh approximation."""
    if approximate == "tanh":
        return x * 0.5 * (mathlib.tanh(_gelu_inner(x)) + 1.0)
    else:
        return x * 0.5 * (mathlib.erf(x * 0.7071067811865476) + 1.0)


@triton.jit
def _gelu_inner(x):
    """sqrt(2 / pi) * (x + 0.044715 x ** 3)."""
    return mathlib.muladd(0.044715, x * x * x, x) * 0.7978845608028654


@triton.jit
def quick_gelu_backward(dy, x, approximate, nvidia=False):
    """As quick_gelu; with s = 1 / (1 + exp(-2 u)) the derivative of x * s is s + x * s'."""
    if approximate == "tanh":
        one = tl.full([], 1.0, tl.float32)
        s = mathlib.quick_reciprocal(tl.exp2(_tanh_exponent(x)) + 1.0, nvidia)
        slope = x * tl.fma(x * x, 0.2140644488, tl.full([], 1.5957691216, tl.float32))  # 2 x u'
        return dy * (s * tl.fma(slope, 1.0 - s, one))
    else:
        phi, bell = _normal(x, nvidia)
        return dy * tl.fma(x, bell * 0.3989422804014327, phi)


@pointwise(
    "aten.gelu_backward.default",
    samples=[call(X, WIDE), call(X, WIDE, approximate="tanh")],
    quick=quick_gelu_backward,
)
@triton.jit
def gelu_backward(dy, x, approximate):
    """dy * d(gelu)/dx."""
    if approximate == "tanh":
        tanh = mathlib.tanh(_gelu_inner(x))
        square = x * x
        d_tanh = mathlib.muladd(mathlib.neg(tanh), tanh, mathlib.like(1.0, x))
        # 3 * 0.044715
        d_inner = mathlib.muladd(0.134145, square, mathlib.like(1.0, x)) * 0.7978845608028654
        right = x * 0.5 * d_tanh * d_inner
        return dy * mathlib.muladd(0.5, tanh + 1.0, right)
    else:
        cdf = (mathlib.erf(x * 0.7071067811865476) + 1.0) * 0.5
        pdf = mathlib.exp(x * -0.5 * x) * 0.3989422804014327
        return dy * mathlib.muladd(x, pdf, cdf)


@pointwise("aten.leaky_relu.default", samples=[call(X), call(X, 0.2)])
@triton.jit
def leaky_relu(x, negative_slope):
    """x above 0, else x * negative_slope."""
    return tl.where(x > 0, x, x * negative_slope)


@pointwise(
    "aten.leaky_relu_backward.default",
    samples=[call(X, X, 0.2, False), call(X, X, 0.01, True)],
)
@triton.jit
def leaky_relu_backward(dy, x, negative_slope):
    """dy where x is above 0, else dy * negative_slope; x may be the result, which has its sign."""
    return tl.where(x > 0, dy, dy * negative_slope)


@triton.jit
def _elu(x, alpha, scale, input_scale):
    # eager multiplies the coefficients in float32
    slope = mathlib.like(alpha, x) * mathlib.like(scale, x)
    return tl.where(x > 0, x * scale, mathlib.expm1(x * input_scale) * slope)


@pointwise("aten.elu.default", samples=[call(X), call(X, 1.67, 1.05, 1), call(X, 0.5, 2, 0.7)])
@triton.jit
def elu(x, alpha, scale, input_scale):
    """scale * x above 0, else scale * alpha * (exp(input_scale * x) - 1)."""
    return _elu(x, alpha, scale, input_scale)


@pointwise("aten.celu.default", samples=[call(X), call(X, 0.5)])
@triton.jit
def celu(x, alpha):
    """x above 0, else alpha * (exp(x / alpha) - 1)."""
    return _elu(x, alpha, 1.0, 1.0 / alpha)


@pointwise(
    "aten.elu_backward.default",
    samples=[
        call(X, 1.0, 1.0, 1.0, False, X),
        call(X, 0.5, 2.0, 0.7, False, X),
        call(X, 0.5, 2.0, 0.7, True, T(4, 33, low=-0.9, high=2)),
    ],
)
@triton.jit
def elu_backward(dy, alpha, scale, input_scale, is_result, x):
    """dy * d(elu)/dx, from elu's input or, with ``is_result``, from its result."""
    slope = mathlib.like(alpha, x) * mathlib.like(scale, x)
    if is_result:
        dx = dy * input_scale * (x + slope)
    else:
        dx = dy * input_scale * slope * mathlib.exp(x * input_scale)
    return tl.where(x <= 0, dx, dy * scale)


@pointwise("aten.hardtanh.default", samples=[call(WIDE), call(WIDE, -2.5, 3.5)])
@triton.jit
def hardtanh(x, min_val, max_val):
    """x clamped to [min_val, max_val]; NaN stays."""
    return mathlib.minimum(mathlib.maximum(x, min_val), max_val)


@pointwise(
    "aten.hardtanh_backward.default",
    samples=[call(X, WIDE, -1, 1), call(X, WIDE, -2.5, 3.5)],
)
@triton.jit
def hardtanh_backward(dy, x, min_val, max_val):
    """dy strictly inside the bounds, else 0."""
    return tl.where((x <= min_val) | (x >= max_val), 0.0, dy)


@triton.jit
def _relu6_of_shifted(x):
    return mathlib.minimum(mathlib.maximum(x + 3.0, 0.0), 6.0)


@pointwise("aten.hardswish.default", samples=[call(WIDE)])
@triton.jit
def hardswish(x):
    """x * min(max(x + 3, 0), 6) / 6."""
    return x * _relu6_of_shifted(x) * 0.16666666666666666


@pointwise("aten.hardswish_backward.default", samples=[call(X, WIDE)])
@triton.jit
def hardswish_backward(dy, x):
    """0 up to -3, dy from 3, dy * (x / 3 + 1 / 2) between."""
    between = dy * (mathlib.div(x, 3.0) + 0.5)
    return tl.where(x <= -3.0, 0.0, tl.where(x < 3.0, between, dy))


@pointwise("aten.hardsigmoid.default", samples=[call(WIDE)])
@triton.jit
def hardsigmoid(x):
    """min(max(x + 3, 0), 6) / 6."""
    return _relu6_of_shifted(x) * 0.16666666666666666


@pointwise("aten.hardsigmoid_backward.default", samples=[call(X, WIDE)])
@triton.jit
def hardsigmoid_backward(dy, x):
    """dy / 6 strictly inside (-3, 3), else 0."""
    return tl.where((x > -3.0) & (x < 3.0), dy * 0.16666666666666666, 0.0)


@pointwise("aten.softplus.default", samples=[call(WIDE), call(WIDE, 2, 5)])
@triton.jit
def softplus(x, beta, threshold):
    """log(1 + exp(beta x)) / beta; x itself once beta x passes the threshold."""
    scaled = x * beta
    curve = mathlib.div(mathlib.log1p(mathlib.exp(scaled)), mathlib.like(beta, x))
    return tl.where(scaled > threshold, x, curve)


@pointwise(
    "aten.softplus_backward.default",
    samples=[call(X, WIDE, 1, 20), call(X, WIDE, 2, 5)],
)
@triton.jit
def softplus_backward(dy, x, beta, threshold):
    """dy * sigmoid(beta x); dy once beta x passes the threshold."""
    scaled = x * beta
    z = mathlib.exp(scaled)
    return tl.where(scaled > threshold, dy, mathlib.div(dy * z, z + 1.0))


@pointwise("aten.softshrink.default", samples=[call(X), call(X, 0.25)])
@triton.jit
def softshrink(x, lambd):
    """x moved towards 0 by lambd, 0 within; NaN stays."""
    below = tl.where(x < -lambd, x + lambd, 0.0)
    return tl.where(x != x, x, tl.where(x > lambd, x - lambd, below))


@pointwise("aten.hardshrink.default", samples=[call(X), call(X, 0.25)])
@triton.jit
def hardshrink(x, lambd):
    """0 within lambd of 0, else x."""
    return _outside(x, x, lambd)


@triton.jit
def _outside(value, x, lambd):
    return tl.where((x >= -lambd) & (x <= lambd), 0.0, value)


@pointwise(
    "aten.softshrink_backward.default",
    "aten.hardshrink_backward.default",
    samples=[call(X, X, 0.5), call(X, X, 0.25)],
)
@triton.jit
def shrink_backward(dy, x, lambd):
    """0 within lambd of 0, else dy: of both shrinks."""
    return _outside(dy, x, lambd)


@pointwise("aten.mish.default", samples=[call(WIDE)])
@triton.jit
def mish(x):
    """x * tanh(log(1 + exp(x)))."""
    return x * mathlib.tanh(mathlib.log1p(mathlib.exp(x)))


@pointwise(
    "aten._prelu_kernel.default",
    samples=[call(X, T(4, 33, low=0.1, high=0.5)), call(X, T(33, low=0.1, high=0.5))],
)
@triton.jit
def prelu_kernel(x, weight):
    """x above 0, else weight * x."""
    return tl.where(x > 0, x, weight * x)


@pointwise(
    "aten.rrelu_with_noise_backward.default",
    samples=[
        call(X, X, T(4, 33, low=0.1, high=1), 0.125, 0.333, True, False),
        call(X, X, T(4, 33, low=0.1, high=1), 0.125, 0.333, False, False),
    ],
)
@triton.jit
def rrelu_with_noise_backward(dy, x, noise, lower, upper, training):
    """dy * noise in training, else leaky_relu's gradient at the mean slope."""
    if training:
        if upper - lower > 1e-6:
            return dy * noise
        else:
            return tl.where(x > 0, dy, dy * ((lower + upper) / 2))
    else:
        return tl.where(x > 0, dy, dy * ((lower + upper) / 2))
