"""Which ops move data from one memory layout into another.

ATen's pointwise kernels run along the result: an operand that is contiguous along another axis is
read a line of memory for each element. A kernel with a tile of both axes reads and writes whole
lines (H200, 4096 x 4096 and a transposed operand: 26 us, ATen 125).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from .indexing import Size, is_static, product
from .ir import BITS, Value

#: the shortest axis that a tile is laid along
SHORTEST = 8
#: elements from which on the time is the device's, and not that of a launch
LEAST = 2**18


def changes_layout(v: Value) -> bool:
    """Whether a large pointwise value has another contiguous axis than one of its operands."""
    if not is_static(*v.shape, *v.strides) or product(v.shape) < LEAST:
        return False
    own = _contiguous_axis(v.shape, v.strides)
    return own is not None and any(_runs_across(a, own - v.ndim) for a in v.inputs)


def leaves_gaps_out(v: Value) -> bool:
    """Whether a large pointwise value of 16 bits or less lies in one piece, and an operand in
    pieces: ATen then computes the place of each element, and reads and writes it by itself."""
    if not is_static(*v.shape, *v.strides) or product(v.shape) < LEAST or BITS[v.dtype] > 16:
        return False
    return _in_one_piece(v) and any(
        a.shape == v.shape and is_static(*a.strides) and not _in_one_piece(a) for a in v.inputs
    )


def _in_one_piece(v: Value) -> bool:
    sizes = [(n, s) for n, s in zip(v.shape, v.strides, strict=True) if n != 1]
    return all(s == n * t for (_, s), (n, t) in pairwise(sizes))


def _runs_across(a: Value, own: int) -> bool:
    """Whether ``a`` is contiguous along another axis than ``own``, counted from the last."""
    if not is_static(*a.shape, *a.strides):
        return False
    axis = _contiguous_axis(a.shape, a.strides)
    if axis is None or axis - a.ndim == own or -own > a.ndim:
        return False
    return a.strides[own] not in (0, 1) and a.shape[own] >= SHORTEST


def _contiguous_axis(shape: Sequence[Size], strides: Sequence[Size]) -> int | None:
    sizes = zip(shape, strides, strict=True)
    return next((k for k, (n, s) in enumerate(sizes) if s == 1 and n >= SHORTEST), None)
