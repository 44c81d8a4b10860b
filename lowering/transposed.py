"""Copies of small tensors into another memory layout, as parts of one launch: the weights of
convolutions, and their gradients.

A weight [O, I, kh, kw] in channels-last is O transposed matrices [I, kh * kw]. One axis of them is
short: a tile holds all of it, and is read and written in whole lines of memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .body import Body
from .indexing import is_static
from .ir import Value
from .source import Lines

#: the longest short axis, and the elements of a tile
SHORT, TILE = 64, 1024
#: elements from which on a copy has a kernel with a tile of its own
MUCH = 2**23


@dataclass(frozen=True)
class Transposed:
    """``count`` matrices [columns, rows] -> as many [rows, columns], contiguous both."""

    count: int
    rows: int
    columns: int

    @property
    def numel(self) -> int:
        return self.count * self.rows * self.columns

    @property
    def tile(self) -> tuple[int, int]:
        """Of the longer and the shorter axis."""
        short = _power_of_two(min(self.rows, self.columns))
        return min(TILE // short, _power_of_two(max(self.rows, self.columns))), short

    @property
    def tiles(self) -> int:
        return -(-max(self.rows, self.columns) // self.tile[0])

    @property
    def programs(self) -> int:
        return self.count * self.tiles

    def lines(self, lines: Lines, source: str, out: str, start: int, part: int) -> None:
        """What one program does; ``pid`` is its number, the part's first is ``start``. A name is
        of one shape in a kernel, so each part has its own."""
        (long, short), size = self.tile, self.rows * self.columns
        i, j, matrix, mask, t = (f"{name}{part}" for name in ("i", "j", "matrix", "mask", "t"))
        # the longer axis counts rows of the result, or its columns
        row, column = (i, j) if self.rows >= self.columns else (j, i)
        step = f"(pid - {start})"
        lines.add(f"{i} = ({step} % {self.tiles}) * {long} + tl.arange(0, {long})[:, None]")
        lines.add(f"{j} = tl.arange(0, {short})[None, :]")
        lines.add(f"{matrix} = ({step} // {self.tiles}) * {size}")
        lines.add(f"{mask} = ({row} < {self.rows}) & ({column} < {self.columns})")
        place = f"{source} + {matrix} + {column} * {self.rows} + {row}"
        lines.add(f"{t} = tl.load({place}, mask={mask})")
        place = f"{out} + {matrix} + {row} * {self.columns} + {column}"
        lines.add(f"tl.store({place}, {t}, mask={mask})")


def transposed_of(body: Body) -> Transposed | None:
    """What a kernel that is one such copy does; None of any other."""
    members, ends = body.group.members, [(role, what) for _, role, what in body.params]
    if len(members) != 1 or members[0].kind != "cast":
        return None
    copy: Value = members[0]
    source: Any = copy.args[0]
    if ends != [("in", source), ("out", copy)] or source.dtype != copy.dtype:
        return None
    if not is_static(*copy.shape, *copy.strides, *source.strides):
        return None
    found = _matrices(copy, source)
    return found if found is not None and min(found.rows, found.columns) <= SHORT else None


def _matrices(copy: Value, source: Value) -> Transposed | None:
    shape: Any = copy.shape
    strides: Any = source.strides
    axes = [k for k, n in enumerate(shape) if n != 1]
    axes.sort(key=lambda k: -copy.strides[k])
    step = 1
    dims: list[tuple[int, int]] = []  # (size, stride of the source), joined where both are one axis
    for k in reversed(axes):
        n, stride = shape[k], strides[k]
        if copy.strides[k] != step:
            return None
        step *= n
        if dims and stride == dims[0][0] * dims[0][1]:
            dims[0] = (n * dims[0][0], dims[0][1])
        else:
            dims.insert(0, (n, stride))
    if len(dims) == 2:
        dims.insert(0, (1, step))
    if len(dims) != 3 or step >= MUCH:
        return None
    (count, outer), (rows, row), (columns, column) = dims
    if (outer, row, column) != (rows * columns, 1, rows):
        return None
    return Transposed(count, rows, columns)


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
