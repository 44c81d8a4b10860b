"""How much memory is held step by step, before anything is written: of what could come earlier."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import accumulate
from typing import Any

from torch.fx import Node

from .graph import is_tensor, is_view, value_of
from .group import Group
from .indexing import product
from .ir import BITS, Value
from .ledger import Block

#: bytes of results that are not worth a look at what else is held
FEW = 2**16
#: what a step waits for by itself: steps, and Values that nobody stores
Needs = Callable[[Any], Iterable[Any]]


class Held:
    """Bytes held at each of ``steps`` and by ``output``, the graph's last node, when steps that
    are ``late`` run as something reads what they make."""

    def __init__(
        self,
        steps: Sequence[Any],
        needs: Needs,
        late: Collection[Any],
        output: Node,
    ) -> None:
        born: dict[Any, int] = {}
        self.first: dict[Any, int] = {}  # reader of what a step makes
        last: dict[Any, int] = {}
        for place, step in enumerate([*steps, output]):
            for part in getattr(step, "groups", (step,)):
                born[part] = place
                for need in waits(part, needs):
                    self.first.setdefault(need, place)
                    last[need] = place
        change = [0] * (len(steps) + 2)
        self.bytes: list[int] | None = None  # where sizes are symbolic
        for part, place in born.items():
            size = allocates(part) if isinstance(part, Group) else _allocated_by(part)
            if type(size) is not int:
                return
            change[self.first.get(part, place) if part in late else place] += size
            change[last.get(part, place) + 1] -= size
        self.bytes = list(accumulate(change))
        self.peak = max(self.bytes)

    def moves(self, group: Group, place: int) -> bool:
        """Launch a late group at ``place``, unless more is held at once for it."""
        if self.bytes is None:
            return True
        size, until = allocates(group), self.first.get(group, place)
        if any(held + size > self.peak for held in self.bytes[place:until]):
            return False
        for k in range(place, until):
            self.bytes[k] += size
        return True


def may_move(group: Group, place: int, held: Callable[[], Held]) -> bool:
    """Whether a late group may be launched at ``place``; then it is."""
    return allocates(group) < FEW or held().moves(group, place)


def _allocated_by(node: Node) -> int | None:
    """None where that is symbolic. Parts of a tuple are nodes of their own."""
    if node.op != "call_function" or is_view(node) or not is_tensor(value_of(node)):
        return 0
    return Block.of(value_of(node)).size


def waits(step: Any, needs: Needs) -> set[Any]:
    """The steps that a step waits for by itself, seen through Values that nobody stores."""
    found: set[Any] = set()
    stack = list(needs(step))
    while stack:
        thing = stack.pop()
        if thing is not step and thing not in found:
            found.add(thing)
            if isinstance(thing, Value):
                stack.extend(needs(thing))
    return found


def allocates(group: Group) -> int:
    return sum(product(o.shape) * BITS[o.dtype] // 8 for o in group.outputs)
