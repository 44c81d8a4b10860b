"""Depthwise convolutions in one dim or two, and their gradients, as kernels of our own.

ATen has a kernel for contiguous images, and takes cuDNN's in channels-last. Both read a window's
elements from the cache once for each result. 64 images of 96 x 56 x 56, 7 x 7, bfloat16, H200, in
us (ATen, these; 77 MB at full bandwidth are 17, the multiplications 30):

    contiguous      forward 666, 70    backward 2199, 156
    channels-last           152, 79               458, 201
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from .convolutions import BACKWARD, FORWARD, Convolution
from .depthwise_kernels import MOST_TAPS, Windows, shares_of, windows_of
from .graph import value_of
from .rewrite import call_before
from .strides import is_channels_last, is_contiguous

aten = torch.ops.aten

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
#: how far apart windows may be where the gradient of images is asked for: a lane's tile of results
#: is a multiple of it
MOST_STRIDE = 2


def found_in(graph: fx.Graph) -> list[Convolution]:
    """Those in one dim or two, and their backward."""
    nodes = [node for node in graph.nodes if node.target in (FORWARD, BACKWARD)]
    return [conv for conv in map(Convolution, nodes) if value_of(conv.input).ndim in (3, 4)]


def why_not_depthwise(conv: Convolution) -> str | None:
    """Why a convolution is not ours, or None."""
    x, weight = value_of(conv.input), value_of(conv.weight)
    if conv.transposed or not conv.groups == x.shape[1] == weight.shape[0]:
        return "it is not depthwise"
    if {x.dtype, weight.dtype} - {*DTYPES} or x.dtype != weight.dtype:
        return f"a depthwise convolution of {x.dtype}"
    made = value_of(conv.images[0]) if conv.backward else value_of(conv.node)
    sizes = (*x.shape, *weight.shape, *made.shape)
    if not all(type(n) is int and n > 0 for n in sizes):
        return "a depthwise convolution of no elements, or of sizes that vary"
    if (taps := math.prod(weight.shape[2:])) > MOST_TAPS:
        return f"a window of {taps} taps: ours have at most {MOST_TAPS}"
    if conv.backward and conv.wanted[0] and max(conv.stride) > MOST_STRIDE:
        return f"the gradient of images with a stride above {MOST_STRIDE}"
    return None


def take_depthwise(gm: fx.GraphModule, multiprocessors: int) -> int:
    """Replace depthwise convolutions and their gradients; returns how many."""
    taken = [conv for conv in found_in(gm.graph) if why_not_depthwise(conv) is None]
    for conv in taken:
        _Depthwise(conv, multiprocessors).take()
    if taken:
        gm.recompile()
    return len(taken)


class _Depthwise:
    """The edit of one convolution, in the layout of its result, or of its images."""

    def __init__(self, conv: Convolution, multiprocessors: int) -> None:
        self.conv, self.multiprocessors = conv, multiprocessors
        (made,) = conv.results
        shown = value_of(conv.input) if made is None else made
        self.last = is_channels_last(shown) and not is_contiguous(shown)
        dims = value_of(conv.input).ndim - 2
        self.how = conv.stride[:dims], conv.padding[:dims], conv.dilation[:dims]

    def take(self) -> None:
        conv = self.conv
        results = self._gradients() if conv.backward else {0: self._forward()}
        nodes = [conv.node]
        if conv.backward:
            nodes = list(conv.node.users)
        for node in nodes:
            new = results[node.args[1] if conv.backward else 0]  # type: ignore[index]
            node.replace_all_uses_with(new)
            conv.node.graph.erase_node(node)
        if conv.backward:
            conv.node.graph.erase_node(conv.node)

    def _forward(self) -> fx.Node:
        conv = self.conv
        size = list(value_of(conv.node).shape[2:])
        bias = conv.bias if conv.bias is None else self._dense(conv.bias)
        return self._convolution(self._images(conv.input), bias, size, False)

    def _gradients(self) -> dict[int, fx.Node]:
        conv, results = self.conv, {}
        gradient = self._images(conv.images[0])
        if conv.wanted[0]:
            size = list(value_of(conv.input).shape[2:])
            results[0] = self._convolution(gradient, None, size, True)
        if conv.wanted[1]:
            results[1] = self._weight_gradient(gradient)
        if conv.wanted[2]:
            others = [k for k in range(value_of(gradient).ndim) if k != 1]
            results[2] = self._call(aten.sum.dim_IntList, gradient, others)
        return results

    def _convolution(self, x: fx.Node, bias: fx.Node | None, size: list[int], back: bool) -> Any:
        target = torch.ops.gems.depthwise_convolution.default
        return self._call(target, x, self._weight(), bias, *self.how, size, back, self.last)

    def _weight_gradient(self, gradient: fx.Node) -> fx.Node:
        weight = value_of(self.conv.weight)
        images = self._images(self.conv.input)
        shares = shares_of(self._windows(), self.multiprocessors)
        target = torch.ops.gems.depthwise_weight_parts.default
        how = list(weight.shape[2:]), *self.how, shares, self.last
        parts = self._call(target, gradient, images, *how)
        whole = self._call(aten.sum.dim_IntList, parts, [0])
        whole = self._call(aten._to_copy.default, whole, dtype=weight.dtype)
        if self.last:
            whole = self._call(aten.permute.default, whole, [1, 0])
            whole = self._call(aten.clone.default, whole, memory_format=torch.contiguous_format)
        return self._call(aten.view.default, whole, list(weight.shape))

    def _windows(self) -> Windows:
        conv = self.conv
        shape, made = value_of(conv.input).shape, value_of(conv.images[0]).shape[2:]
        return windows_of(shape, made, value_of(conv.weight).shape[2:], *self.how, self.last)

    # operands as the kernels read them -----------------------------------------------------------

    def _images(self, x: fx.Node) -> fx.Node:
        """A copy where they lie otherwise, as ATen makes one."""
        if (is_channels_last if self.last else is_contiguous)(value_of(x)):
            return x
        layout = torch.channels_last if self.last else torch.contiguous_format
        return self._call(aten.clone.default, x, memory_format=layout)

    def _weight(self) -> fx.Node:
        weight = self.conv.weight
        if not self.last:
            return self._dense(weight)
        turned = self._call(aten.permute.default, weight, [2, 3, 1, 0])
        return self._call(aten.clone.default, turned, memory_format=torch.contiguous_format)

    def _dense(self, x: fx.Node) -> fx.Node:
        value, step = value_of(x), 1
        for size, stride in zip(reversed(value.shape), reversed(value.stride()), strict=True):
            if size != 1 and stride != step:
                return self._call(aten.clone.default, x, memory_format=torch.contiguous_format)
            step *= size
        return x

    def _call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return call_before(self.conv.node, target, *args, **kwargs)
