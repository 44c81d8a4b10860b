"""Numbers that Python made into tensors on the CPU, where an op takes a plain number as well."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import _disable_current_modes

from .graph import value_of

aten = torch.ops.aten
#: where ops take a number that Python made into a tensor
_FILLS: dict[Any, int] = {aten.fill.Tensor: 1, aten.index_put.default: 2}


def read_fills(gm: fx.GraphModule) -> int:
    """``fill(x, number on the CPU)`` -> ``fill(x, number)``, of a part (``z[2:] = 7``) or where a
    mask is set (``z[mask] = 7``); returns how many."""
    changed = 0
    for node in gm.graph.nodes:
        place = _FILLS.get(node.target)
        number = node.args[place] if place else None
        if not isinstance(number, fx.Node) or number.op != "get_attr":
            continue
        constant = getattr(gm, str(number.target))
        if constant.device.type != "cpu" or constant.ndim or set(number.users) != {node}:
            continue
        with _disable_current_modes():  # a compile runs under a FakeTensorMode
            value = constant.item()
        if place == 1:
            node.target, node.args = aten.fill.Scalar, (node.args[0], value)
        elif (mask := _whole_mask(node)) is not None:
            node.target, node.args = aten.masked_fill.Scalar, (node.args[0], mask, value)
        else:
            continue
        changed += 1
    return changed


def _whole_mask(node: fx.Node) -> fx.Node | None:
    """The mask that is the only index of an index_put, if it is as large as what it selects of."""
    indices: Any = node.args[1]
    if len(indices) != 1 or len(node.args) > 3:
        return None
    x, mask = value_of(node.args[0]), value_of(indices[0])  # type: ignore[arg-type]
    return indices[0] if mask.dtype == torch.bool and mask.ndim == x.ndim else None
