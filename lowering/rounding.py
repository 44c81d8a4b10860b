"""Which values of a kernel are seen only after a rounding to 16 bits.

A 16-bit float keeps 8 or 11 bits. What a float32 value is computed with may then have errors of a
few units in its 24th bit, and cost a third: the other bodies of some ops (``Op.quick``).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

from .group import Group
from .ir import SIXTEEN_BIT, Value
from .translate import op_of

#: a float32 exp that a program asks for by name stays as exact as eager's
_OURS_ONLY = ("exp",)


class Rounding:
    """``computes``: whether the kernel computes a value, and does not load it."""

    def __init__(self, group: Group, computes: Callable[[Value], bool]) -> None:
        self.stored = {*group.stored, *group.stores}
        self.readers: dict[Value, list[Value]] = defaultdict(list)
        self.known: dict[Value, bool] = {}
        todo = list(self.stored)
        seen = set(todo)
        while todo:
            reader = todo.pop()
            for a in reader.bases:
                if computes(a):
                    self.readers[a].append(reader)
                    if a not in seen:
                        seen.add(a)
                        todo.append(a)

    def may_be_quick(self, v: Value) -> bool:
        """Whether an error of a few units of float32 in a pointwise value is as good as none."""
        if v.op in _OURS_ONLY and not _is_ours(v):
            return False
        return all(isinstance(a, (Value, str)) for a in v.args) and self._is_rounded(v)

    def _is_rounded(self, v: Value) -> bool:
        if v.dtype in SIXTEEN_BIT:
            return True
        if v not in self.known:
            self.known[v] = (
                v.dtype == "float32"
                and v.kind in ("pointwise", "cast", "reduce")
                and v not in self.stored
                and all(map(self._is_rounded, self.readers[v]))
            )
        return self.known[v]


def _is_ours(v: Value) -> bool:
    """Whether it is a step of the formula by which an op is written."""
    op = None if v.node is None else op_of(v.node.target)
    return v.node is None or (op is not None and op.kind == "composite")
