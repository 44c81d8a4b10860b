"""A ``copy_`` into an input is a store of the kernel that computes what is copied.

The graph computes a new value and copies it over an input (a parameter, a running statistic). Where
one kernel makes the value, it writes the input's memory itself: no second pass, and no memory for
the value unless somebody else reads it. That is wrong as soon as the old value is read too late, so
``why_not_store`` refuses whatever it cannot prove.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from torch import fx

from .flow import base_of, find_escapes
from .frames import carried
from .fuse import Fuser, on_chip
from .group import Group, atoms_of
from .indexing import is_one, is_static
from .ir import Value, is_dense
from .translate import Program
from .views import Frame


def store_copies(graph: fx.Graph, program: Program, fuser: Fuser) -> int:
    """Turn copies into inputs into stores, where that is provably the same; returns how many.

    Leaves the reason in ``program.aten`` where it is not.
    """
    changed: dict[Group, None] = {}
    for node, shared in fuser.copies.items():
        if node not in program.aten:
            continue
        why = shared or why_not_store(node, program, fuser)
        if why is None:
            changed[_store(node, program, fuser)] = None
        else:
            program.aten[node] = why
    if changed:
        fuser.escapes = find_escapes(program, graph)
    for group in changed:
        group.outputs = [m for m in group.outputs if fuser._stored(m, group)]
    return sum(len(g.stores) for g in changed)


def why_not_store(node: fx.Node, program: Program, fuser: Fuser) -> str | None:
    """Why the kernel that computes the new value cannot store it in the input, or None."""
    args: Any = node.args
    into, new, copy = (program.of.get(n) for n in (*args[:2], node))
    assert isinstance(into, Value) and isinstance(copy, Value)  # see copies_alone
    if not isinstance(new, Value) or (group := fuser.home.get(base_of(new))) is None:
        return "no kernel computes what is copied"
    frame = carried(new, base_of(new), group.frame(base_of(new)), group)
    if new.shape != into.shape or frame is None:
        return "the kernel does not run over what is copied"
    if not _places_differ(into):
        return "elements of the input share memory"
    if group.whole:
        return "a kernel that is written as a whole stores its result in memory of its own"
    if any(fuser.home.get(r) is group for r, _ in fuser.readers.get(into, ())):
        across = not set(group.reduced).isdisjoint(atoms_of(frame))
        if across and not on_chip(group):
            return "the kernel reads the old value more than once"
        if not _reads_in_place(group, into, frame, fuser.inlined):
            return "the kernel reads the old value at another place"
    bit = 1 << group.number
    for source in _waits(copy, fuser):
        if fuser.home.get(source) is not group and fuser.closure.before(source) & bit:
            return "the old value is read after the new one is computed"
    return None


def _reads_in_place(group: Group, memory: Value, frame: Frame, inlined: Collection[Value]) -> bool:
    """Whether all that the kernel computes from the memory needs it at ``frame``, where it stores.

    By induction: what is computed from it is read by others at its own place only.
    """
    places: dict[Value, Frame | None] = {memory: frame}
    for m in group.members:
        for a in m.inputs:
            base = _source(a, inlined)
            if base not in places:
                continue
            places[m] = group.frame(m)
            place = carried(a, base, places[base], group)
            if m.reduces:  # it runs over its operand as that was framed
                same = _equal(place, group.frame(a), group)
            else:
                same = m.kind in ("pointwise", "cast") and _equal(place, _seen(a, m, group), group)
            if not same:
                return False
    return True


def _seen(a: Value, m: Value, group: Group) -> Frame | None:
    """Where an element of ``m`` reads its operand ``a``, which may be broadcast."""
    whole, lead = group.frame(m), m.ndim - a.ndim
    if whole is None:
        return None
    return tuple(() if is_one(size) else whole[lead + k] for k, size in enumerate(a.shape))


def _equal(one: Frame | None, two: Frame | None, group: Group) -> bool:
    if one is None or two is None or None in one or None in two:
        return False
    return [group.resolve(a) for a in one] == [group.resolve(a) for a in two]


def _source(v: Value, inlined: Collection[Value]) -> Value:
    while v.kind == "view" or (v.kind == "cast" and v in inlined):
        v = v.args[0]
    return v


def _places_differ(memory: Value) -> bool:
    """Whether no two elements lie at the same address."""
    if is_dense(memory):
        return True
    if not is_static(*memory.shape, *memory.strides):
        return False
    reach = 0
    for stride, size in sorted(zip(memory.strides, memory.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return False
            reach += stride * (size - 1)
    return True


def _waits(copy: Value, fuser: Fuser) -> Iterator[Value]:
    return (s for s in fuser.waits.get(copy, ()) if s is not copy)


def _store(node: fx.Node, program: Program, fuser: Fuser) -> Group:
    """Make the copy a member of the kernel that computes what is copied."""
    args: Any = node.args
    into, new, copy = (program.of[n] for n in (*args[:2], node))
    group = fuser.home[base_of(new)]
    frame = carried(new, base_of(new), group.frame(base_of(new)), group)
    assert frame is not None  # why_not_store has looked
    fuser.closure.put(copy, _waits(copy, fuser))
    fuser.turn(copy, "cast", (new,))
    group.frames[copy] = frame
    group.members.append(copy)
    group.stores[copy] = into
    group.last = max(group.last, fuser.place[copy])
    fuser.home[copy] = group
    fuser.closure.grow(group)
    fuser.written.discard(into)
    del program.aten[node]
    return group
