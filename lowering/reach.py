"""How far a kernel's places reach: whether 32 bits hold them, and up to which sizes.

Of static sizes this is a number. A kernel of symbolic sizes is written in 32 bits, with a *bound*:
an expression of the sizes that none of its places exceeds, and no size that it is given. Where a
call's sizes bring that above ``LIMIT_32``, the same kernel in 64 bits runs (``executor.py``); it is
written and compiled when this first happens.

Bounds are sums of products of sizes, held as {factors: coefficient}. The bound of several is the
larger coefficient of each product: one comparison a kernel, and above the largest of them by what
products of fewer sizes are.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from .indexing import Index, Size, is_static, product, simplify
from .ir import Value

if TYPE_CHECKING:
    from .render import Renderer

#: a tile, or a step of a loop, goes on behind the last place: that still fits in 32 bits
LIMIT_32 = 2**31 - 2**15

Sum = dict[tuple[Any, ...], int]  # factors -> coefficient; () -> the constant


class Reach:
    """The farthest that places lie from zero, on either side, and the longest loop variables."""

    def __init__(self, renderer: Renderer) -> None:
        self.renderer = renderer
        self.static = 0  # of what is a number
        self.sums: Sum = {}  # of what is not: the bound of all
        bases = defaultdict(set)  # place -> what is read or written there
        for instr in renderer.instrs:
            for index in instr.indices:
                bases[index].add(instr.text)
        for index, texts in bases.items():
            counted = all(map(self._is_counted, index.atoms))
            for base in ("",) if counted else sorted(texts):
                self._see_index(index, base)
        for atoms in (renderer.parallel, renderer.reduced):
            self.see(product(renderer.sizes[a] for a in atoms))

    def see(self, size: Size) -> None:
        if type(size) is int:
            self.static = max(self.static, abs(size))
        else:
            _join(self.sums, _terms(size))

    def bound(self) -> Any:
        """The bound as an expression."""
        return _expression(tuple(self.sums.items()))

    def _see_index(self, index: Index, base: str) -> None:
        for side in self._sides(index, base):
            if isinstance(side, int):
                self.static = max(self.static, side)
            else:
                _join(self.sums, side)

    def _sides(self, index: Index, base: str = "") -> list[int] | list[Sum]:
        """How far above and below zero a place may lie, and the sum of its terms so far."""
        terms = [(c, self._farthest(a)) for a, c in index.terms if self._is_counted(a)]
        if len(terms) < len(index.terms):
            terms.append((1, self._last_place(base)))
        if not is_static(index.const, *(n for term in terms for n in term)):
            return _sides(terms, index.const)
        up = sum(step * count for step, count in terms if step > 0)
        down = sum(-step * count for step, count in terms if step < 0)
        return [up, down, up + index.const, down - index.const]

    def _is_counted(self, atom: str) -> bool:
        """Whether it is no number that was loaded."""
        return atom in self.renderer.group.sizes or atom in self.renderer.body.derived

    def _farthest(self, atom: str) -> Size:
        """The largest value of an atom, one less than its size."""
        renderer = self.renderer
        if atom in renderer.group.sizes:
            return renderer.group.sizes[atom] - 1
        kind, inner, divisor = renderer.body.derived[atom]
        if kind == "%":
            return divisor - 1
        whole: Sum = {}
        for side in self._sides(inner):
            _join(whole, side if isinstance(side, dict) else {(): side})
        top = simplify(_expression(tuple(whole.items())))
        return top // divisor + 1 if is_static(top, divisor) else top

    def _last_place(self, base: str) -> Size:
        """Where the memory ends that is read or written at places that were loaded."""
        params = self.renderer.body.params
        memory = next((what for name, _, what in params if name == base), None)
        if not isinstance(memory, Value):
            return 0
        return sum((n - 1) * s for n, s in zip(memory.shape, memory.strides, strict=True))


def runs_far(renderer: Renderer) -> bool:
    """Whether the part of a place that runs along the reduced atoms may be too large by itself:
    lanes along them are numbers of 64 bits then."""
    row = set(renderer.reduced)
    for index in renderer._live_indices():
        steps = [(c, renderer.sizes[a]) for a, c in index.terms if a in renderer.sizes and a in row]
        if not is_static(*(n for step in steps for n in step)):
            return True
        if sum(abs(c) * (count - 1) for c, count in steps) > LIMIT_32:
            return True
    return False


def is_multiple(size: Size, of: int = 16) -> bool:
    """Whether a symbolic size is a multiple of a number, whatever its symbols are: masks that end
    there end between whole vectors."""
    found = size.expand().as_coefficients_dict().values()
    return all(c.is_Integer and int(c) % of == 0 for c in found)


# sums of products of sizes ------------------------------------------------------------------------


def _terms(size: Size) -> Sum:
    return ({(): size} if size else {}) if type(size) is int else _expanded(size)


@functools.lru_cache(4096)
def _expanded(size: Any) -> Sum:
    out: Sum = {}
    for monomial, coefficient in size.expand().as_coefficients_dict().items():
        factors: list[Any] = []
        for base, power in monomial.as_powers_dict().items():
            if power.is_Integer and power > 0:
                factors += [base] * int(power) if not base.is_number else []
            else:
                factors.append(base**power)
        up = math.ceil(abs(coefficient))
        key = tuple(sorted(factors, key=str))
        out[key] = out.get(key, 0) + (up if coefficient > 0 else -up)
    return out


def _plus(a: Sum, b: Sum) -> Sum:
    out = dict(a)
    for key, coefficient in b.items():
        out[key] = out.get(key, 0) + coefficient
    return out


def _times(a: Sum, b: Sum) -> Sum:
    out: Sum = {}
    for one, c in a.items():
        for two, d in b.items():
            key = tuple(sorted((*one, *two), key=str)) if one and two else one or two
            out[key] = out.get(key, 0) + c * d
    return out


def _join(bound: Sum, other: Sum) -> None:
    """Raise a bound to what the other sum may be, on either side of zero."""
    for key, coefficient in other.items():
        if not all(f.is_nonnegative for f in key):
            coefficient = abs(coefficient)
        if coefficient > bound.get(key, 0):
            bound[key] = coefficient


def _sides(terms: list[tuple[Size, Size]], const: Size) -> list[Sum]:
    """The sums of the positive and of the negative products, of those that may be either both, and
    these sums with the constant."""
    up: Sum = {}
    down: Sum = {}
    for step, count in terms:
        along = _terms(step)
        whole = _times(along, _terms(count))
        sign = _sign(along)
        if sign > 0:
            up = _plus(up, whole)
        elif sign < 0:
            down = _plus(down, {key: -c for key, c in whole.items()})
        else:
            whole = {key: abs(c) for key, c in whole.items()}
            up, down = _plus(up, whole), _plus(down, whole)
    more = _terms(const)
    less = {key: -c for key, c in more.items()}
    return [up, down, _plus(up, more), _plus(down, less)]


def _sign(some: Sum) -> int:
    """1 or -1 of what is never negative or positive, 0 of what may be either."""
    if all(f.is_nonnegative for key in some for f in key):
        for sign in (1, -1):
            if all(c * sign >= 0 for c in some.values()):
                return sign
    return 0


@functools.lru_cache(4096)
def _expression(items: tuple[tuple[tuple[Any, ...], int], ...]) -> Any:
    import sympy

    def distance(factor: Any) -> Any:
        return factor if factor.is_nonnegative else sympy.Abs(factor)

    return sympy.Add(*(sympy.Mul(c, *map(distance, key)) for key, c in items))
