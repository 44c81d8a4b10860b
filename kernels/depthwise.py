"""Depthwise convolutions of images, or of signals: each channel has a window of its own. Their
kernels are written as a whole, by ``lowering.depthwise_kernels``.

Compile workers import this file without torch: torch is imported inside the functions.
"""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl


@triton.jit
def joined(first, second, dtype: tl.constexpr):
    """Two results side by side as one number: rounded to ``dtype``, the first one's bits below."""
    bits: tl.constexpr = dtype.primitive_bitwidth
    narrow: tl.constexpr = tl.uint16 if bits == 16 else tl.uint32
    wide: tl.constexpr = tl.uint32 if bits == 16 else tl.uint64
    low = first.to(dtype).to(narrow, bitcast=True).to(wide)
    high = second.to(dtype).to(narrow, bitcast=True).to(wide)
    return low | (high << bits)


def define(library: Any) -> None:
    """Register these on a torch Library. ``last``: images lie in channels-last, and the weight as
    [rows, columns, 1, C]; else images are contiguous, and the weight is [C, 1, rows, columns], in
    order. Pairs are (down, across). Signals are [N, C, L], contiguous; of them all has one dim.

    depthwise_convolution:  out[n, c, o] = bias[c] + sum over k of
                            x[n, c, o * stride + k * dilation - padding] * weight[c, k], where x is
                            0 outside; of ``size``. ``back``: the gradient of x, of which ``size``
                            is the size, where x is out's: the sum over o of the same products
    depthwise_weight_parts: the gradient of the weight in ``shares`` parts, float32, whose sum is
                            meant: [shares, rows * columns, C] where ``last``, else
                            [shares, C, rows * columns]
    """
    import torch

    tags = (torch.Tag.pt2_compliant_tag,)
    library.define(
        "depthwise_convolution(Tensor x, Tensor weight, Tensor? bias, int[] stride, int[] padding,"
        " int[] dilation, int[] size, bool back, bool last) -> Tensor",
        tags=tags,
    )
    library.define(
        "depthwise_weight_parts(Tensor gradient, Tensor x, int[] window, int[] stride,"
        " int[] padding, int[] dilation, int shares, bool last) -> Tensor",
        tags=tags,
    )
    library.impl("depthwise_convolution", _convolution, "CompositeExplicitAutograd")
    library.impl("depthwise_weight_parts", _weight_parts, "CompositeExplicitAutograd")
    torch.library.register_fake("gems::depthwise_convolution", _room_for_result, lib=library)
    torch.library.register_fake("gems::depthwise_weight_parts", _room_for_parts, lib=library)


def _room_for_result(
    x: Any,
    weight: Any,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    size: Any,
    back: bool,
    last: bool,
) -> Any:
    n, c = x.shape[:2]
    if not last:
        return x.new_empty((n, c, *size))
    h, w = size
    return x.new_empty_strided((n, c, h, w), (h * w * c, 1, w * c, c))


def _room_for_parts(
    gradient: Any,
    x: Any,
    window: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    shares: int,
    last: bool,
) -> Any:
    import torch

    taps, channels = math.prod(window), x.shape[1]
    shape = (shares, taps, channels) if last else (shares, channels, taps)
    return x.new_empty(shape, dtype=torch.float32)


def _convolution(
    x: Any,
    weight: Any,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    size: Any,
    back: bool,
    last: bool,
) -> Any:
    import torch

    out = _room_for_result(x, weight, bias, stride, padding, dilation, size, back, last)
    weight = weight.permute(3, 2, 0, 1) if last else weight
    channels = x.shape[1]
    how = stride, padding, dilation, False, [0] * len(stride), channels
    if not back:
        return out.copy_(torch.ops.aten.convolution(x, weight, bias, *how))
    image = torch.empty_like(out)
    found = torch.ops.aten.convolution_backward(x, image, weight, None, *how, [True, False, False])
    return out.copy_(found[0])


def _weight_parts(
    gradient: Any,
    x: Any,
    window: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    shares: int,
    last: bool,
) -> Any:
    import torch

    channels = x.shape[1]
    nothing = [0] * len(stride)
    how = None, stride, padding, dilation, False, nothing, channels, [False, True, False]
    weight = x.new_empty((channels, 1, *window))
    found = torch.ops.aten.convolution_backward(gradient, x, weight, *how)[1].flatten(1)
    out = _room_for_parts(gradient, x, window, stride, padding, dilation, shares, last).zero_()
    out[0] = found.t() if last else found
    return out
