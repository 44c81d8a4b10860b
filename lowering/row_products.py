"""A product of one row and a matrix is a reduction of our own: it reads the matrix once, at the
speed of memory, and takes what surrounds it along (a residual, SwiGLU's gate).

A step of decoding is made of such products. As calls of cuBLAS each is a launch and some ten us of
the host's time, and what they give to each other goes through memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .graph import value_of

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
