"""Rows that begin or end between two multiples of 16 bytes, moved in whole vectors all the same.

A row of 50257 bfloat16 numbers may begin at any even address, and its elements would be loaded one
by one. A program's lanes count from the multiple of 16 bytes at or below the row's first element
instead. Loads take whole vectors, with what lies beside the row in the first and the last of them
(it is there: 16 aligned bytes do not straddle the end of memory that begins at such a multiple);
stores take the vectors that lie inside the row whole, and the rest one by one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .body import Instr
from .indexing import Index, is_static
from .ir import BITS

if TYPE_CHECKING:
    from .render import Renderer

#: elements that lanes are aligned to: 16 bytes of 16-bit numbers, 32 of float32
LANES = 8
#: instructions that count on a row's elements in order
ORDERED = ("carry", "scan")


@dataclass(frozen=True)
class Aligned:
    """inner: the atom along a row; rows: (atom, step modulo LANES) of where rows begin."""

    inner: str
    rows: tuple[tuple[str, int], ...]
    const: int

    @property
    def shifted(self) -> bool:
        return bool(self.rows or self.const)

    def shift(self) -> str:
        """How far the row's first element lies behind the first lane's place, as text."""
        terms = [f"{atom} * {step}" for atom, step in self.rows]
        terms += [str(self.const)] if self.const else []
        return f"({' + '.join(terms)}) % {LANES}" if terms else "0"


def aligned_of(renderer: Renderer) -> Aligned | None:
    """How the kernel's lanes are moved, or None where vectors are whole or nothing can be done."""
    inner = renderer.along or _looped(renderer)
    if inner is None or renderer.body.unaligned:
        return None
    found = {_residue(renderer, i, inner) for i in renderer.instrs if _moves_rows(renderer, i)}
    if len(found) != 1 or None in found:
        return None
    (aligned,) = found
    assert aligned is not None  # just looked
    odd = renderer.along is not None and renderer.sizes[inner] % LANES != 0
    return aligned if aligned.shifted or odd else None


def _looped(renderer: Renderer) -> str | None:
    """The atom of a row that comes in steps, in any order."""
    plain = renderer.body.looped and not renderer.group.column and not renderer.shares
    if not plain or renderer.tile.x != 1 or len(renderer.reduced) != 1:
        return None
    instrs = renderer.instrs
    if any(i.kind in ORDERED or i.text in ("argmax", "argmin") for i in instrs):
        return None
    (inner,) = renderer.reduced
    length = renderer.sizes[inner]
    return inner if is_static(length) and length >= 2 * renderer.tile.r else None


def _moves_rows(renderer: Renderer, instr: Instr) -> bool:
    if instr.kind not in ("load", "store") or BITS[instr.dtype] not in (16, 32):
        return False
    atoms = set(instr.indices[0].atoms)
    inner = renderer.along or renderer.reduced[0]
    return inner in atoms and bool(atoms & (set(renderer.parallel) - {inner}))


def _residue(renderer: Renderer, instr: Instr, inner: str) -> Aligned | None:
    index: Index = instr.indices[0]
    known = {*renderer.parallel, *renderer.reduced, *renderer.merged}
    if not is_static(index.const, *(step for _, step in index.terms)):
        return None
    masked = instr.kind == "load" and instr.cond is not None
    if index.coefficient(inner) != 1 or masked or not known.issuperset(index.atoms):
        return None
    rows = [(a, step % LANES) for a, step in index.terms if a != inner and a not in renderer.merged]
    return Aligned(inner, tuple(sorted(r for r in rows if r[1])), index.const % LANES)


def begin(renderer: Renderer) -> None:
    """Define how far the program's lanes are moved."""
    if renderer.aligned is not None:
        renderer.lines.add(f"shift = {renderer.aligned.shift()}")


def ends(renderer: Renderer) -> None:
    """Where lanes may lie beside the row: which vectors hold some of it, and which only that."""
    aligned = renderer.aligned
    if aligned is None:
        return
    add, length = renderer.lines.add, renderer.sizes[aligned.inner]
    for lanes in _vectors(renderer):
        add(f"v{lanes} = q // {lanes} * {lanes}")
        add(f"some{lanes} = v{lanes} < {length} + shift")
        add(f"whole{lanes} = (v{lanes} >= shift) & (v{lanes} <= {length - lanes} + shift)")


def inside(length: int) -> str:
    """Whether the lanes, which count from the place before the row, lie in it."""
    return f"(q >= shift) & (q < {length} + shift)"


def _vectors(renderer: Renderer) -> list[int]:
    moved = (i for i in renderer.instrs if _moves_rows(renderer, i))
    return sorted({128 // BITS[i.dtype] for i in moved})


def vector(renderer: Renderer, instr: Instr) -> int:
    """How many elements of the row the access takes at once; 0 where it says nothing of that."""
    if renderer.aligned is None or not _moves_rows(renderer, instr):
        return 0
    return 128 // BITS[instr.dtype]


def promise(renderer: Renderer, pointer: str, lanes: int) -> str:
    """The offsets, of which Triton cannot see that vectors of them are aligned."""
    each = f"[1, {lanes}]" if renderer._two_dims else f"[{lanes}]"
    return f"tl.multiple_of({pointer}, {each})"


def store_ends(renderer: Renderer, what: str, mask: str, policy: str, lanes: int) -> None:
    """Whole vectors as such, and what is left of the row's first and last one."""
    lines = renderer.lines
    lines.add(f"tl.store({what}, mask=whole{lanes}{policy})")
    if renderer.along is not None:
        lines.add("if at_end:")
    lines.depth += renderer.along is not None
    lines.add(f"tl.store({what}{mask} & (whole{lanes} == 0){policy})")
    lines.depth -= renderer.along is not None
