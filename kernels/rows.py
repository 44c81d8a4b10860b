"""``gems::put_``, ``gems::put_rows_`` and ``gems::add_rows_``: elements into a vector, or rows into
a matrix, but for those whose place is out of range. Kernels write them as ``lowering.scatter``
says; here is what ATen would do."""

from __future__ import annotations

from typing import Any


def define(library: Any) -> None:
    """Register them in torch's library ``gems``.

    put_: x [N], index and rows of one shape, whatever it is; no two places are one
    """
    import torch

    for name, run in (("put_", _put), ("put_rows_", _put_rows), ("add_rows_", _add_rows)):
        library.define(
            f"{name}(Tensor(a!) x, Tensor index, Tensor rows) -> ()",
            tags=(torch.Tag.pt2_compliant_tag,),
        )
        library.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"gems::{name}", lambda x, index, rows: None, lib=library)


def _put(x: Any, index: Any, rows: Any) -> None:
    kept = (index >= 0) & (index < x.shape[0])
    x.index_put_((index[kept],), rows[kept])


def _put_rows(x: Any, index: Any, rows: Any) -> None:
    kept = index >= 0
    x.index_copy_(0, index[kept], rows[kept])


def _add_rows(x: Any, index: Any, rows: Any) -> None:
    kept = index >= 0
    x.index_add_(0, index[kept], rows[kept])
