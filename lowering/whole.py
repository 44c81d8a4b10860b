"""Kernels that are written as a whole, for which reading and writing element by element is not
enough. They are groups of one value, or of the results of one call, which nothing joins."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch

from ..kernels.target import Target
from . import attention, bag_kernels, depthwise_kernels, image_kernels, sorting
from .group import Group
from .indexing import size_of
from .ir import FURTHER, Declined, Value, dtype_name
from .options import Options
from .source import Source


class Whole(NamedTuple):
    """``facts``: what the kernel must know of a call's arguments; ``write``: its text, of the
    call's results."""

    facts: Callable[..., Any]
    write: Callable[[Sequence[Value], Target], Source]


def _of_one(
    write: Callable[[Value, Target], Source],
) -> Callable[[Sequence[Value], Target], Source]:
    return lambda values, target: write(values[0], target)


#: of one result, by the overload: the facts of its arguments, and what writes its value
_OF_ONE: dict[str, tuple[Callable[..., Any], Callable[[Value, Target], Source]]] = {
    "gems.bag_of_each.default": (bag_kernels.of_each, bag_kernels.each),
    "gems.bag_sizes.default": (bag_kernels.of_sizes, bag_kernels.sizes),
    "gems.depthwise_convolution.default": (
        depthwise_kernels.of_convolution,
        depthwise_kernels.convolution,
    ),
    "gems.depthwise_weight_parts.default": (
        depthwise_kernels.of_weight_parts,
        depthwise_kernels.weight_parts,
    ),
    "gems.embedding_bags.default": (bag_kernels.of_bags, bag_kernels.bags),
    "gems.image_convolution.default": (image_kernels.of_convolution, image_kernels.convolution),
    "gems.image_weight_parts.default": (image_kernels.of_weight_parts, image_kernels.weight_parts),
    "gems.row_order.default": (sorting.of_rows, sorting.rows),
}
#: by the overload
WHOLE = {name: Whole(facts, _of_one(write)) for name, (facts, write) in _OF_ONE.items()} | {
    "gems.attention.default": Whole(attention.of_forward, attention.forward),
    "gems.attention_keys.default": Whole(attention.of_backward, attention.backward_keys),
    "gems.attention_queries.default": Whole(attention.of_backward, attention.backward_queries),
}


def lower_whole(name: str, args: Sequence[Any], results: Sequence[torch.Tensor]) -> list[Value]:
    """The values that a call of one of ``WHOLE`` returns."""
    operands = [a for a in args if isinstance(a, Value)]
    if any(a.kind in ("view", "full", "iota") for a in operands):
        raise Declined("its kernel reads tensors that lie in memory as they are")
    params = WHOLE[name].facts(*args)
    values: list[Value] = []
    for result in results:
        shape, strides = ([size_of(n) for n in ns] for ns in (result.shape, result.stride()))
        given = (values[:1], FURTHER) if values else (operands, params)
        dtype = dtype_name(result.dtype)
        values.append(
            Value("whole", name, given[0], shape, dtype, params=given[1], strides=strides)
        )
    return values


def whole_source(group: Group, options: Options, written: Collection[Value]) -> Source:
    """The text of such a group's kernel. ``written``: memory that ATen writes."""
    source = WHOLE[str(group.members[0].op)].write(group.members, options.target)
    unaligned = [n for n, role, what in source.params if role == "in" and what in written]
    source.meta.update(exact=options.exact, unaligned=unaligned)
    return source
