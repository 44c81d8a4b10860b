"""The kernel of ``gems::numbered_rows``: a program sorts whole rows, in registers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..kernels.sorting import LONGEST, SORTED
from ..kernels.target import Target
from .indexing import ceil_div, is_static, product
from .ir import Declined, Value
from .schedule import power_of_two
from .source import WAIT, Lines, Source, whole_kernel

#: elements of a program that has several rows
TOGETHER = 1024
#: elements of a tensor from which on 32 bits do not count its places
NARROW = 2**31


@dataclass(frozen=True)
class Rows:
    """``count`` rows of ``size`` elements, one behind the other."""

    count: int
    size: int
    descending: bool


def of_rows(x: Value, descending: bool, flat: bool) -> Rows:
    size: Any = product(x.shape) if flat else x.shape[-1]
    if not is_static(*x.shape) or not 0 < size <= LONGEST:
        raise Declined(f"a row of {size} elements: its kernel sorts up to {LONGEST}")
    if x.dtype not in SORTED:
        raise Declined(f"sorting {x.dtype}")
    expected = [product(x.shape[k + 1 :]) for k in range(len(x.shape))]
    if any(n != 1 and s != e for n, s, e in zip(x.shape, x.strides, expected, strict=True)):
        raise Declined("its kernel sorts contiguous rows")
    count: Any = product(x.shape)
    return Rows(count // size, size, descending)


def rows(v: Value, target: Target) -> Source:
    (x,) = v.inputs
    size, count = v.params.size, v.params.count
    block = power_of_two(size)
    tall = max(1, min(TOGETHER // block, power_of_two(count)))
    text = Lines()
    text.depth = 1
    if target.waits:
        text.add(WAIT)
    wide = ".to(tl.int64)" if size * count >= NARROW else ""
    text.add(f"row = tl.program_id(0){wide} * {tall} + tl.arange(0, {tall})[:, None]")
    text.add(f"place = tl.arange(0, {block})[None, :]")
    text.add(f"inside = (row < {count}) & (place < {size})")
    text.add(f"value = tl.load(x + (row * {size} + place), mask=inside, other=0)")
    how = f"value, place, inside, {v.params.descending}"
    text.add(f"number = tl.sort(sorting.numbered({how}))")
    text.add(f"tl.store(out + (row * {size} + place), number, mask=inside)")
    params = [("x", "in", x), ("out", "out", v)]
    warps = 4 if block * tall <= TOGETHER else 8
    grid = ceil_div(count, tall)
    return whole_kernel("numbered_rows", text, params, grid, warps, target.waits, ("sorting",))
