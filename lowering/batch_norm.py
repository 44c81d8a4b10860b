"""Batch norm in a joint graph: its statistics, and their application, which costs no memory twice.

Backward needs the input and the statistics anyhow. What else it asks for, the normalized values or
on which side of zero they are (a ReLU's gradient), is computed from those again: the partitioner
need not save it, and the kernels of the backward read a tensor less.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from .graph import value_of

APPLY = "gems.batch_norm_apply.default"
aten = torch.ops.aten
_SAME = (aten.detach.default, aten.alias.default)


def take_batch_norms_apart(joint: GraphModule) -> int:
    """Apply the statistics of each training batch norm by an op of its own, and let its gradient
    read no more than it needs; returns what was changed."""
    count = _forget_running_statistics(joint)
    for node in joint.graph.find_nodes(
        op="call_function", target=aten._native_batch_norm_legit_functional.default
    ):
        picks = {user.args[1]: user for user in node.users}
        if node.args[5] is True and {0, 1, 2} <= set(picks) and _is_wide(node, picks[1]):
            _compare_before_relu(_apply_apart(joint, node, picks))
            count += 1
    if count:
        joint.recompile()
    return count


def _forget_running_statistics(joint: GraphModule) -> int:
    """In training the gradient reads the batch's own statistics: the running ones, which it is
    handed as well, would be saved for it."""
    count = 0
    for node in joint.graph.find_nodes(
        op="call_function", target=aten.native_batch_norm_backward.default
    ):
        grad, x, weight, _, _, mean, rstd, train, *rest = node.args
        if train is True:
            node.args = (grad, x, weight, None, None, mean, rstd, train, *rest)
            count += 1
    return count


def _is_wide(norm: Node, mean: Node) -> bool:
    """Whether the saved statistics are what the forward computes with, not rounded."""
    x: Any = norm.args[0]
    wide = torch.promote_types(value_of(x).dtype, torch.float32)
    return value_of(mean).dtype == wide


def _apply_apart(joint: GraphModule, norm: Node, picks: dict[Any, Node]) -> Node:
    x, weight, bias = norm.args[:3]
    y, mean, rstd = (picks[k] for k in range(3))
    for pick in (rstd, mean, y):  # they may be picked one by one, where they are first read
        norm.append(pick)
    with joint.graph.inserting_after(rstd):
        apply = joint.graph.call_function(
            torch.ops.gems.batch_norm_apply.default, (x, mean, rstd, weight, bias)
        )
    apply.meta = dict(y.meta)
    y.replace_all_uses_with(apply)
    joint.graph.erase_node(y)
    return apply


def _compare_before_relu(y: Node) -> None:
    """Let the gradients of ReLUs of y look at y: it is above zero where they are."""
    for relu in [u for u in y.users if u.target is aten.relu.default]:
        stack = [relu]
        while stack:
            same = stack.pop()
            for user in list(same.users):
                if user.target in _SAME:
                    stack.append(user)
                elif _is_gradient(user, same):
                    user.replace_input_with(same, y)


def _is_gradient(node: Node, relu: Node) -> bool:
    if node.target is not aten.threshold_backward.default:
        return False
    args: Any = node.args
    return args[1] is relu and args[0] is not relu and bool(args[2] == 0)
