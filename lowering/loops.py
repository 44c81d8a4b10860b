"""How a row that does not fit on chip is run through: one loop for each level.

What a later loop loads once more should still be in the cache by then. ``schedule`` lets no more
programs run at once than the cache has room for; the loads say which data is wanted again.
"""

from __future__ import annotations

from collections.abc import Sequence

from .aligned import LANES, Aligned
from .body import Body, Instr
from .indexing import Index, Size, is_static, product
from .ir import BITS
from .schedule import Tile
from .source import Lines

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
    sweeps: bool
    wide64: bool
    aligned: Aligned | None
    rmask: str | None
    defined: set[str]
    level: int | None = None  # of the loop that is being written

    def body_size(self, size: Size) -> str:
        raise NotImplementedError

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
        """What the cache does with a load or a store of a loop."""
        if not self.tile.cached or self.level is None:
            return ""
        load = (instr.text, instr.indices, instr.dtype)
        others = self._loads()
        if instr.kind == "load" and any(load in others[k] for k in others if k > self.level):
            return ', eviction_policy="evict_last"'
        if instr.kind == "store" or any(load in others[k] for k in others if k < self.level):
            return ', eviction_policy="evict_first"'
        return ""

    def _loop(self, steps: Sequence[Instr], level: int) -> None:
        length = product(self.sizes[a] for a in self.reduced)
        self.level = level
        if self.aligned is not None:
            self._aligned_loop(steps, length)
            self.level = None
            return
        whole = length // self.tile.r * self.tile.r if is_static(length) and not self.shares else 0
        bounds = "first, end" if self.shares else f"0, {self.body_size(whole or length)}"
        starts = f"range({bounds}, RBLOCK)"
        if self.tile.stages > 1:
            starts = f"tl.{starts[:-1]}, num_stages={self.tile.stages})"
        self.lines.add(f"for start in {starts}:")
        self.lines.depth += 1
        lane = "tl.arange(0, RBLOCK)[None, :]"
        lane = f"{lane}.to(tl.int64)" if self.wide64 and not is_static(length) else lane
        self._step_at("start", lane, steps, masked=not whole)
        self.lines.depth -= 1
        if whole and whole != length:  # only the last step looks where the row ends
            self._step_at(str(whole), lane, steps, masked=True)
        self.level = None

    def _aligned_loop(self, steps: Sequence[Instr], length: int) -> None:
        """Both ends of the row, where lanes may lie beside it, and what is between them."""
        block, lane = self.tile.r, "tl.arange(0, RBLOCK)[None, :]"
        last = length // block * block
        edges = 2 if length % block + LANES - 1 <= block else 3
        self.lines.add(f"for edge in range({edges}):")
        self.lines.depth += 1
        self.lines.add(f"start = tl.where(edge == 0, 0, {last - block} + edge * RBLOCK)")
        self._step_at("start", lane, steps, masked=True)
        self.lines.depth -= 1
        self.lines.add(f"for start in range(RBLOCK, {last}, RBLOCK):")
        self.lines.depth += 1
        self._step_at("start", lane, steps, masked=False)
        self.lines.depth -= 1

    def _step_at(self, start: str, lane: str, steps: Sequence[Instr], masked: bool) -> None:
        outside = set(self.defined)
        self.rmask = None
        at = "r" if self.aligned is None else "q"
        self.lines.add(f"{at} = {start} + {lane}")
        if self.aligned is not None:
            self.lines.add("r = q - shift")
        self._reduced_vars(masked)
        for instr in steps:
            self._instr(instr)
        self.defined = outside


def _bytes(loads: set[Load]) -> int:
    return sum(BITS[dtype] // 8 for _, _, dtype in loads)
