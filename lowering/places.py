"""Values that a kernel has in one place only, and who would read them in another.

A member that needs no reduction of its kernel is computed again wherever it is read. The result of
a reduction or a scan, and what follows from one, is there for the program's own row alone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence

from .group import Group
from .ir import Value
from .views import Frame

Resolve = Callable[[Sequence[str]], tuple[str, ...]]


def find_tied(members: Iterable[Value]) -> set[Value]:
    """The members (in topological order) that exist at the kernel's own place only."""
    tied: set[Value] = set()
    for m in members:
        if is_tied(m, tied):
            tied.add(m)
    return tied


def is_tied(m: Value, tied: set[Value]) -> bool:
    """Whether a member exists at the kernel's own place only, given those before it that do."""
    return m.reduces or m.kind == "scan" or bool(_tied_reads(m, tied))


def strays(v: Value, frame: Frame, group: Group, tied: set[Value]) -> bool:
    """Whether v, run by the group as ``frame`` says, reads a tied member in another place."""
    return any(
        _is_elsewhere(v, place, a, frame, group.frame(a), group.resolve)
        for place, a in _tied_reads(v, tied)
    )


def reads_through(v: Value, inlined: Collection[Value], tied: set[Value]) -> bool:
    """Whether v reads a tied member through a value that is computed where it is read: nobody can
    say at which place."""
    stack = [_behind_casts(base, inlined) for base in v.bases]  # a cast's place is its operand's
    while stack:
        value = stack.pop()
        if value not in inlined:
            continue
        if any(_shows(base, tied) for base in value.bases):
            return True
        stack += (_behind_casts(base, inlined) for base in value.bases)
    return False


def _behind_casts(base: Value, inlined: Collection[Value]) -> Value:
    while base.kind == "view" or (base.kind == "cast" and base in inlined):
        base = base.args[0]
    return base


class Crossings:
    """Reads of one group's tied members by another's, should the two become one kernel."""

    def __init__(self, one: Group, two: Group) -> None:
        self.one, self.two = one, two
        self.reads = [
            (m, place, a, reader, source)
            for reader, source in ((one, two), (two, one))
            if source.tied
            for m in reader.members
            for place, a in _tied_reads(m, source.tied)
        ]
        for m, _, a, reader, source in self.reads:  # atoms split now, not after they are aligned
            reader.frame(_domain_of(m))
            source.frame(a)

    def stray(self, mapping: dict[str, str]) -> bool:
        """Whether one is in another place; ``mapping`` takes the atoms of two to those of one."""

        def frame_in_one(group: Group, v: Value) -> Frame | None:
            frame = group.frame(v)
            if frame is None or group is self.one:
                return frame
            return tuple(a and tuple(mapping.get(atom, atom) for atom in a) for a in frame)

        for m, place, a, reader, source in self.reads:
            frame = frame_in_one(reader, _domain_of(m))
            known = frame_in_one(source, a)
            if frame is None or _is_elsewhere(m, place, a, frame, known, self.one.resolve):
                return True
        return False


def _domain_of(v: Value) -> Value:
    return v.args[0] if v.reduces else v


def _tied_reads(v: Value, tied: set[Value]) -> list[tuple[int, Value]]:
    """(place among v's operands, the operand) for those that show a tied value."""
    if not tied:
        return []
    return [(k, v.inputs[k]) for k, base in enumerate(v.bases) if _shows(base, tied)]


def _shows(base: Value, tied: set[Value]) -> bool:
    """Whether it is one of them, or a cast of one."""
    if base in tied:
        return True
    while base.kind in ("view", "cast"):
        base = base.args[0]
    return base in tied


def _is_elsewhere(
    v: Value, place: int, a: Value, frame: Frame, known: Frame | None, resolve: Resolve
) -> bool:
    if known is None or v.kind == "concat" or (v.kind == "gather" and place == 0):
        return True
    if v.kind == "patch" and place == 1 and any(known[axis] for axis, _, _ in v.params):
        return True
    if known == frame:
        return False
    lead = len(frame) - a.ndim
    return any(  # None and no atoms: the same all along the axis
        axis and resolve(axis) != resolve(frame[lead + k] or ()) for k, axis in enumerate(known)
    )
