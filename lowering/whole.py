"""Kernels that are written as a whole, for which reading and writing element by element is not
enough. They are groups of one value, which nothing joins."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch

from ..kernels.target import Target
from . import bag_kernels, depthwise_kernels, image_kernels, sorting
from .group import Group
from .indexing import size_of
from .ir import Declined, Value, dtype_name
from .options import Options
from .source import Source


class Whole(NamedTuple):
    """``facts``: what the kernel must know of a call's arguments; ``write``: its text."""

    facts: Callable[..., Any]
    write: Callable[[Value, Target], Source]


#: by the overload
WHOLE = {
    "gems.bag_of_each.default": Whole(bag_kernels.of_each, bag_kernels.each),
    "gems.bag_sizes.default": Whole(bag_kernels.of_sizes, bag_kernels.sizes),
    "gems.depthwise_convolution.default": Whole(
        depthwise_kernels.of_convolution, depthwise_kernels.convolution
    ),
    "gems.depthwise_weight_parts.default": Whole(
        depthwise_kernels.of_weight_parts, depthwise_kernels.weight_parts
    ),
    "gems.embedding_bags.default": Whole(bag_kernels.of_bags, bag_kernels.bags),
    "gems.image_convolution.default": Whole(
        image_kernels.of_convolution, image_kernels.convolution
    ),
    "gems.image_weight_parts.default": Whole(
        image_kernels.of_weight_parts, image_kernels.weight_parts
    ),
    "gems.row_order.default": Whole(sorting.of_rows, sorting.rows),
}


def lower_whole(name: str, args: Sequence[Any], result: torch.Tensor) -> Value:
    """The value that a call of one of ``WHOLE`` is."""
    operands = [a for a in args if isinstance(a, Value)]
    if any(a.kind in ("view", "full", "iota") for a in operands):
        raise Declined("its kernel reads tensors that lie in memory as they are")
    params = WHOLE[name].facts(*args)
    shape, strides = ([size_of(n) for n in ns] for ns in (result.shape, result.stride()))
    dtype = dtype_name(result.dtype)
    return Value("whole", name, operands, shape, dtype, params=params, strides=strides)


def whole_source(group: Group, options: Options, written: Collection[Value]) -> Source:
    """The text of such a group's kernel. ``written``: memory that ATen writes."""
    (value,) = group.members
    source = WHOLE[str(value.op)].write(value, options.target)
    unaligned = [n for n, role, what in source.params if role == "in" and what in written]
    source.meta.update(exact=options.exact, unaligned=unaligned)
    return source
