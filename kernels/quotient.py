"""Quotients by a divisor that many numbers share, the same as those of ``div_rn``, for NVIDIA.

A row is divided by its norm, its sum, its scale. With the divisor's reciprocal rounded to nearest,
a product and two fused multiply-adds round as a division does (Markstein 1990; Brisebarre, Muller
and Raina 2004: "Accelerating correctly rounded floating-point division when the divisor is known in
advance") wherever nothing on the way leaves the range of float32. Where something may, the division
is made after all, four elements at a time; no division is made of a whole row of usual numbers.
"""

from __future__ import annotations

import triton
import triton.language as tl

#: dividends above 2 ** -62 and divisors from there to 2 ** 62 have residuals that are exact
_LARGE = tl.constexpr(2.0**62)
#: twice the bits of 2 ** -62
_SMALL_BITS = 2 * (127 - 62) << 23

#: one of four: y and its reciprocal are $1 and $2, a sign of y less 1 is ``sign``
_ONE = """
    mul.rn.f32 q, {x}, {z};
    neg.f32 less, {x};
    fma.rn.f32 rest, q, {y}, less;
    neg.f32 step, {z};
    fma.rn.f32 {out}, step, rest, q;
"""
#: what no quotient is right of: NaN (of an infinity, of a divisor out of range), a small x. Zeros
#: are right, save those that a negative y turns: one is taken off twice the others' bits.
_CHECK = """
    setp.nan.or.f32 odd, {out}, {out}, odd;
    shr.u32 sign, {y}, 31;
    add.u32 bits, {x}, {x};
    sub.u32 sign, sign, 1;
    add.u32 bits, bits, sign;
    setp.lt.or.u32 odd, bits, {small}, odd;
"""


def _four() -> str:
    registers = [
        {"out": f"${k}", "x": f"${4 + k}", "y": f"${8 + k}", "z": f"${12 + k}"} for k in range(4)
    ]
    first = ".reg .f32 q, less, rest, step; .reg .u32 bits, sign; .reg .pred odd;"
    products = "".join(_ONE.format(**r) for r in registers)
    checks = "".join(_CHECK.format(**r, small=_SMALL_BITS - 1) for r in registers)
    exact = "".join("div.rn.f32 {out}, {x}, {y};\n".format(**r) for r in registers)
    return f"{{ {first} setp.ne.u32 odd, 0, 0; {products} {checks} @!odd bra done; {exact} done: }}"


_FOUR = tl.constexpr(_four())
_REGISTERS = tl.constexpr(",".join(["=&r"] * 4 + ["r"] * 12))


@triton.constexpr_function
def of_rows(dividends, divisors):
    """Whether tiles of these shapes hold one divisor for four numbers of a row, or more."""
    shared = not divisors or divisors[-1] == 1
    return len(dividends) > 0 and dividends[-1] >= 4 and shared


@triton.jit
def quotient(x, y):
    """x / y in float32, rounded to nearest."""
    size = tl.abs(y)
    tame = (size >= 1 / _LARGE) & (size <= _LARGE)
    z = tl.where(tame, tl.div_rn(1.0, y), float("nan"))
    return tl.inline_asm_elementwise(
        _FOUR, _REGISTERS, [x, y, z], dtype=tl.float32, is_pure=True, pack=4
    )
