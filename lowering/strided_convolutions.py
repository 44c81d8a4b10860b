"""The gradient of images of a convolution of one tap that strides (a ResNet's shortcuts), in
channels-last and 16 bits: a matrix product, between whose pixels there are zeros.

cuDNN writes the zeros as well, three quarters of the result, and whoever adds to it reads them.
Here they are a padding that the reader's kernel does without. 64 images, bfloat16, H200, in us:

    256 -> 512 channels of 56 x 56, stride 2    cuDNN 60, the product 29
    512 -> 1024 of 28 x 28                            43,             24
    1024 -> 2048 of 14 x 14                           36,             23
"""

from __future__ import annotations

import functools
import operator
from typing import Any

import torch
from torch import fx

from . import pointwise_convolutions
from .convolutions import BACKWARD, Convolution, convolution_of
from .graph import same, value_of
from .rewrite import call_before
from .strides import is_channels_last, read_by_kernels

aten = torch.ops.aten


def take_strided(gm: fx.GraphModule) -> int:
    """Replace such gradients, where kernels alone read them; returns how many."""
    nodes = gm.graph.find_nodes(op="call_function", target=BACKWARD)
    found = [c for c in map(convolution_of, nodes) if c is not None and _may_take(c)]
    for conv in found:
        _take(gm.graph, conv)
    if found:
        gm.recompile()
    return len(found)


def _gradient(conv: Convolution) -> fx.Node | None:
    picks = (u for u in conv.node.users if u.target is operator.getitem and u.args[1] == 0)
    return next(picks, None)


def _may_take(conv: Convolution) -> bool:
    given, x, weight = (value_of(n) for n in (*conv.images, conv.weight))
    if weight.dtype not in pointwise_convolutions.DTYPES:
        return False
    if weight.device.type not in pointwise_convolutions.DEVICES:
        return False
    sizes = [*x.shape[1:], *weight.shape, *given.shape[2:]]
    if not all(type(n) is int and n > 0 for n in sizes) or same(given.shape[0], 0):
        return False
    if (weight.stride(0), weight.stride(1)) != (weight.shape[1], 1):
        return False
    plain = conv.groups == 1 and not conv.transposed and not any(conv.padding)
    if not plain or list(weight.shape[2:]) != [1, 1] or max(conv.stride) == 1:
        return False
    node = _gradient(conv)
    if node is None or not all(map(is_channels_last, (given, x, value_of(node)))):
        return False
    return read_by_kernels(node)


def _take(graph: fx.Graph, conv: Convolution) -> None:
    node: Any = _gradient(conv)
    _, _, height, width = value_of(node).shape
    written, read = (int(n) for n in value_of(conv.weight).shape[:2])
    lines, columns = (int(n) for n in value_of(conv.images[0]).shape[2:])
    down, across = conv.stride
    call = functools.partial(call_before, conv.node)
    given = call(aten.permute.default, conv.images[0], [0, 2, 3, 1])
    matrix = call(aten.view.default, conv.weight, [written, read])
    product = call(aten.mm.default, call(aten.view.default, given, [-1, written]), matrix)
    apart = call(aten.view.default, product, [-1, lines, 1, columns, 1, read])
    zeros = [0, 0, 0, across - 1, 0, 0, 0, down - 1]
    whole = call(aten.constant_pad_nd.default, apart, zeros)
    whole = call(aten.view.default, whole, [-1, lines * down, columns * across, read])
    for axis, size in ((1, height), (2, width)):  # there may be no row behind the last window
        if value_of(whole).shape[axis] != size:
            whole = call(aten.slice.Tensor, whole, axis, 0, size)
    whole = call(aten.permute.default, whole, [0, 3, 1, 2])
    whole = call(aten.clone.default, whole, memory_format=torch.channels_last)
    node.replace_all_uses_with(whole)
    graph.erase_node(node)
    if not any(conv.wanted[1:]):
        graph.erase_node(conv.node)
        return
    args: Any = conv.node.args
    conv.node.args = (*args[:-1], [False, *args[-1][1:]])
    results: Any = conv.node.meta["val"]
    conv.node.meta["val"] = type(results)((None, *results[1:]))
