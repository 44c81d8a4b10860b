"""Which values are recomputed where they are read instead of stored."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Mapping, Sequence

from .authored import is_authored
from .flow import base_of, is_widening
from .indexing import is_static, product
from .ir import BITS, Value
from .sweep import is_column
from .translate import Program

Readers = Mapping[Value, Sequence[tuple[Value, bool]]]

#: a value recomputed by its readers may cost this much in all (one unit is an add)
INLINE_BUDGET = 24
HEAVY = {
    "exp",
    "log",
    "pow",
    "sin",
    "cos",
    "tan",
    "tanh",
    "erf",
    "gelu",
    "gelu_backward",
    "silu",
    "sigmoid",
    "softplus",
    "mish",
    "log1p",
    "expm1",
    "div",
    "rsqrt",
    "sqrt",
    "lgamma",
}
#: a value with so few elements beside another's costs no time to store and load
MUCH_SMALLER = 1024
CONSTANT = ("full", "iota")


def op_cost(v: Value) -> int:
    """What computing one element costs, its operands given."""
    return 4 if v.op in HEAVY or is_authored(v.op) else 2 if v.kind == "gather" else 1


def column_feeds(program: Program, readers: Readers, escapes: set[Value]) -> set[Value]:
    """Values that only column reductions need: worth a kernel with those, not a store."""
    feeds: set[Value] = set()
    needed: set[Value] = set()  # by a column reduction, or by what only those need
    for v in reversed(program.values):
        if v.reduces:
            if is_column(v):
                needed.update(v.bases)
        elif (
            v in needed
            and v.computes
            and v not in escapes
            and all(r in feeds or (r.reduces and is_column(r)) for r, _ in readers[v])
        ):
            feeds.add(v)
            needed.update(v.bases)
    return feeds


class Inliner:
    """``escapes`` are read by ATen or returned, ``waits`` for others, ``written`` is memory that
    the graph writes."""

    def __init__(
        self,
        program: Program,
        readers: Readers,
        escapes: set[Value],
        waits: Collection[Value],
        written: set[Value],
    ) -> None:
        self.program, self.readers, self.escapes = program, readers, escapes
        self.waits, self.written = waits, written
        self.column_feeds = column_feeds(program, readers, escapes)

    def run(self) -> set[Value]:
        """Constants, widening casts, and cheap chains that are read in part, or in two kernels.

        What such a chain costs is paid as often as readers that are no part of it ask for an
        element.
        """
        inlined: set[Value] = set()
        torn = self._read_by_rows_and_columns()
        worth = self._read_elsewhere()
        uses: dict[Value, float] = {}
        for v in reversed(self.program.values):
            if v in worth:
                uses[v] = self._uses(v, uses)
        cost: dict[Value, int] = {}
        for v in self.program.values:
            if v.kind in CONSTANT:
                inlined.add(v)
                cost[v] = 0
            elif is_widening(v) and self._may_move(v):
                inlined.add(v)  # loading the narrow value costs less than storing the wide
                cost[v] = cost.get(base_of(v.args[0]), 0)
            elif v in torn:
                inlined.add(v)
                cost[v] = 2
            elif v in worth:
                cost[v] = op_cost(v) + sum(cost[a] for a in v.bases if a in inlined)
                whole = [a for a in v.bases if not (a.reduces or _is_small(a, v))]
                if (
                    cost[v] * uses[v] <= INLINE_BUDGET
                    and all(a in inlined or self._lies_in_memory(a, v, worth) for a in whole)
                    and (len(whole) == len(v.bases) or any(_as_large(a, v) for a in whole))
                ):
                    inlined.add(v)
        return inlined

    def _uses(self, v: Value, uses: Mapping[Value, float]) -> float:
        """How often each element of v would be computed: a reader may take a part alone."""
        return sum(
            uses[r] if same else _share(a, r, v) * (uses.get(r, 1) if r.kind == "patch" else 1)
            for r, same, a in self._readings(v)
        )

    def _readings(self, v: Value) -> Iterator[tuple[Value, bool, Value]]:
        """(reader, whether it reads v element for element, what it reads v as)."""
        inputs: dict[Value, Iterator[Value]] = {}
        for r, same in self.readers[v]:
            if r not in inputs:
                inputs[r] = (a for a in r.inputs if base_of(a) is v)
            yield r, same, next(inputs[r])

    def _lies_in_memory(self, a: Value, v: Value, worth: set[Value]) -> bool:
        """Whether v's operand is stored in any case, or is better stored than copies of it."""
        if a.kind == "buffer":
            return True
        readers = self.readers[a]
        if v.kind == "patch":
            others = {r for r, _ in readers}
            copies = len(others) > 1 and all(r in worth and r.kind == "patch" for r in others)
            if copies or a in self.escapes:
                return True
        return a in self._ends and not any(same for r, same in readers if r is v)

    @functools.cached_property
    def _ends(self) -> set[Value]:
        """Results of reductions and what is made of those element for element: whoever reads them
        at other places finds them in memory."""
        found: set[Value] = set()
        for v in self.program.values:
            if v.reduces or (
                v.kind in ("pointwise", "cast")
                and any(a in found and _as_large(a, v) for a in v.bases)
            ):
                found.add(v)
        return found

    def _read_by_rows_and_columns(self) -> set[Value]:
        """Cheap values that column reductions read, and other kernels too (a ReLU's gradient).

        Loading its operands twice moves no more bytes than storing it and loading that twice.
        """
        out: set[Value] = set()
        for v in self.program.values:
            if v.kind != "pointwise":
                continue
            readers = self.readers.get(v, ())
            if len(readers) < 2 or v.op in HEAVY:
                continue
            reduced = [r.reduces or r in self.column_feeds for r, _ in readers]
            if not any(reduced) or all(reduced) or not all(same for _, same in readers):
                continue
            if not self._may_move(v):
                continue
            operands = set(v.bases)
            read = sum(BITS[a.dtype] for a in operands if product(a.shape) == product(v.shape))
            if all(a.kind == "buffer" for a in operands) and read <= 2 * BITS[v.dtype]:
                out.add(v)
        return out

    def _may_move(self, v: Value) -> bool:
        """Whether v may be computed where it is read: only there, with no write in between."""
        return v not in self.escapes and v not in self.waits and self.written.isdisjoint(v.bases)

    def _read_elsewhere(self) -> set[Value]:
        """Values that no reader takes element for element, but for readers that are such too."""
        out: set[Value] = set()
        for v in reversed(self.program.values):
            if v.kind not in ("pointwise", "cast", "concat", "gather", "patch"):
                continue
            readers = self.readers.get(v, ())
            for r, same in readers:
                if same and r not in out:
                    break
            else:
                if readers and self._may_move(v):
                    out.add(v)
        return out


def _share(a: Value, reader: Value, v: Value) -> float:
    """The part of v's elements, at most all, that something reads of it as ``a``."""
    what = reader if reader.kind in ("patch", "gather", "concat") else a
    if not is_static(*what.shape, *v.shape):
        return 1
    return min(1, product(what.shape) / max(product(v.shape), 1))


def _is_small(a: Value, v: Value) -> bool:
    """Whether a is to v as a row's results are to the row."""
    return is_static(*a.shape, *v.shape) and MUCH_SMALLER * product(a.shape) <= product(v.shape)


def _as_large(a: Value, v: Value) -> bool:
    """Whether a has an element for each of v's; the rows of logits are often counted as one axis
    behind their cast."""
    return product(a.shape) == product(v.shape)
