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
    e = b.exp(b.sub(x, b.amax(x, [dim]), 1))
    return b.div(e, b.sum(e, [dim]))


@composite("aten._log_softmax.default", samples=_SAMPLES, declines=_no_dims)
def log_softmax(b: Any, x: Any, dim: int, half_to_float: bool) -> Any:
    """x - logsumexp(x)."""
    x = wide(b, x)
    return b.sub(x, b.reduce("logsumexp", x, [dim]), 1)


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
