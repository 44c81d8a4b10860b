"""Scatters that put few elements on each line: every place looks whether one of them is for it.

That is one kernel, which fuses with what made the tensor and with what reads the result; it takes
no atomic addition, so its sums are those of one order, and a place out of range is nobody's. Of
more elements a line, ``lowering.updates`` makes stores. A mask as index is looked at likewise.
"""

from __future__ import annotations

import math
from typing import Any

from .indexing import _ids
from .op import NUMBERS, T, call, composite

#: elements on a line that each of its places is compared with, and comparisons in all
MOST_ON_A_LINE = 8
MOST_COMPARISONS = 2**24


def _why_not_lines(x: Any, dim: int, index: Any, src: Any, *_: Any) -> str | None:
    if not x.ndim or x.ndim != index.ndim:
        return "0-d operand"
    if getattr(src, "dtype", x.dtype) != x.dtype:
        return "of several dtypes"
    dim %= x.ndim
    if any(a != b for k, (a, b) in enumerate(zip(x.shape, index.shape, strict=True)) if k != dim):
        return "its index covers a part"
    count, sizes = index.shape[dim], [s for s in x.shape if type(s) is int]
    if type(count) is not int or count > MOST_ON_A_LINE:
        return f"more than {MOST_ON_A_LINE} elements a line"
    if count > 1 and (len(sizes) < x.ndim or math.prod(sizes) * count > MOST_COMPARISONS):
        return "comparing every place with each element takes longer than a store"
    return None


def _placed(b: Any, x: Any, dim: int, index: Any, src: Any) -> Any:
    """For each element of a line: (whether a place is its goal, the element)."""
    dim %= x.ndim
    line = [x.shape[dim] if a == dim else 1 for a in range(x.ndim)]
    place, count = b.iota(line, dim), index.shape[dim]
    if not hasattr(src, "shape"):
        src = b.full([1] * x.ndim, src, x.dtype)
    for a, (wanted, given) in enumerate(zip(index.shape, src.shape, strict=True)):
        if given != wanted and given != 1:
            src = b.slice(src, a, 0, wanted)
    for k in range(count):
        goal = index if count == 1 else b.slice(index, dim, k, k + 1)
        value = src if src.shape[dim] == 1 else b.slice(src, dim, k, k + 1)
        yield b.call("eq", place, b.cast(goal, "int64"), dtype="bool"), value


_SAMPLES = [
    call(T(5, 7), 1, _ids(5, 1, high=7), T(5, 1)),
    call(T(5, 7), 0, _ids(1, 7, high=5), T(2, 9)),
]


@composite(
    "aten.scatter.src",
    "aten.scatter.value",
    dtypes=NUMBERS,
    declines=_why_not_lines,
    samples=[*_SAMPLES, call(T(5, 7), 1, _ids(5, 1, high=7), 2)],
)
def scatter(b: Any, x: Any, dim: int, index: Any, src: Any) -> Any:
    """x with out[i, index[i, j]] = src[i, j] along dim (or a number); of equal places the last."""
    out = x
    for hit, value in _placed(b, x, dim, index, src):
        out = b.call("where", hit, value, out, dtype=x.dtype)
    return out


@composite(
    "aten.scatter_add.default",
    dtypes=NUMBERS,
    declines=_why_not_lines,
    samples=[*_SAMPLES, call(T(5, 7), 1, _ids(5, 3, high=7), T(5, 3))],
)
def scatter_add(b: Any, x: Any, dim: int, index: Any, src: Any) -> Any:
    """x with out[i, index[i, j]] += src[i, j] along dim."""
    out = x
    for hit, value in _placed(b, x, dim, index, src):
        # the sum with a constant does not vary along the line, which a sum over lines makes use of
        old = b.full([1] * x.ndim, *x.args, x.dtype) if out.kind == "full" else out
        out = b.call("where", hit, b.call("add", old, value, 1, dtype=x.dtype), out, dtype=x.dtype)
    return out


def _why_not_mask(x: Any, indices: Any, values: Any, accumulate: bool = False) -> str | None:
    if len(indices) != 1 or indices[0] is None or indices[0].dtype != "bool" or accumulate:
        return "its places are computed"
    if values.dtype != x.dtype:
        return "of several dtypes"
    of_each = values.ndim > x.ndim - indices[0].ndim and values.shape[0] != 1
    return "a value for each place of a mask" if of_each else None


@composite(
    "aten.index_put.default",
    dtypes=NUMBERS,
    declines=_why_not_mask,
    samples=[
        call(T(5, 7), [T(5, 7, dtype="bool")], T()),
        call(T(5, 7), [T(5, dtype="bool")], T(7)),
        call(T(5, 7), [T(5, dtype="bool")], T(1, 7)),
    ],
)
def index_put(b: Any, x: Any, indices: Any, values: Any, accumulate: bool = False) -> Any:
    """x with x[mask] = values, the same for every place of the mask."""
    (mask,) = indices
    rest = x.ndim - mask.ndim
    if values.ndim > rest:
        values = b.squeeze(values, [0])
    hit = b.reshape(mask, (*mask.shape, *[1] * rest))
    return b.call("where", hit, values, x, dtype=x.dtype)
