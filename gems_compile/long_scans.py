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

from .kernels.scan import LONGEST
from .whole import Whole, wide

aten = torch.ops.aten

#: elements of a block, unless there would be more of them than one program scans
BLOCK = 2048
#: rows from which on there is a program for each to keep a GPU busy
MANY = 64


def block_size(count: int) -> int:
    """A power of two, of which there are few enough in ``count``."""
    return max(BLOCK, 1 << (-(-count // LONGEST) - 1).bit_length())


def in_blocks(rows: Tensor, fill: Any = 0) -> Tensor:
    """[..., blocks, elements], ``fill`` behind the end of each row."""
    count, size = rows.shape[-1], block_size(rows.shape[-1])
    return F.pad(rows, (0, -count % size), value=fill).unflatten(-1, (-1, size))


def before(ends: Tensor, first: Any) -> Tensor:
    """What there is before each block, of what there is at its end; ``first`` before all."""
    return F.pad(ends[..., :-1], (1, 0), value=first)


def running_sum(rows: Tensor) -> Tensor:
    """Along the last dim, in the dtype of the rows."""
    blocks = in_blocks(rows)
    behind = before(blocks.sum(-1, dtype=rows.dtype).cumsum(-1, dtype=rows.dtype), 0)
    return _joined(blocks.cumsum(-1, dtype=rows.dtype) + behind.unsqueeze(-1), rows)


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
    blocks = in_blocks(rows, 1)
    behind = before(blocks.prod(-1).cumprod(-1), 1)
    return _restored(_joined(blocks.cumprod(-1) * behind.unsqueeze(-1), rows).to(dtype), dim)


@of_long_rows
def logcumsumexp(rows: Tensor, dim: int) -> Tensor:
    blocks = in_blocks(wide(rows), -torch.inf)
    behind = before(blocks.logsumexp(-1).logcumsumexp(-1), -torch.inf)
    joined = torch.logaddexp(blocks.logcumsumexp(-1), behind.unsqueeze(-1))
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
    """(Best so far, place of the last such one). A block's last best is the first one of it turned
    round."""
    if rows.dtype == torch.bool:
        raise Whole("truth values")
    blocks = in_blocks(rows)
    size = blocks.shape[-1]
    ends, which = scan(best(blocks, -1), -1)
    last = size - 1 - place(blocks.flip(-1), -1)
    above = before(ends, 0).unsqueeze(-1)
    where = before(which * size + last.gather(-1, which), 0).unsqueeze(-1)
    values, places = scan(blocks, -1)
    numbers = torch.arange(blocks.shape[-2], device=rows.device).unsqueeze(-1)
    take = beyond(above, values)
    if rows.is_floating_point():
        take = take | (above.isnan() & ~values.isnan())
    take = take & (numbers > 0)
    values = torch.where(take, above, values)
    places = torch.where(take, where, places + numbers * size)
    return tuple(_restored(_joined(t, rows), dim) for t in (values, places))  # type: ignore[return-value]


#: tried before a kernel of one program a row is
LONG_SCANS: dict[Any, Callable[..., Any]] = {
    aten.cumsum.default: cumsum,
    aten.cumprod.default: cumprod,
    aten.logcumsumexp.default: logcumsumexp,
    aten.cummax.default: cummax,
    aten.cummin.default: cummin,
}
