"""Strides of tensors, and of the results of ops that are called with others than they were traced
with."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from .convolutions import hint
from .graph import all_same, is_tensor, is_view, mutated_arguments, same
from .translate import op_of

#: packets whose results do not depend on strides, and that take any; with pointwise ops and sums
_FOLLOW = frozenset(
    {
        "alias",
        "detach",
        "view",
        "_unsafe_view",
        "reshape",
        "expand",
        "permute",
        "transpose",
        "t",
        "slice",
        "select",
        "squeeze",
        "unsqueeze",
        "split",
        "split_with_sizes",
        "unsafe_split",
        "unbind",
        "cat",
        "stack",
        "constant_pad_nd",
        "clone",
        "_to_copy",
        "mm",
        "bmm",
        "addmm",
        "baddbmm",
        "_native_batch_norm_legit_functional",
        "_native_batch_norm_legit_no_training",
        "native_batch_norm_backward",
        "batch_norm_apply",
        "native_layer_norm",
        "native_layer_norm_backward",
        "max_pool2d_with_indices",
        "max_pool2d_with_indices_backward",
        "avg_pool2d",
        "avg_pool2d_backward",
        "_adaptive_avg_pool2d",
        "_adaptive_avg_pool2d_backward",
        "upsample_nearest2d",
        "upsample_nearest2d_backward",
        "upsample_bilinear2d",
        "upsample_bilinear2d_backward",
    }
)
_BATCH_NORMS = frozenset(n for n in _FOLLOW if "batch_norm" in n)


def is_channels_last(tensor: Any) -> bool:
    """Whether a 4-d tensor is dense in channels-last for all sizes that the graph may have."""
    if not is_tensor(tensor) or tensor.ndim != 4:
        return False
    _, c, h, w = tensor.shape
    expected = (h * w * c, 1, w * c, c)
    pairs = zip(tensor.shape, tensor.stride(), expected, strict=True)
    return all(same(s, e) or same(n, 1) for n, s, e in pairs)


def follows(node: fx.Node) -> bool:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or any(mutated_arguments(node)):
        return False
    if torch.Tag.nondeterministic_seeded in target.tags:
        return False  # which numbers are drawn where follows memory
    op = op_of(target)
    plain = op is not None and op.kind in ("pointwise", "reduction")
    return plain or target._opname in _FOLLOW or torch.Tag.pointwise in target.tags


def result_of_alike(node: fx.Node, operands: list[Any]) -> Any:
    """What a pointwise op or a batch norm returns whose whole operands are all channels-last; None
    of others. (A fake call takes as long as all else about a node, a batch norm's ten times.)"""
    target: Any = node.target
    op = op_of(target)
    plain = op is not None and op.kind == "pointwise" and "memory_format" not in node.kwargs
    if not plain and target._opname not in _BATCH_NORMS:
        return None
    value: Any = node.meta["val"]
    first = value[0] if isinstance(value, (tuple, list)) else value
    whole = [t for t in operands if is_tensor(t) and t.shape == first.shape]
    if not whole or not all(map(is_channels_last, whole)):
        return None
    if not isinstance(value, (tuple, list)):
        return _in_channels_last(value)
    return type(value)(
        _in_channels_last(v) if is_tensor(v) and v.shape == first.shape else v for v in value
    )


def _in_channels_last(value: torch.Tensor) -> torch.Tensor:
    n, c, h, w = value.shape
    with value.fake_mode, torch.no_grad():  # type: ignore[attr-defined]
        return value.new_empty_strided((n, c, h, w), (h * w * c, 1, w * c, c))


def by_kernel(node: fx.Node) -> bool:
    """Whether kernels of ours compute the node, as far as the declarations tell."""
    while node.target is operator.getitem:
        source: Any = node.args[0]
        node = source
    return node.op == "call_function" and op_of(node.target) is not None


def read_by_kernels(node: fx.Node) -> bool:
    """Whether kernels alone read a node, or views of it."""
    return all(
        read_by_kernels(reader)
        if is_view(reader)
        else reader.op == "call_function" and by_kernel(reader)
        for reader in node.users
    )


def same_strides(a: Any, b: Any) -> bool:
    """Strictly: strides of axes with one element are seen by who asks for them."""
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(map(same_strides, a, b))
    return not is_tensor(a) or not is_tensor(b) or all_same(a.stride(), b.stride())


def same_but_ones(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether all that differs is the strides of axes of one element."""
    pairs = zip(a.shape, a.stride(), b.stride(), strict=True)
    fixed = all(type(n) is int for n in a.shape)
    return fixed and all(n == 1 or same(s, t) for n, s, t in pairs)


def order_of_axes(tensor: torch.Tensor) -> list[int] | None:
    """The axes from the outermost to the innermost; None where they leave gaps, or share memory."""
    order = sorted(range(tensor.ndim), key=lambda k: -hint(tensor.stride(k)))
    step: Any = 1
    for k in reversed(order):
        if not same(tensor.shape[k], 1) and not same(tensor.stride(k), step):
            return None
        step = step * tensor.shape[k]
    return order


def is_contiguous(tensor: torch.Tensor) -> bool:
    step: Any = 1
    for n, s in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        if not same(s, step):
            return False
        step = step * n
    return True
