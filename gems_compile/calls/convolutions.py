"""A call of a convolution in eager mode as a graph: of images of few channels, by
``lowering.images``, or depthwise, by ``lowering.depthwise``. All others are cuDNN's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels.target import Target
from ..lowering.overload import find_overload
from .one_node import OneCall, one_node_graph

aten = torch.ops.aten

CONVOLUTIONS = frozenset({aten.convolution.default, aten.convolution_backward.default})
#: ATen's kernel of contiguous images, which its convolution calls on a GPU
DEPTHWISE = find_overload("aten._conv_depthwise2d.default")
#: what a convolution may come to beside our kernels: windows side by side are a product's rows
PRODUCTS = frozenset({"aten.mm.default", "gems.product.default"})


def is_convolution(overload: torch._ops.OpOverload) -> bool:
    return overload in CONVOLUTIONS or overload is DEPTHWISE


def convolution_graph(
    overload: torch._ops.OpOverload,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    target: Target,
) -> OneCall:
    """See ``one_node.one_node_graph``."""
    from ..kernels.fused import register_torch_ops
    from ..lowering.depthwise import found_in, take_depthwise, why_not_depthwise
    from ..lowering.images import replace_images

    register_torch_ops()
    if overload is DEPTHWISE:
        given = _as_convolution(*args, **kwargs)
        if isinstance(given, str):
            return given
        overload, args, kwargs = aten.convolution.default, given, {}
    made = one_node_graph(overload, args, kwargs)
    if isinstance(made, str):
        return made
    gm, many = made[0], target.multiprocessors
    found = found_in(gm.graph)
    if not found:
        return "no convolution in one dim or two"
    if replace_images(gm, many, contiguous=True) or take_depthwise(gm, many):
        return made
    return f"{why_not_depthwise(found[0])}; nor is it one of images of up to 4 channels in 16 bits"


def _as_convolution(
    x: Tensor,
    weight: Tensor,
    kernel_size: Sequence[int],
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[Any, ...] | str:
    """The arguments of ATen's convolution; its result is contiguous only if its images are."""
    if not x.is_contiguous():
        return "images that are not contiguous"
    how = list(stride), list(padding), list(dilation), False, [0, 0], x.shape[1]
    return x, weight, bias, *how
