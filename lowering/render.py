"""Instructions -> the text of a Triton kernel: loop order, tiles, masks, addresses."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence

from .accumulators import Accumulators
from .aligned import aligned_of, begin, ends, inside, promise, store_ends, vector
from .authored import name_of_authored
from .body import Body, Instr, loads_first
from .by_rows import row_of, row_prologue
from .carried import Carried, carried_of, prologue, written
from .flight import elements_of_a_thread, stores_more
from .folds import define, parts_of, render_fold, render_load
from .fours import axis_of_fours, is_plain, whole_axis
from .group import SHARE
from .indexing import Index, Size, ceil_div, is_one, is_static, product, simplify
from .ir import SIXTEEN_BIT, Value
from .loops import Loops, shared_first
from .pairs import join_sums
from .reach import LIMIT_32, Reach, is_multiple, runs_far
from .reused import leaves_first
from .scan import render_carry, render_scan
from .schedule import (
    MAX_IN_FLIGHT,
    Tile,
    column_tile,
    looped_row_tile,
    pointwise_tile,
    row_share_tile,
    row_tile,
    sweep_tile,
    transpose_tile,
)
from .source import NUMBER, POINTER, WAIT, Lines, Source, preamble
from .square import axes_of, square_prologue
from .sweep import shares_rows
from .walk import for_every_row, render_sweep, sweep_prologue
from .writes import render_put


class Renderer(Accumulators, Loops):
    def __init__(
        self,
        body: Body,
        name: str,
        multiprocessors: int,
        backend: str = "",
        shared: int = MAX_IN_FLIGHT,
        wide: bool = False,
        tile: Tile | None = None,
        waits: bool = False,
    ) -> None:
        """``wide``: places of symbolic sizes are numbers of 64 bits. ``tile``: the one to use in
        place of what ``schedule`` says. ``waits``: it may be launched before the kernel ahead of it
        has ended."""
        self.body, self.name, self.backend = body, name, backend
        self.nvidia = backend == "cuda"  # whose assembly may stand in a kernel
        self.group = body.group
        self.instrs = [i for section in body.sections.values() for i in section]
        self.multiprocessors, self.shared, self.waits = multiprocessors, shared, waits
        self.sizes: dict[str, Size] = {a: body.size(a) for a in self.group.domain}
        self.merged: dict[str, str | None] = {}  # atom -> atom it became, None when it vanished
        self.lines = Lines()
        self.shares, self.sweeps = self.group.shares, self.group.sweeps
        self.rowwise = shares_rows(self.group)
        self.parallel = self._order(self.group.parallel)
        self.reduced = list(self.group.reduced)
        self._collapse(self.parallel)
        self._collapse(self.reduced)
        self.rank = 2 if self.reduced or self.group.reduced or self._is_reduction() else 1
        self.reach = Reach(self)
        self.symbolic = bool(self.reach.sums)  # whether places depend on symbolic sizes
        self.wide64 = (wide and self.symbolic) or self.reach.static > LIMIT_32
        self.far = self.wide64 and runs_far(self)
        self.square: tuple[str, str] | None = None  # (x atom, y atom) of a 2-D pointwise tile
        self.along: str | None = None  # the atom of a row that pointwise programs have parts of
        self.carried: Carried | None = None  # how threads' places go on in the next row
        scheduled = self._choose_tile()
        self.tile = tile or scheduled
        self.aligned = aligned_of(self)
        self.yields = leaves_first(self)
        self.outside_sweep = False  # where there is no row, and no x

    def _is_reduction(self) -> bool:
        return any(m.reduces or m.kind == "scan" for m in self.group.members)

    # loop order --------------------------------------------------------------------------------

    def _indices(self) -> list[Index]:
        found = [x for i in self.instrs for x in i.indices]
        return found + [index for _, index, _ in self.body.derived.values()]

    def _order(self, atoms: Sequence[str]) -> list[str]:
        """Outermost first, by the strides of the first output that has all of them."""
        for instr in self.instrs:
            if instr.kind == "store":
                strides = dict(instr.indices[0].terms)
                if all(type(strides.get(a)) is int for a in atoms):
                    return sorted(atoms, key=lambda a: -strides[a])
        return list(atoms)

    def _collapse(self, atoms: list[str]) -> None:
        """Join neighbouring atoms that every address runs through as one."""
        k = len(atoms) - 1
        while k > 0:
            outer, inner = atoms[k - 1], atoms[k]
            step = self.sizes[inner]
            if all(
                i.coefficient(outer) == simplify(i.coefficient(inner) * step)
                for i in self._live_indices()
            ):
                self.sizes[inner] = simplify(self.sizes[outer] * step)
                self.merged[outer] = None
                del atoms[k - 1]
            k -= 1

    def _live_indices(self) -> list[Index]:
        if not hasattr(self, "_known_indices"):
            self._known_indices = list(dict.fromkeys(self._indices()))
        return self._known_indices

    # tiles ---------------------------------------------------------------------------------------

    def _choose_tile(self) -> Tile:
        rows = product(self.sizes[a] for a in self.parallel)
        reduced = product(self.sizes[a] for a in self.reduced)
        if self.rank == 1:
            self.square = None if self.body.folds else axes_of(self)
            if self.square is not None:
                x, y = (self.sizes[a] for a in self.square)
                return transpose_tile(x, y, long=stores_more(self, rows))
            by_rows = row_of(self)
            if by_rows is not None:
                self.along, tile = by_rows
                return tile
            carried = carried_of(self)
            if carried is not None:
                self.carried, tile = carried
                return tile
            return pointwise_tile(rows, self.multiprocessors, elements_of_a_thread(self, rows))
        if self.group.column:
            reduced = self.group.reduced_length
            if self.rowwise:
                return row_share_tile(reduced, self.body.looped)
            return column_tile(rows, reduced, self.shares, self.body.looped, self._loaded_bytes())
        draws = "random" in self.body.modules
        if self.sweeps:
            return sweep_tile(reduced, self._loaded_bytes(), self.shared)
        if self.body.looped:
            online = any(i.kind == "online_step" for i in self.instrs)
            few = is_static(rows) and rows <= 2 * self.multiprocessors
            loaded, again = self._loaded_bytes(), self._bytes_again()
            return looped_row_tile(reduced, loaded, again, online, few)
        whole = [i for i in self.instrs if i.kind == "load" and self._is_whole(i)]
        gathers = any(
            a not in self.sizes and a not in self.body.derived
            for i in whole
            for a in i.indices[0].atoms
        )
        loads = len({i.text for i in whole})
        return row_tile(rows, reduced, loads, self.multiprocessors, gathers, draws)

    def _is_whole(self, instr: Instr) -> bool:
        """Whether an operand has an element for each of the tile's."""
        index = instr.indices[0]
        if parts_of(self, index):
            return False
        spans = self._spans(index)
        return any(map(self._varies, index.atoms)) and (spans["x"] or spans["other"])

    # text ----------------------------------------------------------------------------------------

    def run(self) -> Source:
        self.lines.depth = 1
        if self.waits:
            self.lines.add(WAIT)
        grid = self._prologue()
        self._sections()
        names = [n for n, _, _ in self.body.params]
        constants = {"XBLOCK": self.tile.x}
        if self.rank == 2:
            constants["RBLOCK"] = self.tile.r
        elif self.square is not None:
            constants["YBLOCK"] = self.tile.r
        signature = {n: self._type(role, what) for n, role, what in self.body.params}
        meta = {
            "name": self.name,
            "signature": signature,
            "constants": constants,
            "num_warps": self.tile.warps,
        }
        sizes = [(n, what) for n, role, what in self.body.params if role == "size"]
        multiples = [n for n, what in sizes if not is_static(what) and is_multiple(what)]
        if multiples:
            meta["multiples"] = multiples
        params = ", ".join([*names, *(f"{c}: tl.constexpr" for c in constants)])
        begin = preamble([self.body], ["dependents"] if self.waits else ())
        head = f"{begin}\n\n@triton.jit\ndef {self.name}({params}):\n"
        return Source(
            self.name,
            head + self.lines.text,
            self.body.params,
            grid,
            meta,
            self.lines.below(head),
            bound=None if self.wide64 else self._bound(sizes),
            loops=len(self.parallel),
        )

    def _type(self, role: str, what: object) -> str:
        if role == NUMBER:
            return "i64"
        if role != "size":
            return POINTER[what.dtype]  # type: ignore[attr-defined]
        return "i32" if self.symbolic and not self.wide64 else "i64"

    def _bound(self, sizes: Sequence[tuple[str, Size]]) -> Size | None:
        """What ``sizes`` must keep within 32 bits; None of places that do not depend on any."""
        if not self.symbolic:
            return None
        for _, what in sizes:
            self.reach.see(what)
        return self.reach.bound()

    def _prologue(self) -> Size:
        """Program ids -> x (and y), their masks and the atoms; returns the grid."""
        add, x = self.lines.add, self.tile.x
        pid = "tl.program_id(0).to(tl.int64)" if self.wide64 else "tl.program_id(0)"
        rows = product(self.sizes[a] for a in self.parallel)
        self.xmask: str | None = None
        self.ymask: str | None = None
        self.rmask: str | None = None
        self.defined: set[str] = set()
        if self.square is not None:
            return square_prologue(self, pid, self.square)
        if self.along is not None:
            return row_prologue(self, self.along, pid)
        if self.carried is not None:
            return prologue(self, self.carried, pid)
        if self.sweeps:
            return sweep_prologue(self, pid)
        column = "[:, None]" if self.rank == 2 else ""
        blocks = ceil_div(rows, x)
        if self.shares:
            add(f"{SHARE} = {pid} // {self.body_size(blocks)}")
            pid = f"{pid} % {self.body_size(blocks)}"
        add(f"x = {pid} * XBLOCK + tl.arange(0, XBLOCK){column}")
        if not (is_static(rows) and rows % x == 0):
            add(f"xmask = x < {self.body_size(rows)}")
            self.xmask = "xmask"
        self._unravel("x", self.parallel)
        if self.shares:
            self._share_bounds(product(self.sizes[a] for a in self.reduced))
        begin(self)
        if self.rank == 2 and not self.body.looped:
            first = "first + " if self.shares else ""
            add(f"r = {first}{self.lanes}")
            self._reduced_vars()
        return simplify(blocks * max(1, self.shares))

    def _share_bounds(self, rows: Size) -> None:
        """Define where the program's share of the rows begins and ends; of one along memory, at
        whole steps, whose loads are vectors."""
        step = self.tile.r if self.rowwise and self.body.looped else 1
        together = self.shares * step
        if is_static(rows):
            share = str(-(-rows // together) * step)
        else:
            whole = f" * {step}" if step > 1 else ""
            share = f"((({self.body_size(rows)} - 1) // {together} + 1){whole})"
        self.lines.add(f"first = {SHARE} * {share}")
        # no sum here is beyond the row, whose places may be as many as 32 bits count
        self.lines.add(f"end = first + tl.minimum({share}, {self.body_size(rows)} - first)")

    def _unravel(self, var: str, atoms: Sequence[str]) -> None:
        """Define the atoms as the digits of ``var``."""
        inner: Size = 1
        for place, atom in enumerate(reversed(atoms)):
            text = var if inner == 1 and is_static(inner) else f"({var} // {self.body_size(inner)})"
            if place < len(atoms) - 1:
                text = f"{text} % {self.body_size(self.sizes[atom])}"
            self.lines.add(f"{atom} = {text}")
            inner = simplify(inner * self.sizes[atom])

    def _reduced_vars(self, masked: bool = True) -> None:
        length = product(self.sizes[a] for a in self.reduced)
        if self.shares and not self.sweeps and (masked or not self.rowwise):
            self.lines.add("rmask = r < end")
            self.rmask = "rmask"
        elif masked and self.aligned is not None:
            self.lines.add(f"rmask = {inside(length)}")
            self.rmask = "rmask"
        elif masked and not (is_static(length) and length % self.tile.r == 0):
            self.lines.add(f"rmask = r < {self.body_size(length)}")
            self.rmask = "rmask"
        self._unravel("r", self.reduced)
        if masked:
            ends(self)

    def body_size(self, size: Size) -> str:
        if type(size) is int:
            return str(size)
        for name, role, what in self.body.params:
            if role == "size" and what == size:
                return name
        name = f"ks{sum(role == 'size' for _, role, _ in self.body.params)}"
        self.body.params.append((name, "size", size))
        return name

    def _sections(self) -> None:
        if self.sweeps:
            render_sweep(self, product(self.sizes[a] for a in self.parallel))
            return
        top = max((level for _, level in self.body.sections), default=0)
        for level in range(top + 1):
            steps = self.body.sections.get(("row", level), [])
            flat = self.rank == 1
            if flat:
                steps = loads_first(steps, self.body.derived)
            elif not self.group.column:
                steps = join_sums(shared_first(self, steps), self.body.derived)
            for instr in steps:
                self._instr(instr)
            steps = self.body.sections.get(("loop", level), [])
            if steps:
                self._loop(steps, level)

    def _instr(self, instr: Instr) -> None:
        for index in instr.indices:
            self._define(index)
        if self.carried is None or not written(self, self.carried, instr):
            getattr(self, f"_{instr.kind}")(instr)

    def _define(self, index: Index) -> None:
        """Emit the derived atoms an index needs."""
        for atom in index.atoms:
            if atom in self.body.folds and atom not in self.defined:
                define(self, atom)
            if atom in self.body.derived and atom not in self.defined:
                kind, inner, divisor = self.body.derived[atom]
                self._define(inner)
                text = f"({self.index(inner)}) {kind} {self.body_size(divisor)}"
                self.lines.add(f"{atom} = {f'({text}).to(tl.int64)' if self.wide64 else text}")
                self.defined.add(atom)

    def index(self, index: Index) -> str:
        terms, parts = list(index.terms), []
        if self._is_linear(index):
            terms, parts = [t for t in terms if t[0] not in self.sizes], ["x"]
        for atom, c in terms:
            if atom in self.merged:
                continue
            if self.wide64 and atom not in self.group.sizes and atom not in self.body.derived:
                atom = f"{atom}.to(tl.int64)"  # a number that was loaded, perhaps of 32 bits
            parts.append(atom if is_one(c) else f"{atom} * {self.body_size(c)}")
        if type(index.const) is not int or index.const != 0:
            parts.append(self.body_size(index.const))
        return " + ".join(parts) or "0"

    def _is_linear(self, index: Index) -> bool:
        """Whether the loop variables run through memory in order, so that ``x`` says where."""
        one = self.rank == 1 and self.square is None and self.along is None
        return one and len(self.parallel) > 1 and is_plain(self, dict(index.terms), self.parallel)

    # instructions --------------------------------------------------------------------------------

    def _line(self, instr: Instr) -> None:
        text = instr.text
        for k, index in enumerate(instr.indices):
            text = text.replace(f"{{i{k}}}", self._coordinate(index))
        if "{fours}" in text:
            text = text.replace("{fours}", str(axis_of_fours(self, instr.indices[0])))
        text = text.replace("{nvidia}", str(self.nvidia))
        text = text.replace("{ones}", "1, 1" if self._two_dims else "1")
        self.lines.add(f"{instr.out} = {text}", instr.computes)

    @property
    def _two_dims(self) -> bool:
        return self.rank == 2 or self.square is not None or self.carried is not None

    def _coordinate(self, index: Index) -> str:
        """An index as a tile of numbers (never a bare literal)."""
        text = whole_axis(self, index) or self.index(index)
        return f"(x * 0 + {text})" if not index.atoms else f"({text})"

    def _load(self, instr: Instr) -> None:
        parts = parts_of(self, instr.indices[0])
        text = self._loaded(instr) if parts is None else render_load(self, instr, parts)
        if instr.dtype in SIXTEEN_BIT:
            text += ".to(tl.float32)"
        self.lines.add(f"{instr.out} = {text}")

    def _loaded(self, instr: Instr) -> str:
        index = instr.indices[0]
        wide = any(self._varies(a) for a in index.atoms) or instr.cond in self.body.wide
        pointer = self.index(index)
        masks = self._masks(index, wide)
        if instr.cond is not None:
            masks.append(instr.cond)
        if instr.cond is not None or (masks and self._spans(index)["other"]):
            pointer += self._missing(index, wide)  # a loaded place may be one number for the tile
        lanes = vector(self, instr)
        if lanes:
            pointer = promise(self, pointer, lanes)
            masks = [f"some{lanes}" if m in (self.rmask, self.xmask) else m for m in masks]
        mask = f", mask={' & '.join(masks)}, other=0" if masks else ""
        pointer = for_every_row(self, wide, pointer)
        return f"tl.load({instr.text} + ({pointer}){mask}{self._policy(instr)})"

    def _varies(self, atom: str) -> bool:
        return atom in self.group.reduced or atom in self.body.wide

    def _masks(self, index: Index, wide: bool) -> list[str]:
        across = self._spans(index)
        masks = []
        if self.xmask and (across["x"] or across["other"]):
            masks.append(self.xmask)
        if self.ymask and (across["y"] or across["other"]):
            masks.append(self.ymask)
        if self.rmask and wide:
            masks.append(self.rmask)
        return masks

    def _spans(self, index: Index) -> dict[str, bool]:
        """Which tile axes an index moves along; "other" for registers and derived atoms."""
        out = {"x": False, "y": False, "other": False}
        for atom in index.atoms:
            if atom in self.merged:
                continue
            if self.square is not None and atom in self.square:
                out["x" if atom == self.square[0] else "y"] = True
            elif atom in self.parallel:
                out["x"] = out["x"] or (self.square is None and self.along in (None, atom))
            elif atom == SHARE:
                continue  # one number for all of a program
            elif atom not in self.reduced:
                out["other"] = True
        return out

    def _missing(self, index: Index, wide: bool) -> str:
        """Zero terms that give an address the whole tile's shape."""
        across = self._spans(index)
        out = "" if across["x"] or self.outside_sweep else " + x * 0"
        if self.square is not None and not across["y"]:
            out += " + y * 0"
        if wide and not any(a in self.reduced for a in index.atoms):
            out += " + r * 0"
        return out

    def _store(self, instr: Instr) -> None:
        index, wide = instr.indices[0], instr.cond == "wide"
        if self.along is not None and self.along not in index.atoms:  # all of the row's programs
            self.lines.add(
                f"tl.store({instr.text} + ({self.index(index)} + tl.arange(0, 1)), {instr.out})"
            )
            return
        pointer = self.index(index) + self._missing(index, wide)
        masks = [m for m in (self.xmask, self.ymask, self.rmask if wide else None) if m]
        mask = f", mask={' & '.join(masks)}" if masks else ""
        policy = self._policy(instr)
        lanes = vector(self, instr)
        if lanes:
            pointer = promise(self, pointer, lanes)
        if lanes and masks:
            store_ends(self, f"{instr.text} + ({pointer}), {instr.out}", mask, policy, lanes)
        else:
            self.lines.add(f"tl.store({instr.text} + ({pointer}), {instr.out}{mask}{policy})")

    _carry, _fold, _scan, _put = render_carry, render_fold, render_scan, render_put

    def _barrier(self, instr: Instr) -> None:
        self.lines.add("tl.debug_barrier()")


@functools.cache
def _identifier(word: str) -> str:
    return re.sub(r"\W", "_", word).strip("_")


def kernel_name(group_members: Sequence[Value]) -> str:
    words: list[str] = []
    for m in group_members:
        node = m.node
        word = getattr(getattr(node, "target", None), "_opname", None) or name_of_authored(m.op)
        word = word or m.op or m.kind
        word = _identifier(str(word))
        if word not in words and word not in ("view", "to_copy", "cast", "clone", "copy"):
            words.append(word)
    return "fused_" + ("_".join(words)[:56].strip("_") or "copy")
