"""Scatters that put few elements on each line: every element looks whether it is one of them.

That is one kernel, which fuses with what made the tensor and with what reads the result; it takes
no atomic addition, so its sums are those of one order, and a place out of range is nobody's. Of
more elements a line ``lowering.scatter`` makes stores.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from .indexing import _ids
from .op import NUMBERS, T, call, composite

#: elements on a line that each of its places is compared with, and comparisons in all
MOST_ON_A_LINE = 8
MOST_COMPARISONS = 2**24


def why_not_lines(shape: Sequence[Any], dim: int, index: Sequence[Any]) -> str | None:
    """Why places do not look which elements of ``index`` are theirs, or None. Sizes are ints, or
    whatever the compiler has for symbolic ones."""
    if not shape or len(shape) != len(index):
        return "0-d operand"
    dim %= len(shape)
    if any(a != b for k, (a, b) in enumerate(zip(shape, index, strict=True)) if k != dim):
        return "its index covers a part"
    count, sizes = index[dim], [s for s in shape if type(s) is int]
    if type(count) is not int or count > MOST_ON_A_LINE:
        return f"more than {MOST_ON_A_LINE} elements a line"
    if count > 1 and (len(sizes) < len(shape) or math.prod(sizes) * count > MOST_COMPARISONS):
        return "comparing every place with each element takes longer than a store"
    return None


def _declines(x: Any, dim: int, index: Any, src: Any, *_: Any) -> str | None:
    if (why := why_not_lines(x.shape, dim, index.shape)) is not None:
        return why
    return "of several dtypes" if getattr(src, "dtype", x.dtype) != x.dtype else None


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
    declines=_declines,
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
    declines=_declines,
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
