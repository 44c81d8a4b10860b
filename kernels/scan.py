"""Scans along one dim. Sums and products accumulate in float32 (integers in int64)."""

from __future__ import annotations

from typing import Any

from .op import NUMBERS, T, call, composite, reduction
from .reduction import wide

#: the longest single row that one program scans as fast as ATen's whole GPU does
LONGEST = 16384
FLOATING = ("float16", "bfloat16", "float32", "float64")


def _one_long_row(x: Any, dim: int, *_: Any) -> str | None:
    if x.ndim == 0:
        return "0-d operand"
    length = x.shape[dim]
    rows = [n for k, n in enumerate(x.shape) if k != dim % x.ndim]
    if all(type(n) is int and n == 1 for n in rows) and not (
        type(length) is int and length <= LONGEST
    ):
        return "one long row, which ATen scans with the whole GPU"
    return None


def _no_order(x: Any, dim: int) -> str | None:
    return "truth values" if x.dtype == "bool" else _one_long_row(x, dim)


_SMALL = [call(T(4, 33), 1), call(T(4, 33), 0), call(T(2, 3, 150), -1)]
_NEAR_ONE = [call(T(4, 33, low=0.5, high=1.5), 1), call(T(5, 3, low=1, high=3), 0)]


@reduction("aten.cumsum.default", dtypes=NUMBERS, declines=_one_long_row, samples=_SMALL)
def cumsum(b: Any, x: Any, axes: tuple[int, ...], dtype: str) -> Any:
    """Sum of the elements so far."""
    return b.scan("sum", _as_asked(b, x, dtype), axes[0], dtype)


@reduction("aten.cumprod.default", dtypes=NUMBERS, declines=_one_long_row, samples=_NEAR_ONE)
def cumprod(b: Any, x: Any, axes: tuple[int, ...], dtype: str) -> Any:
    """Product of the elements so far."""
    return b.scan("prod", _as_asked(b, x, dtype), axes[0], dtype)


def _as_asked(b: Any, x: Any, dtype: str) -> Any:
    """x in the result's dtype, if that is another float's; integers widen as they are summed."""
    return b.cast(x, dtype) if dtype in FLOATING or x.dtype in FLOATING else x


@reduction("aten.logcumsumexp.default", declines=_one_long_row, samples=_SMALL)
def logcumsumexp(b: Any, x: Any, axes: tuple[int, ...], dtype: str) -> Any:
    """log(sum(exp(x))) of the elements so far, computed from the largest of them down."""
    return b.cast(b.scan("logsumexp", wide(b, x), axes[0]), dtype)


@composite("aten.cummax.default", dtypes=NUMBERS, declines=_no_order, samples=_SMALL)
def cummax(b: Any, x: Any, dim: int) -> Any:
    """(largest element so far, place of the last such one); NaN from the first NaN on."""
    return b.scan("amax", x, dim), b.scan("argmax", x, dim, "int64")


@composite("aten.cummin.default", dtypes=NUMBERS, declines=_no_order, samples=_SMALL)
def cummin(b: Any, x: Any, dim: int) -> Any:
    """(smallest element so far, place of the last such one); NaN from the first NaN on."""
    return b.scan("amin", x, dim), b.scan("argmin", x, dim, "int64")
