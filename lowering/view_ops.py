"""ATen's views, and what else only arranges or makes elements: each as a Value.

A function gets the builder, the node's FakeTensor and the node's arguments.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .builder import Builder
from .graph import value_of
from .indexing import Size, is_static, product, simplify, size_of
from .ir import (
    Declined,
    SizeArg,
    Value,
    base_of,
    dtype_name,
    first_place,
    is_dense,
)
from .parts import contiguous_axis
from .patch import patched, patched_part


def negative_zero(value: Any) -> bool:
    """Triton drops the sign of a literal -0.0."""
    return type(value) is float and value == 0.0 and math.copysign(1.0, value) < 0


def _shape(val: torch.Tensor) -> list[Size]:
    return [size_of(s) for s in val.shape]


def _reshape(b: Builder, val: torch.Tensor, x: Value, *_: Any) -> Value:
    return b.reshape(x, _shape(val))


def _slice(
    b: Builder, val: Any, x: Value, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> Value:
    length = size_of(val.shape[dim])
    first = _first(start, end, x.shape[dim], length, step)
    return b.slice(
        x,
        dim,
        first,
        simplify(first + length * step) if step == 1 else first + (length - 1) * step + 1,
        step,
    )


def _first(start: Any, end: Any, size: Size, length: Size, step: int) -> Size:
    """A slice's start as an offset from 0, not cut off at either end."""
    first = 0 if start is None else _size(start)
    if is_static(first, size):
        return min(first, size) if first >= 0 else max(first + size, 0)
    if is_static(first) and first < 0:
        first = simplify(first + size)
    stop = size if end is None or end == 2**63 - 1 else _size(end)
    if is_static(stop) and stop < 0:
        stop = simplify(stop + size)
    if not (is_static(first) and first == 0) and (
        step != 1 or length not in (simplify(stop - first), simplify(size - first))
    ):
        raise Declined("slice with a symbolic start")
    return first


def _select(b: Builder, val: Any, x: Value, dim: int, index: Any) -> Value:
    if not isinstance(index, int):
        raise Declined("select with a symbolic index")
    start = index if index >= 0 else simplify(x.shape[dim] + index)
    return b.reshape(b.slice(x, dim, start, start + 1), _shape(val))


def _expand(b: Builder, val: Any, x: Value, *_: Any) -> Value:
    return b.expand(x, _shape(val))


def _permute(b: Builder, val: Any, x: Value, dims: Sequence[int]) -> Value:
    return b.permute(x, dims)


def _transpose(b: Builder, val: Any, x: Value, d0: int, d1: int) -> Value:
    dims = list(range(x.ndim))
    if dims:
        dims[d0], dims[d1] = dims[d1], dims[d0]
    return b.permute(x, dims)


def _t(b: Builder, val: Any, x: Value) -> Value:
    return b.permute(x, list(reversed(range(x.ndim))))


def _split(b: Builder, val: Any, x: Value, _size: Any, dim: int = 0) -> tuple[Value, ...]:
    out, start = [], 0
    for piece in val:
        length = size_of(piece.shape[dim])
        out.append(b.slice(x, dim, start, simplify(start + length)))
        start = simplify(start + length)
    return tuple(out)


def _unbind(b: Builder, val: Any, x: Value, dim: int = 0) -> tuple[Value, ...]:
    return tuple(_select(b, piece, x, dim, k) for k, piece in enumerate(val))


def _flip(b: Builder, val: Any, x: Value, dims: Sequence[int]) -> Value:
    return b.copy(b.flip(x, dims))


def _repeat(b: Builder, val: torch.Tensor, x: Value, repeats: Sequence[Any]) -> Value:
    times = [_size(n) for n in repeats]
    x = b.reshape(x, [*[1] * (len(times) - x.ndim), *x.shape])
    ones = b.reshape(x, [n for size in x.shape for n in (1, size)])
    whole = b.expand(ones, [n for pair in zip(times, x.shape, strict=True) for n in pair])
    return b.copy(b.reshape(whole, _shape(val)))


def _size(n: Any) -> Size:
    return n.expr if isinstance(n, SizeArg) else n


def _unfold(b: Builder, val: torch.Tensor, x: Value, dim: int, size: int, step: int) -> Value:
    """[..., N, ...] -> [..., windows, ..., size]: a view, whose windows may overlap."""
    if not x.ndim:
        raise Declined("0-d operand")
    steps: list[list[tuple[int, Size]]] = [[(k, 1)] for k in range(x.ndim)]
    steps[dim] = [(dim % x.ndim, step), (x.ndim, 1)]
    return b.affine(x, _shape(val), [0] * x.ndim, steps)


def _diagonal(
    b: Builder, val: torch.Tensor, x: Value, offset: int = 0, dim1: int = 0, dim2: int = 1
) -> Value:
    one, two = dim1 % x.ndim, dim2 % x.ndim
    rest = iter(range(val.ndim - 1))
    last = (val.ndim - 1, 1)
    steps = [[last] if k in (one, two) else [(next(rest), 1)] for k in range(x.ndim)]
    starts = [
        max(0, -offset) if k == one else max(0, offset) if k == two else 0 for k in range(x.ndim)
    ]
    return b.affine(x, _shape(val), starts, steps)


def _as_strided(
    b: Builder, val: torch.Tensor, x: Value, size: Any, stride: Sequence[Any], start: Any = None
) -> Value:
    """The elements at ``start + sum(i * stride)`` of x's memory, where x is all of it."""
    base = base_of(x)
    if base.node is None or not is_static(*base.shape, *base.strides) or not is_dense(base):
        raise Declined("its base has gaps or symbolic sizes")
    shape, steps = _shape(val), [_size(n) for n in stride]
    whole = value_of(base.node)
    start = first_place(x) if start is None else _size(start) - size_of(whole.storage_offset())
    if not is_static(*shape, *steps, start):
        raise Declined("symbolic sizes")
    last = start + sum((n - 1) * s for n, s in zip(shape, steps, strict=True))
    if start < 0 or last >= product(base.shape):
        raise Declined("it reaches beyond its base")
    near = contiguous_axis(base)
    if base.kind == "buffer" and near is not None:  # an address is a sum: one axis can run it all
        own = list(enumerate(steps))
        starts = [start if k == near else 0 for k in range(base.ndim)]
        return b.affine(base, shape, starts, [own if k == near else [] for k in range(base.ndim)])
    order = sorted(range(base.ndim), key=lambda k: (-base.strides[k], base.shape[k]))
    flat = b.reshape(b.permute(base, order), [product(base.shape)])
    return b.affine(flat, shape, [start], [list(enumerate(steps))])


def _cat(b: Builder, val: torch.Tensor, parts: Sequence[Value], dim: int = 0) -> Value:
    if len(parts) > 8:
        raise Declined(f"{len(parts)} parts; up to 8 are fused")
    if any(p.ndim != val.ndim for p in parts):
        raise Declined("parts of several ranks")
    dtype = dtype_name(val.dtype)
    return b.concat([b.cast(p, dtype) for p in parts], dim)


def _stack(b: Builder, val: torch.Tensor, parts: Sequence[Value], dim: int = 0) -> Value:
    dim %= val.ndim
    return _cat(b, val, [b.unsqueeze(p, [dim], val.ndim) for p in parts], dim)


def _copy(b: Builder, val: torch.Tensor, x: Value, src: Any, *_: Any) -> Value:
    """src in x's shape and dtype; x itself is not read."""
    if not isinstance(src, Value):  # eager mode hands numbers on as they are
        return b.copy(_full(b, val, (), src))
    return b.copy(b.expand(b.cast(src, x.dtype), x.shape))


def _fill(b: Builder, val: torch.Tensor, x: Value, value: Any) -> Value:
    given = value if isinstance(value, Value) else _full(b, val, (), value)
    return _copy(b, val, x, given)


def _slice_scatter(
    b: Builder,
    val: torch.Tensor,
    x: Value,
    src: Value,
    dim: int = 0,
    start: Any = None,
    end: Any = None,
    step: int = 1,
) -> Value:
    src = b.cast(src, x.dtype)
    if src.shape == x.shape:
        return b.copy(src)
    start = 0 if start is None else start
    if not (isinstance(start, int) and start >= 0):  # else src would be empty, were it cut off
        start = _first(start, end, x.shape[dim], src.shape[dim], step)
    return patched(b, x, src, dim, start, step)


def _select_scatter(
    b: Builder, val: torch.Tensor, x: Value, src: Value, dim: int, index: Any
) -> Value:
    if not isinstance(index, int):
        raise Declined("select with a symbolic index")
    start = index if index >= 0 else simplify(x.shape[dim] + index)
    return patched_part(b, x, b.cast(src, x.dtype), dim, start)


def _pad(b: Builder, val: torch.Tensor, x: Value, pad: Sequence[Any], value: Any = 0) -> Value:
    """Values around x; a negative amount takes away instead."""
    if not all(isinstance(p, int) for p in pad):
        raise Declined("symbolic padding")
    shape, places = list(x.shape), []
    for k in range(len(pad) // 2):
        axis = x.ndim - 1 - k
        before, after = pad[2 * k], pad[2 * k + 1]
        if before < 0 or after < 0:
            stop = simplify(x.shape[axis] + min(after, 0))
            if is_static(stop) and stop + min(before, 0) <= 0:
                raise Declined("nothing is left of an axis")
            x = b.slice(x, axis, max(0, -before), stop)
            before, after = max(before, 0), max(after, 0)
        shape[axis] = simplify(x.shape[axis] + before + after)
        if before or after:
            places.append((axis, before, 1))
    if not places:
        return b.copy(x)
    return b.patch(b.full(shape, value or 0, x.dtype), x, places[::-1])


def _full(b: Builder, val: torch.Tensor, size: Any, value: Any, *_: Any) -> Value:
    if not isinstance(value, (int, float, SizeArg)):
        raise Declined("fill value is no number")
    if negative_zero(value):
        raise Declined("negative zero as a literal")
    if val.dtype == torch.uint8 and isinstance(value, int):
        value %= 256
    return b.full(_shape(val), value, dtype_name(val.dtype))


def _constant(value: int) -> Callable[..., Value]:
    return lambda b, val, *_: b.full(_shape(val), value, dtype_name(val.dtype))


def _scalar(b: Builder, val: torch.Tensor, value: Any, *_: Any) -> Value:
    return _full(b, val, (), value)


def _arange(b: Builder, val: torch.Tensor, start: Any, end: Any, step: Any = 1, *_: Any) -> Value:
    dtype = dtype_name(val.dtype)
    if dtype not in ("int64", "int32") or not all(
        isinstance(n, (int, SizeArg)) for n in (start, step)
    ):
        raise Declined("arange of floats")
    out = b.iota(_shape(val), 0)
    if step != 1:
        out = b.call("mul", out, step)
    if start != 0:
        out = b.call("add", out, start, 1)
    return b.cast(out, dtype)


VIEWS: dict[str, Callable[..., Any]] = {
    "aten.view.default": _reshape,
    "aten._unsafe_view.default": _reshape,
    "aten.reshape.default": _reshape,
    "aten._reshape_alias.default": _reshape,
    "aten.unsqueeze.default": _reshape,
    "aten.squeeze.default": _reshape,
    "aten.squeeze.dim": _reshape,
    "aten.squeeze.dims": _reshape,
    "aten.expand.default": _expand,
    "aten.permute.default": _permute,
    "aten.transpose.int": _transpose,
    "aten.t.default": _t,
    "aten.slice.Tensor": _slice,
    "aten.select.int": _select,
    "aten.split.Tensor": _split,
    "aten.split_with_sizes.default": _split,
    "aten.unbind.int": _unbind,
    "aten.unfold.default": _unfold,
    "aten.diagonal.default": _diagonal,
    "aten.as_strided.default": _as_strided,
    "aten.repeat.default": _repeat,
    "aten.flip.default": _flip,
    "aten.cat.default": _cat,
    "aten.stack.default": _stack,
    "aten.copy.default": _copy,
    "aten.fill.Scalar": _fill,
    "aten.fill.Tensor": _fill,
    "aten.slice_scatter.default": _slice_scatter,
    "aten.select_scatter.default": _select_scatter,
    "aten.constant_pad_nd.default": _pad,
    "aten.full.default": _full,
    "aten.full_like.default": _full,
    "aten.zeros.default": _constant(0),
    "aten.zeros_like.default": _constant(0),
    "aten.ones.default": _constant(1),
    "aten.ones_like.default": _constant(1),
    "aten.new_zeros.default": _constant(0),
    "aten.new_ones.default": _constant(1),
    "aten.new_full.default": lambda b, val, x, size, value, *_: _full(b, val, size, value),
    "aten.scalar_tensor.default": _scalar,
    "aten.arange.default": lambda b, val, end, *_: _arange(b, val, 0, end),
    "aten.arange.start": lambda b, val, start, end, *_: _arange(b, val, start, end),
    "aten.arange.start_step": _arange,
}
