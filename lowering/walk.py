"""The text of a kernel that sweeps over rows: see ``sweep``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .group import SHARE
from .indexing import Size, is_static
from .pairs import join_sums
from .reach import LIMIT_32

if TYPE_CHECKING:
    from .render import Renderer


def sweep_prologue(renderer: Renderer, pid: str, rows: Size) -> Size:
    """Define the program's share of the rows and its lanes; returns the grid."""
    renderer.lines.add(f"{SHARE} = {pid}")
    if in_whole_steps(renderer, rows):
        steps, shares = rows // renderer.tile.x, renderer.shares
        renderer.lines.add(f"first = {SHARE} * {steps} // {shares} * XBLOCK")
        renderer.lines.add(f"end = ({SHARE} + 1) * {steps} // {shares} * XBLOCK")
    else:
        renderer._share_bounds(rows)
    renderer.lines.add(f"r = {renderer.lanes}")
    renderer._reduced_vars()
    return renderer.shares


def in_whole_steps(renderer: Renderer, rows: Size) -> bool:
    """Whether each share is a number of whole steps, none of which looks where its rows end (a
    fifth of the instructions of a layer norm's gradient over rows of 128)."""
    x = renderer.tile.x
    if not is_static(rows) or rows % x:
        return False
    return rows // x * (renderer.shares + 1) <= LIMIT_32


def render_sweep(renderer: Renderer, rows: Size) -> None:
    """What is the same for all rows, the loop over them, and the sums over them."""
    sections, lines = renderer.body.sections, renderer.lines
    renderer.outside_sweep = True
    for instr in sections.get(("once", 0), ()):
        renderer._instr(instr)
    renderer.outside_sweep = False
    outside = set(renderer.defined)
    stages = renderer.tile.stages
    lines.add(f"for start in tl.range(first, end, XBLOCK, num_stages={stages}):")
    lines.depth += 1
    lines.add("x = start + tl.arange(0, XBLOCK)[:, None]")
    if not in_whole_steps(renderer, rows) and renderer.tile.x > 1:
        lines.add("xmask = x < end")
        renderer.xmask = "xmask"
    renderer._unravel("x", renderer.parallel)
    for instr in join_sums(sections.get(("row", 0), ())):
        renderer._instr(instr)
    lines.depth -= 1
    renderer.xmask, renderer.defined, renderer.outside_sweep = None, outside, True
    for instr in sections.get(("after", 0), ()):
        renderer._instr(instr)
