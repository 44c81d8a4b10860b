"""Sizes and index expressions.

A size is an ``int``, or a sympy expression where torch has a symbolic one; static graphs never
touch sympy. An ``Index`` is an affine combination of *atoms* (the loop variables of a kernel).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

Size = Any  # int | sympy.Expr


class NeedSplit(Exception):
    """An atom must be split in two (its inner part ``inner`` long) for an index to stay affine."""

    def __init__(self, atom: str, inner: Size) -> None:
        super().__init__(f"{atom} needs an inner part of {inner}")
        self.atom, self.inner = atom, inner


def size_of(value: Any) -> Size:
    """An int, or the sympy expression of a SymInt; 1 where the graph is guarded to have 1 there."""
    if type(value) is int:
        return value
    node = getattr(value, "node", None)
    if node is None:
        return int(value)
    size = simplify(node.expr)
    return size if type(size) is int or size.is_Symbol or not _is_always_one(value) else 1


def _is_always_one(value: Any) -> bool:
    """Of a SymInt: tensors were broadcast on the strength of it (a slice of an unknown step)."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return value.node.hint == 1 and statically_known_true(value == 1)


def simplify(size: Size) -> Size:
    """The int behind a constant sympy expression; anything else as it is."""
    if type(size) is not int and size.is_number:
        return int(size)
    return size


def product(sizes: Iterable[Size]) -> Size:
    size = math.prod(sizes)
    return size if type(size) is int else simplify(size)


def is_static(*sizes: Size) -> bool:
    for size in sizes:  # noqa: SIM110 (all() would take twice as long)
        if type(size) is not int:
            return False
    return True


def is_one(size: Size) -> bool:
    """Whether a size is known to be 1."""
    return type(size) is int and size == 1


def quotient(a: Size, b: Size) -> Size | None:
    """a / b when b provably divides a, else None."""
    if is_static(a, b):
        return a // b if b and a % b == 0 else None
    if type(b) is int and b == 1:
        return a
    ratio = a / b if not is_static(a) else _sympy(a) / b
    numerator, denominator = ratio.as_numer_denom()
    return simplify(numerator) if denominator == 1 else None


def _sympy(value: int) -> Any:
    import sympy

    return sympy.Integer(value)


def contiguous_strides(shape: Sequence[Size]) -> tuple[Size, ...]:
    strides: list[Size] = []
    step: Size = 1
    for size in reversed(shape):
        strides.append(step)
        step = simplify(step * size) if not (type(size) is int and size == 0) else step
    return tuple(reversed(strides))


class Index:
    """``const + sum(coefficient * atom)``; immutable."""

    __slots__ = ("_hash", "const", "terms")

    def __init__(self, terms: dict[str, Size] | None = None, const: Size = 0) -> None:
        kept = [t for t in terms.items() if not (type(t[1]) is int and t[1] == 0)] if terms else []
        if len(kept) > 1:
            kept.sort()  # the names differ, so no sizes are compared
        self.terms: tuple[tuple[str, Size], ...] = tuple(kept)
        self.const = const
        self._hash = hash((self.terms, const))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Index) and self.terms == other.terms and self.const == other.const

    def __repr__(self) -> str:
        parts = [a if type(c) is int and c == 1 else f"{c}*{a}" for a, c in self.terms]
        if not (type(self.const) is int and self.const == 0) or not parts:
            parts.append(str(self.const))
        return " + ".join(parts)

    def __add__(self, other: Index) -> Index:
        terms = dict(self.terms)
        for atom, c in other.terms:
            terms[atom] = simplify(terms[atom] + c) if atom in terms else c
        return Index(terms, simplify(self.const + other.const))

    def scale(self, factor: Size) -> Index:
        if type(factor) is int and factor == 1:
            return self
        terms = {a: simplify(c * factor) for a, c in self.terms}
        return Index(terms, simplify(self.const * factor))

    @staticmethod
    def sum(places: Sequence[Index], steps: Sequence[Size]) -> Index:
        """The sum of places, each so many times."""
        terms: dict[str, Size] = {}
        const: Size = 0
        for place, step in zip(places, steps, strict=True):
            for atom, c in place.terms:
                more = simplify(c * step)
                terms[atom] = simplify(terms[atom] + more) if atom in terms else more
            const = const + place.const * step
        return Index(terms, simplify(const))

    def shift(self, offset: Size) -> Index:
        return Index(dict(self.terms), simplify(self.const + offset))

    @property
    def atoms(self) -> tuple[str, ...]:
        return tuple([a for a, _ in self.terms])

    def coefficient(self, atom: str) -> Size:
        for a, c in self.terms:
            if a == atom:
                return c
        return 0


ZERO = Index()


def split_index(
    index: Index,
    divisor: Size,
    sizes: Callable[[str], Size],
    derive: Callable[[str, Index, Size], Index],
) -> tuple[Index, Index]:
    """(index // divisor, index % divisor), affine where that is exact.

    Raises NeedSplit when splitting one atom would make it exact; otherwise the two halves become
    derived atoms, made by ``derive(kind, index, divisor)``.
    """
    if type(divisor) is int and divisor == 1:
        return index, ZERO
    high: dict[str, Size] = {}
    low: dict[str, Size] = {}
    for atom, c in index.terms:
        ratio = quotient(c, divisor)
        if ratio is None:
            low[atom] = c
        else:
            high[atom] = ratio
    const_high: Size = 0
    const_low = index.const
    if is_static(index.const, divisor):
        const_high, const_low = divmod(index.const, divisor)
    if not low and type(const_low) is int and const_low == 0:
        return Index(high, const_high), ZERO
    if _fits_below(low, const_low, divisor, sizes):
        return Index(high, const_high), Index(low, const_low)
    for atom, c in low.items():
        if is_static(c) and c < 0:  # a flipped axis has no digits to split
            continue
        inner = quotient(divisor, c)
        outer = quotient(sizes(atom), inner) if inner is not None else None
        if outer is not None and not (type(outer) is int and outer == 1) and atom[0] == "a":
            raise NeedSplit(atom, inner)
    return derive("//", index, divisor), derive("%", index, divisor)


def _fits_below(
    terms: dict[str, Size], const: Size, limit: Size, sizes: Callable[[str], Size]
) -> bool:
    """Whether const + sum(c * (size - 1)) < limit, with nothing negative."""
    top = const
    for atom, c in terms.items():
        if type(c) is int and c < 0:
            return False
        top = top + c * (sizes(atom) - 1)
    if is_static(top, limit):
        return const >= 0 and top < limit
    gap = simplify((limit - top).expand()) if hasattr(limit - top, "expand") else limit - top
    return type(gap) is int and gap > 0 and is_static(const) and const >= 0


def segments(src: Sequence[Size], dst: Sequence[Size]) -> list[tuple[list[int], list[int]]] | None:
    """Pair runs of dims of two shapes with equal products, smallest runs first.

    ``segments((6, 4), (2, 3, 4)) == [([0], [0, 1]), ([1], [2])]``. Dims of size 1 take part in no
    run. None when the shapes cannot be paired.
    """
    one = [k for k, s in enumerate(src) if not (type(s) is int and s == 1)]
    two = [k for k, s in enumerate(dst) if not (type(s) is int and s == 1)]
    out: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(one) and j < len(two):
        run_i, run_j = [one[i]], [two[j]]
        p, q = src[one[i]], dst[two[j]]
        i, j = i + 1, j + 1
        while p != q:
            if _grows(p, q, i < len(one), j < len(two)):
                if i >= len(one):
                    return None
                p = simplify(p * src[one[i]])
                run_i.append(one[i])
                i += 1
            else:
                if j >= len(two):
                    return None
                q = simplify(q * dst[two[j]])
                run_j.append(two[j])
                j += 1
        out.append((run_i, run_j))
    return out if i == len(one) and j == len(two) else None


def _grows(p: Size, q: Size, more_p: bool, more_q: bool) -> bool:
    """Whether the run with product p is the one to extend towards q."""
    if is_static(p, q):
        return p < q
    if quotient(q, p) is not None:
        return more_p
    if quotient(p, q) is not None:
        return not more_q
    return more_p


def ceil_div(size: Size, block: int) -> Size:
    """ceil(size / block); of a symbolic size, as a sympy floor division."""
    if is_static(size):
        return -(-size // block)
    from torch.utils._sympy.functions import FloorDiv

    return FloorDiv(size + (block - 1), block)
