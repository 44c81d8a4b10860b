"""Framed rows of an odd length, stored in whole vectors: pads of images, and patches of them.

Eight places of a row of 114 elements need not lie in one row. A program of 1024 places wherever
they lie then divides for each of them. Here a thread has eight places side by side, and divides for
the first: those behind the row's end are in the *next* row. What depends on the row is computed for
both rows, and chosen by the lane. The next row may be the first one of another plane: so this is
for kernels that read nothing for a plane's first row (it is part of the frame).

A frame of one zero around 64 x 128 x 112 x 112 in bfloat16, with an affine step and a ReLU, H200:
108 to 110 us; 129 with a division for each place, 119 to 122 in tiles of whole rows, whose stores
are of 4 bytes. A copy of as many bytes takes 105.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .aligned import LANES
from .indexing import Index, Size, is_static, product
from .ir import SIXTEEN_BIT
from .schedule import Tile

if TYPE_CHECKING:
    from .body import Instr, Range
    from .render import Renderer

#: threads of a program, each with LANES places
THREADS = 128


@dataclass(frozen=True)
class Carried:
    """inner: the atom along a row; row: the next one outwards; both with their sizes."""

    inner: str
    length: int
    row: str
    rows: int

    def base(self, index: Index) -> Index:
        """The index at the thread's first place."""
        names = {self.inner: "f_inner", self.row: "f_row"}
        return Index({names.get(a, a): c for a, c in index.terms}, index.const)

    def step(self, index: Index) -> str:
        """How far from there the lane's place is, as text; empty where it is the same for all."""
        along, down = index.coefficient(self.inner), index.coefficient(self.row)
        lane = "lane" if along == 1 else f"lane * {along}"
        if along == 0:
            return f"tl.where(over, {down}, 0)" if down else ""
        return f"tl.where(over, {lane} + {down - self.length * along}, {lane})"


def carried_of(renderer: Renderer) -> tuple[Carried, Tile] | None:
    """How the places of a pointwise kernel are carried into the next row, and its tile."""
    atoms = renderer.parallel
    sizes = [renderer.sizes[a] for a in atoms]
    if len(atoms) < 3 or not is_static(*sizes) or renderer.wide64 or renderer.body.derived:
        return None
    numel, length = product(sizes), sizes[-1]
    if numel < 4096 * renderer.multiprocessors or numel % LANES:
        return None
    if length % LANES == 0 or length < 2 * LANES:
        return None
    carried = Carried(atoms[-1], length, atoms[-2], sizes[-2])
    reads_rows = False
    for instr in renderer.instrs:
        if not _is_plain(renderer, carried, instr):
            return None
        reads_rows |= instr.kind == "load" and _reads_rows(renderer, carried, instr)
    return (carried, Tile(THREADS, warps=THREADS // 32)) if reads_rows else None


def _is_plain(renderer: Renderer, carried: Carried, instr: Instr) -> bool:
    """Whether the instruction can be written for two rows at once."""
    if instr.kind == "store":
        return renderer._is_linear(instr.indices[0])
    if instr.kind == "load":
        return not _reads_rows(renderer, carried, instr) or _is_framed(renderer, carried, instr)
    if instr.kind != "line":
        return False
    if instr.out in renderer.body.masks:
        return _ranges(renderer, carried, instr.out) is not None
    return not instr.indices or instr.out[0] == "c"  # a coordinate, of which masks are made


def _reads_rows(renderer: Renderer, carried: Carried, instr: Instr) -> bool:
    """Whether where it loads depends on the row, and not as the place itself does."""
    index = instr.indices[0]
    live = {a for a in index.atoms if a not in renderer.merged}
    return not renderer._is_linear(index) and bool(live - {carried.inner})


def _is_framed(renderer: Renderer, carried: Carried, instr: Instr) -> bool:
    """Whether nobody reads what it loads in a plane's first row, nor in place of it."""
    index = instr.indices[0]
    known = {*renderer.parallel, *renderer.merged}
    if not known.issuperset(index.atoms) or not is_static(
        index.const, *(c for _, c in index.terms)
    ):
        return False
    if instr.cond is None and carried.step(index):
        return False  # it would read beyond the last row
    asked = _ranges(renderer, carried, instr.within)
    if asked is None:
        return False
    return any(
        r.place.coefficient(carried.row) and not r.low <= r.place.const < r.high for r in asked
    )


def _ranges(renderer: Renderer, carried: Carried, mask: str | None) -> list[Range] | None:
    """What a mask asks: ranges of the row, or of the place in it; None if something else."""
    found: list[Range] = []
    stack = [mask] if mask is not None else []
    while stack:
        text = stack.pop()
        parts = renderer.body.masks.get(text)
        if parts is not None:
            stack.extend(parts)
            continue
        asked = renderer.body.ranges.get(text)
        if asked is None or len(asked.place.terms) != 1 or not is_static(asked.place.const):
            return None
        ((atom, c),) = asked.place.terms
        if atom not in (carried.inner, carried.row) or c != 1:
            return None
        found.append(asked)
    return found


# the text -----------------------------------------------------------------------------------------


def prologue(renderer: Renderer, carried: Carried, pid: str) -> Size:
    """Define the thread's first place, the row it is in, and which lanes are in the next one."""
    add, length, rows = renderer.lines.add, carried.length, carried.rows
    numel = product(renderer.sizes[a] for a in renderer.parallel)
    add(f"first = ({pid} * XBLOCK + tl.arange(0, XBLOCK)[:, None]) * {LANES}")
    add(f"lane = tl.arange(0, {LANES})[None, :]")
    add("x = first + lane")
    if numel % (renderer.tile.x * LANES):
        add(f"xmask = first < {numel}")
        renderer.xmask = "xmask"
    add(f"f_line = first // {length}")
    add(f"f_inner = first - f_line * {length}")
    add(f"z = f_line // {rows}")
    add(f"f_row = f_line - z * {rows}")
    add(f"n_row = tl.where(f_row < {rows - 1}, f_row + 1, 0)")
    renderer._unravel("z", renderer.parallel[:-2])
    add(f"over = lane >= {length} - f_inner")
    add(f"{carried.inner} = f_inner + tl.where(over, lane - {length}, lane)")
    return -(-numel // (renderer.tile.x * LANES))


def written(renderer: Renderer, carried: Carried, instr: Instr) -> bool:
    """Write the instruction for both rows, where that is not how others are written."""
    if instr.kind == "load" and _reads_rows(renderer, carried, instr):
        _load(renderer, carried, instr)
    elif instr.kind == "line" and instr.out in renderer.body.masks:
        _mask(renderer, carried, instr.out)
    else:  # a coordinate is for masks alone
        return instr.kind == "line" and instr.out[0] == "c"
    return True


def _load(renderer: Renderer, carried: Carried, instr: Instr) -> None:
    """What is the same for a thread's places is added to the pointer once, or loaded once."""
    index = instr.indices[0]
    step = carried.step(index)
    where = f"{instr.text} + ({renderer.index(carried.base(index))})"
    where = f"({where}) + {step}" if step else where
    masks = [m for m in (renderer.xmask, instr.cond if step else None) if m is not None]
    mask = f", mask={' & '.join(masks)}, other=0" if masks else ""
    text = f"tl.load({where}{mask}{renderer._policy(instr)})"
    if instr.dtype in SIXTEEN_BIT:
        text += ".to(tl.float32)"
    renderer.lines.add(f"{instr.out} = {text}")


def _mask(renderer: Renderer, carried: Carried, out: str) -> None:
    """One comparison a lane: with a length that is zero where the row is in the frame."""
    asked = _ranges(renderer, carried, out)
    assert asked is not None  # carried_of has looked
    add = renderer.lines.add
    here, after = (
        " & ".join(t for r in asked if r.place.coefficient(carried.row) for t in r.tests(name))
        for name in ("f_row", "n_row")
    )
    along = [r for r in asked if r.place.coefficient(carried.inner)]
    low = max((r.low - r.place.const for r in along), default=0)
    high = min((r.high - r.place.const for r in along), default=carried.length)
    low, high = max(low, 0), min(high, carried.length)
    count = str(max(high - low, 0))
    if here:
        add(f"{out}_here = tl.where({here}, {count}, 0)")
        add(f"{out}_next = tl.where({after}, {count}, 0)")
        count = f"tl.where(over, {out}_next, {out}_here).to(tl.uint32, bitcast=True)"
    add(f"{out} = ({carried.inner} - {low}).to(tl.uint32, bitcast=True) < {count}")
