"""Updates that are kernels in which every place looks if it is meant (``kernels.scatter``)."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..kernels import load_ops
from ..kernels.op import OPS
from .graph import value_of
from .indexing import size_of
from .ir import dtype_name
from .overload import name_of
from .translate import schema_args


def looks(node: fx.Node) -> bool:
    """Whether every place looks if an element of the update, or the mask's value, is for it."""
    load_ops()
    op = OPS.get(name_of(node.target))
    if op is None or op.declines is None:
        return False
    args: Any = fx.map_arg(tuple(schema_args(node)), _shape_of)
    return op.declines(*args) is None


def _shape_of(node: fx.Node) -> Any:
    return _Shape(value_of(node))


class _Shape:
    """What an op's ``declines`` asks of a tensor."""

    def __init__(self, value: torch.Tensor) -> None:
        self.shape, self.ndim = tuple(map(size_of, value.shape)), value.ndim
        self.dtype = dtype_name(value.dtype)
