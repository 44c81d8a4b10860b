"""The values fusion works on: a light twin of the FX graph, without FakeTensors.

A ``Value`` is a tensor computed elementwise over its shape. Composite ops (norms, softmax, losses)
are written as small graphs of Values, so that everything downstream knows pointwise ops,
reductions, views and gathers only. Dtypes are torch's names as strings.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache
from itertools import count
from typing import Any

from .indexing import ZERO, Index, Size, contiguous_strides, is_static, simplify

BITS = {
    "bool": 8,
    "uint8": 8,
    "int8": 8,
    "int16": 16,
    "int32": 32,
    "int64": 64,
    "float16": 16,
    "bfloat16": 16,
    "float32": 32,
    "float64": 64,
    "opaque": 0,
}
FLOATING = {"float16", "bfloat16", "float32", "float64"}
INTEGERS = {"uint8", "int8", "int16", "int32", "int64"}
SUPPORTED = FLOATING | INTEGERS | {"bool"}
SIXTEEN_BIT = {"float16", "bfloat16"}

_ids = count()


class Declined(Exception):
    """A node stays an ATen call; the message says why."""


@cache
def dtype_name(dtype: Any) -> str:
    """``torch.float32`` -> ``"float32"``."""
    return str(dtype).removeprefix("torch.")


class Value:
    """One tensor.

    kind       op                    args
    buffer     -                     () : lives in memory (an input, or the result of an ATen call;
                                     "opaque" is one that kernels cannot read, see is_seed)
    pointwise  name in BODIES        Values and literals, the body's parameters
    cast       -                     (Value,)
    reduce     name in REDUCTIONS    (Value,), axes in ``params``; the reduced axes stay, of size 1
    partial    name in REDUCTIONS    the same of shares of the rows, side by side on a first axis
    scan       name in SCANS         (Value,), the axis in ``params``; of its operand's shape
    view       -                     (Value,), the View in ``params``
    concat     -                     Values, the axis in ``params``
    patch      -                     (under, patch): see Builder.patch
    gather     -                     (base, index, ...): see Builder.gather
    store      -                     (values, index, ...): see Builder.store
    iota, full -                     literals
    random     kept                  (seed, salt, threshold): see Builder.kept
    random     bits                  (seed, salt, bits): see Builder.random_bits
    whole      its overload          Values in memory, what it must know in ``params``: see whole;
                                     or (Value,), whose kernel has this result, too: see is_further
    """

    __slots__ = (
        "args",
        "bases",
        "computes",
        "dtype",
        "id",
        "inputs",
        "kind",
        "node",
        "op",
        "params",
        "reduces",
        "shape",
        "strides",
    )

    def __init__(
        self,
        kind: str,
        op: str | None,
        args: Sequence[Any],
        shape: Sequence[Size],
        dtype: str,
        *,
        params: Any = None,
        strides: Sequence[Size] | None = None,
        node: Any = None,
    ) -> None:
        self.id = next(_ids)
        self.become(kind, op, args, params)
        self.shape, self.dtype, self.node = tuple(shape), dtype, node
        self.strides = tuple(strides) if strides is not None else contiguous_strides(self.shape)

    def __repr__(self) -> str:
        args = ", ".join(f"v{a.id}" if isinstance(a, Value) else repr(a) for a in self.args)
        what = self.op or self.kind
        return f"v{self.id}:{self.dtype}{list(self.shape)} = {what}({args})"

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def become(self, kind: str, op: str | None, args: Sequence[Any], params: Any = None) -> None:
        """Be computed otherwise from now on."""
        self.kind, self.op, self.args, self.params = kind, op, tuple(args), params
        self._read()
        self.reduces = kind in ("reduce", "partial")
        # whether a kernel must do something for it (not memory, not a view)
        self.computes = kind not in ("buffer", "view")

    def _read(self) -> None:
        """Note the Values among the arguments, and what they show; a view shows one for good."""
        self.inputs = inputs = tuple([a for a in self.args if isinstance(a, Value)])
        self.bases = tuple([base_of(a) if a.kind == "view" else a for a in inputs])

    def again(self, args: tuple[Any, ...], inputs: tuple[Value, ...]) -> Value:
        """The same of other operands (``inputs``: the Values among them), made by no node."""
        v = Value.__new__(Value)
        v.id, v.node = next(_ids), None
        v.kind, v.op, v.params = self.kind, self.op, self.params
        v.reduces, v.computes = self.reduces, self.computes
        v.args, v.inputs = args, inputs
        v.bases = tuple([base_of(a) if a.kind == "view" else a for a in inputs])
        v.shape, v.strides, v.dtype = self.shape, self.strides, self.dtype
        return v


#: ``params`` of a further result
FURTHER = "further"


def is_further(v: Value) -> bool:
    """Whether another Value's kernel, which is written as a whole, has v as a further result."""
    return v.kind == "whole" and v.params is FURTHER


def is_alike(r: Value, v: Value) -> bool:
    """Whether r is v, or a reduction that shares its operand and its kernel (a max's place)."""
    return r is v or (r.kind == v.kind == "reduce" and (r.args, r.params) == (v.args, v.params))


def is_seed(v: Value) -> bool:
    """Whether v is the seed that a run draws."""
    return v.kind == "buffer" and v.op == "seed"


class SizeArg:
    """A symbolic integer used as a number in the graph (``x * s0``)."""

    __slots__ = ("expr",)

    def __init__(self, expr: Size) -> None:
        self.expr = expr

    def __repr__(self) -> str:
        return f"size({self.expr})"


def computing_dtype(dtype: str) -> str:
    """What a tile of this dtype is held as in registers."""
    return "float32" if dtype in SIXTEEN_BIT else dtype


def is_dense(v: Value) -> bool:
    """Whether v's strides are a permutation of a contiguous layout."""
    return is_dense_layout(v.shape, v.strides)


def is_dense_layout(shape: Sequence[Size], strides: Sequence[Size]) -> bool:
    if not is_static(*shape, *strides):
        return tuple(strides) == contiguous_strides(shape)
    return _is_dense(tuple(shape), tuple(strides))


@lru_cache(4096)
def _is_dense(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    step = 1
    for stride, size in sorted((st, s) for st, s in zip(strides, shape, strict=True) if s != 1):
        if stride != step:
            return False
        step *= size
    return True


def base_of(v: Value) -> Value:
    """What a view shows."""
    while v.kind == "view":
        v = v.args[0]
    return v


def first_place(v: Value) -> Size:
    """How far a view's first element lies behind its base's first.

    From the view itself: a pass may have put another base under it than its FakeTensor knows.
    """
    coords = [ZERO] * v.ndim
    while v.kind == "view":
        coords = v.params.pull(coords, _NoAtoms)
        v = v.args[0]
    place: Size = 0
    for c, stride in zip(coords, v.strides, strict=True):
        place = place + c.const * stride
    return simplify(place)


class _NoAtoms:
    """The context of a pull at a fixed place: there are no loop variables."""

    size = None

    @staticmethod
    def derive(kind: str, index: Index, divisor: Size) -> Index:
        """A quotient or a remainder whose operands are numbers, at least one of them symbolic."""
        from torch.utils._sympy.functions import FloorDiv, Mod

        return Index(const=simplify((FloorDiv if kind == "//" else Mod)(index.const, divisor)))
