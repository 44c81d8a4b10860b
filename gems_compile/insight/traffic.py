"""How many bytes of memory a step of a plan moves, and how many eager PyTorch would for the same.

Symbols stand for the sizes that they had when the graph was traced. An element that a view repeats
counts once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils._pytree import tree_leaves

from ..lowering.convolutions import hint
from ..lowering.graph import is_view
from ..lowering.indexing import is_static, size_of
from ..lowering.ir import BITS, Value, base_of
from ..lowering.packed import is_unpacked

Sizes = Mapping[Any, int]


#: ops that read of their first tensor what their places name
PICKING = {
    "aten.embedding.default",
    "aten.gather.default",
    "aten.index.Tensor",
    "aten.index_select.default",
    "aten.take.default",
}


def read_by(
    members: Sequence[Value], inputs: Sequence[Value], stored: Sequence[Value], sizes: Sizes
) -> int:
    """What a kernel of ``members`` that stores some reads of its inputs: of one that only views or
    gathers show, no more than they show; nor of one that is computed where a gather looks."""
    asked = _Asked(members, inputs, stored, sizes)
    total = 0
    for v in dict.fromkeys(inputs):
        whole = asked.whole(v)
        total += min(whole, asked.of(v) or whole) * BITS[v.dtype] // 8
    return total


class _Asked:
    """How many elements of a value a kernel needs."""

    def __init__(
        self,
        members: Sequence[Value],
        inputs: Sequence[Value],
        stored: Sequence[Value],
        sizes: Sizes,
    ) -> None:
        self.stored, self.sizes = set(stored), sizes
        self.users: dict[Value, list[tuple[Value, Value]]] = {}  # base -> (user, what it is shown)
        self.known: dict[Value, int] = {}
        met, todo = set(members) | set(inputs), list(members)
        while todo:
            member = todo.pop()
            for operand in member.inputs:
                base = base_of(operand)
                self.users.setdefault(base, []).append((member, operand))
                if base not in met:  # computed where it is read
                    met.add(base)
                    todo.append(base)

    def whole(self, v: Value) -> int:
        return _elements(v.shape, _strides(v), self.sizes)

    def of(self, v: Value) -> int:
        """Of an operand or a member; 0 if nothing reads it."""
        if v not in self.known:
            shown: dict[Value, int] = {}
            for user, operand in self.users.get(v, ()):
                part = user if _picks(user, operand) else operand
                shown[part] = max(shown.get(part, 0), self._shown(user, operand))
            self.known[v] = sum(shown.values())
        return self.known[v]

    def _shown(self, user: Value, operand: Value) -> int:
        """Of an operand to a user, which is computed in full, or where those look that read it."""
        if _picks(user, operand):
            return self._computed(user)
        part = self.whole(operand)
        return min(part, self._computed(user)) if user.kind in ("pointwise", "cast") else part

    def _computed(self, v: Value) -> int:
        return (
            self.whole(v) if v in self.stored else min(self.whole(v), self.of(v) or self.whole(v))
        )


def _picks(user: Value, operand: Value) -> bool:
    return user.kind == "gather" and operand is user.args[0]


def of_values(values: Iterable[Value], sizes: Sizes) -> int:
    """Of whole tensors."""
    return sum(_elements(v.shape, v.strides, sizes) * BITS[v.dtype] // 8 for v in values)


def _elements(shape: Iterable[Any], strides: Iterable[Any], sizes: Sizes) -> int:
    return math.prod(
        _number(n, sizes) for n, s in zip(shape, strides, strict=True) if not _is_zero(s)
    )


def _strides(v: Value) -> Sequence[Any]:
    """Of a view those of its FakeTensor, which are 0 along dims that repeat."""
    val = None if v.node is None else v.node.meta.get("val")
    if not isinstance(val, Tensor) or val.ndim != v.ndim:
        return v.strides
    return [size_of(s) for s in val.stride()]


def _number(size: Any, sizes: Sizes) -> int:
    return int(size) if is_static(size) else int(size.xreplace(dict(sizes)))


def _is_zero(stride: Any) -> bool:
    return is_static(stride) and int(stride) == 0


def of_node(node: Node) -> tuple[int, int]:
    """(Bytes that its op reads, bytes that it writes) as a call of ATen; none of a view."""
    if is_view(node) or is_unpacked(node):
        return 0, 0
    operands, written = node.all_input_nodes, _of_tensors(node.meta.get("val"))
    read = [_of_tensors(n.meta.get("val")) for n in operands]
    if str(node.target) in PICKING:
        read[0] = min(read[0], written)
    return sum(read), written


def _of_tensors(val: Any) -> int:
    return sum(_of_tensor(t) for t in tree_leaves(val) if isinstance(t, Tensor))


def _of_tensor(t: Tensor) -> int:
    if t.layout != torch.strided:
        return 0
    own = [hint(n) for n, s in zip(t.shape, t.stride(), strict=True) if hint(s) != 0]
    return math.prod(own) * t.element_size()
