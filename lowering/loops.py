"""How a row that does not fit on chip is run through: one loop for each level.

What a later loop loads once more should still be in the cache by then. ``schedule`` lets no more
programs run at once than the cache has room for; the loads say which data is wanted again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .aligned import LANES, Aligned
from .body import Body, Instr
from .indexing import Index, Size, is_static, product
from .ir import BITS
from .schedule import Tile
from .source import Lines

if TYPE_CHECKING:
    from .render import Renderer

#: rows of a tile that make an operand of one row small beside it
SHARED = 8

Load = tuple[str, tuple[Index, ...], str]  # buffer, place, dtype


class Loops:
    """The part of the Renderer that writes loops over a row."""

    body: Body
    lines: Lines
    tile: Tile
    sizes: dict[str, Size]
    parallel: list[str]
    reduced: list[str]
    shares: int
    rowwise: bool  # its shares are of rows along memory
    sweeps: bool
    far: bool
    aligned: Aligned | None
    rmask: str | None
    defined: set[str]
    level: int | None = None  # of the loop that is being written
    yields: bool  # whether what is stored outside of loops leaves the cache first

    def body_size(self, size: Size) -> str:
        raise NotImplementedError

    @property
    def lanes(self) -> str:
        """A tile's places along the reduced atoms, from its start."""
        lanes = "tl.arange(0, RBLOCK)[None, :]"
        return f"{lanes}.to(tl.int64)" if self.far else lanes

    def _reduced_vars(self, masked: bool = True) -> None:
        raise NotImplementedError

    def _instr(self, instr: Instr) -> None:
        raise NotImplementedError

    def _loads(self) -> dict[int, set[Load]]:
        """level -> what its loop (or a sweep's) loads of the row."""
        kind, row = "row" if self.sweeps else "loop", set(self.reduced)
        return {
            level: {
                (i.text, i.indices, i.dtype)
                for i in steps
                if i.kind == "load" and row.intersection(i.indices[0].atoms)
            }
            for (section, level), steps in self.body.sections.items()
            if section == kind
        }

    def _loaded_bytes(self) -> int:
        """What a step of a loop loads for one element of the tile, at the most."""
        return max((_bytes(some) for some in self._loads().values()), default=0)

    def _bytes_again(self) -> int:
        """What loops load once more, for one element of a program's row."""
        again: set[Load] = set()
        seen: set[Load] = set()
        for _, loads in sorted(self._loads().items()):
            again |= seen & loads
            seen |= loads
        own = set(self.parallel)
        return _bytes({load for load in again if own.intersection(load[1][0].atoms)})

    def _policy(self, instr: Instr) -> str:
        """What the cache does with a load or a store."""
        if self.level is None:
            first = instr.kind == "store" and self.yields
            return ', eviction_policy="evict_first"' if first else ""
        if not self.tile.cached:
            return ""
        load = (instr.text, instr.indices, instr.dtype)
        others = self._loads()
        if instr.kind == "load" and any(load in others[k] for k in others if k > self.level):
            return ', eviction_policy="evict_last"'
        if instr.kind == "store" or any(load in others[k] for k in others if k < self.level):
            return ', eviction_policy="evict_first"'
        return ""

    def _loop(self, steps: Sequence[Instr], level: int) -> None:
        length, block = product(self.sizes[a] for a in self.reduced), self.tile.r
        self.level = level
        if self.aligned is not None:
            last = length // block * block
            self._ends_of_row(steps, length, last)
            self._run(steps, f"{block}, {last}", masked=False)
        elif self.rowwise:
            self.lines.add("whole = first + tl.maximum(end - first, 0) // RBLOCK * RBLOCK")
            self._run(steps, "first, whole", masked=False)
            self._run(steps, "whole, end", masked=True)
        elif self.shares or not is_static(length) or length < block:
            bounds = "first, end" if self.shares else f"0, {self.body_size(length)}"
            self._run(steps, bounds, masked=True)
        else:  # only the last step looks where the row ends
            whole = length // block * block
            self._run(steps, f"0, {whole}", masked=False)
            if whole != length:
                self._step_at(str(whole), steps, masked=True)
        self.level = None

    def _range(self, bounds: str) -> str:
        if self.tile.stages > 1:
            return f"tl.range({bounds}, RBLOCK, num_stages={self.tile.stages})"
        return f"range({bounds}, RBLOCK)"

    def _run(self, steps: Sequence[Instr], bounds: str, masked: bool) -> None:
        """A loop of whole steps, or of such as look where the row ends."""
        self.lines.add(f"for start in {self._range(bounds)}:")
        self.lines.depth += 1
        self._step_at("start", steps, masked)
        self.lines.depth -= 1

    def _ends_of_row(self, steps: Sequence[Instr], length: int, last: int) -> None:
        """The steps where lanes may lie beside the row: the first, and the last one or two."""
        block = self.tile.r
        count = 2 if length % block + LANES - 1 <= block else 3
        self.lines.add(f"for edge in range({count}):")
        self.lines.depth += 1
        self.lines.add(f"start = tl.where(edge == 0, 0, {last - block} + edge * RBLOCK)")
        self._step_at("start", steps, masked=True)
        self.lines.depth -= 1

    def _step_at(self, start: str, steps: Sequence[Instr], masked: bool) -> None:
        outside = set(self.defined)
        self.rmask = None
        at = "r" if self.aligned is None else "q"
        self.lines.add(f"{at} = {start} + {self.lanes}")
        if self.aligned is not None:
            self.lines.add("r = q - shift")
        self._reduced_vars(masked)
        for instr in steps:
            self._instr(instr)
        self.defined = outside


def _bytes(loads: set[Load]) -> int:
    return sum(BITS[dtype] // 8 for _, _, dtype in loads)


def shared_first(renderer: Renderer, steps: list[Instr]) -> list[Instr]:
    """What all rows of a tile read at the same places comes first, and arrives with the rows: of
    few rows it would hold registers through the reductions."""
    if renderer.rank == 1 or renderer.tile.x < SHARED or renderer.group.column:
        return steps
    row = set(renderer.reduced)
    shared = [i for i in steps if i.kind == "load" and not i.cond and {*i.indices[0].atoms} <= row]
    return shared + [i for i in steps if i not in shared]
