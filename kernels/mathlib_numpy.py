"""The device functions of ``mathlib`` for Triton's interpreter, which has no libdevice.

Each takes interpreter tiles of one floating dtype, computes in float64 with NumPy and rounds to the
tile's dtype. Nothing here calls torch: an op of ours may be what is running a torch operator.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import TensorHandle


def on_tiles(function: Callable[..., Any]) -> Callable[..., tl.tensor]:
    """Lift a function of float64 arrays to broadcasting tiles of one dtype."""

    @functools.wraps(function)
    def lifted(*tiles: tl.tensor) -> tl.tensor:
        dtype = tiles[0].dtype
        with np.errstate(all="ignore"):
            wide = function(*(tile.handle.data.astype(np.float64) for tile in tiles))
            data = np.asarray(wide).astype(f"float{dtype.primitive_bitwidth}")
        is_block = any(tile.type.is_block() for tile in tiles)
        kind = tl.block_type(dtype, list(data.shape)) if is_block else dtype
        return tl.tensor(TensorHandle(data, dtype), kind)

    return lifted


def _each(function: Callable[[float], float]) -> Callable[[Any], Any]:
    return np.vectorize(function, otypes=[np.float64])


def _lgamma(x: float) -> float:
    if math.isinf(x) or (x <= 0 and x == math.floor(x)):  # math.lgamma raises at the poles
        return math.inf
    return math.lgamma(x)


_erf = _each(math.erf)


def _erfinv(x: Any) -> Any:
    """Winitzki's closed form, then Newton's method on erf."""
    log = np.log1p(-x * x)
    half = 2 / (math.pi * 0.147) + log / 2
    y = np.copysign(np.sqrt(np.sqrt(half * half - log / 0.147) - half), x)
    for _ in range(3):
        y = y - (_erf(y) - x) * np.exp(y * y) * (math.sqrt(math.pi) / 2)
    return np.where(np.abs(x) == 1, np.copysign(np.inf, x), y)


exp = on_tiles(np.exp)
exp2 = on_tiles(np.exp2)
expm1 = on_tiles(np.expm1)
log = on_tiles(np.log)
log2 = on_tiles(np.log2)
log10 = on_tiles(np.log10)
log1p = on_tiles(np.log1p)
rsqrt = on_tiles(lambda x: 1 / np.sqrt(x))
sin = on_tiles(np.sin)
cos = on_tiles(np.cos)
tan = on_tiles(np.tan)
asin = on_tiles(np.arcsin)
acos = on_tiles(np.arccos)
atan = on_tiles(np.arctan)
sinh = on_tiles(np.sinh)
cosh = on_tiles(np.cosh)
tanh = on_tiles(np.tanh)
asinh = on_tiles(np.arcsinh)
acosh = on_tiles(np.arccosh)
atanh = on_tiles(np.arctanh)
erf = on_tiles(_erf)
erfc = on_tiles(_each(math.erfc))
erfinv = on_tiles(_erfinv)
lgamma = on_tiles(_each(_lgamma))
trunc = on_tiles(np.trunc)
rint = on_tiles(np.rint)
atan2 = on_tiles(np.arctan2)
hypot = on_tiles(np.hypot)
fmod = on_tiles(np.fmod)
pow = on_tiles(np.power)
