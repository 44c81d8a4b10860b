"""Group -> instructions.

Every output is *pulled*: its expression is evaluated at the group's loop variables, through views
as index arithmetic, down to loads. What comes out is a list of instructions whose addresses are
still ``Index`` objects; ``render`` chooses loop order and tiles and writes the kernel's text.

A reduction group runs in *levels*: values of level 0 need no reduction of this kernel, a reduction
of level-k operands has level k + 1. A row that fits on chip is one straight run; a longer one is
one loop over the row for each level. A group that sweeps over rows is one loop over whole rows,
between what is the same for all of them and the sums over them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from ..kernels.op import BODIES, Authored
from .authored import emit_authored
from .body import Body, Instr, Window
from .folds import fold
from .group import Group
from .indexing import ZERO, Index, NeedSplit, Size, is_one, is_static, quotient, simplify
from .ir import INTEGERS, SIXTEEN_BIT, SizeArg, Value, computing_dtype
from .leaves import emit_full, emit_iota, emit_random
from .online import Pair, find_online
from .patch import emit_patch
from .pieces import emit_concat, lies_inside
from .reduced import accumulate, finish_reduction
from .rounding import Rounding
from .saturate import rounded_to_int8
from .scan import emit_scan
from .seeds import emit_seed, takes_number
from .spelling import (
    EmitError,
    computing_type,
    literal,
    parameters,
    spelling,
    whole,
)
from .writes import emit_store


class Emitter:
    def __init__(
        self,
        group: Group,
        inlined: set[Value],
        exact: bool,
        looped: bool,
        window: Window | None = None,
    ) -> None:
        self.group, self.inlined, self.exact = group, inlined, exact
        self.members = set(group.members)
        self.body = Body(group, looped, window)
        self.memo: dict[Any, str] = {}
        self.levels: dict[Value, int] = {}
        self.radix: dict[tuple[str, ...], Index] = {}  # atoms of an axis -> the place along it
        self.reductions: dict[Value, str] = {}  # reduction -> its name in the kernel
        self.results: dict[Value, str] = {}  # reduction -> register of its result
        self.after: dict[str, int] = {}  # register of a row -> the level it is known from, if not 0
        self.online = find_online(group) if looped else {}
        self.running: dict[Pair, str] = {}  # operand -> name of its running maximum and sum
        self.names: dict[Any, str] = {}  # buffer or size expression -> kernel parameter
        self.wide_atoms = set(group.reduced)
        self.walked = set(group.parallel) if group.sweeps else set()  # a program's rows
        self.counter = 0

    @functools.cached_property
    def rounding(self) -> Rounding:
        """Which values are seen in 16 bits only; few kernels have an op that asks."""
        return Rounding(self.group, self._computes)

    # driver --------------------------------------------------------------------------------

    def run(self) -> Body:
        members = self.group.members
        top = max([self.level(m) for m in members], default=0)
        reductions = [(m, self.level(m)) for m in members if m.reduces]
        wide = [out for out in self.group.stored if self._is_wide(out)]
        narrow = [out for out in self.group.stored if out not in wide]
        for level in range(top + 1):
            for m, own in reductions:
                if own == level:
                    finish_reduction(self, m)
            self._store_all(narrow, level)
            for m, own in reductions:
                if own == level + 1:
                    accumulate(self, m, level)
            self._store_all(wide, level)
        self._store_in_place()
        return self.body

    def level(self, v: Value) -> int:
        known = self.levels.get(v)
        if known is None:
            if v.kind == "view":
                known = self.level(v.args[0])
            elif not self._computes(v):
                known = 0
            elif v in self.online:
                known = self.level(self.online[v][1][0]) + 1
            else:
                own = v in self.members and v.reduces  # else it is a fold, in no loop
                known = max([self.level(a) for a in v.inputs], default=0) + own
            self.levels[v] = known
        return known

    def _computes(self, v: Value) -> bool:
        return v in self.members or v in self.inlined

    def _is_wide(self, v: Value) -> bool:
        if not self.wide_atoms:
            return False
        frame = self.group.frame(v)
        return any(a in self.wide_atoms for axis in frame or () for a in axis or ())

    def coords(self, v: Value) -> list[Index]:
        """v's place in terms of the group's atoms."""
        frame = self.group.frame(v)
        if frame is None or None in frame:
            raise EmitError(f"{v!r} has no place in its group")
        return [self.mixed_radix(axis) for axis in frame]

    def mixed_radix(self, axis: tuple[str, ...]) -> Index:
        known = self.radix.get(axis)
        if known is None:
            terms: dict[str, Size] = {}
            step: Size = 1
            first: Size = 0
            for atom in reversed(axis):
                terms[atom] = step
                first = simplify(first + step * self.body.first(atom))
                step = simplify(step * self.group.size(atom))
            known = self.radix[axis] = Index(terms, first)
        return known

    # what views ask for ----------------------------------------------------------------------

    def size(self, atom: str) -> Size:
        if atom in self.body.derived:
            kind, index, divisor = self.body.derived[atom]
            if kind == "%":
                return divisor
            top = self._extent(index)
            return quotient(top, divisor) or top
        known = atom in self.group.sizes or atom in self.body.folds
        return self.body.size(atom) if known else 2**31

    def _extent(self, index: Index) -> Size:
        top: Size = index.const + 1
        for atom, c in index.terms:
            top = top + c * (self.size(atom) - 1)
        return simplify(top)

    def derive(self, kind: str, index: Index, divisor: Size) -> Index:
        for name, known in self.body.derived.items():
            if known == (kind, index, divisor):
                return Index({name: 1})
        name = f"q{len(self.body.derived)}"
        self.body.derived[name] = (kind, index, divisor)
        if not is_static(divisor):
            self.size_name(divisor)
        if self._varies(index):
            self.wide_atoms.add(name)
            self.body.wide.add(name)
        elif known_from := self._after(index):
            self.after[name] = known_from
        return Index({name: 1})

    def _varies(self, *places: Index) -> bool:
        atoms, registers = self.wide_atoms, self.body.wide
        if not atoms and not registers:  # as in a pointwise kernel
            return False
        for place in places:
            for atom, _ in place.terms:
                if atom in atoms or atom in registers:
                    return True
        return False

    # evaluation ------------------------------------------------------------------------------

    def at(
        self, v: Value, coords: Sequence[Index], shape: Sequence[Size], cond: str | None, level: int
    ) -> str:
        """The register of operand ``v`` of something of ``shape`` evaluated at ``coords``."""
        lead = len(shape) - len(v.shape)
        own = [
            ZERO if type(s) is int and s == 1 else coords[k] for k, s in enumerate(v.shape, lead)
        ]
        return self.eval(v, own, cond, level)

    def eval(self, v: Value, coords: Sequence[Index], cond: str | None, level: int) -> str:
        while v.kind == "view":
            coords = v.params.pull(coords, self)
            v = v.args[0]
        if v in self.results:
            if not self._over_rows(v) and not self.is_own_place(v, coords):
                raise EmitError(f"{v!r} is read in another place than its own")
            return self.results[v]
        wide = self._varies(*coords) or cond in self.body.wide
        section = self._section(wide, level if wide else self._known_from(v, coords, cond))
        if self.walked and cond is None and self._is_fixed(v, coords):
            section = ("once", 0)
        key = (v, tuple(coords), cond, section)
        register = self.memo.get(key)
        if register is None:
            register = self._compute(v, coords, cond, level, section)
            if wide:
                self.body.wide.add(register)
            self.memo[key] = register
        return register

    def _known_from(self, v: Value, coords: Sequence[Index], cond: str | None) -> int:
        """The level at which v can be computed there: of an element that a gather picks, not before
        its place is known, which may be a reduction's result."""
        return max(self.level(v), self._after(*coords), self.after.get(cond or "", 0))

    def _after(self, *places: Index) -> int:
        if not self.after:
            return 0
        return max([self.after.get(atom, 0) for place in places for atom in place.atoms], default=0)

    def _over_rows(self, v: Value) -> bool:
        """Whether v adds up the rows that a program walks over."""
        return v.kind == "partial" and self.group.sweeps

    def _is_fixed(self, v: Value, coords: Sequence[Index]) -> bool:
        """Whether v is memory that all rows of the sweep read at the same place."""
        return (
            v not in self.members
            and v not in self.inlined
            and all(a in self.group.sizes and a not in self.walked for c in coords for a in c.atoms)
        )

    def is_own_place(self, v: Value, coords: Sequence[Index]) -> bool:
        """Whether the coordinates are where the kernel itself has v."""
        own = self.coords(v)
        return all(a == b or is_one(size) for a, b, size in zip(coords, own, v.shape, strict=True))

    def _section(self, wide: bool, level: int) -> tuple[str, int]:
        if not self.body.looped:
            return ("row", 0)
        return ("loop" if wide else "row", level)

    def _compute(
        self,
        v: Value,
        coords: Sequence[Index],
        cond: str | None,
        level: int,
        section: tuple[str, int],
    ) -> str:
        if not self._computes(v):
            return self._load(v, coords, cond, section)
        if v.reduces and v not in self.members:
            return fold(self, v, coords, cond, level, section)
        method = getattr(self, f"_{v.kind}", None)
        if method is None or v.reduces:
            raise EmitError(f"{v!r} cannot be evaluated here")
        return method(v, coords, cond, level, section)

    def line(
        self,
        section: tuple[str, int],
        text: str,
        indices: Sequence[Index] = (),
        computes: Value | None = None,
        prefix: str = "t",
    ) -> str:
        register = self.new_register(section, prefix)
        self.body.sections.setdefault(section, []).append(
            Instr("line", register, text, tuple(indices), computes=computes)
        )
        return register

    def new_register(self, section: tuple[str, int], prefix: str = "t") -> str:
        register = f"{prefix}{self.counter}"
        self.counter += 1
        if section[0] == "row" and section[1]:
            self.after[register] = section[1]
        return register

    def _load(
        self, v: Value, coords: Sequence[Index], cond: str | None, section: tuple[str, int]
    ) -> str:
        name = self.buffer_name(v, "in")
        if takes_number(self, v):
            return emit_seed(self, v, name, section)
        index, within = self.address(v, coords), cond
        if cond is not None and lies_inside(v, coords, self):
            cond = None
        register = self.new_register(section)
        self.body.sections.setdefault(section, []).append(
            Instr("load", register, name, (index,), cond=cond, dtype=v.dtype, within=within)
        )
        return register

    def address(self, v: Value, coords: Sequence[Index]) -> Index:
        return self._known(Index.sum(coords, v.strides))

    def buffer_name(self, v: Value, role: str) -> str:
        if v not in self.names:
            self.names[v] = f"{role}{sum(r == role for _, r, _ in self.body.params)}"
            self.body.params.append((self.names[v], role, v))
        return self.names[v]

    def size_name(self, size: Size) -> str:
        """A size in kernel text: a literal, or the name of a kernel argument."""
        if type(size) is int:
            return str(size)
        if size not in self.names:
            self.names[size] = f"ks{sum(r == 'size' for _, r, _ in self.body.params)}"
            self.body.params.append((self.names[size], "size", size))
        return self.names[size]

    # kinds of values -------------------------------------------------------------------------

    def _pointwise(
        self,
        v: Value,
        coords: Sequence[Index],
        cond: str | None,
        level: int,
        section: tuple[str, int],
    ) -> str:
        assert v.op is not None  # a name in BODIES, for a pointwise value
        op = BODIES[v.op]
        if isinstance(op, Authored):
            return emit_authored(self, v, op, coords, cond, level, section)
        compute = computing_type(v)
        names = parameters(op)
        args = []
        for name, a in zip(names, v.args, strict=False):
            if isinstance(a, Value):
                register = self.at(a, coords, v.shape, cond, level)
                want = "bool" if name in op.truth else compute
                args.append(self._operand(register, a, want, v))
            elif isinstance(a, SizeArg):
                args.append(f"{self.size_name(a.expr)}.to(tl.{compute})")
            else:
                args.append(literal(whole(a) if compute in INTEGERS else a))
        quick = op.quick is not None and compute == "float32" and self.rounding.may_be_quick(v)
        args += ["{nvidia}"] if "nvidia" in (parameters(op, quick) if quick else names) else []
        module, function = spelling(op, quick)
        self.body.modules.add(module)
        result = f"{module}.{function}({', '.join(args)})"
        return self.line(section, self.rounded(result, v.dtype, compute, v), computes=v)

    def _operand(self, register: str, a: Value, want: str, v: Value) -> str:
        if want == "bool":
            return register if a.dtype == "bool" else f"({register} != 0)"
        have = computing_dtype(a.dtype)
        if a.ndim == 0 and v.ndim and v.dtype in SIXTEEN_BIT and a.dtype in ("float32", "float64"):
            register, have = f"{register}.to(tl.{v.dtype})", v.dtype  # eager casts it first
        return register if have == want else f"{register}.to(tl.{want})"

    def rounded(self, text: str, dtype: str, have: str, v: Value) -> str:
        """``text`` (held as ``have``) as eager would leave it in a tensor of ``dtype``."""
        hold = computing_dtype(dtype)
        if dtype in SIXTEEN_BIT and self.exact:
            return f"({text}).to(tl.{dtype}).to(tl.float32)"
        if dtype == "bool" or hold == have:
            return text
        return f"({text}).to(tl.{hold})"

    def _cast(
        self,
        v: Value,
        coords: Sequence[Index],
        cond: str | None,
        level: int,
        section: tuple[str, int],
    ) -> str:
        a = v.args[0]
        wide = rounded_to_int8(v)
        if wide is not None and self._computes(a) and self._computes(a.args[0]):
            register = self.at(wide, coords, v.shape, cond, level)
            self.body.modules.add("unary")
            text = f"unary.round_to_int8({register}, {{nvidia}})"
            return self.line(section, text, computes=v)
        register = self.at(a, coords, v.shape, cond, level)
        if a.dtype == v.dtype or (v.dtype == computing_dtype(a.dtype) and v.dtype != "bool"):
            return register
        if v.dtype == "bool":
            return self.line(section, f"({register} != 0)", computes=v)
        if v.dtype in SIXTEEN_BIT and not self.exact and computing_dtype(a.dtype) == "float32":
            return register
        text = register
        if v.dtype in SIXTEEN_BIT:
            text = f"{text}.to(tl.{v.dtype})"
        return self.line(section, f"{text}.to(tl.{computing_dtype(v.dtype)})", computes=v)

    def _known(self, index: Index) -> Index:
        """The index, whose sizes are parameters from now on."""
        for size in (*(c for _, c in index.terms), index.const):
            if type(size) is not int:
                self.size_name(size)
        return index

    _full, _iota, _random = emit_full, emit_iota, emit_random
    _concat = emit_concat
    _patch = emit_patch
    _scan = emit_scan

    def _gather(
        self,
        v: Value,
        coords: Sequence[Index],
        cond: str | None,
        level: int,
        section: tuple[str, int],
    ) -> str:
        axes, places, wrap = v.params
        base = v.args[0]
        own = [ZERO if p is None else coords[p] for p in places]
        for axis, index in zip(axes, v.args[1:], strict=True):
            register = self.at(index, coords, v.shape, cond, level)
            if wrap:
                size = self.size_name(base.shape[axis])
                register = self.line(
                    section, f"tl.where({register} < 0, {register} + {size}, {register})"
                )
                if section[0] == "loop" or self._varies(*coords):
                    self.body.wide.add(register)
            own[axis] = Index({register: 1})
        return self.eval(base, own, cond, level)

    # stores -------------------------------------------------------------------------------------

    def _store_in_place(self) -> None:
        """Write inputs, when all is computed: behind everything that reads them."""
        stores = self.group.stores
        for copy in stores:
            self.eval(copy, self.coords(copy), None, self.level(copy))
        instrs = [i for steps in self.body.sections.values() for i in steps if i.kind == "load"]
        for copy, memory in stores.items():
            loads = [i for i in instrs if i.text == self.names.get(memory)]
            place = self.address(memory, self.coords(copy))
            if any(i.indices[0] != place or i.cond is not None for i in loads):
                raise EmitError(f"the old value of {memory!r} is read at another place")
            self.names[copy] = self.buffer_name(memory, "in")
            if loads and any(m.reduces or m.kind == "scan" for m in self.group.members):
                # threads hold copies of a row's values: none may store before all have loaded
                section = self._section(self._is_wide(copy), self.level(copy))
                self.body.sections.setdefault(section, []).append(Instr("barrier", "", ""))
            self._store(copy, self.level(copy))

    def _store_all(self, outs: Sequence[Value], level: int) -> None:
        for out in outs:
            if self.level(out) == level:
                self._store(out, level)

    def _store(self, out: Value, level: int) -> None:
        if out.kind == "store":
            emit_store(self, out, level)
            return
        coords = self.coords(out)
        wide = self._is_wide(out)
        register = self.eval(out, coords, None, level)
        section = ("after", 0) if self._over_rows(out) else self._section(wide, level)
        name = self.buffer_name(out, "out")
        self.body.sections.setdefault(section, []).append(
            Instr(
                "store",
                register,
                name,
                (self.address(out, coords),),
                dtype=out.dtype,
                cond="wide" if wide else None,
            )
        )


def emit(group: Group, inlined: set[Value], exact: bool, looped: bool) -> Body:
    """The group's instructions; splits atoms until its index arithmetic is affine."""
    for _ in range(32):
        try:
            return Emitter(group, inlined, exact, looped).run()
        except NeedSplit as need:
            group.split(need.atom, need.inner)
    raise EmitError("index arithmetic does not settle")
