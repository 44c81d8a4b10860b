"""Matrix products of sizes that are no multiple of a vector, as fast as those that are.

cuBLAS takes several times as long where a row begins at an odd address or ends within a vector: so
rows are padded apart, and the last few elements of a dim are multiplied by themselves.

Compile workers import this file without torch: torch is imported inside the functions.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl  # noqa: F401 (the interpreter looks for it beside a jit function)

from .op import ALL, T, call, composite, pointwise

#: bytes: what a 128-bit access needs, and what a cache line is
VECTOR, LINE = 16, 128

#: terms of a sum from which on it costs little to add the last few of them in a second pass
MANY = 512


@pointwise("gems.aligned_rows.default", dtypes=ALL, samples=[call(T(4, 33)), call(T(2, 3, 5))])
@triton.jit
def aligned_rows(x):
    """A copy of x whose rows begin at aligned addresses: the last stride but one is padded."""
    return x


@composite(
    "gems.row_product.default",
    samples=[call(T(1, 33), T(33, 5)), call(T(1, 64), T(64, 24))],
)
def row_product(b: Any, row: Any, matrix: Any) -> Any:
    """row [1, K] @ matrix [K, N], summed in float32: a reduction over K for each column."""
    columns = b.permute(b.cast(matrix, "float32"), (1, 0))
    total = b.sum(b.mul(b.cast(row, "float32"), columns), (1,))
    return b.cast(b.permute(total, (1, 0)), row.dtype)


def define(library: Any) -> None:
    """Register these on a torch Library:

    aligned_rows:    a copy of x [..., N] with the strides of x [..., padded N] where the last is 1
    product:         a [M, K] @ b [K, N], with a stride of ``stride`` between its rows
    row_product:     row [1, K] @ matrix [K, N], which kernels compute
    joined_products: the concatenation along ``dim`` (0 or 1) of a [M, K] @ b [K, N] for all a and b
    """
    import torch

    tags = (torch.Tag.pt2_compliant_tag,)
    library.define("aligned_rows(Tensor x) -> Tensor", tags=tags)
    library.define("product(Tensor a, Tensor b, int stride) -> Tensor", tags=tags)
    library.define("row_product(Tensor row, Tensor matrix) -> Tensor", tags=tags)
    library.define("joined_products(Tensor[] a, Tensor[] b, int dim) -> Tensor", tags=tags)
    library.impl("aligned_rows", _aligned_rows, "CompositeExplicitAutograd")
    library.impl("product", _product, "CompositeExplicitAutograd")
    library.impl("row_product", torch.mm, "CompositeExplicitAutograd")
    library.impl("joined_products", _joined_products, "CompositeExplicitAutograd")
    torch.library.register_fake("gems::aligned_rows", _rows_like, lib=library)
    torch.library.register_fake("gems::product", _room_for_product, lib=library)
    torch.library.register_fake("gems::row_product", _row_of, lib=library)
    torch.library.register_fake("gems::joined_products", _room_for_products, lib=library)


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


def _room_for_product(a: Any, b: Any, stride: int) -> Any:
    return a.new_empty_strided((a.shape[0], b.shape[1]), (stride, 1))


def _product(a: Any, b: Any, stride: int) -> Any:
    out = _room_for_product(a, b, stride)
    _multiply(out, a, b)
    return out


def _row_of(row: Any, matrix: Any) -> Any:
    return row.new_empty((row.shape[0], matrix.shape[1]))


def _room_for_products(a: Any, b: Any, dim: int) -> Any:
    rows, columns = [x.shape[0] for x in a], [x.shape[1] for x in b]
    return a[0].new_empty((sum(rows), columns[0]) if dim == 0 else (rows[0], sum(columns)))


def _joined_products(a: Any, b: Any, dim: int) -> Any:
    import torch

    out = _room_for_products(a, b, dim)
    sizes = [x.shape[0] for x in a] if dim == 0 else [x.shape[1] for x in b]
    for left, right, part in zip(a, b, out.split(sizes, dim), strict=True):
        torch.mm(left, right, out=part)
    return out


def _multiply(out: Any, a: Any, b: Any) -> None:
    """out = a @ b, the odd ends of dims that lie side by side in memory apart."""
    import torch

    odd = odd_dim(a, b)
    if odd == "columns":
        for part in _parts(b.shape[1], b):
            _multiply(out[:, part], a, b[:, part])
    elif odd == "rows":
        for part in _parts(a.shape[0], a):
            _multiply(out[part], a[part], b)
    elif odd == "terms":
        most, rest = _parts(a.shape[1], a)
        wide = _wide_product(a[:, most], b[most])
        out.copy_(wide.addmm_(a[:, rest].float(), b[rest].float()))
    else:
        torch.mm(a, b, out=out)


def _wide_product(a: Any, b: Any) -> Any:
    """a @ b in float32. (A product that adds to a 16-bit matrix is rounded before it is added.)"""
    import torch

    if a.is_cuda and hasattr(torch.ops.aten.mm, "dtype"):
        return torch.ops.aten.mm.dtype(a, b, torch.float32)
    return a.float() @ b.float()


def _even(size: int, like: Any) -> int:
    """The elements in whole vectors; all of them where there is no whole one."""
    unit = VECTOR // like.element_size()
    return size // unit * unit or size


def _parts(size: int, like: Any) -> tuple[slice, slice]:
    """The whole vectors of a dim, and its odd end."""
    even = _even(size, like)
    return slice(even), slice(even, size)


def odd_dim(a: Any, b: Any) -> str | None:
    """The dim of a @ b whose odd end ``gems::product`` takes apart next, or None; a size that
    varies counts as even."""
    sizes = b.shape[1], a.shape[0], a.shape[1]
    columns, rows, terms = (type(n) is int and _even(n, a) != n for n in sizes)
    if columns:
        return "columns"
    if rows and a.stride(0) == 1:
        return "rows"
    if terms and a.shape[1] >= MANY and 1 in (a.stride(1), b.stride(0)):
        return "terms"
    return None
