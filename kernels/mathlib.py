"""Device functions whose spelling depends on the target, and what literals need.

Compiled, a function is CUDA's or HIP's libdevice, as accurate as eager's: Triton's own ``tl.exp``,
``tl.sin`` and ``/`` are approximations in float32. Interpreted, it is NumPy's. All take tiles of
float32 or float64 alone; ``tiles`` makes a literal one.
"""

# ruff: noqa: RET505 - Triton compiles what follows a static if, a return in it or not
from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))

if INTERPRETED.value:
    from .mathlib_numpy import (
        acos,
        acosh,
        asin,
        asinh,
        atan,
        atan2,
        atanh,
        cos,
        cosh,
        erf,
        erfc,
        erfinv,
        exp,
        exp2,
        expm1,
        fmod,
        hypot,
        lgamma,
        log,
        log1p,
        log2,
        log10,
        pow,
        rint,
        rsqrt,
        sin,
        sinh,
        tan,
        tanh,
        trunc,
    )
else:

    @triton.jit
    def exp(x):
        return libdevice.exp(x)

    @triton.jit
    def exp2(x):
        return libdevice.exp2(x)

    @triton.jit
    def expm1(x):
        return libdevice.expm1(x)

    @triton.jit
    def log(x):
        return libdevice.log(x)

    @triton.jit
    def log2(x):
        return libdevice.log2(x)

    @triton.jit
    def log10(x):
        return libdevice.log10(x)

    @triton.jit
    def log1p(x):
        return libdevice.log1p(x)

    @triton.jit
    def rsqrt(x):
        return libdevice.rsqrt(x)

    @triton.jit
    def sin(x):
        return libdevice.sin(x)

    @triton.jit
    def cos(x):
        return libdevice.cos(x)

    @triton.jit
    def tan(x):
        return libdevice.tan(x)

    @triton.jit
    def asin(x):
        return libdevice.asin(x)

    @triton.jit
    def acos(x):
        return libdevice.acos(x)

    @triton.jit
    def atan(x):
        """In float64: libdevice's counts on fused multiply-adds, which exact kernels do without."""
        return libdevice.atan(x.to(tl.float64)).to(x.dtype)

    @triton.jit
    def sinh(x):
        return libdevice.sinh(x)

    @triton.jit
    def cosh(x):
        return libdevice.cosh(x)

    @triton.jit
    def tanh(x):
        return libdevice.tanh(x)

    @triton.jit
    def asinh(x):
        return libdevice.asinh(x)

    @triton.jit
    def acosh(x):
        return libdevice.acosh(x)

    @triton.jit
    def atanh(x):
        return libdevice.atanh(x)

    @triton.jit
    def erf(x):
        return libdevice.erf(x)

    @triton.jit
    def erfc(x):
        return libdevice.erfc(x)

    @triton.jit
    def erfinv(x):
        return libdevice.erfinv(x)

    @triton.jit
    def lgamma(x):
        return libdevice.lgamma(x)

    @triton.jit
    def trunc(x):
        return libdevice.trunc(x)

    @triton.jit
    def rint(x):
        return libdevice.nearbyint(x)  # HIP has no rint in Triton 3.6

    @triton.jit
    def atan2(x, y):
        return libdevice.atan2(x, y)

    @triton.jit
    def hypot(x, y):
        return libdevice.hypot(x, y)

    @triton.jit
    def fmod(x, y):
        return libdevice.fmod(x, y)

    @triton.jit
    def pow(x, y):
        """In float64, as ``atan``: 1.7 units in the last place otherwise, eager's has 0.5."""
        return libdevice.pow(x.to(tl.float64), y.to(tl.float64)).to(x.dtype)


@triton.jit
def like(value, x):
    """``value`` as a tile of x's dtype; a literal is rounded once, straight to that dtype, and is
    what torch makes of it: True where it is not zero, 255 for -1."""
    if isinstance(value, tl.tensor):
        return value
    elif x.dtype == tl.int1:
        return tl.full([], value != 0, x.dtype)
    elif x.dtype == tl.uint8:
        return tl.full([], value % 256, x.dtype)
    else:
        return tl.full([], value, x.dtype)


@triton.jit
def tiles(x, y):
    """Both operands as tiles, where either may be a literal (``tl.where``, ``tl.maximum`` and
    libdevice take a literal as float32 whatever the tile)."""
    if isinstance(x, tl.tensor):
        return x, like(y, x)
    else:
        return like(x, y), y


@triton.jit
def spread(value, x):
    """``value`` broadcast to x's shape; x's load is dropped, as the select chooses nothing."""
    tile = like(value, x)
    return tl.where(x == x, tile, tile)


@triton.jit
def number(x):
    """x, with a truth value as 0 or 1 in int32: int1 compares and adds as a signed number."""
    if isinstance(x, tl.tensor):
        if x.dtype == tl.int1:
            return x.to(tl.int32)
        else:
            return x
    else:
        return x


@triton.jit
def truth(x):
    """x != 0, of a tile or a literal."""
    if isinstance(x, tl.tensor):
        if x.dtype == tl.int1:
            return x
        else:
            return x != 0
    else:
        return tl.full([], x != 0, tl.int1)


@triton.jit
def neg(x):
    """-x. Triton's own is 0 - x, which loses the sign of zero."""
    if x.dtype.is_floating():
        return x * -1.0
    else:
        return 0 - x


@triton.jit
def signbit(x):
    """Whether a float is negative, -0.0 and NaN included."""
    if x.dtype == tl.float64:
        return x.to(tl.int64, bitcast=True) < 0
    else:
        return x.to(tl.int32, bitcast=True) < 0


@triton.jit
def copysign(x, y):
    """|x| with y's sign."""
    size = tl.abs(x)
    return tl.where(signbit(y), neg(size), size)


@triton.jit
def div(x, y):
    """x / y, rounded to nearest."""
    x, y = tiles(x, y)
    if x.dtype == tl.float32:
        return tl.div_rn(x, y)
    else:
        return x / y


@triton.jit
def sqrt(x):
    """The square root, rounded to nearest."""
    if x.dtype == tl.float32:
        return tl.sqrt_rn(x)
    else:
        return tl.sqrt(x)


@triton.jit
def muladd(x, y, z):
    """x * y + z: one rounding for floats, where eager's compiler contracts; x may be a literal."""
    if z.dtype.is_floating():
        return tl.fma(like(x, z), y, z)
    else:
        return like(x, z) * y + z


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x))."""
    return div(1.0, exp(neg(x)) + 1.0)


@triton.jit
def quick_exp(x):
    """e ** x in float32: the relative error is 2e-7 and 6e-8 * |x|."""
    return tl.exp2(x * 1.4426950408889634)


if INTERPRETED.value:

    @triton.jit
    def quick_div(x, y):
        return x / y

    @triton.jit
    def quick_atan(x):
        return atan(x)

    @triton.jit
    def quick_pow(x, y):
        return pow(x, y)
else:

    @triton.jit
    def quick_div(x, y):
        """x / y in float32 within 2 units in the last place; 0 where y is beyond 2 ** 126."""
        return libdevice.fast_dividef(x, y)

    @triton.jit
    def quick_atan(x):
        """In float32, which it is: see ``atan``."""
        return libdevice.atan(x)

    @triton.jit
    def quick_pow(x, y):
        return libdevice.pow(x, y)


@triton.jit
def quick_reciprocal(x, nvidia):
    """1 / x in float32 within 2 units in the last place; 0 where x is beyond 2 ** 126.

    NVIDIA's compiler makes a second instruction of a quotient whose dividend is 1.
    """
    if nvidia:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return quick_div(like(1.0, x), x)


@triton.jit
def quick_sigmoid(x, nvidia=False):
    """1 / (1 + exp(-x)) in float32."""
    return quick_reciprocal(quick_exp(x * -1.0) + 1.0, nvidia)


@triton.jit
def maximum(x, y):
    """The larger one; NaN if either is."""
    x, y = tiles(x, y)
    if x.dtype == tl.int1:
        return x | y
    else:
        return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def minimum(x, y):
    """The smaller one; NaN if either is."""
    x, y = tiles(x, y)
    if x.dtype == tl.int1:
        return x & y
    else:
        return tl.minimum(x, y, propagate_nan=tl.PropagateNan.ALL)
