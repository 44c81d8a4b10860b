"""Matrix products whose rows begin at odd addresses: cuBLAS takes several times as long for them.

A vocabulary of 50257 makes three of them a training step: the logits, and both products that read
the logits' gradient. Here logits are written with padded rows, and so is what a kernel computes for
a product to read; nothing is copied but a result that leaves the graph. ``gems::product`` takes the
odd ends of dims apart.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from ..kernels.product import VECTOR, odd_dim, padded
from .graph import is_tensor, is_view, mutated_arguments, output_node, value_of
from .rewrite import call_on_fakes
from .translate import op_of

aten = torch.ops.aten

#: multiplications from which on a product is worth it
LEAST = 2**28
_OPERANDS = {aten.mm.default: (0, 1), aten.addmm.default: (1, 2)}


def align_products(gm: fx.GraphModule) -> int:
    """Pad the rows of 16-bit products' results and operands; returns how much was changed."""
    changed = 0
    for node in list(gm.graph.nodes):
        if node.target in _OPERANDS and _is_large(node):
            changed += sum(_align_operand(gm.graph, node, k) for k in _OPERANDS[node.target])
            changed += _align_product(gm.graph, node)
    if changed:
        gm.graph.eliminate_dead_code()
        gm.recompile()
    return changed


def _operands(product: fx.Node) -> list[Any]:
    places = _OPERANDS[product.target]  # type: ignore[index]
    return [value_of(product.args[k]) for k in places]  # type: ignore[arg-type]


def _is_large(product: fx.Node) -> bool:
    """Whether it multiplies much; a size that varies is taken to be large."""
    a, b = _operands(product)
    sizes = (*a.shape, b.shape[1])
    fixed = [n for n in sizes if type(n) is int]
    return a.element_size() == 2 and (len(fixed) < len(sizes) or math.prod(fixed) >= LEAST)


def _align_operand(graph: fx.Graph, product: fx.Node, place: int) -> bool:
    """Let a product, and all else that reads it, read a padded copy of what a kernel computes: that
    kernel writes it so."""
    base: Any = product.args[place]
    if _is_aligned(value_of(base)):
        return False
    while is_view(base) and isinstance(base.args[0], fx.Node):
        base = base.args[0]
    if op_of(base.target) is None or not _has_odd_rows(value_of(base)):
        return False
    readers = [user for user in base.users if user.op != "output"]
    with graph.inserting_after(base):
        copy = graph.call_function(torch.ops.gems.aligned_rows.default, (base,))
    copy.meta = dict(base.meta)
    for reader in readers:
        reader.replace_input_with(base, copy)
    family = _family(copy)
    if any(_leaves(node) for node in family) or not _revalued(family):
        for reader in readers:
            reader.replace_input_with(copy, base)
        graph.erase_node(copy)
        return False
    return True


def _align_product(graph: fx.Graph, product: fx.Node) -> bool:
    """Write a product with padded rows, if views are all that shares its memory, and without its
    odd ends. One of the views may leave the graph, as a copy in the layout that it had."""
    operands, value = _operands(product), value_of(product)
    if product.target is not aten.mm.default:
        return False  # an addend is added to the rounded product where rows are padded
    if not all(map(_is_aligned, operands)) or odd_dim(*operands) is None:
        return False
    family = _family(product)
    leaving = [node for node in family if _leaves(node)]
    odd = _has_odd_rows(value)
    if odd and (len(leaving) > 1 or not all(value_of(v).is_contiguous() for v in leaving)):
        return False
    target, args = product.target, product.args
    stride = padded(value.shape[1], value.element_size()) if odd else value.shape[1]
    product.target = torch.ops.gems.product.default
    product.args = (*args, stride)
    if not _revalued(family):
        product.target, product.args = target, args
        return False
    output = output_node(graph)
    for node in leaving if odd else ():
        with graph.inserting_before(output):
            copy = graph.call_function(aten.clone.default, (node,))
        copy.kwargs = {"memory_format": torch.contiguous_format}
        copy.meta = {**node.meta, "val": call_on_fakes(copy)}
        output.replace_input_with(node, copy)
    return True


def _family(node: fx.Node) -> list[fx.Node]:
    """The node and the views of it, each after what it is a view of."""
    family = [node]
    for member in family:
        family.extend(u for u in member.users if is_view(u) and u.args[0] is member)
    return family


def _leaves(node: fx.Node) -> bool:
    return any(user.op == "output" for user in node.users)


def _revalued(family: list[fx.Node]) -> bool:
    """Give all of them the layouts that they have now, or change nothing: a view that padded rows
    do not have, or memory that is written."""
    if any(node in mutated_arguments(user) for node in family for user in node.users):
        return False
    before = [value_of(node) for node in family]
    try:
        for node in family:
            node.meta["val"] = call_on_fakes(node)
    except (RuntimeError, ValueError):  # a fake view that cannot be
        for node, value in zip(family, before, strict=True):
            node.meta["val"] = value
        return False
    return True


# ------------------------------------------------------------------------------------- layouts


def _is_aligned(matrix: torch.Tensor) -> bool:
    """Whether one stride is 1 and the other, and the start, are multiples of 16 bytes."""
    places: list[Any] = [s for s in matrix.stride() if type(s) is not int or s != 1]
    places.append(matrix.storage_offset())
    unit = VECTOR // matrix.element_size()
    return all(type(n) is not int or n % unit == 0 for n in places)


def _has_odd_rows(value: Any) -> bool:
    """Whether it is contiguous with rows of a fixed length that is no multiple of 16 bytes."""
    if not is_tensor(value) or value.ndim < 2 or type(value.shape[-1]) is not int:
        return False
    odd = value.shape[-1] * value.element_size() % VECTOR != 0
    return odd and value.shape[-1] > 1 and value.is_contiguous()
