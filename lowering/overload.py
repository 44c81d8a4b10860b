"""What the compiler asks of an ATen overload, found out once: torch answers, and hashes the
overload, in Python each time."""

from __future__ import annotations

from typing import Any

import torch

#: Fresh by contract, but the same memory in fact: their result is read as a view.
_UNSAFE_VIEWS = frozenset({"aten::_unsafe_view", "aten::reshape", "aten::contiguous"})


class Facts:
    """name:      as torch prints it, ``aten.add.Tensor``
    view:      whether the result shares (or may share) the memory of the first argument
    written:   (place, name) of the arguments whose memory it writes
    memory:    whose memory a result lies in: "new", that of the "first" operand, what is "written"
    fresh:     whether it writes no argument, and its results share no memory
    effect:    whether it changes memory or draws random numbers
    pure:      whether two calls of the same operands give the same, and nothing else happens
    """

    __slots__ = ("effect", "fresh", "memory", "name", "pure", "target", "view", "written")

    def __init__(self, target: torch._ops.OpOverload) -> None:
        self.target = target  # as long as it is kept, no other object has its id
        self.name = str(target)
        schema = target._schema
        results = [r.alias_info for r in schema.returns if r.alias_info is not None]
        self.view = schema.name in _UNSAFE_VIEWS or not all(r.is_write for r in results)
        self.written = tuple(
            (i, argument.name)
            for i, argument in enumerate(schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
        )
        self.memory = "first" if self.view else "new"
        if schema.is_mutable:
            self.memory = "written" if results else "new"
        self.fresh = self.memory == "new" and not self.written
        random = torch.Tag.nondeterministic_seeded in target.tags
        self.effect = schema.is_mutable or random
        known = target.namespace in ("aten", "prims", "gems", "gems_user")
        self.pure = known and not self.effect and bool(schema.returns)


_known: dict[int, Facts] = {}


def facts_of(target: Any) -> Facts | None:
    """None of what is no overload: an operator of Python, or one of higher order."""
    found = _known.get(id(target))
    if found is None and isinstance(target, torch._ops.OpOverload):
        found = _known[id(target)] = Facts(target)
    return found


def name_of(target: Any) -> str:
    """As torch prints it; "" of what is no overload."""
    facts = facts_of(target)
    return facts.name if facts is not None else ""


def find_overload(name: str) -> torch._ops.OpOverload | None:
    """The overload that torch prints so; None where this torch has none."""
    namespace, base, overload = name.split(".")
    packet = getattr(getattr(torch.ops, namespace), base, None)
    if packet is None or overload not in packet.overloads():
        return None
    found: torch._ops.OpOverload = getattr(packet, overload)
    return found
