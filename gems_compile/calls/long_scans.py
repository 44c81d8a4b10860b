"""Rules of eager mode for scans of few long rows, which one program each would take long for.

A row is cut into blocks. One kernel reduces each, a second scans what they came to, and the third
scans within the blocks, behind what came before. So sums are added up in one order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..kernels.scan import LONGEST
from .whole import Whole, wide

aten = torch.ops.aten

#: elements of a block, unless there would be more of them than one program scans
BLOCK = 2048
#: rows from which on there is a program for each to keep a GPU busy
MANY = 64


def block_size(count: int) -> int:
    """A power of two, of which there are few enough in ``count``, also by halves."""
    return max(BLOCK, 1 << (-(-2 * count // LONGEST) - 1).bit_length())


def in_blocks(rows: Tensor, fill: Any = 0, size: int | None = None) -> Tensor:
    """[..., blocks, elements], ``fill`` behind the end of each row."""
    count = rows.shape[-1]
    size = block_size(count) if size is None else size
    return F.pad(rows, (0, -count % size), value=fill).unflatten(-1, (-1, size))


def _halves(rows: Tensor, fill: Any) -> Tensor:
    """Halves of the blocks: sums of these are another kernel's than scans of the blocks, which is
    to compute the scans where they are used. Else it would store them to be read again."""
    size = block_size(rows.shape[-1])
    return in_blocks(rows, fill, size).unflatten(-1, (2, size // 2)).flatten(-3, -2)


def _behind(ends: Tensor, first: Any) -> Tensor:
    """What there is before each block, of what there is at the end of each half; ``first`` before
    all."""
    numbers = torch.arange(ends.shape[-1] // 2, device=ends.device)
    found = ends.index_select(-1, (2 * numbers - 1).clamp(min=0))
    return torch.where(numbers > 0, found, first).unsqueeze(-1)


def running_sum(rows: Tensor) -> Tensor:
    """Along the last dim, in the dtype of the rows."""
    kind = rows.dtype
    if rows.shape[-1] <= LONGEST:
        return rows.cumsum(-1, dtype=kind)
    ends = _halves(rows, 0).sum(-1, dtype=kind).cumsum(-1, dtype=kind)
    return _joined(in_blocks(rows).cumsum(-1, dtype=kind) + _behind(ends, 0), rows)


def _joined(blocks: Tensor, rows: Tensor) -> Tensor:
    return blocks.flatten(-2)[..., : rows.shape[-1]]


def of_long_rows(rule: Callable[..., Any]) -> Callable[..., Any]:
    """The rule, of rows along the last dim, where they are few and long; others are one call, as
    the rule's own scans are."""

    @functools.wraps(rule)
    def applied(x: Tensor, dim: int, **how: Any) -> Any:
        if x.ndim == 0 or x.shape[dim] <= LONGEST or x.numel() >= MANY * x.shape[dim]:
            return NotImplemented
        return rule(x.movedim(dim, -1), dim, **how)

    return applied


def _restored(rows: Tensor, dim: int) -> Tensor:
    return rows.movedim(-1, dim).contiguous()


def _summed(x: Tensor, dtype: torch.dtype | None) -> tuple[Tensor, torch.dtype]:
    """(x as it is added or multiplied up, the result's dtype)."""
    if dtype is None:
        dtype = x.dtype if x.is_floating_point() else torch.int64
    x = x.to(dtype)
    return (wide(x) if x.is_floating_point() else x.long()), dtype


@of_long_rows
def cumsum(rows: Tensor, dim: int, *, dtype: torch.dtype | None = None) -> Tensor:
    rows, dtype = _summed(rows, dtype)
    return _restored(running_sum(rows).to(dtype), dim)


@of_long_rows
def cumprod(rows: Tensor, dim: int, *, dtype: torch.dtype | None = None) -> Tensor:
    rows, dtype = _summed(rows, dtype)
    behind = _behind(_halves(rows, 1).prod(-1).cumprod(-1), 1)
    return _restored(_joined(in_blocks(rows, 1).cumprod(-1) * behind, rows).to(dtype), dim)


@of_long_rows
def logcumsumexp(rows: Tensor, dim: int) -> Tensor:
    halves, blocks = _halves(wide(rows), -torch.inf), in_blocks(wide(rows), -torch.inf)
    behind = _behind(halves.logsumexp(-1).logcumsumexp(-1), -torch.inf)
    joined = torch.logaddexp(blocks.logcumsumexp(-1), behind)
    return _restored(_joined(joined, rows).to(rows.dtype), dim)


@of_long_rows
def cummax(rows: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    return _extreme(rows, dim, Tensor.cummax, Tensor.amax, Tensor.argmax, torch.gt)


@of_long_rows
def cummin(rows: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    return _extreme(rows, dim, Tensor.cummin, Tensor.amin, Tensor.argmin, torch.lt)


def _extreme(
    rows: Tensor, dim: int, scan: Any, best: Any, place: Any, beyond: Any
) -> tuple[Tensor, Tensor]:
    """(Best so far, place of the last such one). A half's last best is the first one of it turned
    round."""
    if rows.dtype == torch.bool:
        raise Whole("truth values")
    halves, blocks = _halves(rows, 0), in_blocks(rows)
    ends, which = scan(best(halves, -1), -1)
    last = halves.shape[-1] - 1 - place(halves.flip(-1), -1)
    above = _behind(ends, 0)
    where = _behind(which * halves.shape[-1] + last.gather(-1, which), 0)
    values, places = scan(blocks, -1)
    numbers = torch.arange(blocks.shape[-2], device=rows.device).unsqueeze(-1)
    take = beyond(above, values)
    if rows.is_floating_point():
        take = take | (above.isnan() & ~values.isnan())
    take = take & (numbers > 0)
    values = torch.where(take, above, values)
    places = torch.where(take, where, places + numbers * blocks.shape[-1])
    return _restored(_joined(values, rows), dim), _restored(_joined(places, rows), dim)


#: tried before a kernel of one program a row is
LONG_SCANS: dict[Any, Callable[..., Any]] = {
    aten.cumsum.default: cumsum,
    aten.cumprod.default: cumprod,
    aten.logcumsumexp.default: logcumsumexp,
    aten.cummax.default: cummax,
    aten.cummin.default: cummin,
}
