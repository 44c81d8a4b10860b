"""Row kernels that reduce columns too: each program walks over some rows and adds up as it goes.

So one read of the data serves a norm's dx, which needs whole rows, and its weight and bias
gradients, which need whole columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .flow import base_of
from .frames import atoms_of
from .group import Group
from .indexing import is_static, product
from .ir import Value
from .parts import MAX_SWEPT_ROW, SPLITTABLE, contiguous_axis
from .schedule import needs_loop
from .views import Frame

Readers = Mapping[Value, Sequence[tuple[Value, bool]]]


def on_chip(group: Group) -> bool:
    """Whether one program holds all that it reduces, so that the data is read once."""
    rows = product(group.sizes[a] for a in group.parallel)
    return not needs_loop(rows, product(group.sizes[a] for a in group.reduced), group.column)


def is_column(v: Value) -> bool:
    """Whether the reduction runs across memory: its operand's contiguous axis is kept."""
    axis = contiguous_axis(v.args[0])
    return axis is not None and axis not in v.params


def is_swept(group: Group, v: Value) -> bool:
    """Whether v is one of the group's reductions over the rows a program walks over."""
    return v.kind == "reduce" and bool(group.swept) and v in group.members and _over_rows(group, v)


def _over_rows(group: Group, v: Value) -> bool:
    frame = group.frame(v.args[0])
    return frame is not None and {a for k in v.params for a in frame[k]} == set(group.swept)


def why_not_sweep(
    group: Group, v: Value, frame: Frame, readers: Readers, multiprocessors: int
) -> str | None:
    """Why the group's programs cannot reduce v (or what v is for) over rows, or None."""
    if not group.reduced or group.column or not on_chip(group):
        return "it reduces other dims than the group does"
    if not is_static(*(group.sizes[a] for a in group.domain)):
        return "it reduces other dims than the group does, whose sizes are not known"
    found = _reduction_of(group, v, frame, readers)
    if found is None:
        return "it reduces other dims than the group does"
    reduction, atoms = found
    if reduction.op not in SPLITTABLE or set(atoms) & set(group.reduced):
        return "it reduces other dims than the group does"
    if product(group.sizes[a] for a in group.reduced) > MAX_SWEPT_ROW:
        return f"its rows are longer than {MAX_SWEPT_ROW}"
    if group.swept and set(atoms) != set(group.swept):
        return "it adds up other rows than the kernel walks over"
    programs = product(group.sizes[a] for a in group.parallel if a not in set(atoms))
    if 2 * programs < multiprocessors:
        return f"walking over rows would leave work for {programs} programs only"
    return None


def _reduction_of(
    group: Group, v: Value, frame: Frame, readers: Readers
) -> tuple[Value, list[str]] | None:
    """(the column reduction that v is or feeds, the atoms it reduces)."""
    known: Frame | None = frame
    while v.kind != "reduce":
        reader = next((r for r, _ in readers.get(v, ())), None)
        operand = next((a for a in reader.inputs if base_of(a) is v), None) if reader else None
        if reader is None or operand is None or known is None:
            return None
        if reader.kind != "reduce" and reader.shape != operand.shape:
            return None
        known = carried(group, v, operand, known)
        v = reader
    if known is None or set(group.resolve(atoms_of(known))) != set(group.domain):
        return None
    return v, list(group.resolve([a for k in v.params for a in known[k]]))


def carried(group: Group, base: Value, view: Value, frame: Frame) -> Frame | None:
    """The frame of a view, given its base's."""
    chain: list[Any] = []
    while view is not base:
        chain.append(view.params)
        view = view.args[0]
    known: Frame | None = frame
    for params in reversed(chain):
        if known is None:
            return None
        known = params.carry(known, group)
    return known
