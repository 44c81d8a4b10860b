"""Rules by which eager mode takes resampling of images apart: pooling by means, interpolation.

A result's element is a weighted sum of few elements, which are written out: the rule of a call with
more than ``MOST_TAPS`` of them does not end, it says ``Whole``. See ``rules``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from ..kernels.pool import MOST_TAPS as MOST_WRITTEN_OUT
from ..kernels.pool import windows
from .whole import Whole, wide

aten = torch.ops.aten

#: elements of a sum that are written out, at most
MOST_TAPS = 64


def _integers(size: int, x: Tensor) -> Tensor:
    return torch.arange(size, device=x.device, dtype=torch.int32)


def _line(size: int, x: Tensor) -> Tensor:
    """0, 1, ... in the dtype in which ATen computes places: float32, of float64 that."""
    return _integers(size, x).to(torch.float64 if x.dtype == torch.float64 else torch.float32)


def _along(line: Tensor, axis: int, ndim: int) -> Tensor:
    """A vector as something that broadcasts over all axes but one."""
    return line.view([-1 if k == axis else 1 for k in range(ndim)])


# interpolation -----------------------------------------------------------------------------------


def _scale(before: int, after: int, align: bool, scale: float | None) -> float:
    """Elements of the input for one of the output, as ATen computes it."""
    if align:
        return (before - 1) / (after - 1) if after > 1 else 0.0
    return 1.0 / scale if scale is not None and scale > 0 else before / after


def _nearest_exact(x: Tensor, size: Sequence[int], *scales: float | None) -> Tensor:
    """Each element that whose middle is nearest: floor((i + 0.5) scale)."""
    for k, (after, scale) in enumerate(zip(size, scales, strict=True)):
        axis = x.ndim - len(size) + k
        before = x.shape[axis]
        step = _scale(before, after, False, scale)
        place = ((_line(after, x) + 0.5) * step).floor().int().clamp(max=before - 1)
        x = x.index_select(axis, place)
    return x


def _triangle(x: Tensor) -> Tensor:
    """1 - |x| where that is positive."""
    return (1 - x.abs()).clamp(min=0)


def _cubic(x: Tensor) -> Tensor:
    """Keys' kernel with a = -0.5, as ATen has it for antialiasing."""
    a, x = -0.5, x.abs()
    inner = ((a + 2) * x - (a + 3)) * x * x + 1
    outer = ((x - 5) * x + 8) * x * a - 4 * a
    return torch.where(x < 1, inner, torch.where(x < 2, outer, torch.zeros_like(x)))


def _antialiased(
    kernel: Callable[[Tensor], Tensor],
    reach: int,
    x: Tensor,
    size: Sequence[int],
    align: bool,
    *scales: float | None,
) -> Tensor:
    """Sums weighted by the kernel, stretched where the image shrinks: across, then down."""
    out = wide(x)
    for k in reversed(range(len(size))):
        scale = _scale(x.shape[2 + k], size[k], align, scales[k])
        out = _stretched(kernel, reach, out, 2 + k, size[k], scale)
    return out.to(x.dtype)


def _stretched(
    kernel: Callable[[Tensor], Tensor], reach: int, x: Tensor, axis: int, after: int, scale: float
) -> Tensor:
    """Along one axis."""
    before = x.shape[axis]
    support = reach * max(scale, 1.0)
    taps = min(2 * math.ceil(support) + 1, before)
    if taps > MOST_TAPS:
        raise Whole(f"{taps} elements for each")
    centre = (_line(after, x) + 0.5) * scale
    first = (centre - support + 0.5).int().clamp(min=0)
    end = (centre + support + 0.5).int().clamp(max=before)
    weights = []
    for k in range(taps):
        weight = kernel((first.to(x.dtype) + k - centre + 0.5) * (1 / max(scale, 1.0)))
        weights.append(torch.where(first + k < end, weight, torch.zeros_like(weight)))
    total = sum(weights[1:], weights[0])
    out = None
    for k, weight in enumerate(weights):
        tap = x.index_select(axis, (first + k).clamp(max=before - 1))
        term = tap * _along(weight / total, axis, x.ndim)
        out = term if out is None else out + term
    assert out is not None
    return out


def bicubic_antialiased(x: Tensor, size: Any, align: bool, *scales: Any) -> Tensor:
    return _antialiased(_cubic, 2, x, size, align, *(scales or (None, None)))


def bilinear_antialiased(x: Tensor, size: Any, align: bool, *scales: Any) -> Tensor:
    return _antialiased(_triangle, 1, x, size, align, *(scales or (None, None)))


def nearest_exact1d(x: Tensor, size: Any, scale: Any = None) -> Tensor:
    return _nearest_exact(x, size, scale)


def nearest_exact2d(x: Tensor, size: Any, down: Any = None, across: Any = None) -> Tensor:
    return _nearest_exact(x, size, down, across)


def nearest_exact3d(
    x: Tensor, size: Any, deep: Any = None, down: Any = None, across: Any = None
) -> Tensor:
    return _nearest_exact(x, size, deep, down, across)


# largest elements of windows ----------------------------------------------------------------------


def max_pool2d(
    x: Tensor,
    kernel: Any,
    stride: Any = (),
    padding: Any = (0,),
    dilation: Any = (1,),
    ceil: bool = False,
) -> tuple[Tensor, Tensor]:
    """(The largest element of each window, its place in the image.)"""
    kernel = _per_axis(kernel, 2)
    if {*dilation} != {1} or math.prod(kernel) > MOST_WRITTEN_OUT:
        raise Whole("windows with gaps, or of many elements")
    if not x.is_floating_point():
        raise Whole("windows of integers")
    stride, padding = _per_axis(stride, 2) if len(stride) else kernel, _per_axis(padding, 2)
    values, places = torch.ops.gems.max_pool2d.default(x, kernel, stride, padding, ceil)
    corners = [
        _along((_integers(values.shape[k], x) * stride[k] - padding[k]), k + x.ndim, x.ndim)
        for k in (-2, -1)
    ]
    within = places.int()
    index = (corners[0] + within // kernel[1]) * x.shape[-1] + corners[1] + within % kernel[1]
    return values, index.long()


def max_pool2d_backward(
    gradient: Tensor,
    x: Tensor,
    kernel: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    ceil: bool,
    places: Tensor,
) -> Tensor:
    """Each element's gradient, added at its place in the image; newer torch has this rule too."""
    sums = wide(gradient.new_zeros(())).expand(*x.shape[:-2], x.shape[-2] * x.shape[-1])
    sums = sums.scatter_add(-1, places.flatten(-2), wide(gradient).flatten(-2))
    layout = suggest_memory_format(x)
    return sums.view(x.shape).to(gradient.dtype).contiguous(memory_format=layout)


# means of windows --------------------------------------------------------------------------------


def _per_axis(given: Sequence[int], axes: int) -> list[int]:
    return list(given) * axes if len(given) == 1 else list(given)


def _spans(
    x: Tensor, size: int, kernel: int, stride: int, padding: int, count: int
) -> tuple[Tensor, Tensor]:
    """Elements of each window along an axis: with those of the padding, and without."""
    first = _integers(count, x) * stride - padding
    end = (first + kernel).clamp(max=size + padding)
    return end - first, end.clamp(max=size) - first.clamp(min=0)


def _divisors(x: Tensor, every: Sequence[Any], padded: bool, divisor: int | None) -> Any:
    """What the sum of each window is divided by."""
    if divisor is not None:
        return divisor
    total: Any = 1
    for axis, size, kernel, stride, padding, count in every:
        spans = _spans(x, size, kernel, stride, padding, count)[0 if padded else 1]
        total = total * _along(spans.to(x.dtype), axis, x.ndim)
    return total


def _avg_axes(x: Tensor, axes: int, kernel: Any, stride: Any, padding: Any, ceil: bool) -> Any:
    """(axis, size, kernel, stride, padding, windows) of each pooled axis."""
    kernel = _per_axis(kernel, axes)
    stride = _per_axis(stride, axes) if len(stride) else kernel
    padding = _per_axis(padding, axes)
    if math.prod(kernel) > MOST_TAPS:
        raise Whole(f"windows of {math.prod(kernel)} elements")
    found = []
    for k in range(axes):
        axis = x.ndim - axes + k
        how = (x.shape[axis], kernel[k], stride[k], padding[k])
        found.append((axis, *how, windows(*how, ceil)))
    return found


def avg_pool(
    axes: int,
    x: Tensor,
    kernel: Any,
    stride: Any = (),
    padding: Any = (0,),
    ceil: bool = False,
    count_include_pad: bool = True,
    divisor: int | None = None,
) -> Tensor:
    """The mean of each window."""
    every = _avg_axes(x, axes, kernel, stride, padding, ceil)
    summed = wide(x)
    pads: list[int] = []
    for _, size, kernel_, step, before, count in reversed(every):
        pads += [before, max(0, (count - 1) * step + kernel_ - size - before)]
    padded = torch.constant_pad_nd(summed, pads) if any(pads) else summed
    total = None
    for at in itertools.product(*(range(k) for _, _, k, _, _, _ in every)):
        tap = padded
        for (axis, _, _, step, _, count), first in zip(every, at, strict=True):
            tap = aten.slice.Tensor(tap, axis, first, first + (count - 1) * step + 1, step)
        total = tap if total is None else total + tap
    assert total is not None
    return (total / _divisors(summed, every, count_include_pad, divisor)).to(x.dtype)


def avg_pool_backward(
    axes: int,
    gradient: Tensor,
    x: Tensor,
    kernel: Any,
    stride: Any,
    padding: Any,
    ceil: bool,
    count_include_pad: bool,
    divisor: int | None,
) -> Tensor:
    """Each element the sum of what the windows over it were given, one window after the other."""
    every = _avg_axes(x, axes, kernel, stride, padding, ceil)
    given = wide(gradient) / _divisors(wide(gradient), every, count_include_pad, divisor)
    choices = []
    for axis, size, kernel_, step, before, count in every:
        place = _integers(size, x) + before
        last = place // step
        found = []
        for back in range(-(-kernel_ // step)):
            window = last - back
            reaches = (window >= 0) & (window < count) & (place - window * step < kernel_)
            found.append((axis, window.clamp(0, count - 1), reaches))
        choices.append(found)
    total = None
    for chosen in itertools.product(*choices):
        part = given
        for axis, window, reaches in chosen:
            part = part.index_select(axis, window)
            part = torch.where(_along(reaches, axis, x.ndim), part, torch.zeros_like(part))
        total = part if total is None else total + part
    assert total is not None
    return total.to(x.dtype)


def adaptive_avg_pool(axes: int, x: Tensor, size: Sequence[int]) -> Tensor:
    """The mean of each window; so many of them reach over an axis, and may overlap."""
    first = x.ndim - axes
    full = x.shape[first:]
    if not all((*full, *size)):
        raise Whole("no windows")
    lengths = []
    for k, (n, count) in enumerate(zip(full, size, strict=True)):
        window = _integers(count, x)
        end = ((window + 1) * n + count - 1) // count
        lengths.append(_along(end - window * n // count, first + k, x.ndim))
    if all(n % count == 0 for n, count in zip(full, size, strict=True)):
        split = [k for n, count in zip(full, size, strict=True) for k in (count, n // count)]
        windows = wide(x).reshape(*x.shape[:first], *split)
        total = windows.sum([first + 2 * k + 1 for k in range(axes)])
    else:
        total = _overlapping(x, first, full, size, lengths)
    for length in lengths:  # one after the other, as ATen's kernel
        total = total / length
    return total.to(x.dtype)


def _overlapping(
    x: Tensor, first: int, full: Sequence[int], size: Sequence[int], lengths: Sequence[Tensor]
) -> Tensor:
    """The sum of each window of ``adaptive_avg_pool``, element after element."""
    longest = [
        max(((i + 1) * n + count - 1) // count - i * n // count for i in range(count))
        for n, count in zip(full, size, strict=True)
    ]
    if math.prod(longest) > MOST_WRITTEN_OUT:
        raise Whole(f"windows of {math.prod(longest)} elements")
    total = None
    for at in itertools.product(*map(range, longest)):
        tap = wide(x)
        for k, step in enumerate(at):
            begin = _integers(size[k], x) * full[k] // size[k]
            tap = tap.index_select(first + k, (begin + step).clamp(max=full[k] - 1))
        for step, length in zip(at, lengths, strict=True):
            tap = torch.where(step < length, tap, torch.zeros_like(tap))
        total = tap if total is None else total + tap
    assert total is not None
    return total


def adaptive_avg_pool_backward(axes: int, gradient: Tensor, x: Tensor) -> Tensor:
    """Where windows lie side by side, of one size; others are ATen's."""
    kernel = []
    for axis in range(x.ndim - axes, x.ndim):
        size, count = x.shape[axis], gradient.shape[axis]
        if size % count:
            raise Whole("windows of several sizes")
        kernel.append(size // count)
    given = wide(gradient) / math.prod(kernel)
    for k, length in enumerate(kernel):
        axis = x.ndim - axes + k
        place = _integers(x.shape[axis], x) // length
        given = given.index_select(axis, place)
    return given.to(x.dtype)


def _of(axes: int, rule: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *args: rule(axes, *args)


RESAMPLING: dict[Any, Callable[..., Any]] = {
    aten._upsample_nearest_exact1d.default: nearest_exact1d,
    aten._upsample_nearest_exact2d.default: nearest_exact2d,
    aten._upsample_nearest_exact3d.default: nearest_exact3d,
    aten._upsample_bicubic2d_aa.default: bicubic_antialiased,
    aten._upsample_bilinear2d_aa.default: bilinear_antialiased,
    aten.max_pool2d_with_indices.default: max_pool2d,
    aten.max_pool2d_with_indices_backward.default: max_pool2d_backward,
    aten.avg_pool2d.default: _of(2, avg_pool),
    aten.avg_pool3d.default: _of(3, avg_pool),
    aten.avg_pool2d_backward.default: _of(2, avg_pool_backward),
    aten.avg_pool3d_backward.default: _of(3, avg_pool_backward),
    aten._adaptive_avg_pool2d.default: _of(2, adaptive_avg_pool),
    aten._adaptive_avg_pool3d.default: _of(3, adaptive_avg_pool),
    aten._adaptive_avg_pool2d_backward.default: _of(2, adaptive_avg_pool_backward),
    aten._adaptive_avg_pool3d_backward.default: _of(3, adaptive_avg_pool_backward),
}
