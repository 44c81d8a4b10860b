"""``gems::put_rows_`` and ``gems::add_rows_``: rows into a matrix, but for those whose place is
negative. Kernels write them as ``lowering.scatter`` says; here is what ATen would do."""

from __future__ import annotations

from typing import Any


def define(library: Any) -> None:
    """Register both in torch's library ``gems``."""
    import torch

    for name, run in (("put_rows_", _put_rows), ("add_rows_", _add_rows)):
        library.define(
            f"{name}(Tensor(a!) x, Tensor index, Tensor rows) -> ()",
            tags=(torch.Tag.pt2_compliant_tag,),
        )
        library.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"gems::{name}", lambda x, index, rows: None, lib=library)


def _put_rows(x: Any, index: Any, rows: Any) -> None:
    kept = index >= 0
    x.index_copy_(0, index[kept], rows[kept])


def _add_rows(x: Any, index: Any, rows: Any) -> None:
    kept = index >= 0
    x.index_add_(0, index[kept], rows[kept])
