"""Rules by which eager mode takes ops apart that put rows in order: sort, topk, medians.

``gems::row_order`` sorts elements with their places; all else gathers. See ``rules``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..kernels.sorting import LONGEST
from .whole import Whole

aten = torch.ops.aten

#: places that a row is asked for: whoever wants more is served faster by ATen (a whole row of 2048
#: on an H200, bfloat16: 216 us of 4096 rows, ATen 180; of 1024, 8192 rows: 134 and 185)
MOST = 1024


def _order(x: Tensor, dim: int | None, descending: bool, count: int | None = None) -> Tensor:
    """The places of the first ``count`` elements along dim, or of all, in order; equal ones in the
    order of their places. No dim: all of x is one row."""
    if x.ndim == 0:
        raise Whole("one number")
    flat = dim is None
    rows = x.contiguous() if dim is None else x.movedim(dim, -1).contiguous()
    size = x.numel() if flat else rows.shape[-1]
    if not 0 < size <= LONGEST:
        raise Whole(f"rows of {size} elements")
    count = size if count is None else count
    if count > MOST:
        raise Whole(f"rows of which {count} elements are asked for")
    return torch.ops.gems.row_order.default(rows, descending, flat, count)


def _first(
    x: Tensor, dim: int | None, descending: bool, count: int | None = None
) -> tuple[Tensor, Tensor]:
    """(Elements, places) of ``_order``."""
    places = _order(x, dim, descending, count)
    if dim is None:
        return x.contiguous().reshape(-1).gather(-1, places), places
    values = x.movedim(dim, -1).contiguous().gather(-1, places)
    return values.movedim(-1, dim).contiguous(), places.movedim(-1, dim).contiguous()


def sort(x: Tensor, dim: int = -1, descending: bool = False) -> tuple[Tensor, Tensor]:
    return _first(x, dim, descending)


def stable_sort(
    x: Tensor, *, stable: bool | None, dim: int = -1, descending: bool = False
) -> tuple[Tensor, Tensor]:
    return sort(x, dim, descending)


def topk(
    x: Tensor, k: int, dim: int = -1, largest: bool = True, ordered: bool = True
) -> tuple[Tensor, Tensor]:
    if k == 0:
        raise Whole("none is asked for")
    return _first(x, dim, largest, k)


def kthvalue(x: Tensor, k: int, dim: int = -1, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    """The k-th smallest, counted from one."""
    values, places = _first(x, dim, False, k)
    return _at(values, dim, k - 1, keepdim), _at(places, dim, k - 1, keepdim)


def _at(x: Tensor, dim: int, place: int, keepdim: bool) -> Tensor:
    found = x.narrow(dim, place, 1)
    return (found if keepdim else found.squeeze(dim)).contiguous()


def median(x: Tensor, dim: int = -1, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    """The lower of two in the middle; NaN, and where the first is, for a row with one."""
    middle, where = kthvalue(x, (x.shape[dim] + 1) // 2, dim, keepdim)
    if x.is_floating_point():
        nan = x.isnan()
        some, first = nan.any(dim, keepdim=keepdim), nan.int().argmax(dim, keepdim=keepdim)
        middle = torch.where(some, torch.full_like(middle, torch.nan), middle)
        where = torch.where(some, first, where)
    return middle, where


def nanmedian(x: Tensor, dim: int = -1, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    """That of the numbers of a row which has some."""
    values, places = _first(x, dim, False, (x.shape[dim] + 1) // 2)
    middle = ((x.isnan().logical_not().sum(dim, keepdim=True) - 1) // 2).clamp(min=0)
    found = values.gather(dim, middle), places.gather(dim, middle)
    values, places = found if keepdim else (t.squeeze(dim) for t in found)
    return values, places


def median_of_all(x: Tensor) -> Tensor:
    values, _ = _first(x, None, False, (x.numel() + 1) // 2)
    middle = values[-1]
    if x.is_floating_point():
        middle = torch.where(x.isnan().any(), torch.full_like(middle, torch.nan), middle)
    return middle.clone()


def nanmedian_of_all(x: Tensor) -> Tensor:
    values, _ = _first(x, None, False, (x.numel() + 1) // 2)
    count = x.isnan().logical_not().sum()
    return values.gather(0, ((count - 1) // 2).clamp(min=0).reshape(1)).squeeze(0).clone()


ORDERING: dict[Any, Callable[..., Any]] = {
    aten.sort.default: sort,
    aten.sort.stable: stable_sort,
    aten.topk.default: topk,
    aten.kthvalue.default: kthvalue,
    aten.median.default: median_of_all,
    aten.median.dim: median,
    aten.nanmedian.default: nanmedian_of_all,
    aten.nanmedian.dim: nanmedian,
}
