"""Products of matrices that kernels of our own compute, with what surrounds them.

A product of one row and a matrix is a reduction: it reads the matrix once, at the speed of memory,
and takes a residual or SwiGLU's gate along. A step of decoding is made of such products. As calls
of cuBLAS each is a launch and some ten us of the host's time, and what they give to each other goes
through memory.

A product of one column and one row, as of rotary embeddings' positions and frequencies, is a
multiplication: each sum has one term.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .graph import calls_of, value_of

aten = torch.ops.aten

#: terms from which on a row fills a program
FEWEST = 256


def reduce_row_products(gm: fx.GraphModule, device: torch.device) -> int:
    """``mm`` of one row and of the transpose of a matrix whose rows are contiguous, in 16 bits, as
    ``gems::row_product``; returns how many."""
    count = 0
    for node in gm.graph.find_nodes(op="call_function", target=aten.mm.default):
        if _is_row_product(node, device):
            node.target = torch.ops.gems.row_product.default
            count += 1
    if count:
        gm.recompile()
    return count


def multiply_outer_products(gm: fx.GraphModule, device: torch.device) -> int:
    """``mm`` and ``bmm`` whose sums have one term as ``mul``, of the same rounding (of a finer one
    where cuBLAS may use TF32); returns how many."""
    found = [node for node in calls_of(gm.graph, _PRODUCTS) if _is_outer_product(node, device)]
    for node in found:
        node.target = aten.mul.Tensor
    if found:
        gm.recompile()
    return len(found)


_PRODUCTS = (aten.mm.default, aten.bmm.default)


def _is_outer_product(node: fx.Node, device: torch.device) -> bool:
    args: Any = node.args
    column, row = map(value_of, args)
    terms = column.shape[-1]
    if column.device != device or not column.is_floating_point() or type(terms) is not int:
        return False
    # of factors that lie otherwise a multiplication's result may
    return terms == 1 and column.is_contiguous() and row.is_contiguous()


def _is_row_product(node: fx.Node, device: torch.device) -> bool:
    args: Any = node.args
    row, matrix = map(value_of, args)
    if row.device != device or row.dtype not in (torch.bfloat16, torch.float16):
        return False
    sizes = [*row.shape, *matrix.shape]
    if any(type(n) is not int for n in sizes) or row.shape[0] != 1 or row.shape[1] < FEWEST:
        return False
    turned = matrix.stride(0) == 1 and matrix.stride(1) == matrix.shape[0]
    return bool(turned and row.stride(1) == 1 and matrix.shape[1] > 0)
