"""Which values are recomputed where they are read instead of stored."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

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
    return 4 if v.op in HEAVY else 2 if v.kind == "gather" else 1


def column_feeds(program: Program, readers: Readers, escapes: set[Value]) -> set[Value]:
    """Values that only column reductions need: worth a kernel with those, not a store."""
    feeds: set[Value] = set()
    for v in reversed(program.values):
        if not v.computes or v.reduces or v in escapes:
            continue
        own = readers.get(v)
        if own and all(r in feeds or (r.reduces and is_column(r)) for r, _ in own):
            feeds.add(v)
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

        What such a chain costs is paid once for each of its readers that is no part of it.
        """
        inlined: set[Value] = set()
        torn = self._read_by_rows_and_columns()
        worth = self._read_elsewhere()
        uses: dict[Value, int] = {}
        for v in reversed(self.program.values):
            if v in worth:
                uses[v] = sum(uses[r] if same else 1 for r, same in self.readers[v])
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
                    and all(a in inlined or a.kind == "buffer" for a in whole)
                    and (len(whole) == len(v.bases) or any(_as_large(a, v) for a in whole))
                ):
                    inlined.add(v)
        return inlined

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
            readers = self.readers.get(v)
            if (
                readers
                and all(not same or r in out for r, same in readers)  # seldom: asked first
                and self._may_move(v)
            ):
                out.add(v)
        return out


def _is_small(a: Value, v: Value) -> bool:
    """Whether a is to v as a row's results are to the row."""
    return is_static(*a.shape, *v.shape) and MUCH_SMALLER * product(a.shape) <= product(v.shape)


def _as_large(a: Value, v: Value) -> bool:
    """Whether a has an element for each of v's; the rows of logits are often counted as one axis
    behind their cast."""
    return product(a.shape) == product(v.shape)
