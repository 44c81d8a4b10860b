"""Row kernels that reduce columns too: each program walks over some rows and adds up as it goes.

So one read of the data serves a norm's dx, which needs whole rows, and its weight and bias
gradients, which need whole columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .flow import base_of
from .frames import carried
from .group import Group, atoms_of
from .indexing import is_static, product
from .ir import Value
from .parts import MAX_SWEPT_ROW, contiguous_axis
from .schedule import needs_loop
from .views import Frame

Readers = Mapping[Value, Sequence[tuple[Value, bool]]]


def on_chip(group: Group) -> bool:
    """Whether one program holds all that it reduces, so that the data is read once."""
    rows = product(group.sizes[a] for a in group.parallel)
    return not needs_loop(rows, group.reduced_length, group.column, group.shares)


def is_column(v: Value) -> bool:
    """Whether the reduction runs across memory, its operand's contiguous axis being kept, or is one
    of shares: whose programs reduce what any number of them do."""
    return v.kind == "partial" or not is_along(v)


def is_along(v: Value) -> bool:
    """Whether the reduction runs along memory, or in no way that is known."""
    axis = contiguous_axis(v.args[0])
    return axis is None or axis in v.params


def shares_rows(group: Group) -> bool:
    """Whether the group's programs reduce shares of rows that lie along memory."""
    return bool(group.shares and group.column) and any(
        m.kind == "partial" and is_along(m) for m in group.members
    )


def why_not_sweep(group: Group, v: Value, frame: Frame, readers: Readers) -> str | None:
    """Why the group's programs cannot reduce v (or what v is for) over rows, or None."""
    other = "it reduces other dims than the group does"
    if not group.reduced or group.column or group.scans or not on_chip(group):
        return other
    found = reduction_of(group, v, frame, readers)
    if found is None:
        return other
    reduction, atoms = found
    if reduction.kind != "partial" or set(atoms) != set(group.parallel):
        return other
    length = product(group.sizes[a] for a in group.reduced)
    if not is_static(length) or length > MAX_SWEPT_ROW:
        return f"its rows are longer than {MAX_SWEPT_ROW}"
    return None


def reduction_of(
    group: Group, v: Value, frame: Frame, readers: Readers
) -> tuple[Value, list[str]] | None:
    """(the reduction that v is or feeds, the atoms it reduces)."""
    known: Frame | None = frame
    while not v.reduces:
        reader = next((r for r, _ in readers.get(v, ())), None)
        operand = next((a for a in reader.inputs if base_of(a) is v), None) if reader else None
        if reader is None or operand is None or known is None:
            return None
        if not reader.reduces and reader.shape != operand.shape:
            return None
        known = carried(operand, v, known, group)
        v = reader
    if known is None or set(group.resolve(atoms_of(known))) != set(group.domain):
        return None
    return v, list(group.resolve([a for k in v.params for a in known[k]]))


def set_shares(v: Value, shares: int) -> None:
    """Reduce v's rows in so many shares: as many as the kernel it joins."""
    kept = product(v.shape[1:])
    v.shape = (shares, *v.shape[1:])
    v.strides = (kept, *v.strides[1:])
