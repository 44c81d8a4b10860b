"""Softmax statistics of a long row from one read: a running maximum, a sum rescaled to it.

Written out, ``sum(exp(x - amax(x)))`` waits for the maximum and reads the row once more. Where a
row comes in steps, such a sum, the maximum and what else is made of the two (``ONLINE``) share one
pair of accumulators.
"""

from __future__ import annotations

from .group import Group
from .ir import Value
from .spelling import ONLINE
from .views import Reshape

Pair = tuple[Value, tuple[int, ...]]  # operand, reduced axes


def find_online(group: Group) -> dict[Value, tuple[str, Pair]]:
    """The group's reductions that are made of a running maximum and sum -> (which, of what)."""
    reductions = [m for m in group.members if m.kind == "reduce"]
    found: dict[Value, tuple[str, Pair]] = {}
    for r in reductions:
        x = _exponent(r, reductions)
        if x is not None:
            found[r] = "expsum", (x, r.params)
        elif r.op in ONLINE:
            found[r] = r.op, (r.args[0], r.params)
    pairs = {pair for _, pair in found.values()}
    for r in reductions:
        if r.op == "amax" and (r.args[0], r.params) in pairs:
            found[r] = "amax", (r.args[0], r.params)
    return found


def _exponent(r: Value, reductions: list[Value]) -> Value | None:
    """x, if r is sum(exp(x - amax(x))) and nothing is rounded on the way."""
    e = r.args[0]
    if r.op != "sum" or e.kind != "pointwise" or e.op != "exp":
        return None
    difference = e.args[0]
    if difference.kind != "pointwise" or difference.op != "sub" or difference.args[2] != 1:
        return None
    x, top = difference.args[:2]
    if not (isinstance(x, Value) and isinstance(top, Value)):
        return None
    top = _reshaped(top)
    same = top in reductions and top.op == "amax" and top.args[0] is x and top.params == r.params
    exact = {x.dtype, top.dtype, difference.dtype, e.dtype, r.dtype} in ({"float32"}, {"float64"})
    return x if same and exact else None


def _reshaped(v: Value) -> Value:
    """What v is the same as, dims dropped and put back in between."""
    shown = v
    while shown.kind == "view" and isinstance(shown.params, Reshape):
        shown = shown.args[0]
    return shown if shown.shape == v.shape else v
