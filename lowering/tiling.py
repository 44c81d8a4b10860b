"""A kernel's text in another tile: what it computes, and what it reads and writes, stays.

``Tiling`` writes the kernel that a group was rendered as, in the tile that ``schedule`` chose or in
another one; ``neighbours`` are other tiles worth trying. The order in which a sum adds up depends
on the tile, so its last bits may.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from .aligned import LANES
from .indexing import Size, is_static, product
from .ir import Value
from .piecewise import piecewise
from .render import Renderer
from .schedule import Tile, power_of_two
from .source import Source

#: elements of a tile that a thread may have
FEWEST, MOST = 2, 64
MOST_WARPS = 16
#: the same, of a kernel that has a long row to each program
MOST_WARPS_LOOPED = 32

#: places of a program, where a launch is of many kernels
MOST_TOGETHER = 2**12

#: by kind: steps away from a tile, as powers of two of (x, r, warps), and loads in flight; those
#: that gain most often come first
Step = tuple[int, int, int, int]
STEPS: dict[str, tuple[Step, ...]] = {
    "flat": (
        (0, 0, -1, 0),
        (0, 0, 1, 0),
        (1, 0, 0, 0),
        (1, 0, 1, 0),
        (-1, 0, -1, 0),
        (-1, 0, 0, 0),
        (2, 0, 1, 0),
    ),
    "square": (
        (0, 0, -1, 0),
        (0, 0, 1, 0),
        (1, -1, 0, 0),
        (-1, 1, 0, 0),
        (0, -1, -1, 0),
        (-1, 0, -1, 0),
        (1, 0, 0, 0),
    ),
    "row": (
        (0, 0, -1, 0),
        (0, 0, 1, 0),
        (1, 0, 1, 0),
        (1, 0, 0, 0),
        (-1, 0, -1, 0),
        (-1, 0, 0, 0),
        (0, 0, -2, 0),
    ),
    "loop": (
        (0, 0, -1, 0),
        (0, 0, 1, 0),
        (0, 1, 0, 0),
        (0, -1, 0, 0),
        (0, 1, 1, 0),
        (0, -1, -1, 0),
        (0, 0, 0, 2),
    ),
    "column": (
        (0, 0, -1, 0),
        (0, 0, 1, 0),
        (1, 0, 1, 0),
        (1, 0, 0, 0),
        (-1, 0, -1, 0),
        (-1, 0, 0, 0),
    ),
    "column loop": (
        (0, 0, 1, 0),
        (0, 0, -1, 0),
        (0, 1, 0, -1),
        (0, -1, 0, 1),
        (-1, 1, 0, 0),
        (1, -1, 0, 0),
        (0, 0, 0, 1),
    ),
    "sweep": (
        (0, 0, -1, 0),
        (0, 0, 1, 0),
        (1, 0, 0, -1),
        (1, 0, 1, -1),
        (-1, 0, -1, 0),
        (0, 0, 0, -1),
        (0, 0, 0, 1),
    ),
}


class Tiles:
    """The tiles that a kernel may run in. ``tile``: the scheduled one; ``kind`` says which of its
    numbers say something, ``most`` how large x and r are of a tile not larger than what there is,
    ``each`` how many places one of the tile's has."""

    kind: str
    tile: Tile
    most: tuple[int, int]
    each = 1

    def write(self, tile: Tile | None = None) -> Source:
        """The kernel, in ``tile`` if that is given."""
        raise NotImplementedError

    def neighbours(self, warp: int = 32) -> list[Tile]:
        """Other tiles that are worth trying; ``warp``: threads that step together."""
        found = dict.fromkeys(self._steps(warp))
        found.pop(self.tile, None)
        return list(found)

    def _steps(self, warp: int) -> Iterator[Tile]:
        kind, tile, (most_x, most_r) = self.kind, self.tile, self.most
        most_warps = max(tile.warps, MOST_WARPS_LOOPED if kind == "loop" else MOST_WARPS)
        for dx, dr, dw, stages in STEPS[kind]:
            x, r, warps = (_scaled(n, d) for n, d in ((tile.x, dx), (tile.r, dr), (tile.warps, dw)))
            if min(x, r, warps, tile.stages + stages) < 1 or warps > most_warps:
                continue
            if (dx > 0 and x > most_x) or (dr > 0 and r > most_r):
                continue
            if FEWEST <= self.each * x * r // (warp * warps) <= MOST:
                each = max(1, r // (256 * warps)) if kind == "loop" else 1
                yield Tile(x, r, warps, tile.stages + stages, each, tile.cached)


class Tiling(Tiles):
    """Those of a group's kernel. ``whole``: its renderer, in the scheduled tile."""

    def __init__(
        self, whole: Renderer, inlined: set[Value], exact: bool, more: dict[str, Any]
    ) -> None:
        """``more``: what is known of the source's meta."""
        self.whole, self.inlined, self.exact, self.more = whole, inlined, exact, more
        self.tile = whole.tile
        self.each = LANES if whole.carried is not None else 1

    @property
    def kind(self) -> str:  # type: ignore[override]
        return kind_of(self.whole)

    @property
    def most(self) -> tuple[int, int]:  # type: ignore[override]
        return _limits(self.whole)

    def write(self, tile: Tile | None = None) -> Source:
        renderer = self.whole if tile is None else _like(self.whole, tile)
        source = piecewise(renderer, self.inlined, self.exact) or renderer.run()
        source.meta |= self.more
        source.body, source.tiling = renderer.body, self
        if source.bound is not None:
            source.widen = lambda: self._widened(renderer)
        return source

    def _widened(self, narrow: Renderer) -> Source:
        """The kernel, with places of 64 bits."""
        source = _like(narrow, narrow.tile, wide=True).run()
        source.meta |= self.more
        return source


class TilingOfMany(Tiles):
    """Those of pointwise kernels alike that are one launch, which ``make`` writes."""

    kind = "flat"

    def __init__(self, tile: Tile, make: Callable[[Tile], Source]) -> None:
        self.tile, self.make, self.most = tile, make, (MOST_TOGETHER, 1)

    def write(self, tile: Tile | None = None) -> Source:
        source = self.make(tile or self.tile)
        source.tiling = self
        return source


def _scaled(n: int, power: int) -> int:
    return n << power if power >= 0 else n >> -power


def _like(renderer: Renderer, tile: Tile, wide: bool = False) -> Renderer:
    """The renderer of the same kernel in another tile; parameters that it adds are its own."""
    body = replace(renderer.body, params=list(renderer.body.params))
    name = f"{renderer.name}_wide" if wide else renderer.name
    about = renderer.multiprocessors, renderer.backend, renderer.shared
    return Renderer(body, name, *about, wide=wide, tile=tile, waits=renderer.waits)


def kind_of(renderer: Renderer) -> str:
    """Which of a tile's numbers say something."""
    if renderer.rank == 1:
        return "flat" if renderer.square is None else "square"
    if renderer.group.column:
        return "column loop" if renderer.body.looped else "column"
    if renderer.sweeps:
        return "sweep"
    return "loop" if renderer.body.looped else "row"


def _limits(renderer: Renderer) -> tuple[int, int]:
    """The largest x and r of a tile that is not larger than what there is."""
    if renderer.square is not None:
        x, y = (renderer.sizes[a] for a in renderer.square)
        return _up_to(x), _up_to(y)
    rows = product(renderer.sizes[a] for a in renderer.parallel)
    return _up_to(rows), _up_to(product(renderer.sizes[a] for a in renderer.reduced))


def _up_to(size: Size) -> int:
    return power_of_two(size) if is_static(size) else 2**12
