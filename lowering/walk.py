"""The text of a kernel that sweeps over rows: see ``sweep``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .group import SHARE
from .indexing import Size, is_static
from .pairs import join_sums

if TYPE_CHECKING:
    from .render import Renderer


def sweep_prologue(renderer: Renderer, pid: str) -> Size:
    """Define which program this is and its lanes; returns the grid."""
    renderer.lines.add(f"{SHARE} = {pid}")
    renderer.lines.add(f"r = {renderer.lanes}")
    renderer._reduced_vars()
    return renderer.shares


def render_sweep(renderer: Renderer, rows: Size) -> None:
    """What is the same for all rows, the loop over them, and the sums over them.

    Programs take turns: what is read at a time lies together, and only the last step looks where
    the rows end (gradients of a layer norm, H200: 131072 rows of 128 in 37.2 us, 8192 of 4096 with
    dropout in 84.1; 39.0 and 86.8 with a run of rows to each program).
    """
    sections, lines = renderer.body.sections, renderer.lines
    renderer.outside_sweep = True
    for instr in sections.get(("once", 0), ()):
        renderer._instr(instr)
    renderer.outside_sweep = False
    outside = set(renderer.defined)
    end, step = renderer.body_size(rows), f"{renderer.shares} * XBLOCK"
    stages = f"num_stages={renderer.tile.stages}"
    lines.add(f"for start in tl.range({SHARE} * XBLOCK, {end}, {step}, {stages}):")
    lines.depth += 1
    lines.add("x = start + tl.arange(0, XBLOCK)[:, None]")
    if not (is_static(rows) and rows % renderer.tile.x == 0) and renderer.tile.x > 1:
        lines.add(f"xmask = x < {end}")
        renderer.xmask = "xmask"
    renderer._unravel("x", renderer.parallel)
    for instr in join_sums(sections.get(("row", 0), ()), renderer.body.derived):
        renderer._instr(instr)
    lines.depth -= 1
    renderer.xmask, renderer.defined, renderer.outside_sweep = None, outside, True
    if renderer.waits:
        lines.add("dependents.release()")
    for instr in sections.get(("after", 0), ()):
        renderer._instr(instr)


def for_every_row(renderer: Renderer, wide: bool, pointer: str) -> str:
    """The place of what is the same for all rows, ``wide`` where it has an element for each of a
    row's: as a whole tile, whose rows are at one place.

    A row of it alone has fewer elements for each thread than the tile, and where it has one for
    each, Triton lays out the rows like it once their loads are in shared memory: a warp's row is
    then spread over all warps, and computed twice (gradients of a layer norm of 2**25 elements on
    an H200: rows of 256 in 136 us, of 1024 in 77; 67 and 63 as a whole tile).
    """
    if not (renderer.outside_sweep and wide and renderer.tile.x > 1):
        return pointer
    return f"tl.broadcast_to({pointer}, [XBLOCK, RBLOCK])"
