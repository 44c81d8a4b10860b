"""In how many parts a reduction runs, so that a GPU is busy with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from .indexing import Size, is_static, product
from .schedule import CACHED, COLUMNS, MAX_PERSISTENT, SWEPT_BY_TWO, sweeps_together

if TYPE_CHECKING:
    from .ir import Value

#: what a size was when the graph was traced, or None
Hint = Callable[[Size], "int | None"]

#: the longest row of a kernel that walks over rows and reduces their columns beside
MAX_SWEPT_ROW = 2 * SWEPT_BY_TWO
#: bytes that a multiprocessor reads in a microsecond: for one program; for programs of whole rows
#: that are in the second-level cache when they are read again, and that are not; for many programs
#: of parts (H200: softmax, norms and batch norm of 64 to 260 rows of 40 kB to 1 MB)
BY_PROGRAM, IN_CACHE, BEYOND, BY_PARTS = 40_000, 33_000, 21_000, 28_000
#: microseconds that a second launch takes, and that make it worth its while
LAUNCH = 3
#: shares of the rows are whole steps of a loop over columns
STEP = 64
#: rows so few that one in uneven shares is worth it, where no number of parts cuts them evenly
FEW_ROWS = 16
#: elements of a row that a program reduces at the least
LEAST_OF_A_ROW = 2048


def normalize_axes(axes: Sequence[int], ndim: int) -> tuple[int, ...]:
    return tuple(sorted({a % ndim for a in axes})) if ndim else ()


def count_of(x: Value, axes: Sequence[int]) -> Size:
    """How many elements are reduced."""
    return product(x.shape[a] for a in normalize_axes(axes, x.ndim))


SPLITTABLE = {"sum", "amax", "amin", "prod", "any", "all"}


def parts_wanted(x: Value, axes: Sequence[int], multiprocessors: int, hint: Hint) -> int:
    """In how many parts a reduction should run to keep the GPU busy; 1 where it does anyway."""
    if not multiprocessors or not axes:
        return 1
    kept = product(s for k, s in enumerate(x.shape) if k not in axes)
    reduced = count_of(x, axes)
    along = contiguous_axis(x)
    if along is None:  # not known, as where strides depend on sizes
        return 1
    if along not in axes:
        return column_parts(kept, reduced, _is_stored(x), multiprocessors, hint)
    if not is_static(*x.shape) or kept >= 2 * multiprocessors or reduced <= MAX_PERSISTENT:
        return 1
    return parts_of(x, axes, -(-4 * multiprocessors // kept), reduced // LEAST_OF_A_ROW)


def row_shares(x: Value, axes: Sequence[int], multiprocessors: int, hint: Hint, bits: int) -> int:
    """In how many shares few long rows should be reduced that are of unknown length, or that no
    number of parts cuts evenly; 1 where the GPU is busy anyway, or even parts will do. ``bits``:
    what is loaded for an element."""
    if not multiprocessors or contiguous_axis(x) not in axes:
        return 1
    length = hint(count_of(x, axes))
    rows = hint(product(s for k, s in enumerate(x.shape) if k not in axes))
    if not length or not rows or rows >= 2 * multiprocessors or length <= MAX_PERSISTENT:
        return 1
    if not pays(rows, length * bits // 8, 1, multiprocessors):
        return 1
    wanted = min(-(-4 * multiprocessors // rows), length // LEAST_OF_A_ROW)
    if is_static(*x.shape) and (rows > FEW_ROWS or _cuts_evenly(x, axes, wanted)):
        return 1
    return max(1, wanted)


def _cuts_evenly(x: Value, axes: Sequence[int], wanted: int) -> bool:
    return 2 * parts_of(x, axes, wanted, count_of(x, axes) // LEAST_OF_A_ROW) >= wanted


def pays(rows: int, row: int, passes: int, multiprocessors: int) -> bool:
    """Whether rows of so many bytes, read or written so often, are worth two launches: one that
    reduces parts of them, and one that combines a row's parts where it needs them."""
    each = rows / multiprocessors
    together = IN_CACHE if row <= CACHED else BEYOND
    whole = row * max(1 / BY_PROGRAM, each / together)
    return passes * (whole - row * each / BY_PARTS) > LAUNCH


def column_parts(
    columns: Size, reduced: Size, stored: bool, multiprocessors: int, hint: Hint
) -> int:
    """Shares of the rows, which need not be of one size. What a kernel stores as well
    (``stored``) wants more programs than what it only adds up."""
    if not is_static(columns):
        columns, about = hint(columns), hint(reduced)
        if not columns or not about or about < 512:
            return 1
    if is_static(reduced) and reduced < 512:
        return 1
    programs = -(-columns // COLUMNS)
    if programs >= 2 * multiprocessors:
        return 1
    wanted = (8 if stored else 4) * multiprocessors // programs
    if not is_static(reduced):
        return wanted
    share = -(-reduced // (wanted * STEP)) * STEP
    return -(-reduced // share)


def sweep_parts(rows: Size, length: int, multiprocessors: int) -> int:
    """Shares of the rows, ``length`` long, for programs that walk over whole rows.

    Where a step is of one row, as few as make no program walk a row further: 8192 rows take 264
    programs 32 steps, of which the last is of 8 rows, and 256 programs as many (gradients of norms,
    8192 x 4096, H200, four forms: 0.4 to 2 % faster; none with several rows to a step).
    """
    programs = multiprocessors * sweeps_together(length)
    if not is_static(rows):
        return programs
    if 2 * length > SWEPT_BY_TWO:
        steps = -(-rows // programs)
        programs = -(-rows // max(1, steps))
    return min(programs, rows)


def _is_stored(x: Value) -> bool:
    while x.kind == "view":
        x = x.args[0]
    return x.kind in ("pointwise", "cast") and x.node is not None


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
