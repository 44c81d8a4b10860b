"""Nodes that are products of two matrices: which matrices, and how they are called.

Where sizes are fixed, cuBLAS is called among the kernels of a run, and what it writes is allocated
like what they write. Elsewhere it is ``aten::mm``, with views of what a product's factors are part
of.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.fx import Node

from . import cublas, pointwise_convolutions
from .cublas import Problem, leading
from .graph import value_of
from .indexing import Size, is_static, size_of
from .ir import Value, base_of, dtype_name, first_place
from .pointwise_convolutions import Factor
from .runs import GRID, TENSOR, Multiply, Operand

if TYPE_CHECKING:
    from .executor import Writer

aten = torch.ops.aten


class Product(NamedTuple):
    """``result``: what it becomes, laid out as the graph says."""

    left: Factor
    right: Factor
    result: torch.Tensor


#: what a factor's memory is a part of, and how many bytes it begins behind that
Place = tuple[Value, int]


class Call(NamedTuple):
    """A product as cuBLAS is called for it; ``places``: of its factors."""

    product: Product
    problem: Problem
    places: list[Place]


def products_of(node: Node) -> tuple[Product | None, ...] | None:
    """The products that a node is, one for each of its results, None for one that is not wanted;
    or None where it is something else."""
    if node.target is aten.mm.default:
        left, right = (Factor(a, *_matrix(a)) for a in node.args[:2])  # type: ignore[arg-type]
        return (Product(left, right, value_of(node)),)  # which is contiguous
    found = pointwise_convolutions.factors(node)
    if found is None:
        return None
    val = node.meta["val"]
    results = val if isinstance(val, (tuple, list)) else (val,)
    return tuple(
        None if pair is None else Product(*pair, result)
        for pair, result in zip(found, results, strict=False)
    )


def _matrix(node: Node) -> tuple[tuple[Size, Size], tuple[Size, Size]]:
    val = value_of(node)
    (rows, columns), (row, column) = (map(size_of, ns) for ns in (val.shape, val.stride()))
    return (rows, columns), (row, column)


def _lies_as(value: Value, val: torch.Tensor) -> bool:
    """Whether a value's memory is laid out as its node says."""
    if value.shape != tuple(map(size_of, val.shape)):
        return False
    strides = zip(value.shape, value.strides, map(size_of, val.stride()), strict=True)
    return all(size == 1 or one == other for size, one, other in strides)


class Products:
    """The part of the Writer that calls them."""

    def __init__(self, writer: Writer) -> None:
        self.writer = writer
        self.found = {
            step: products
            for step in writer.plan.steps
            if isinstance(step, Node) and (products := products_of(step)) is not None
        }
        #: of a node that cuBLAS is called for: its results' numbers, and what makes each
        self.native: dict[Node, list[tuple[int, Call]]] = {}
        #: what must lie in memory as the graph says
        self.read: set[Value] = set()
        # what a CUDA graph holds takes the host no time
        natively = writer.cut is None and cublas.why_not(writer.device) is None
        for node, products in self.found.items() if natively else ():
            calls = [(k, self._call(p)) for k, p in enumerate(products) if p is not None]
            known = [(k, call) for k, call in calls if call is not None]
            if len(known) == len(calls):
                self.native[node] = known
                self.read.update(place[0] for _, call in known for place in call.places)

    def call(self, name: str, node: Node) -> bool:
        """Write a node's lines, unless it is ATen's own call."""
        products = self.found.get(node)
        if products is None or (node not in self.native and node.target is aten.mm.default):
            return False
        if node in self.native:
            self._launches(name, node)
        else:
            texts = ["None" if p is None else self._text(p) for p in products]
            self.writer.enter(name, node)
            several = isinstance(node.meta["val"], (tuple, list))
            text = f"({', '.join(texts)}, None)" if several else texts[0]
            self.writer.add(f"{name} = {text}")
            self.writer.calls += 1
            self.writer.named(node, name)
        return True

    # of cuBLAS

    def _call(self, product: Product) -> Call | None:
        """None where it is not static, on another device, or cuBLAS would want a copy."""
        left, right, result = product
        if result.device != self.writer.device:
            return None
        sizes = (*left.shape, *right.shape, *left.strides, *right.strides)
        dtype = dtype_name(result.dtype)
        if dtype not in cublas.TYPES or not is_static(*sizes) or not all(sizes):
            return None
        if any(leading(*f.shape, f.strides) is None for f in (left, right)):
            return None
        places = [place for f in (left, right) if (place := self._place(f)) is not None]
        problem = Problem.of([dtype, *left.shape, right.shape[1], left.strides, right.strides])
        return Call(product, problem, places) if len(places) == 2 else None

    def _place(self, factor: Factor) -> Place | None:
        """What a factor's memory is a part of, and how many bytes it begins behind that; None
        where that is not known."""
        value, val = self.writer.program.of.get(factor.node), value_of(factor.node)
        if not isinstance(value, Value) or value.op == "opaque":
            return None
        base, first = base_of(value), first_place(value)
        if not is_static(first) or dtype_name(val.dtype) != base.dtype:
            return None
        if base is value and not _lies_as(value, val):
            return None
        return base, first * val.dtype.itemsize

    def _operand(self, factor: Factor, place: Place) -> Operand:
        names = self.writer.names
        for whole in (factor.node, self.writer.program.of[factor.node]):
            if whole in names:
                return Operand(TENSOR, self.writer.use(names[whole]))
        base, offset = place
        return Operand(TENSOR, self.writer.use(names[base]), offset)

    def _launches(self, name: str, node: Node) -> None:
        writer, several = self.writer, isinstance(node.meta["val"], (tuple, list))
        for k, (product, problem, places) in self.native[node]:
            getters = [u for u in node.users if u.target is operator.getitem and u.args[1] == k]
            shown = getters if several else [node]
            if not shown:
                continue
            out = f"{name}_{k}" if several else name
            writer.allocate(out, product.result)
            args = list(map(self._operand, product[:2], places))
            args.append(Operand(TENSOR, writer.use(out)))
            kernel, grid = f"m{len(writer.lines)}", Operand(GRID, plus=1)
            writer.runs.launch(Multiply(kernel, "mm", grid, args, problem=problem))
            writer.calls += 1
            for reader in shown:
                writer.named(reader, out)

    # of ATen

    def _text(self, product: Product) -> str:
        mm = self.writer.constant(aten.mm.default, "f")
        left, right = (self._view(self.writer.arg(f.node), *f[1:]) for f in product[:2])
        result = product.result
        shape, strides = ([size_of(n) for n in ns] for ns in (result.shape, result.stride()))
        return self._view(f"{mm}({left}, {right})", shape, strides)

    def _view(self, text: str, shape: Any, strides: Any) -> str:
        return f"view({text}, {self.writer.sizes(shape)}, {self.writer.sizes(strides)}, 0)"
