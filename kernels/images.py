"""Convolutions of images: of few channels, for which cuDNN has no fast kernel in bfloat16, and slow
ones in float16. Their kernels are written as a whole, by ``lowering.image_kernels``.

Images come framed: [N, C, H, W] in channels-last with the padding in memory, C a multiple of 4, so
that each row of a window is one aligned piece of memory.

Compile workers import this file without torch: torch is imported inside the functions.
"""

from __future__ import annotations

from typing import Any


def define(library: Any) -> None:
    """Register these on a torch Library. ``taps``: how many columns of a window count; the weight
    [O, C, rows, columns] is zero in the others. ``stride``, ``size``: down, across.

    image_convolution:  images, weight -> the convolution [N, O, *size], in channels-last or, if not
                        ``last``, contiguous
    image_weight_parts: gradient [N, O, h, w] in either layout, images -> the gradient of the weight
                        in parts, [shares, O, rows, columns, C], float32: their sum is meant
    """
    import torch

    tags = (torch.Tag.pt2_compliant_tag,)
    library.define(
        "image_convolution(Tensor images, Tensor weight, int taps, int[] stride, int[] size,"
        " bool last=True) -> Tensor",
        tags=tags,
    )
    library.define(
        "image_weight_parts(Tensor gradient, Tensor images, int taps, int[] window, int[] stride,"
        " int shares) -> Tensor",
        tags=tags,
    )
    library.impl("image_convolution", _convolution, "CompositeExplicitAutograd")
    library.impl("image_weight_parts", _weight_parts, "CompositeExplicitAutograd")
    torch.library.register_fake("gems::image_convolution", _room_for_result, lib=library)
    torch.library.register_fake("gems::image_weight_parts", _room_for_parts, lib=library)


def _room_for_result(
    images: Any, weight: Any, taps: int, stride: Any, size: Any, last: bool = True
) -> Any:
    n, o, (h, w) = images.shape[0], weight.shape[0], size
    strides = (h * w * o, 1, w * o, o) if last else (o * h * w, h * w, w, 1)
    return images.new_empty_strided((n, o, h, w), strides)


def _room_for_parts(
    gradient: Any, images: Any, taps: int, window: Any, stride: Any, shares: int
) -> Any:
    import torch

    shape = (shares, gradient.shape[1], *window, images.shape[1])
    return images.new_empty(shape, dtype=torch.float32)


def _read(images: Any, rows: int, taps: int, stride: Any, size: Any) -> Any:
    """The part of the images that windows reach."""
    down, across = ((n - 1) * s + k for n, s, k in zip(size, stride, (rows, taps), strict=True))
    return images[:, :, :down, :across]


def _convolution(
    images: Any, weight: Any, taps: int, stride: Any, size: Any, last: bool = True
) -> Any:
    import torch

    read = _read(images, weight.shape[2], taps, stride, size)
    out = torch.conv2d(read, weight[..., :taps], stride=stride)
    return _room_for_result(images, weight, taps, stride, size, last).copy_(out)


def _weight_parts(
    gradient: Any, images: Any, taps: int, window: Any, stride: Any, shares: int
) -> Any:
    import torch

    read = _read(images, window[0], taps, stride, gradient.shape[2:])
    weight = images.new_zeros((gradient.shape[1], images.shape[1], window[0], taps))
    how = None, stride, [0, 0], [1, 1], False, [0, 0], 1, (False, True, False)
    found = torch.ops.aten.convolution_backward(gradient, read, weight, *how)[1]
    out = _room_for_parts(gradient, images, taps, window, stride, shares).zero_()
    out[0, :, :, :taps] = found.permute(0, 2, 3, 1)
    return out
