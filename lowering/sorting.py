"""The kernel of ``gems::row_order``: a program sorts whole rows, in registers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..kernels.sorting import LONGEST, SORTED
from ..kernels.target import Target
from .indexing import Size, ceil_div, is_static, product
from .ir import Declined, Value
from .schedule import power_of_two
from .source import WAIT, Lines, Source, whole_kernel

#: elements of a program that has several rows
TOGETHER = 1024
#: elements of a warp
A_WARP = 2048
#: elements of a tensor from which on 32 bits do not count its places
NARROW = 2**31


@dataclass(frozen=True)
class Rows:
    """``count`` rows, which may be any, of ``size`` elements, one behind the other; of ``kept`` the
    order is asked."""

    count: Size
    size: int
    descending: bool
    kept: int


def of_rows(x: Value, descending: bool, flat: bool, kept: int) -> Rows:
    size: Any = product(x.shape) if flat else x.shape[-1]
    if not is_static(size) or not 0 < size <= LONGEST:
        raise Declined(f"a row of {size} elements: its kernel sorts up to {LONGEST}")
    if x.dtype not in SORTED:
        raise Declined(f"sorting {x.dtype}")
    expected = [product(x.shape[k + 1 :]) for k in range(len(x.shape))]
    if any(n != 1 and s != e for n, s, e in zip(x.shape, x.strides, expected, strict=True)):
        raise Declined("its kernel sorts contiguous rows")
    return Rows(1 if flat else product(x.shape[:-1]), size, descending, kept)


def rows(v: Value, target: Target) -> Source:
    (x,) = v.inputs
    size, many, kept = v.params.size, v.params.count, v.params.kept
    block, first = (max(2, power_of_two(n)) for n in (size, kept))
    tall = max(1, TOGETHER // block)
    params: list[Any] = [("x", "in", x), ("out", "out", v)]
    count = "count"
    if is_static(many):
        tall, count = min(tall, power_of_two(many)), str(many)
    else:
        params.append((count, "size", many))
    text = Lines()
    text.depth = 1
    if target.waits:
        text.add(WAIT)
    narrow = is_static(many) and size * many < NARROW
    wide = "" if narrow else ".to(tl.int64)"
    text.add(f"row = tl.program_id(0){wide} * {tall} + tl.arange(0, {tall})[:, None]")
    text.add(f"place = tl.arange(0, {block})[None, :]")
    text.add(f"inside = (row < {count}) & (place < {size})")
    text.add(f"value = tl.load(x + (row * {size} + place), mask=inside, other=0)")
    how = f"value, place, inside, {v.params.descending}, {first}"
    text.add(f"order = sorting.places_in_order({how})")
    text.add(f"kept = tl.arange(0, {first})[None, :]")
    asked = f"(row < {count}) & (kept < {kept})"
    text.add(f"tl.store(out + (row * {kept} + kept), order, mask={asked})")
    warps = max(1, min(8, block * tall // A_WARP))
    grid = ceil_div(many, tall)
    return whole_kernel("row_order", text, params, grid, warps, target.waits, ("sorting",))
