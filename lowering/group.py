"""Group and Plan: the only data between fusing and code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .indexing import Size, is_static, product, quotient
from .ir import Value, base_of
from .views import Frame, take_inner

#: the atom that counts shares
SHARE = "share"
#: tensors of a kernel
MAX_POINTERS = 40


class Group:
    """Values that become one kernel.

    The kernel's loop variables are *atoms*, ``sizes`` long. ``domain`` is all of them, outermost
    first; ``reduced`` those that are reduced (none in a pointwise group). ``frames`` says for each
    value which atoms make up the coordinate along each axis. An atom can be split in two at any
    time (``parts``), which is how reshapes meet.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self.members: list[Value] = []
        self.operands = 0  # of all members
        self.frames: dict[Value, Frame] = {}
        self.sizes: dict[str, Size] = {}
        self.parts: dict[str, tuple[str, str]] = {}
        self._domain: tuple[str, ...] = ()
        self._reduced: tuple[str, ...] = ()
        self._covered: dict[Frame, bool] = {}  # what is_covered said since atoms last changed
        self.column = False  # the reduced atoms are not the contiguous ones
        self.shares = 0  # of the rows, where columns are reduced in two steps
        self.scans = False  # some member is a scan along the reduced atoms, in their order
        self.whole = False  # its only member has a kernel that is written as a whole
        self.outputs: list[Value] = []
        self.stores: dict[Value, Value] = {}  # copy into an input -> that input
        self.tied: set[Value] = set()  # members that a program has for its own row only
        self.first = self.last = 0  # places of its first and last member in the program

    def facts(self) -> tuple[Any, ...]:
        """What is known of the group beside its members and places: see ``take_facts``."""
        return (
            self.operands,
            dict(self.sizes),
            dict(self.parts),
            self._domain,
            self._reduced,
            (self.column, self.shares, self.scans),
        )

    def take_facts(self, facts: tuple[Any, ...]) -> None:
        """Be like the group whose ``facts`` these are."""
        self.operands, sizes, parts, self._domain, self._reduced, how = facts
        self.sizes, self.parts = dict(sizes), dict(parts)
        self.column, self.shares, self.scans = how

    # atoms ---------------------------------------------------------------------------------

    def new_atom(self, size: Size) -> str:
        atom = f"a{len(self.sizes)}"
        self.sizes[atom] = size
        return atom

    def size(self, atom: str) -> Size:
        return self.sizes[atom]

    def split(self, atom: str, inner: Size) -> tuple[str, str]:
        """Replace an atom by (outer, inner), ``inner`` long."""
        outer = quotient(self.sizes[atom], inner)
        if outer is None:
            raise ValueError(f"{inner} does not divide {self.sizes[atom]}")
        self._covered.clear()
        self.parts[atom] = (self.new_atom(outer), self.new_atom(inner))
        return self.parts[atom]

    def resolve(self, atoms: Sequence[str]) -> tuple[str, ...]:
        if not self.parts:
            return tuple(atoms)
        out: list[str] = []
        for atom in atoms:
            out.extend(self.resolve(self.parts[atom]) if atom in self.parts else (atom,))
        return tuple(out)

    def take(self, atoms: Sequence[str], inner: Size) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return take_inner(self.resolve(atoms), inner, self.size, self.split)

    @property
    def domain(self) -> tuple[str, ...]:
        return self.resolve(self._domain) if self.parts else self._domain

    @property
    def reduced(self) -> tuple[str, ...]:
        return self.resolve(self._reduced) if self.parts else self._reduced

    @property
    def parallel(self) -> tuple[str, ...]:
        domain, reduced = self.domain, set(self.reduced)
        return tuple([a for a in domain if a not in reduced]) if reduced else domain

    def set_reduced(self, atoms: Sequence[str]) -> None:
        self._reduced = tuple(atoms)
        self._covered.clear()

    @property
    def reduced_length(self) -> Size:
        """How many elements one program reduces to one."""
        length = product(self.sizes[a] for a in self.reduced)
        if self.column and self.shares:
            return -(-length // self.shares) if is_static(length) else length
        return length

    def share(self, shares: int) -> None:
        """Reduce the rows in so many shares side by side, each by programs of its own."""
        self.sizes[SHARE] = self.shares = shares

    @property
    def sweeps(self) -> bool:
        """Whether each program works on whole rows, one after the other, and reduces columns."""
        return bool(self.shares) and not self.column

    # frames --------------------------------------------------------------------------------

    def frame(self, value: Value) -> Frame | None:
        """The frame of a value, also of a view of one that has a frame."""
        known = self.frames.get(value)
        if known is not None:
            if not self.parts:
                return known
            return tuple(None if axis is None else self.resolve(axis) for axis in known)
        if value.kind == "view":
            below = self.frame(value.args[0])
            return value.params.carry(below, self) if below is not None else None
        if value.kind == "cast":
            return self.frame(value.args[0])
        return None

    def is_covered(self, frame: Frame) -> bool:
        """Whether the frame has each atom once: all of them, or those that are not reduced."""
        known = self._covered.get(frame)
        if known is None:
            atoms = atoms_of(frame)
            own = set(atoms)
            whole = own == set(self.domain) or (bool(self.reduced) and own == set(self.parallel))
            known = self._covered[frame] = whole and len(own) == len(atoms)
        return known

    def open(self, shape: Sequence[Size]) -> Frame:
        """Start the domain: one atom for each axis longer than 1."""
        frame = tuple(() if type(s) is int and s == 1 else (self.new_atom(s),) for s in shape)
        self._domain = tuple(a for axis in frame for a in axis)
        self._covered.clear()
        return frame

    def numel(self, atoms: Sequence[str]) -> Size:
        return product(self.sizes[a] for a in atoms)

    @property
    def stored(self) -> list[Value]:
        """What the kernel writes: its outputs, and places of inputs."""
        return [*self.outputs, *(m for m in self.members if m.kind == "store")]

    @property
    def nodes(self) -> list[Any]:
        """The FX nodes its members came from, each once."""
        return list(dict.fromkeys(m.node for m in self.members if m.node is not None))

    def effort(self) -> tuple[bool, int]:
        """How long the kernel compiles, for comparing: products longest, then by members.

        The last kernel of a ResNet's backward is one of its longest: 15 workers need 1.4 s in the
        order of the graph, 1.0 s with the longest first (simulated, of each kernel's time alone).
        """
        return self.whole, len(self.members)


def latest_first(group: Group) -> int:
    return -group.last


def reductions_first(group: Group) -> tuple[bool, int]:
    return not group.reduced, -group.last


def has_stores(group: Group) -> bool:
    """Whether it writes memory that others may read."""
    return bool(group.stores) or any(m.kind == "store" for m in group.members)


def atoms_of(frame: Frame) -> list[str]:
    return [a for axis in frame for a in (axis or ())]


@dataclass
class Plan:
    """What runs, in order: groups and ATen nodes; and why what is not fused is not."""

    steps: list[Any] = field(default_factory=list)  # Group | fx.Node
    groups: list[Group] = field(default_factory=list)
    aten: dict[Any, str] = field(default_factory=dict)  # node -> reason
    unfused: list[tuple[Value, Value, str]] = field(default_factory=list)
    inlined: set[Value] = field(default_factory=set)
    written: set[Value] = field(default_factory=set)  # inputs that ATen nodes write
    escapes: set[Value] = field(default_factory=set)  # values that ATen reads or the graph returns
    drawn: set[Any] = field(default_factory=set)  # nodes whose random seed the host draws


def pointers(group: Group, v: Value) -> int:
    """An upper bound of the tensors that the group's kernel would touch with v in it."""
    most = len(v.inputs) + group.operands + len(group.members) // 2
    if most <= MAX_POINTERS:
        return most
    seen = {base_of(a) for m in (*group.members, v) for a in m.inputs}
    return len(seen - set(group.members)) + sum(1 for m in group.members if m.node is not None) // 2
