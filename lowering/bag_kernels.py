"""The kernels of ``gems::embedding_bags`` and its like: a program has a bag, or a block of columns
of one, and takes several of its rows at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..kernels.bags import MAX, MEAN
from ..kernels.target import Target
from .image_kernels import NARROW
from .indexing import is_static, product
from .ir import Declined, Value
from .schedule import power_of_two
from .source import WAIT, Lines, Source, whole_kernel

FLOATS = ("float16", "bfloat16", "float32")
INDICES = ("int32", "int64")
#: columns of a program, and elements that it loads at a time
COLUMNS = 256
TILE = 2048
#: of these, those of a thread
EACH = 8
#: indices that are counted, or given their bag's number, at a time
COUNTED = 128


@dataclass(frozen=True)
class Bags:
    count: int
    mode: int
    padding: int


def _bags(indices: Value, offsets: Value, mode: int, padding: int, bags: int) -> Bags:
    if not is_static(*indices.shape, *offsets.shape):
        raise Declined("its kernel is for a fixed number of bags and indices")
    if indices.dtype not in INDICES or offsets.dtype not in INDICES:
        raise Declined(f"indices of {indices.dtype}, offsets of {offsets.dtype}")
    return Bags(bags, mode, padding)


def of_bags(
    weight: Value,
    indices: Value,
    offsets: Value,
    scales: Value | None,
    mode: int,
    padding: int,
    bags: int,
) -> Bags:
    if weight.dtype not in FLOATS or not is_static(*weight.shape):
        raise Declined(f"a table of {weight.dtype}, or of sizes that vary")
    return _bags(indices, offsets, mode, padding, bags)


def of_sizes(indices: Value, offsets: Value, padding: int, bags: int) -> Bags:
    return _bags(indices, offsets, MAX, padding, bags)


def of_each(indices: Value, offsets: Value, bags: int) -> Bags:
    return _bags(indices, offsets, MAX, -1, bags)


def bags(v: Value, target: Target) -> Source:
    """[bags, columns]"""
    how: Bags = v.params
    weight, indices, offsets, *scales = v.inputs
    width: Any = weight.shape[1]
    columns = min(COLUMNS, power_of_two(width))
    blocks = -(-width // columns)
    text = _Text(target, (*v.inputs, v))
    add = text.add
    add(f"bag = {text.program} // {blocks}")
    add(f"col = tl.program_id(0) % {blocks} * {columns} + tl.arange(0, {columns})")
    text.place_bag(how, indices, offsets)
    if how.mode == MAX:
        _largest(text, how, weight, indices, columns)
        warps = 1 if columns <= 64 else 4
    else:
        each = -(-product(indices.shape) // how.count)
        rows = max(1, min(TILE // columns, power_of_two(each)))
        _total(text, how, (weight, indices, *scales), (rows, columns))
        warps = max(1, min(4, rows * columns // (EACH * target.warp)))
    mask = f", mask=col < {width}" if width % columns else ""
    add(f"tl.store(out + (bag * {width} + col), found.to(out.dtype.element_ty){mask})")
    params = [("weight", "in", weight), ("indices", "in", indices), ("offsets", "in", offsets)]
    params += [("scales", "in", s) for s in scales]
    params.append(("out", "out", v))
    grid = how.count * blocks
    return whole_kernel("embedding_bags", text, params, grid, warps, target.waits)


def _total(text: _Text, how: Bags, operands: tuple[Value, ...], tile: tuple[int, int]) -> None:
    """Sums of a bag's rows, so many at a time, or their means."""
    weight, indices, *scales = operands
    (rows, columns), (down, across) = tile, weight.strides
    add, counts = text.add, how.mode == MEAN and how.padding >= 0
    add(f"total = tl.zeros([{rows}, {columns}], tl.float32)")
    if counts:
        add(f"count = tl.zeros([{rows}, 1], tl.int32)")
    add(f"for start in tl.range(first, end, {rows}):")
    text.depth += 1
    add(f"place = start + tl.arange(0, {rows})[:, None]")
    add(f"row = tl.load(indices + place * {indices.strides[0]}, mask=place < end, other=-1)")
    add(f"here = {text.counts('row', how, weight)}")
    mask = f"here & (col < {weight.shape[1]})[None, :]" if weight.shape[1] % columns else "here"
    where = f"row.to(tl.int64) * {down} + (col * {across})[None, :]"
    add(f"value = tl.load(weight + ({where}), mask={mask}, other=0).to(tl.float32)")
    for scale in scales:
        step = scale.strides[0]
        add(f"scale = tl.load(scales + place * {step}, mask=here, other=0).to(tl.float32)")
        add("value = value * scale")
    add("total += value")
    if counts:
        add("count += here.to(tl.int32)")
    text.depth -= 1
    add("found = tl.sum(total, 0)")
    if how.mode == MEAN:
        size = "tl.sum(tl.sum(count, 1), 0)" if counts else "(end - first)"
        add(f"found = tl.div_rn(found, tl.maximum({size}, 1).to(tl.float32))")


def _largest(text: _Text, how: Bags, weight: Value, indices: Value, columns: int) -> None:
    """The index of each largest element: one row after the other, for the first one to be no number
    stays, as of ATen's."""
    add, (down, across) = text.add, weight.strides
    add(f'best = tl.full([{columns}], float("-inf"), tl.float32)')
    add(f"found = tl.full([{columns}], -1, tl.int64)")
    add("for place in tl.range(first, end):")
    text.depth += 1
    add(f"row = tl.load(indices + place * {indices.strides[0]}).to(tl.int64)")
    add(f"here = {text.counts('row', how, weight)}")
    where = f"row * {down} + col * {across}"
    mask = f"here & (col < {weight.shape[1]})"
    add(f"value = tl.load(weight + ({where}), mask={mask}, other=0).to(tl.float32)")
    add("better = here & ((found < 0) | (value > best))")
    add("best = tl.where(better, value, best)")
    add("found = tl.where(better, row, found)")
    text.depth -= 1


def sizes(v: Value, target: Target) -> Source:
    """[bags]"""
    how: Bags = v.params
    indices, offsets = v.inputs
    text = _Text(target, (*v.inputs, v))
    add = text.add
    add(f"bag = {text.program}")
    text.place_bag(how, indices, offsets)
    add(f"count = tl.zeros([{COUNTED}], tl.int32)")
    add(f"for start in tl.range(first, end, {COUNTED}):")
    text.depth += 1
    add(f"place = start + tl.arange(0, {COUNTED})")
    where = f"indices + place * {indices.strides[0]}"
    add(f"row = tl.load({where}, mask=place < end, other={how.padding})")
    add(f"count += (row != {how.padding}).to(tl.int32)")
    text.depth -= 1
    add("tl.store(out + bag, tl.sum(count, 0).to(out.dtype.element_ty))")
    params = [("indices", "in", indices), ("offsets", "in", offsets), ("out", "out", v)]
    return whole_kernel("bag_sizes", text, params, how.count, 1, target.waits)


def each(v: Value, target: Target) -> Source:
    """[indices]"""
    how: Bags = v.params
    indices, offsets = v.inputs
    text = _Text(target, (indices, v))
    add = text.add
    add(f"bag = {text.program}")
    text.place_bag(how, indices, offsets)
    add(f"for start in tl.range(first, end, {COUNTED}):")
    text.depth += 1
    add(f"place = start + tl.arange(0, {COUNTED})")
    add("tl.store(out + place, bag.to(out.dtype.element_ty), mask=place < end)")
    params = [("offsets", "in", offsets), ("out", "out", v)]
    return whole_kernel("bag_of_each", text, params, how.count, 1, target.waits)


class _Text(Lines):
    """The lines of one of the kernels."""

    def __init__(self, target: Target, tensors: tuple[Value, ...]) -> None:
        super().__init__()
        self.depth = 1
        sizes: list[Any] = [product(t.shape) for t in tensors]
        wide = ".to(tl.int64)" if max(sizes) >= NARROW else ""
        #: the number of the program
        self.program = f"tl.program_id(0){wide}"
        if target.waits:
            self.add(WAIT)

    def place_bag(self, how: Bags, indices: Value, offsets: Value) -> None:
        """Where its indices begin and end."""
        (step,), (count,) = offsets.strides, indices.shape
        self.add(f"first = tl.load(offsets + bag * {step})")
        self.add("first = tl.where(bag == 0, 0, first)")
        last = f"mask=bag < {how.count - 1}, other={count}"
        self.add(f"end = tl.load(offsets + (bag + 1) * {step}, {last})")

    def counts(self, row: str, how: Bags, weight: Value) -> str:
        """Whether a row counts: what is no row of the table is not read."""
        test = f"({row} >= 0) & ({row} < {weight.shape[0]})"
        return f"{test} & ({row} != {how.padding})" if how.padding >= 0 else test
