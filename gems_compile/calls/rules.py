"""Rules of our own, beside torch's, by which eager mode takes ops apart that torch leaves whole.

Each is a function of the overload's arguments, written with ops that the compiler reads; one kernel
or two come of it. ``Whole`` says of a call that it stays ATen's, and why. Formulas are ATen's own,
in the order in which its kernels compute them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..kernels.draws import DRAWS
from ..kernels.factories import RULES as FACTORY_RULES
from ..lowering.overload import find_overload
from .bags import BAGS
from .lists import RULES as LISTS
from .long_scans import LONG_SCANS
from .optimizers import RULES as OPTIMIZERS
from .ordering import ORDERING
from .resampling import RESAMPLING
from .whole import Whole, wide

aten = torch.ops.aten

#: rows from which on ATen computes Euclidean distances by a matrix product
MANY_ROWS = 25


@functools.cache
def rules() -> dict[Any, Callable[..., Any]]:
    """The rule of each overload that has one, also of those written beside their kernels."""
    named = {**DRAWS, **FACTORY_RULES}
    found = ((find_overload(name), rule) for name, rule in named.items())
    beside = {overload: rule for overload, rule in found if overload is not None}
    return beside | _RULES | BAGS | LISTS | OPTIMIZERS | ORDERING | RESAMPLING | LONG_SCANS


# matrix products ---------------------------------------------------------------------------------


def _dots(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of the last two dims, not yet rounded, where reading an operand once is all there is to
    do: one row, one column, or sums of one term. Others are cuBLAS's."""
    if not a.is_floating_point() or a.dtype == torch.float64:
        raise Whole(f"a product of {a.dtype}")
    if a.shape[-1] == 1:
        return wide(a) * wide(b)
    turned = b.mT
    if a.shape[-2] == 1 and turned.is_contiguous():
        return (wide(turned) * wide(a)).sum(-1).unsqueeze(-2)
    if b.shape[-1] == 1 and a.is_contiguous():
        return (wide(a) * wide(turned)).sum(-1).unsqueeze(-1)
    raise Whole("a product of matrices")


def mm(a: Tensor, b: Tensor) -> Tensor:
    return _dots(a, b).to(a.dtype)


def addmm(c: Tensor, a: Tensor, b: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Tensor:
    """beta * c + alpha * (a @ b), rounded once; c is not read where beta is 0."""
    product = _dots(a, b) * alpha
    if beta != 0:
        product = product + wide(c) * beta
    return product.to(a.dtype)


def addbmm(c: Tensor, a: Tensor, b: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Tensor:
    """beta * c + alpha * sum over the batch of a @ b."""
    product = _dots(a, b).sum(0) * alpha
    if beta != 0:
        product = product + wide(c) * beta
    return product.to(a.dtype)


# parts of tensors --------------------------------------------------------------------------------


def _on_diagonal(x: Tensor, values: Tensor, offset: int, dim1: int, dim2: int) -> Tensor:
    """x with ``values`` on its diagonal, which runs along their last dim."""
    x = x.movedim((dim1, dim2), (-2, -1))
    line = torch.arange(max(x.shape[-2:]), device=x.device)
    rows, columns = line[: x.shape[-2], None], line[None, : x.shape[-1]]
    along = columns if offset < 0 else rows
    along = along.clamp(max=values.shape[-1] - 1).broadcast_to(x.shape[-2:]).reshape(-1)
    spread = values.index_select(-1, along).view(x.shape)
    return torch.where(columns - rows == offset, spread, x).movedim((-2, -1), (dim1, dim2))


def diagonal_backward(
    gradient: Tensor, sizes: Sequence[int], offset: int, dim1: int, dim2: int
) -> Tensor:
    zeros = gradient.new_zeros(()).expand(sizes)
    return _on_diagonal(zeros, gradient, offset, dim1, dim2).contiguous()


def diagonal_scatter(
    x: Tensor, values: Tensor, offset: int = 0, dim1: int = 0, dim2: int = 1
) -> Tensor:
    return _on_diagonal(x, values, offset, dim1, dim2).contiguous()


def block_diag(tensors: Sequence[Tensor]) -> Tensor:
    blocks = [t.reshape(1, -1) if t.ndim < 2 else t for t in tensors]
    if len({t.dtype for t in blocks}) > 1:
        raise Whole("blocks of several dtypes")
    width, left, rows = sum(t.shape[1] for t in blocks), 0, []
    for block in blocks:
        rows.append(F.pad(block, (left, width - left - block.shape[1])))
        left += block.shape[1]
    return torch.cat(rows)


def scatter_reduce(x: Tensor, dim: int, index: Tensor, src: Tensor, *, reduce: str) -> Tensor:
    """``scatter`` with "add" or "multiply"; x counts as well."""
    if reduce == "add":
        return x.scatter_add(dim, index, src)
    return x.scatter_reduce(dim, index, src, "prod")


def scatter_value_reduce(x: Tensor, dim: int, index: Tensor, value: Any, *, reduce: str) -> Tensor:
    return scatter_reduce(x, dim, index, x.new_full((), value).expand(index.shape), reduce=reduce)


# padding's gradients -----------------------------------------------------------------------------


def replication_pad_backward(gradient: Tensor, x: Tensor, padding: Sequence[int]) -> Tensor:
    """The elements at the edges get what their copies were given as well, one axis at a time."""
    if min(padding) < 0:
        raise Whole("padding that cuts off")
    out = wide(gradient)
    for k in range(len(padding) // 2):
        axis, before = x.ndim - 1 - k, padding[2 * k]
        out = _folded(out, axis, before, x.shape[axis])
    return out.to(gradient.dtype)


def _folded(gradient: Tensor, axis: int, before: int, size: int) -> Tensor:
    """Along one axis."""
    after = gradient.shape[axis] - before - size
    first = gradient.narrow(axis, 0, before + 1).sum(axis, keepdim=True)
    last = gradient.narrow(axis, before + size - 1, after + 1).sum(axis, keepdim=True)
    if size == 1:
        return first + last - gradient.narrow(axis, before, 1)
    middle = gradient.narrow(axis, before + 1, size - 2)
    return torch.cat([first, middle, last], axis)


# distances and losses ----------------------------------------------------------------------------


def cdist(a: Tensor, b: Tensor, p: float, mode: int | None) -> Tensor:
    """||a_i - b_j||_p; Euclidean ones of many rows are ATen's, by a matrix product."""
    rows = max(a.shape[-2], b.shape[-2])
    if p == 2 and (mode == 1 or (not mode and rows > MANY_ROWS)):
        raise Whole("a product of matrices makes these distances")
    apart = (a.unsqueeze(-2) - b.unsqueeze(-3)).abs()
    if p == 0:
        return (apart != 0).to(a.dtype).sum(-1)
    if p == math.inf:
        return apart.amax(-1)
    if p in (1, 2):
        return apart.sum(-1) if p == 1 else (apart * apart).sum(-1).sqrt()
    return apart.pow(p).sum(-1).pow(1 / p)


def _reduced(loss: Tensor, reduction: int) -> Tensor:
    """By torch's numbers: 0 is none, 1 the mean, 2 the sum."""
    return (loss, loss.mean(), loss.sum())[reduction] if reduction else loss


def binary_cross_entropy_with_logits(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    reduction: int = 1,
) -> Tensor:
    """(1 - t) x + w log(1 + exp(-x)), with w = 1 + (pos_weight - 1) t"""
    bend = -F.logsigmoid(x)
    if pos_weight is not None:
        bend = bend * ((pos_weight - 1) * target + 1)
    loss = (1 - target) * x + bend
    return _reduced(loss if weight is None else loss * weight, reduction)


def soft_margin_loss_backward(
    gradient: Tensor, x: Tensor, target: Tensor, reduction: int
) -> Tensor:
    """-t sigmoid(-t x), which torch's rule computes as 1 less what is nearly 1."""
    out = -target * torch.sigmoid(-target * x) * gradient
    return out / x.numel() if reduction == 1 else out


def weight_norm_backward(
    gradient: Tensor, v: Tensor, g: Tensor, norms: Tensor, dim: int
) -> tuple[Tensor, Tensor]:
    """(d/dv, d/dg) of w = v g / norms, where norms are those of v over all dims but ``dim``."""
    others = [k for k in range(v.ndim) if k != dim]
    sums = (wide(gradient) * wide(v)).sum(others, keepdim=True)
    scaled = wide(g) / wide(norms)
    dv = scaled * (wide(gradient) - wide(v) * (sums / (wide(norms) * wide(norms))))
    return dv.to(v.dtype), (sums / wide(norms)).to(g.dtype)


def masked_scale(x: Tensor, mask: Tensor, scale: float) -> Tensor:
    return (wide(x) * mask.to(torch.float32) * scale).to(x.dtype)


def mvlgamma(x: Tensor, p: int) -> Tensor:
    """p (p - 1) / 4 log pi + sum of lgamma(x - k / 2), k < p"""
    total = torch.lgamma(x)
    for k in range(1, p):
        total = total + torch.lgamma(x - k / 2)
    return total + p * (p - 1) / 4 * math.log(math.pi)


def polar(length: Tensor, angle: Tensor) -> Tensor:
    """length exp(i angle)"""
    parts = torch.stack([length * angle.cos(), length * angle.sin()], -1)
    return torch.view_as_complex(parts)


# look-up -----------------------------------------------------------------------------------------


def searchsorted(
    ordered: Tensor,
    x: Tensor,
    *,
    out_int32: bool = False,
    right: bool = False,
    side: str | None = None,
    sorter: Tensor | None = None,
) -> Tensor:
    """How many numbers of each row of ``ordered`` are below x (``right``: or equal), by bisection:
    each step is a gather, all in one kernel."""
    if sorter is not None:
        raise Whole("a sorter")
    upper = right or side == "right"
    count = ordered.shape[-1]
    row: Any = 0
    if ordered.ndim > 1:
        rows = torch.arange(math.prod(ordered.shape[:-1]), dtype=torch.int32, device=x.device)
        row = (rows * count).view(*ordered.shape[:-1], 1)
    flat = ordered.reshape(-1)
    start = torch.zeros_like(x, dtype=torch.int32)
    end = torch.full_like(start, count)
    for _ in range(count.bit_length()):  # in ATen's steps, which end elsewhere among NaNs
        middle = start + ((end - start) >> 1)
        seen = flat[(row + middle.clamp(max=count - 1)).long()]
        below = ~(seen > x) if upper else ~(seen >= x)
        left = start < end
        start = torch.where(left & below, middle + 1, start)
        end = torch.where(left & ~below, middle, end)
    return start if out_int32 else start.long()


def searchsorted_number(ordered: Tensor, x: Any, **how: Any) -> Tensor:
    if isinstance(x, float) and not ordered.is_floating_point():
        raise Whole("a float among integers")
    return searchsorted(ordered, ordered.new_full((1,), x), **how).view(())


def bucketize_number(x: Any, ordered: Tensor, **how: Any) -> Tensor:
    return searchsorted_number(ordered, x, **how)


# what a host waits for ---------------------------------------------------------------------------


def equal(a: Tensor, b: Tensor) -> Tensor:
    if a.shape != b.shape:
        raise Whole("shapes that differ")
    return (a == b).all()


def allclose(
    a: Tensor, b: Tensor, rtol: float = 1e-5, atol: float = 1e-8, equal_nan: bool = False
) -> Tensor:
    """|a - b| <= atol + rtol |b|, and neither is infinite, or a = b"""
    close = a == b
    if equal_nan and a.is_floating_point():
        close = close | (a.isnan() & b.isnan())
    if rtol or atol:
        apart = (a - b).abs()
        close = close | (apart.isfinite() & (apart <= atol + (rtol * b).abs()))
    return close.all()


def is_all_true(x: Tensor) -> Tensor:
    return x.all()


_RULES: dict[Any, Callable[..., Any]] = {
    aten.mm.default: mm,
    aten.bmm.default: mm,
    aten.addmm.default: addmm,
    aten.baddbmm.default: addmm,
    aten.addbmm.default: addbmm,
    aten.diagonal_backward.default: diagonal_backward,
    aten.diagonal_scatter.default: diagonal_scatter,
    aten.block_diag.default: block_diag,
    aten.scatter.reduce: scatter_reduce,
    aten.scatter.value_reduce: scatter_value_reduce,
    aten.replication_pad1d_backward.default: replication_pad_backward,
    aten.replication_pad2d_backward.default: replication_pad_backward,
    aten.replication_pad3d_backward.default: replication_pad_backward,
    aten._cdist_forward.default: cdist,
    aten.binary_cross_entropy_with_logits.default: binary_cross_entropy_with_logits,
    aten.soft_margin_loss_backward.default: soft_margin_loss_backward,
    aten._weight_norm_interface_backward.default: weight_norm_backward,
    aten._masked_scale.default: masked_scale,
    aten.mvlgamma.default: mvlgamma,
    aten.polar.default: polar,
    aten.searchsorted.Tensor: searchsorted,
    aten.searchsorted.Scalar: searchsorted_number,
    aten.bucketize.Scalar: bucketize_number,
    aten.equal.default: equal,
    aten.allclose.default: allclose,
    aten._is_all_true.default: is_all_true,
}
#: overloads whose result is a Python bool: the host waits, as for ATen's
ON_HOST = frozenset({aten.equal.default, aten.allclose.default})
