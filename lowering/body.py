"""What emit writes and render reads: a kernel's instructions, their addresses not yet text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .group import Group
from .indexing import Index, Size
from .ir import Value

#: more loads at once would take more registers than their latency is worth
MOST_EARLY_LOADS = 8


@dataclass
class Instr:
    """kind: load | line | store | put | begin | step | end (of an accumulator) | end_both | carry |
    scan | fold | sweep_begin ... (of an accumulator over the rows of a sweep).

    ``text`` is a template: ``{i0}`` is the first of ``indices``, rendered.
    """

    kind: str
    out: str
    text: str
    indices: tuple[Index, ...] = ()
    cond: str | None = None
    computes: Value | None = None  # whose line of the user's code is its comment
    dtype: str = ""
    wide: bool = False  # of a put: it varies along r
    within: str | None = None  # of a load: the mask without which nobody reads it
    how: str = ""  # of a put: the atomic operation that it is, if it is one


#: where a range that is open on one side ends
FAR = 2**62


@dataclass(frozen=True)
class Range:
    """What a test asks of a coordinate: ``low <= place < high``."""

    place: Index
    low: int = -FAR
    high: int = FAR

    def tests(self, name: str) -> list[str]:
        """Its text, with the place's atom called ``name``."""
        found = [f"({name} >= {self.low - self.place.const})"] if self.low > -FAR else []
        return found + ([f"({name} < {self.high - self.place.const})"] if self.high < FAR else [])


@dataclass(frozen=True)
class Window:
    """A part of a loop variable."""

    atom: str
    first: int
    length: int


#: an atom -> how it comes from an index: "//" or "%", that, and the divisor
Derived = dict[str, tuple[str, Index, Size]]


@dataclass
class Body:
    """The instructions of one kernel, by section: ("row", level), ("loop", level).

    In a sweep over rows: ("once", 0), ("row", 0) for each row, ("after", 0).
    """

    group: Group
    looped: bool
    window: Window | None = None  # the part of one atom that it runs over; None: all
    sections: dict[tuple[str, int], list[Instr]] = field(default_factory=dict)
    derived: Derived = field(default_factory=dict)
    params: list[tuple[str, str, Any]] = field(default_factory=list)  # (name, role, what)
    modules: set[str] = field(default_factory=set)
    #: texts of users' functions that it calls, each once
    definitions: dict[str, None] = field(default_factory=dict)
    unaligned: list[str] = field(default_factory=list)  # parameters that may begin anywhere
    wide: set[str] = field(default_factory=set)  # registers and derived atoms that vary along r
    folds: dict[str, int] = field(
        default_factory=dict
    )  # atom that counts a row's parts -> how many
    cuts: dict[str, set[int]] = field(default_factory=dict)  # atom -> where another part begins
    masks: dict[str, tuple[str, ...]] = field(default_factory=dict)  # register -> all that it asks
    ranges: dict[str, Range] = field(default_factory=dict)  # text of a test -> what it asks

    def size(self, atom: str) -> Size:
        """How long an atom is, as far as this body runs over it."""
        if self.window is not None and atom == self.window.atom:
            return self.window.length
        return self.folds[atom] if atom in self.folds else self.group.size(atom)

    def first(self, atom: str) -> int:
        """Where it begins to run over an atom."""
        return self.window.first if self.window is not None and atom == self.window.atom else 0


def loads_first(steps: Sequence[Instr], derived: Derived) -> list[Instr]:
    """The steps, with loads (and what masks them) that wait for no other step in front.

    ``derived`` is the body's. The compiler moves no load across the branches of libdevice's
    functions: a load behind one waits until it is computed (GeGLU, H200: 174 us, 161 with both
    loads in front).
    """
    made = {i.out for i in steps if i.out}
    early: set[str] = set()
    loads = 0
    for instr in steps:
        if instr.kind == "load":
            loads += 1
        elif instr.kind != "line" or instr.out[0] not in "cm":  # coordinates, and masks of them
            continue
        if read_by(instr, derived) & made <= early:
            early.add(instr.out)
        elif instr.kind == "load":
            loads -= 1
    if loads > MOST_EARLY_LOADS:
        return list(steps)
    return sorted(steps, key=lambda i: i.out not in early or i.kind not in ("load", "line"))


def read_by(instr: Instr, derived: Derived) -> set[str]:
    """The registers that an instruction reads, and the atoms; a store's value is its ``out``."""
    found = set() if instr.kind == "load" else set(re.findall(r"\w+", instr.text))
    found.update(re.findall(r"\w+", instr.cond or ""))
    if instr.kind in ("store", "put"):
        found.add(instr.out)
    stack = list(instr.indices)
    while stack:
        for atom in stack.pop().atoms:
            found.add(atom)
            if atom in derived:
                stack.append(derived[atom][1])
    return found
