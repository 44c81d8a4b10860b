"""Softmax and log-softmax over one dim, with their backwards; statistics in float32."""

from __future__ import annotations

from typing import Any

from .op import T, call, composite
from .reduction import wide

_SAMPLES = [call(T(4, 33), -1, False), call(T(3, 1), -1, False), call(T(3, 5, 7), 1, False)]


def _no_dims(x: Any, *_: Any) -> str | None:
    return "0-d operand" if x.ndim == 0 else None


@composite("aten._softmax.default", samples=_SAMPLES, declines=_no_dims)
def softmax(b: Any, x: Any, dim: int, half_to_float: bool) -> Any:
    """exp(x - max(x)) / sum(exp(x - max(x)))."""
    x = wide(b, x)
    found = _stats_of_parts(b, x, dim, 3)
    if found is not None:
        return b.mul(b.exp(b.sub(x, found[0], 1)), b.reciprocal(found[1]))
    e = b.exp(b.sub(x, b.amax(x, [dim]), 1))
    # one division a row: the sum is at least 1, so that its reciprocal neither overflows nor loses
    return b.mul(e, b.reciprocal(b.sum(e, [dim])))


def _stats_of_parts(b: Any, x: Any, dim: int, passes: int) -> tuple[Any, Any] | None:
    """(max(x), sum(exp(x - max(x)))) of few long rows, from parts that are each read once."""
    dim %= x.ndim
    parts = b.row_parts(x, [dim], passes)
    if parts == 1:
        return None
    cut, within, across = b.split(x, [dim], parts)
    tops = b.reduce("amax", cut, within, split=False)
    sums = b.reduce("sum", b.exp(b.sub(cut, tops, 1)), within, split=False)
    top = b.reduce("amax", tops, across, split=False)
    # a part of nothing but -inf has a sum of NaN, and no share in the row's
    none, nothing = b.full((1,), 0.0, x.dtype), b.call("eq", tops, float("-inf"), dtype="bool")
    sums = b.where(nothing, none, b.mul(sums, b.exp(b.sub(tops, top, 1))), dtype=x.dtype)
    kept = [1 if k == dim else s for k, s in enumerate(x.shape)]
    return b.reshape(top, kept), b.reshape(b.sum_of_parts(sums, across), kept)


@composite(
    "gems.log_softmax_stats.default",
    samples=[call(T(4, 33), -1), call(T(3, 5, 7), 1)],
)
def log_softmax_stats(b: Any, x: Any, dim: int) -> Any:
    """(max(x), log(sum(exp(x - max(x))))), both from one read of x."""
    x = wide(b, x)
    found = _stats_of_parts(b, x, dim, 2)
    if found is not None:
        return found[0], b.log(found[1])
    return b.amax(x, [dim]), b.reduce("logsum", x, [dim])


def decompose_log_softmax(x: Any, dim: int, half_to_float: bool) -> Any:
    """The decomposition of ``aten._log_softmax``: backward recomputes the result from x and two
    numbers a row, which are saved in place of a float32 tensor of x's size."""
    import torch

    size = x.shape[dim] if x.ndim else 0
    if not x.is_floating_point() or (type(size) is int and size == 0):
        return NotImplemented
    top, logsum = torch.ops.gems.log_softmax_stats.default(x, dim)
    y = (x.to(top.dtype) - top) - logsum
    return (y if half_to_float else y.to(x.dtype)).contiguous()


@composite("aten._log_softmax.default", samples=_SAMPLES, declines=_no_dims)
def log_softmax(b: Any, x: Any, dim: int, half_to_float: bool) -> Any:
    """(x - max(x)) - log(sum(exp(x - max(x))))."""
    top, logsum = log_softmax_stats(b, x, dim)
    return b.sub(b.sub(wide(b, x), top, 1), logsum, 1)


@composite(
    "aten._softmax_backward_data.default",
    declines=_no_dims,
    samples=[
        call(T(4, 33), T(4, 33), -1, "input_dtype"),
        call(T(3, 5, 7), T(3, 5, 7), 1, "input_dtype"),
    ],
)
def softmax_backward(b: Any, dy: Any, y: Any, dim: int) -> Any:
    """y * dy - y * sum(y * dy)."""
    dy, y = wide(b, dy), wide(b, y)
    product = b.mul(dy, y)
    return b.sub(product, b.mul(y, b.sum(product, [dim])), 1)


@composite(
    "aten._log_softmax_backward_data.default",
    declines=_no_dims,
    samples=[call(T(4, 33), T(4, 33, high=0), -1, "input_dtype")],
)
def log_softmax_backward(b: Any, dy: Any, y: Any, dim: int) -> Any:
    """dy - exp(y) * sum(dy)."""
    dy, y = wide(b, dy), wide(b, y)
    return b.sub(dy, b.mul(b.exp(y), b.sum(dy, [dim])), 1)
