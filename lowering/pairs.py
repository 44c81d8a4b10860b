"""Sums of a row that end together: the warps of a program meet once for two of them.

A norm's gradient needs two sums of each row. Where several warps have a row, each sum ends with an
exchange through shared memory, before and after which all of them wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from .body import Derived, Instr, read_by


def join_sums(steps: Sequence[Instr], derived: Derived) -> list[Instr]:
    """The steps, with sums ended in pairs, as late as the first of their readers allows; an atom
    that is ``derived`` from a sum (a place's row) reads it."""
    out: list[Instr] = []
    open_: list[Instr] = []
    for instr in steps:
        if open_ and {i.out for i in open_} & read_by(instr, derived):
            out += _ended(open_)
            open_ = []
        if instr.kind == "end" and instr.text == "sum":
            open_.append(instr)
        else:
            out.append(instr)
    return out + _ended(open_)


def _ended(sums: Sequence[Instr]) -> list[Instr]:
    out: list[Instr] = []
    left = list(sums)
    while left:
        first = left.pop(0)
        second = next((s for s in left if s.dtype == first.dtype), None)
        if second is None:
            out.append(first)
        else:
            left.remove(second)
            out.append(replace(first, kind="end_both", cond=second.out))
    return out
