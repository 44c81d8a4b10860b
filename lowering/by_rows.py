"""Pointwise kernels whose programs have a part of one row each.

What is read once a row (a row's statistics, a token's label) is then one number for a program. In a
program of 1024 places wherever they lie, each place divides to find its row, and loads its numbers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .aligned import LANES, begin, ends, inside
from .flight import asks_for_a_byte
from .folds import row_atoms
from .indexing import Size, is_static, product
from .schedule import Tile
from .spelling import EmitError

if TYPE_CHECKING:
    from .render import Renderer

#: lanes beyond the row's end, as a share of it, that cost less than the divisions
IDLE = 1 / 16
#: the same, that cost less than another launch
IDLE_BESIDE_LAUNCH = 1 / 4


def row_of(renderer: Renderer) -> tuple[str, Tile] | None:
    """(the atom that runs along a row, the tile of one), if the kernel is better run by rows."""
    rows = row_atoms(renderer)
    if rows:
        return _row_of_folds(renderer, rows)
    sizes = [renderer.sizes[a] for a in renderer.parallel]
    if len(sizes) < 2 or not is_static(*sizes):
        return None
    numel, length, inner = product(sizes), sizes[-1], renderer.parallel[-1]
    if numel < 4096 * renderer.multiprocessors:
        return None
    tile, values = _tile(length, IDLE), _row_values(renderer, inner)
    if tile is None or not values:
        return None
    if asks_for_a_byte(renderer):  # see ``elements_of_a_thread``
        return (inner, Tile(tile, warps=2)) if values > 1 and tile == 2048 else None
    return inner, Tile(tile)


def _tile(length: int, idle: float) -> int | None:
    return next((t for t in (2048, 1024) if -(-length // t) * t <= length * (1 + idle)), None)


def _row_of_folds(renderer: Renderer, rows: set[str]) -> tuple[str, Tile]:
    """The same, where programs combine the parts of their row."""
    inner = renderer.parallel[-1]
    length = renderer.sizes[inner]
    tile = _tile(length, IDLE_BESIDE_LAUNCH) if is_static(length) else None
    if inner in rows or not rows <= {*renderer.parallel, *renderer.merged} or tile is None:
        raise EmitError("its programs would combine the parts of many rows")
    return inner, Tile(tile)


def _row_values(renderer: Renderer, inner: str) -> int:
    """How many numbers are loaded once a row; none, if what is stored does not all run along one.

    Two of them are worth a row to each program where a place reads a byte beside (images of 64 x 3
    x 224 x 224 and of 512 x 512 bytes, normalized, H200: 4 and 1 % faster by rows; weights
    dequantized with one are not).
    """
    outer = set(renderer.parallel) - {inner}
    once = set()
    for instr in renderer.instrs:
        atoms = set(instr.indices[0].atoms) if instr.indices else set()
        if instr.kind in ("store", "put") and inner not in atoms:
            return 0
        if instr.kind == "load" and atoms and atoms <= outer:
            once.add((instr.text, instr.indices[0]))
    return len(once)


def row_prologue(renderer: Renderer, inner: str, pid: str) -> Size:
    """Define where the program is in its row, and in which; returns the grid."""
    add, length, block = renderer.lines.add, renderer.sizes[inner], renderer.tile.x
    aligned, rest = renderer.aligned, renderer.parallel[:-1]
    most = length + LANES - 1 if aligned is not None and aligned.shifted else length
    parts = -(-most // block)
    add(f"pid = {pid}")
    add(f"z = pid // {parts}")
    renderer._unravel("z", rest)
    first, lane = f"(pid % {parts}) * XBLOCK", "tl.arange(0, XBLOCK)"
    if aligned is None:
        add(f"x = {first} + {lane}")
    else:
        begin(renderer)
        add(f"q = {first} + {lane}")
        add("x = q - shift")
        add(f"at_end = (pid % {parts} == 0) | (pid % {parts} * XBLOCK > {length} - XBLOCK)")
    add(f"{inner} = x")
    if aligned is not None or length % block:
        add(f"xmask = {f'x < {length}' if aligned is None else inside(length)}")
        renderer.xmask = "xmask"
    ends(renderer)
    return parts * product(renderer.sizes[a] for a in rest)
