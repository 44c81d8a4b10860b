"""Values that each kernel computes for itself, because storing and loading them moves more bytes.

The normalized input of a batch norm, say, is float32: the kernel that sums over it and the one that
computes the gradient from it would write four bytes an element and read them again, where the
input itself is two. Which kernels read a value is known once the groups are, so this runs last.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .indexing import is_one, is_static, product, quotient
from .inline import INLINE_BUDGET, op_cost
from .ir import BITS, Value, base_of

if TYPE_CHECKING:
    from .fuse import Fuser
    from .group import Group

KINDS = ("pointwise", "cast")


@dataclass
class Chain:
    """How a value is computed: from ``leaves`` in memory, through ``inner`` of its kernel."""

    inner: set[Value] = field(default_factory=set)
    leaves: set[Value] = field(default_factory=set)
    cost: int = 0


def recompute(fuser: Fuser) -> None:
    """Move what is cheaper to compute again from its kernel into ``fuser.inlined``.

    A kernel that computes one value anew may have loaded what another needs: hence once more.
    """
    values = [v for v in fuser.program.values if v in fuser.home and _may_move(fuser, v)]
    while any([_try(fuser, v) for v in values if _is_shared(fuser, v)]):
        pass


def _is_shared(fuser: Fuser, v: Value) -> bool:
    """Whether a kernel computes v and another reads it, which is so of few."""
    home, readers = fuser.home, fuser.readers
    if v in home and v in readers:
        group = home[v]
        for reader, _ in readers[v]:
            if reader not in home or home[reader] is not group:
                return True
    return False


def _try(fuser: Fuser, v: Value) -> bool:
    group = fuser.home[v]
    if not _read_in_place(fuser, v):
        return False
    readers = set(_reading_groups(fuser, v)) - {group}
    chain = _chain(fuser, group, v) if readers else None
    if chain is None or chain.cost * len(readers) > INLINE_BUDGET:
        return False
    if _added_bits(fuser, chain, v, readers) >= BITS[v.dtype] * (1 + len(readers)):
        return False
    for m in chain.inner:
        group.members.remove(m)
        del fuser.home[m]
    fuser.inline(chain.inner)
    return True


def _may_move(fuser: Fuser, v: Value) -> bool:
    return v.kind in KINDS and v not in fuser.escapes and v not in fuser.waits


def _read_in_place(fuser: Fuser, v: Value) -> bool:
    """Whether every reader takes v element for element: none needs one more than once."""
    return all(
        same and (r not in fuser.inlined or _read_in_place(fuser, r))
        for r, same in fuser.readers.get(v, ())
    )


def _reading_groups(fuser: Fuser, v: Value) -> Iterator[Group]:
    """The groups that read v, seen through inlined values."""
    for reader, _ in fuser.readers.get(v, ()):
        if reader in fuser.inlined:
            yield from _reading_groups(fuser, reader)
        else:
            yield fuser.home[reader]


def _chain(fuser: Fuser, group: Group, v: Value) -> Chain | None:
    """How v is computed from memory; None where that is not known to be cheap."""
    chain, stack = Chain(inner={v}), [v]
    while stack:
        u = stack.pop()
        chain.cost += op_cost(u)
        for a in u.inputs:
            base = base_of(a)
            if base in chain.inner or base in chain.leaves:
                continue
            if product(a.shape) == product(v.shape) and not _same_layout(a, u):
                return None
            if base in fuser.inlined:
                if base.kind not in (*KINDS, "full"):
                    return None
                stack.append(base)
            elif _is_leaf(fuser, base, v):
                if base in fuser.written:
                    return None
                chain.leaves.add(base)
            elif fuser.home.get(base) is group and _may_move(fuser, base):
                chain.inner.add(base)
                stack.append(base)
            else:
                return None
    return chain


def _same_layout(a: Value, u: Value) -> bool:
    """Whether u's kernel runs over its operand in the order in which u itself lies in memory."""
    places = zip(a.shape, a.strides, u.strides, strict=False)
    return a.shape == u.shape and all(is_one(s) or one == two for s, one, two in places)


def _is_leaf(fuser: Fuser, base: Value, v: Value) -> bool:
    """Whether the value is in memory anyhow, or costs little to store."""
    home = fuser.home.get(base)
    if home is None:
        return base.kind == "buffer"
    return fuser._stored(base, home) or _bits(base, v) * 4 <= BITS[v.dtype]


def _added_bits(fuser: Fuser, chain: Chain, v: Value, readers: set[Group]) -> float:
    """What all readers together load in v's place, in bits for an element of v."""
    added = 0.0
    for group in readers:
        known = {s for m in group.members for s in fuser.reads(m)}
        added += sum(_bits(leaf, v) for leaf in chain.leaves - known)
    return added


def _bits(leaf: Value, v: Value) -> float:
    """The bits of a leaf for each element of v."""
    size, whole = product(leaf.shape), product(v.shape)
    if is_static(size, whole):
        return BITS[leaf.dtype] * size / max(1, whole)
    if size == whole:
        return BITS[leaf.dtype]
    return 0.0 if quotient(whole, size) is not None else float("inf")  # one for each row, say
