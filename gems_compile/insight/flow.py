"""Which calls of a graph read the results of which: what goes through memory, exactly."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch.fx import Node

from ..lowering.group import Group
from ..lowering.ir import Value
from ..lowering.source import Source


def read_by(steps: Sequence[Any], source_of: dict[Group, Source]) -> list[tuple[int, ...]]:
    """Of each step, a group or a node, the places of the earlier steps whose results it reads."""
    made: dict[Value | Node, int] = {}
    found: list[tuple[int, ...]] = []
    for place, step in enumerate(steps):
        if isinstance(step, Node):
            found.append(_places(step.all_input_nodes, made))
            made[step] = place
            continue
        params = source_of[step].params
        found.append(_places((v for _, role, v in params if role == "in"), made))
        written = [v for _, role, v in params if role == "out"]
        written += [*step.stores, *(m for m in step.members if m.kind == "store")]
        for v in written:
            made[v] = place
            if v.node is not None:
                made[v.node] = place
    return found


def _places(operands: Iterable[Value | Node], made: dict[Value | Node, int]) -> tuple[int, ...]:
    """Where they come from, through views and parts of tuples."""
    places: dict[int, None] = {}
    todo, seen = list(operands), set()
    while todo:
        operand = todo.pop()
        if operand in seen:
            continue
        seen.add(operand)
        if operand in made:
            places[made[operand]] = None
        elif isinstance(operand, Value):
            todo.extend([operand.node] if operand.node is not None else operand.inputs)
        elif operand.op == "call_function":
            todo.extend(operand.all_input_nodes)
    return tuple(sorted(places))
