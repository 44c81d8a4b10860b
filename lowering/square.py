"""Tiles of two axes in a pointwise kernel: one along which the result is contiguous, and one along
which an operand is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .indexing import Size, is_static, product

if TYPE_CHECKING:
    from .render import Renderer

#: elements along an axis from which on a tile gains by it
LEAST = 8


def axes_of(renderer: Renderer) -> tuple[str, str] | None:
    """(x, y): the axes along which the output and some operand are contiguous, if they differ."""
    sizes, parallel = renderer.sizes, renderer.parallel
    if len(parallel) < 2 or not is_static(*(sizes[a] for a in parallel)):
        return None
    x = parallel[-1]
    stores = [i for i in renderer.instrs if i.kind == "store"]
    if not all(i.indices[0].coefficient(x) == 1 for i in stores) or sizes[x] < LEAST:
        return None
    for instr in renderer.instrs:
        if instr.kind != "load":
            continue
        index = instr.indices[0]
        along = index.coefficient(x)
        for y in parallel[:-1]:
            if index.coefficient(y) == 1 and along not in (0, 1) and sizes[y] >= LEAST:
                return x, y
    return None


def square_prologue(renderer: Renderer, pid: str, axes: tuple[str, str]) -> Size:
    """Define the program's tile of both axes, its masks, and the other atoms; returns the grid."""
    sizes, tile, add = renderer.sizes, renderer.tile, renderer.lines.add
    ax, ay = axes
    nx, ny = -(-sizes[ax] // tile.x), -(-sizes[ay] // tile.r)
    rest = [a for a in renderer.parallel if a not in axes]
    add(f"pid = {pid}")
    add(f"x = (pid % {nx}) * XBLOCK + tl.arange(0, XBLOCK)[None, :]")
    add(f"y = (pid // {nx} % {ny}) * YBLOCK + tl.arange(0, YBLOCK)[:, None]")
    for var, atom, block in (("x", ax, tile.x), ("y", ay, tile.r)):
        if sizes[atom] % block:
            add(f"{var}mask = {var} < {sizes[atom]}")
            setattr(renderer, f"{var}mask", f"{var}mask")
        add(f"{atom} = {var}")
    if rest:
        add(f"z = pid // {nx * ny}")
        renderer._unravel("z", rest)
    return nx * ny * product(sizes[a] for a in rest)
