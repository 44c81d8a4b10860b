"""What an in-place scatter, index_add or index_put stores where, and how it meets what is there.

Sums are atomic additions in the memory's own dtype, in no order that is the same every run, as
ATen's ``scatter_add`` and ``index_add`` are on a GPU. ``updates`` says in which memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..kernels.indexing import masks, picked
from .builder import Builder
from .indexing import is_one
from .ir import INTEGERS, Declined, Value

#: node.meta's word for 16-bit sums that the target adds atomically, each rounded as eager's are
NATIVE = "gems_adds_in_16_bits"
#: and for memory that only the graph's own updates write
OWN = "gems_own_memory"
#: what Triton has atomic operations of
ADDED = {"float16", "bfloat16", "float32", "float64", "int32", "int64"}
COMPARED = {"int32", "int64"}  # of floats the sign of a NaN would decide whether it stays
_REDUCTIONS = {"sum": "add", "amax": "max", "amin": "min"}


def check(target: Value, values: Value, how: str = "") -> None:
    if not target.ndim or values.dtype != target.dtype:
        raise Declined(f"{values.dtype} values for {target.dtype} in {target.ndim} dims")
    if how and target.dtype not in (ADDED if how == "add" else COMPARED):
        raise Declined(f"no atomic {how} of {target.dtype}")
    # integers come to the same in any order, and so does one number
    exact = values.kind == "full" if not how else target.dtype in INTEGERS
    if torch.are_deterministic_algorithms_enabled() and not exact:
        raise Declined("deterministic algorithms are asked for")


def _index_copy(b: Builder, target: Value, dim: int, index: Value, source: Value) -> Value:
    return _along(b, target, dim, index, source, "")


def _index_add(
    b: Builder, target: Value, dim: int, index: Value, source: Value, alpha: Any = 1
) -> Value:
    if alpha != 1:
        source = b.call("mul", source, alpha, dtype=source.dtype)
    return _along(b, target, dim, index, source, "add")


def _index_fill(b: Builder, target: Value, dim: int, index: Value, value: Any) -> Value:
    return _along(b, target, dim, index, b.full([1] * target.ndim, value, target.dtype), "")


def _put(b: Builder, target: Value, index: Value, values: Value) -> Value:
    """Each element put at its place in a vector. No two have the same: any order is fine."""
    if target.ndim != 1 or values.dtype != target.dtype:
        raise Declined(f"{values.dtype} values for {target.dtype} in {target.ndim} dims")
    return b.store(target, values, [(0, index)], [None], index.shape, wrap=False)


def _put_rows(b: Builder, target: Value, index: Value, rows: Value) -> Value:
    return _along(b, target, 0, index, rows, "")


def _add_rows(b: Builder, target: Value, index: Value, rows: Value) -> Value:
    return _along(b, target, 0, index, rows, "add")


def _along(b: Builder, target: Value, dim: int, index: Value, source: Value, how: str) -> Value:
    """Slices of ``source`` put at the places ``index`` along ``dim``."""
    check(target, source, how)
    if source.ndim != target.ndim or index.ndim != 1:
        raise Declined("its operands have several ranks")
    dim %= target.ndim
    count = index.shape[0]
    places = b.reshape(index, [count if a == dim else 1 for a in range(target.ndim)])
    along = [None if a == dim else a for a in range(target.ndim)]
    shape = [count if a == dim else s for a, s in enumerate(target.shape)]
    return b.store(target, source, [(dim, places)], along, shape, wrap=False, how=how)


def _index_put(
    b: Builder, target: Value, indices: Sequence[Any], values: Value, accumulate: bool = False, *_
) -> Value:
    how = "add" if accumulate else ""
    check(target, values, how)
    if why := masks(target, indices):
        raise Declined(why)
    spread, places, shape = picked(b, target, indices)
    return b.store(target, values, spread, places, shape, wrap=True, how=how)


def _scatter(b: Builder, target: Value, dim: int, index: Value, src: Any, how: str = "") -> Value:
    """Each element of ``src``, as far as the index covers it, put at its own place along dim."""
    if not isinstance(src, Value):
        src = b.full([1] * target.ndim, src, target.dtype)
    check(target, src, how)
    if not index.ndim == src.ndim == target.ndim:
        raise Declined("its operands have several ranks")
    dim %= target.ndim
    for a, (wanted, given) in enumerate(zip(index.shape, src.shape, strict=True)):
        if given != wanted and not (is_one(given) and src.kind == "full"):
            src = b.slice(src, a, 0, wanted)
    along = [None if a == dim else a for a in range(target.ndim)]
    return b.store(target, src, [(dim, index)], along, index.shape, wrap=False, how=how)


def _scatter_add(b: Builder, target: Value, dim: int, index: Value, src: Value) -> Value:
    return _scatter(b, target, dim, index, src, "add")


def _scatter_reduce(
    b: Builder,
    target: Value,
    dim: int,
    index: Value,
    src: Value,
    reduce: str,
    include_self: bool = True,
) -> Value:
    if reduce not in _REDUCTIONS:
        raise Declined(f"no atomic {reduce}")
    if not include_self:
        raise Declined("what is there does not count")
    return _scatter(b, target, dim, index, src, _REDUCTIONS[reduce])


SCATTERS: dict[str, Callable[..., Value]] = {
    "aten.index_copy_.default": _index_copy,
    "aten.index_add_.default": _index_add,
    "aten.index_fill_.int_Scalar": _index_fill,
    "aten.index_put_.default": _index_put,
    "aten._index_put_impl_.default": _index_put,
    "gems.put_.default": _put,
    "gems.put_rows_.default": _put_rows,
    "gems.add_rows_.default": _add_rows,
    "aten.scatter_.src": _scatter,
    "aten.scatter_.value": _scatter,
    "aten.scatter_add_.default": _scatter_add,
    "aten.scatter_reduce_.two": _scatter_reduce,
}
