"""The bias of a convolution is added by the kernel that reads the result.

ATen adds it in a call of its own after cuDNN's, which reads and writes the result once more: a
ninth of a ConvNeXt's time. The numbers are the same: both round the product, then the sum. The
gradient of a bias is a sum over the gradient, which a kernel takes along as well.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from .convolutions import BACKWARD, FORWARD
from .graph import is_tensor, is_view, value_of
from .options import Options
from .rewrite import call_before, call_on_fakes
from .strides import by_kernel, is_channels_last, read_by_kernels

aten = torch.ops.aten


def take_biases_apart(gm: fx.GraphModule, options: Options) -> int:
    """Add biases, and sum their gradients, in nodes of their own; returns how many. On a CPU a
    convolution adds its bias itself: there, only if asked to work as on a GPU."""
    if options.target.device == "cpu" and options.layout != "channels_last":
        return 0
    count = 0
    for node in list(gm.graph.nodes):
        if node.target is FORWARD and _may_add(node):
            _add(gm.graph, node)
            count += 1
        elif node.target is BACKWARD and _may_sum(node):
            _sum(gm.graph, node)
            count += 1
    if count:
        gm.recompile()
    return count


def _may_add(node: fx.Node) -> bool:
    args: Any = node.args
    if args[2] is None or type(value_of(args[2]).shape[0]) is not int:
        return False
    if not _is_plain(node, args[0]):
        return False
    return read_by_kernels(node)  # else ATen adds as well as we do


def _may_sum(node: fx.Node) -> bool:
    """Whether the gradient of a bias is asked for, of a gradient that a kernel computes."""
    args: Any = node.args
    wanted = any(user.args[1] == 2 for user in node.users if user.target is operator.getitem)
    source = args[0]
    while is_view(source) and isinstance(source.args[0], fx.Node):
        source = source.args[0]
    return wanted and args[-1][2] and _is_plain(node, args[1]) and by_kernel(source)


def _is_plain(node: fx.Node, x: fx.Node) -> bool:
    """Whether it is cuDNN's. What is depthwise and not channels-last is a kernel of ATen's, which
    adds the bias before it rounds."""
    value = value_of(x)
    if not is_tensor(value) or value.ndim != 4 or value.dtype == torch.float64:
        return False
    args: Any = node.args
    groups = args[8] if node.target is FORWARD else args[9]
    return groups == 1 or is_channels_last(value)


def _add(graph: fx.Graph, node: fx.Node) -> None:
    args: Any = node.args
    bias, readers = args[2], list(node.users)
    node.args = (*args[:2], None, *args[3:])
    with graph.inserting_after(node):
        column = graph.call_function(aten.view.default, (bias, [1, value_of(bias).shape[0], 1, 1]))
    column.meta = {**node.meta, "val": call_on_fakes(column)}
    with graph.inserting_after(column):
        total = graph.call_function(aten.add.Tensor, (node, column))
    total.meta = {**node.meta, "val": call_on_fakes(total)}
    for reader in readers:
        reader.replace_input_with(node, total)


def _sum(graph: fx.Graph, node: fx.Node) -> None:
    args: Any = node.args
    pick = next(u for u in node.users if u.target is operator.getitem and u.args[1] == 2)
    total = call_before(node, aten.sum.dim_IntList, args[0], [0, 2, 3])
    pick.replace_all_uses_with(total)
    graph.erase_node(pick)
    node.args = (*args[:-1], [*args[-1][:2], False])
    results: Any = node.meta["val"]
    node.meta["val"] = type(results)((*results[:2], None))
