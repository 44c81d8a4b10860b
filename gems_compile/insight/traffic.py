"""How many bytes of memory a step of a plan moves, and how many eager PyTorch would for the same.

Symbols stand for the sizes that they had when the graph was traced. An element that a view repeats
counts once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils._pytree import tree_leaves

from ..lowering.convolutions import hint
from ..lowering.graph import is_view
from ..lowering.indexing import is_static
from ..lowering.ir import BITS, Value
from ..lowering.packed import is_unpacked

Sizes = Mapping[Any, int]


def of_values(values: Iterable[Value], sizes: Sizes) -> int:
    """Of what a kernel reads, or writes."""
    return sum(_elements(v.shape, v.strides, sizes) * BITS[v.dtype] // 8 for v in values)


def _elements(shape: Iterable[Any], strides: Iterable[Any], sizes: Sizes) -> int:
    return math.prod(
        _number(n, sizes) for n, s in zip(shape, strides, strict=True) if not _is_zero(s)
    )


def _number(size: Any, sizes: Sizes) -> int:
    return int(size) if is_static(size) else int(size.xreplace(dict(sizes)))


def _is_zero(stride: Any) -> bool:
    return is_static(stride) and int(stride) == 0


def of_node(node: Node) -> tuple[int, int]:
    """(Bytes that its op reads, bytes that it writes) as a call of ATen; none of a view."""
    if is_view(node) or is_unpacked(node):
        return 0, 0
    read = sum(_of_tensors(n.meta.get("val")) for n in node.all_input_nodes)
    return read, _of_tensors(node.meta.get("val"))


def _of_tensors(val: Any) -> int:
    return sum(_of_tensor(t) for t in tree_leaves(val) if isinstance(t, Tensor))


def _of_tensor(t: Tensor) -> int:
    if t.layout != torch.strided:
        return 0
    own = [hint(n) for n, s in zip(t.shape, t.stride(), strict=True) if hint(s) != 0]
    return math.prod(own) * t.element_size()
