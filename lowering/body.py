"""What emit writes and render reads: a kernel's instructions, their addresses not yet text."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .group import Group
from .indexing import Index, Size


@dataclass
class Instr:
    """kind: load | line | store | put | begin | step | end (of an accumulator) | carry | scan |
    sweep_begin ... (of an accumulator over the rows of a sweep).

    ``text`` is a template: ``{i0}`` is the first of ``indices``, rendered.
    """

    kind: str
    out: str
    text: str
    indices: tuple[Index, ...] = ()
    cond: str | None = None
    comment: str = ""
    dtype: str = ""
    wide: bool = False  # of a put: it varies along r


@dataclass
class Body:
    """The instructions of one kernel, by section: ("row", level), ("loop", level).

    In a sweep over rows: ("once", 0), ("row", 0) for each row, ("after", 0).
    """

    group: Group
    looped: bool
    sections: dict[tuple[str, int], list[Instr]] = field(default_factory=dict)
    derived: dict[str, tuple[str, Index, Size]] = field(default_factory=dict)
    params: list[tuple[str, str, Any]] = field(default_factory=list)  # (name, role, what)
    modules: set[str] = field(default_factory=set)
    wide: set[str] = field(default_factory=set)  # registers and derived atoms that vary along r
