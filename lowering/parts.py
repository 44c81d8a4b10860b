"""In how many parts a reduction runs, so that a GPU is busy with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .indexing import Size, is_static, product
from .schedule import COLUMNS

if TYPE_CHECKING:
    from .ir import Value

#: the longest row of a kernel that walks over rows and reduces their columns beside
MAX_SWEPT_ROW = 8192
#: elements for each multiprocessor below which such a kernel gains nothing
LEAST_SWEPT = 512
#: how many values back a reduction looks for one over rows
FAR = 64

def normalize_axes(axes: Sequence[int], ndim: int) -> tuple[int, ...]:
    return tuple(sorted({a % ndim for a in axes})) if ndim else ()


def count_of(x: Value, axes: Sequence[int]) -> Size:
    """How many elements are reduced."""
    return product(x.shape[a] for a in normalize_axes(axes, x.ndim))


SPLITTABLE = {"sum", "amax", "amin", "prod", "any", "all"}


def parts_wanted(x: Value, axes: Sequence[int], multiprocessors: int) -> int:
    """In how many parts a reduction should run to keep the GPU busy; 1 where it does anyway."""
    if not multiprocessors or not axes or not is_static(*x.shape):
        return 1
    reduced = count_of(x, axes)
    kept = product(x.shape) // max(1, reduced)
    column = contiguous_axis(x) not in axes
    if column:
        # what a kernel stores as well wants more programs than what it only adds up
        made = x
        while made.kind == "view":
            made = made.args[0]
        stored = made.kind in ("pointwise", "cast") and made.node is not None
        programs, least = -(-kept // COLUMNS), 32
        enough = (8 if stored else 4) * multiprocessors
        busy = programs >= 2 * multiprocessors or reduced < 512
    else:
        programs, least, enough = kept, 2048, 4 * multiprocessors
        busy = programs >= 2 * multiprocessors or reduced < 16384
    if busy:
        return 1
    return parts_of(x, axes, -(-enough // programs), reduced // least)


def parts_of(x: Value, axes: Sequence[int], wanted: int, most: int) -> int:
    """The number of parts nearest to ``wanted``, at most ``most``, that cuts the axes evenly."""
    lead, best = 1, 1
    for axis in axes:
        size = x.shape[axis]
        for d in range(1, size + 1):
            if size % d == 0 and lead * d <= most and lead * d < count_of(x, axes):
                if abs(lead * d - wanted) < abs(best - wanted):
                    best = lead * d
                if lead * d >= wanted:
                    break
        lead *= size
        if lead >= wanted:
            break
    return best


def contiguous_axis(x: Value) -> int | None:
    """The axis along which neighbours in memory lie."""
    best, axis = None, None
    for k, (size, stride) in enumerate(zip(x.shape, x.strides, strict=True)):
        if type(size) is int and size == 1:
            continue
        if type(stride) is int and stride > 0 and (best is None or stride < best):
            best, axis = stride, k
    return axis


def parts_beside_rows(
    x: Value, axes: Sequence[int], multiprocessors: int, beside_rows: bool
) -> int:
    """The parts of a column reduction that a kernel of whole rows can take in; 0: none can.

    Two programs on each multiprocessor then walk over the rows of one part each, or one program
    where a row takes more registers than two have room for.
    """
    if not multiprocessors or not axes or not is_static(*x.shape, *x.strides):
        return 0
    reduced = count_of(x, axes)
    kept = product(x.shape) // max(1, reduced)
    if not (32 <= kept <= MAX_SWEPT_ROW and reduced * kept >= LEAST_SWEPT * multiprocessors):
        return 0
    if contiguous_axis(x) in axes or not (beside_rows or _made_by_rows(x, kept)):
        return 0
    wanted = multiprocessors * (2 if kept <= MAX_SWEPT_ROW // 2 else 1)
    parts = parts_of(x, axes, wanted, reduced // 4)
    return parts if parts >= multiprocessors // 2 else 0


def _made_by_rows(x: Value, kept: int) -> bool:
    """Whether x comes from a reduction over rows of ``kept`` elements, not far back."""
    stack, seen = [x], {x}
    while stack and len(seen) < FAR:
        v = stack.pop(0)
        if v.kind == "reduce":
            if count_of(v.args[0], v.params) == kept and contiguous_axis(v.args[0]) in v.params:
                return True
            continue
        if v.kind in ("pointwise", "cast", "view"):
            fresh = [a for a in v.inputs if a not in seen]
            seen.update(fresh)
            stack.extend(fresh)
    return False
