"""Rules by which eager mode takes ops apart that put rows in order: sort, topk, medians.

``gems::numbered_rows`` sorts elements with their places; all else gathers. See ``rules``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .kernels.sorting import LONGEST, PLACE
from .whole import Whole

aten = torch.ops.aten


def sort(x: Tensor, dim: int | None = -1, descending: bool = False) -> tuple[Tensor, Tensor]:
    """(Elements, places) in order, equal ones in the order of their places. No dim: all of x is one
    row."""
    if x.ndim == 0:
        raise Whole("one number")
    flat = dim is None
    rows = x.contiguous() if dim is None else x.movedim(dim, -1).contiguous()
    size = x.numel() if flat else rows.shape[-1]
    if not 0 < size <= LONGEST:
        raise Whole(f"rows of {size} elements")
    places = torch.ops.gems.numbered_rows.default(rows, descending, flat) & PLACE
    values = (rows.reshape(-1) if flat else rows).gather(-1, places)
    if dim is None:
        return values, places
    return values.movedim(-1, dim).contiguous(), places.movedim(-1, dim).contiguous()


def stable_sort(
    x: Tensor, *, stable: bool | None, dim: int = -1, descending: bool = False
) -> tuple[Tensor, Tensor]:
    return sort(x, dim, descending)


def topk(
    x: Tensor, k: int, dim: int = -1, largest: bool = True, ordered: bool = True
) -> tuple[Tensor, Tensor]:
    values, places = sort(x, dim, largest)
    return values.narrow(dim, 0, k).contiguous(), places.narrow(dim, 0, k).contiguous()


def kthvalue(x: Tensor, k: int, dim: int = -1, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    """The k-th smallest, counted from one."""
    values, places = sort(x, dim, False)
    return _at(values, dim, k - 1, keepdim), _at(places, dim, k - 1, keepdim)


def _at(x: Tensor, dim: int, place: int, keepdim: bool) -> Tensor:
    found = x.narrow(dim, place, 1)
    return (found if keepdim else found.squeeze(dim)).contiguous()


def median(x: Tensor, dim: int = -1, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    """The lower of two in the middle; NaN, and where the first is, for a row with one."""
    values, places = sort(x, dim, False)
    size = x.shape[dim]
    middle, where = (_at(t, dim, (size - 1) // 2, keepdim) for t in (values, places))
    if x.is_floating_point():
        nan = values.isnan()
        count = nan.sum(dim, keepdim=True)
        first = places.gather(dim, (size - count).clamp(max=size - 1))
        first, some = (t if keepdim else t.squeeze(dim) for t in (first, count > 0))
        middle = torch.where(some, torch.full_like(middle, torch.nan), middle)
        where = torch.where(some, first, where)
    return middle, where


def nanmedian(x: Tensor, dim: int = -1, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    """That of the numbers of a row which has some."""
    values, places = sort(x, dim, False)
    count = values.isnan().logical_not().sum(dim, keepdim=True)
    middle = ((count - 1) // 2).clamp(min=0)
    found = values.gather(dim, middle), places.gather(dim, middle)
    values, places = found if keepdim else (t.squeeze(dim) for t in found)
    return values, places


def median_of_all(x: Tensor) -> Tensor:
    values, _ = sort(x, None)
    middle = values[(x.numel() - 1) // 2]
    if x.is_floating_point():
        middle = torch.where(values[-1].isnan(), torch.full_like(middle, torch.nan), middle)
    return middle.clone()


def nanmedian_of_all(x: Tensor) -> Tensor:
    values, _ = sort(x, None)
    count = values.isnan().logical_not().sum(0, keepdim=True)
    return values.gather(0, ((count - 1) // 2).clamp(min=0)).squeeze(0).clone()


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
