"""How reductions are written: an accumulator begins, takes steps and ends.

Tiles are [X, R]. ``begin``, ``step`` and ``end`` reduce R; ``sweep_*`` reduce X, over the rows that
a program walks over.
"""

from __future__ import annotations

from .body import Body, Instr
from .indexing import Index
from .schedule import Tile
from .source import Lines
from .spelling import ONLINE, REDUCTIONS, identity


class Accumulators:
    """The part of the Renderer that knows reductions."""

    body: Body
    lines: Lines
    tile: Tile
    xmask: str | None
    rmask: str | None

    def _coordinate(self, index: Index) -> str:
        raise NotImplementedError

    def _begin(self, instr: Instr) -> None:
        if not self.body.looped:
            return
        shape, op = "[XBLOCK, RBLOCK]", instr.text
        dtype = "int1" if instr.dtype == "bool" else instr.dtype
        start = identity(op, instr.dtype)
        self.lines.add(f"acc_{instr.out} = tl.full({shape}, {start}, tl.{dtype})")
        if op in ("argmax", "argmin"):
            self.lines.add(f"at_{instr.out} = tl.full({shape}, {2**62}, tl.int64)")

    def _step(self, instr: Instr) -> None:
        add, out, op = self.lines.add, instr.out, instr.text
        x, acc = f"x_{out}", f"acc_{out}"
        add(f"{x} = tl.broadcast_to({instr.cond}, [XBLOCK, RBLOCK])")
        if op in ("argmax", "argmin"):
            self._argbest_step(instr)
            return
        ident = identity(op, instr.dtype)
        if self.rmask:
            if instr.dtype == "bool":
                least = ident in ("0", "False")
                add(f"{x} = {x} " + (f"& {self.rmask}" if least else f"| ({self.rmask} == 0)"))
            else:
                add(f"{x} = tl.where({self.rmask}, {x}, {ident})")
        if not self.body.looped:
            return
        add(f"{acc} = {REDUCTIONS[op][0].format(acc, x)}")

    def _online_begin(self, instr: Instr) -> None:
        shape = f"[XBLOCK, {self.tile.r // self.tile.each}]"
        start = identity("logsumexp", instr.dtype)
        self.lines.add(f"acc_{instr.out} = tl.full({shape}, {start}, tl.{instr.dtype})")
        self.lines.add(f"sum_{instr.out} = tl.full({shape}, 0, tl.{instr.dtype})")

    def _online_step(self, instr: Instr) -> None:
        add, out = self.lines.add, instr.out
        x, pair = f"x_{out}", f"acc_{out}, sum_{out}"
        add(f"{x} = tl.broadcast_to({instr.cond}, [XBLOCK, RBLOCK])")
        if self.rmask:
            add(f"{x} = tl.where({self.rmask}, {x}, {identity('logsumexp', instr.dtype)})")
        add(f"{pair} = reductions.running_logsumexp({pair}, {x})")

    def _online_end(self, instr: Instr) -> None:
        pair = (
            f"acc_{instr.cond}" if instr.text == "amax" else f"acc_{instr.cond}, sum_{instr.cond}"
        )
        self.lines.add(f"{instr.out} = reductions.row_{instr.text}({pair})")

    def _argbest_step(self, instr: Instr) -> None:
        add, out = self.lines.add, instr.out
        x, at, largest = f"x_{out}", f"at_{out}", instr.text == "argmax"
        place = f"tl.broadcast_to({self._coordinate(instr.indices[0])}, [XBLOCK, RBLOCK])"
        add(f"place_{out} = ({place}).to(tl.int64)")
        if self.rmask:
            add(f"place_{out} = tl.where({self.rmask}, place_{out}, {2**62})")
        if self.body.looped:
            better = f"reductions.beats({x}, acc_{out}, {largest}) | ({at} == {2**62})"
            add(f"better_{out} = ({better}) & (place_{out} < {2**62})")
            add(f"acc_{out} = tl.where(better_{out}, {x}, acc_{out})")
            add(f"{at} = tl.where(better_{out}, place_{out}, {at})")

    def _end(self, instr: Instr) -> None:
        add, out, op = self.lines.add, instr.out, instr.text
        looped = self.body.looped
        if op in ("argmax", "argmin"):
            x, at = (f"acc_{out}", f"at_{out}") if looped else (f"x_{out}", f"place_{out}")
            add(f"{out} = reductions.row_argbest({x}, {at}, {op == 'argmax'})")
        elif op in ONLINE:
            ones = f"tl.full([XBLOCK, RBLOCK], 1, tl.{instr.dtype})"
            add(f"{out} = reductions.row_{op}(x_{out}, {ones})")
        else:
            add(f"{out} = {REDUCTIONS[op][3]}({'acc' if looped else 'x'}_{out})")

    def _end_both(self, instr: Instr) -> None:
        one, two, of = instr.out, instr.cond, "acc" if self.body.looped else "x"
        self.lines.add(f"{one}, {two} = reductions.row_sums({of}_{one}, {of}_{two})")

    def _sweep_begin(self, instr: Instr) -> None:
        dtype = "int1" if instr.dtype == "bool" else instr.dtype
        start = identity(instr.text, instr.dtype)
        self.lines.add(f"acc_{instr.out} = tl.full([XBLOCK, RBLOCK], {start}, tl.{dtype})")

    def _sweep_step(self, instr: Instr) -> None:
        x, acc = f"x_{instr.out}", f"acc_{instr.out}"
        self.lines.add(f"{x} = tl.broadcast_to({instr.cond}, [XBLOCK, RBLOCK])")
        if self.xmask:
            start = identity(instr.text, instr.dtype)
            self.lines.add(f"{x} = tl.where({self.xmask}, {x}, {start})")
        self.lines.add(f"{acc} = {REDUCTIONS[instr.text][0].format(acc, x)}")

    def _sweep_end(self, instr: Instr) -> None:
        finish = REDUCTIONS[instr.text][3].replace("row_", "column_")
        self.lines.add(f"{instr.out} = {finish}(acc_{instr.out})")
