"""Sums that need no loop: over an axis along which all but one element are zero."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .builder import Builder
from .indexing import is_one
from .ir import Value

#: the ops and kinds of Values at whose operands ``sum_of_one_hot`` looks
LOOKED_INTO = {"where", "logical_and", "eq", "full", "iota"}


def sum_of_one_hot(b: Builder, x: Value, axes: Sequence[int]) -> Value | None:
    """The sum of ``where(place == goal and more, g, 0)`` along the axis of ``place``, else None.

    It is g where the goal lies on the axis. This is the gradient of a negative log likelihood,
    which log-softmax's backward sums over the classes.
    """
    if len(axes) != 1 or x.op != "where" or not _is_zero(x.args[2]):
        return None
    (axis,) = axes
    back, g, length = x.ndim - axis, x.args[1], x.shape[axis]
    wanted = _conditions(x.args[0])
    places = [v for v in wanted if _goal(v, back) is not None]
    others = [v for v in (*wanted, g) if isinstance(v, Value) and v not in places]
    if len(places) != 1 or any(_varies(v, back) for v in others):
        return None
    goal = _goal(places[0], back)
    size = b.size_number(length)
    hit = b.call("ge", goal, 0, dtype="bool")
    for more in (b.call("lt", goal, size, dtype="bool"), *(v for v in wanted if v not in places)):
        hit = b.call("logical_and", hit, more, dtype="bool")
    return b.call("where", hit, g, x.args[2], dtype=x.dtype)


def _conditions(v: Value) -> list[Value]:
    if v.op == "logical_and":
        return [c for a in v.inputs for c in _conditions(a)]
    return [v]


def _goal(v: Value, back: int) -> Any:
    """What the coordinate along the axis, ``back`` from the end, is compared with; or None."""
    if v.op != "eq" or not all(isinstance(a, Value) for a in v.args):
        return None
    place, goal = v.args
    if place.kind == "iota" and place.ndim - place.params == back and not _varies(goal, back):
        return goal
    return None


def _varies(v: Value, back: int) -> bool:
    return v.ndim >= back and not is_one(v.shape[v.ndim - back])


def _is_zero(v: Any) -> bool:
    if isinstance(v, Value):
        return v.kind == "full" and _is_zero(v.args[0])
    return type(v) in (int, float) and v == 0
