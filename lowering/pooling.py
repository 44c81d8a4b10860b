"""Max pooling as kernels of our own, which tell places within their windows: see ``kernels.pool``.

ATen's indices of a ResNet's pooling take 98 MB of the 2.7 GB that a training step saves, and its
backward asks for the pooled tensor besides, of which it reads the size alone.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch._prims_common import suggest_memory_format

from ..kernels.pool import MOST_TAPS
from .graph import is_tensor, value_of

aten = torch.ops.aten
FORWARD, BACKWARD = (
    aten.max_pool2d_with_indices.default,
    aten.max_pool2d_with_indices_backward.default,
)
#: of stride, padding, dilation, ceil
_DEFAULTS: tuple[Any, ...] = ([], [0, 0], [1, 1], False)


def take_poolings(gm: fx.GraphModule) -> int:
    """Replace max poolings whose indices nobody reads but their backward; returns how many. The
    graph is the one before it is split, or one of inference."""
    found = gm.graph.find_nodes(op="call_function", target=FORWARD)
    count = sum(_take(gm.graph, node) for node in found)
    if count:
        gm.recompile()
    return count


def _take(graph: fx.Graph, node: fx.Node) -> bool:
    args: Any = node.args
    how = _how(args[1:])
    if node.kwargs or how is None or not _may_take(value_of(args[0]), how):
        return False
    parts = {user.args[1]: user for user in node.users if user.target is operator.getitem}
    backwards = list(parts[1].users) if 1 in parts else []
    if len(parts) < len(node.users) or not all(_is_its_backward(b, node, how) for b in backwards):
        return False
    values = node.meta["val"][0]
    if not values.is_contiguous(memory_format=suggest_memory_format(value_of(args[0]))):
        return False  # another layout is promised to whoever reads it
    with values.fake_mode:  # as ``gems::max_pool2d`` would, in a fraction of the time
        node.meta["val"] = values, torch.empty_like(values, dtype=torch.int8)
    node.target, node.args = torch.ops.gems.max_pool2d.default, (args[0], *how)
    if 1 in parts:
        parts[1].meta["val"] = node.meta["val"][1]
    for backward in backwards:
        given: Any = backward.args
        size = list(value_of(args[0]).shape[-2:])
        backward.target = torch.ops.gems.max_pool2d_backward.default
        backward.args = (given[0], parts[1], size, *how)
    return True


def _how(args: Any) -> tuple[Any, ...] | None:
    """(kernel, stride, padding, ceil), in pairs; None where a size is a symbol, or for windows with
    gaps."""
    given: tuple[Any, ...] = (*args, *_DEFAULTS[len(args) - 1 :])
    kernel, stride, padding, dilation, ceil = given
    pairs = [list(kernel), list(stride) or list(kernel), list(padding), list(dilation)]
    pairs = [pair * 2 if len(pair) == 1 else pair for pair in pairs]
    if not all(type(n) is int for pair in pairs for n in pair) or pairs.pop() != [1, 1]:
        return None
    return (*pairs, bool(ceil))


def _may_take(x: Any, how: tuple[Any, ...]) -> bool:
    if not is_tensor(x) or not x.dtype.is_floating_point or x.ndim not in (3, 4):
        return False
    static = all(type(n) is int and n > 0 for n in x.shape[-2:])
    return static and how[0][0] * how[0][1] <= MOST_TAPS


def _is_its_backward(reader: fx.Node, node: fx.Node, how: tuple[Any, ...]) -> bool:
    """Whether the reader is the backward of this very pooling, of a gradient of its layout."""
    if reader.target is not BACKWARD or reader.kwargs:
        return False
    args: Any = reader.args
    if args[1] is not node.args[0] or _how(args[2:7]) != how or args[7].args[0] is not node:
        return False
    given, made = value_of(args[0]), value_of(reader)
    layout = torch.channels_last
    if given.ndim != 4 or not made.is_contiguous(memory_format=layout):
        return bool(made.is_contiguous())
    return bool(given.is_contiguous(memory_format=layout))
