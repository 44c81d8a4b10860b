"""Copies and casts: the body is the identity, and the store converts."""

from __future__ import annotations

import triton
import triton.language as tl  # noqa: F401 (the interpreter looks for it beside a jit function)

from . import mathlib
from .op import ALL, T, call, pointwise


@pointwise(
    "aten._to_copy.default",
    dtypes=ALL,
    samples=[
        call(T(4, 33)),
        call(T(4, 33), dtype="float32"),
        call(T(4, 33), dtype="bfloat16"),
        call(T(4, 33, low=-9, high=9), dtype="int64"),
        call(T(4, 33), dtype="bool"),
    ],
)
@triton.jit
def to_copy(x):
    """x in another dtype."""
    return x


@pointwise(
    "prims.convert_element_type.default",
    dtypes=ALL,
    samples=[
        call(T(4, 33), "float32"),
        call(T(4, 33), "float16"),
        call(T(4, 33, low=-9, high=9), "int32"),
    ],
)
@triton.jit
def convert_element_type(x):
    """x in another dtype."""
    return x


@pointwise("aten.clone.default", dtypes=ALL, samples=[call(T(4, 33)), call(T(5))])
@triton.jit
def clone(x):
    """A copy of x."""
    return x


@pointwise(
    "aten.copy.default",
    dtypes=ALL,
    samples=[
        call(T(4, 33), T(4, 33)),
        call(T(4, 33), T(33)),
        call(T(4, 33), T(1, dtype="float32", low=1, high=9)),
    ],
)
@triton.jit
def copy(x, src):
    """src, in x's shape and dtype."""
    return mathlib.spread(src, x)


@pointwise(
    "aten.fill.Scalar",
    "aten.fill.Tensor",
    dtypes=ALL,
    samples=[call(T(4, 33), 2), call(T(4, 33), T(dtype="float32", low=1, high=4))],
)
@triton.jit
def fill(x, value):
    """value, in x's shape and dtype."""
    return mathlib.spread(value, x)
