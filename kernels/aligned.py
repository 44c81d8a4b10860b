"""Matrices whose rows begin at aligned addresses, which is where matrix products are fast.

Compile workers import this file without torch: torch is imported inside the functions.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl  # noqa: F401 (the interpreter looks for it beside a jit function)

from .op import ALL, T, call, pointwise

#: bytes: what a 128-bit access needs, and what a cache line is
VECTOR, LINE = 16, 128


@pointwise("gems.aligned_rows.default", dtypes=ALL, samples=[call(T(4, 33)), call(T(2, 3, 5))])
@triton.jit
def aligned_rows(x):
    """A copy of x whose rows begin at aligned addresses: the last stride but one is padded."""
    return x


def define(library: Any) -> None:
    """Register ``gems::aligned_rows`` and ``gems::product`` on a torch Library.

    aligned_rows: a copy of x [..., N] with the strides of x [..., padded N] where the last is 1
    product:      a [M, K] @ b [K, N] (+ bias), with a stride of ``stride`` between its rows;
                  rounded once, as ``aten.addmm`` is
    """
    import torch

    tags = (torch.Tag.pt2_compliant_tag,)
    library.define("aligned_rows(Tensor x) -> Tensor", tags=tags)
    library.define("product(Tensor? bias, Tensor a, Tensor b, int stride) -> Tensor", tags=tags)
    library.impl("aligned_rows", _aligned_rows, "CompositeExplicitAutograd")
    library.impl("product", _product, "CompositeExplicitAutograd")
    torch.library.register_fake("gems::aligned_rows", _rows_like, lib=library)
    torch.library.register_fake("gems::product", _room_for_product, lib=library)


def padded(size: int, itemsize: int) -> int:
    """The stride of rows of ``size`` elements: to whole cache lines where that costs below 1 %."""
    unit = (LINE if size * itemsize >= 100 * LINE else VECTOR) // itemsize
    return -(-size // unit) * unit


def _rows_like(x: Any) -> Any:
    """Uninitialised, with the strides of ``gems::aligned_rows``."""
    strides = [1]
    if x.ndim > 1:
        for size in (padded(x.shape[-1], x.element_size()), *reversed(x.shape[1:-1])):
            strides.insert(0, strides[0] * size)
    return x.new_empty_strided(x.shape, strides[: x.ndim])


def _aligned_rows(x: Any) -> Any:
    return _rows_like(x).copy_(x)


def _room_for_product(bias: Any, a: Any, b: Any, stride: int) -> Any:
    return a.new_empty_strided((a.shape[0], b.shape[1]), (stride, 1))


def _product(bias: Any, a: Any, b: Any, stride: int) -> Any:
    import torch

    out = _room_for_product(bias, a, b, stride)
    if bias is None:
        return torch.mm(a, b, out=out)
    return torch.addmm(bias, a, b, out=out)
