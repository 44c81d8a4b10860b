"""Kernels of equal layers are written once.

A model of 64 layers has each of its groups 64 times. Two groups alike in all that emit and render
read have the same text; only the Values behind its parameters differ, and the lines of the user's
code. The second one takes over what was written for the first.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

from .group import Group
from .ir import SizeArg, Value, is_seed
from .source import Source
from .views import View

_NUMBERS = {int}


class Alike:
    """The sources of one graph's groups. ``written``: memory that ATen writes."""

    def __init__(self, inlined: Collection[Value], written: Collection[Value]) -> None:
        self.inlined, self.written = inlined, written
        self.known: dict[Any, tuple[_Description, Source]] = {}

    def source(self, group: Group, write: Callable[[Group], Source]) -> Source:
        """The group's source, by ``write`` if no group like it had one before."""
        own = _Description(group, self.inlined, self.written)
        known = self.known.get(own.key)
        if known is None:
            source = write(group)
            self.known[own.key] = own, source
            return source
        first, source = known
        # writing may have split atoms
        group.sizes, group.parts = dict(first.group.sizes), dict(first.group.parts)
        return _taken_over(source, first, own)


def _taken_over(source: Source, first: _Description, own: _Description) -> Source:
    values = dict(zip(first.places, own.places, strict=True))
    salts = dict(zip(first.salts, own.salts, strict=True)) if own.salts else {}

    def moved(what: Any) -> Any:
        if isinstance(what, Value):
            return values[what]
        return salts.get(what, what) if type(what) is int else what  # else it is a size

    params = [(name, role, moved(what)) for name, role, what in source.params]
    return Source(
        source.name,
        source.text,
        params,
        source.grid,
        source.meta,
        source.computes,
        source.body and replace(source.body, group=own.group, params=params),
        like=source,
        own=values,
        bound=source.bound,
        widen=source.widen,
        tiling=source.tiling,
    )


def in_the_tile_of(other: Source, source: Source) -> Source:
    """The kernel ``source``, as ``other``: a kernel alike, in another tile."""
    own = {name: what for name, _, what in source.params}
    params = [(name, role, own.get(name, what)) for name, role, what in other.params]
    body = other.body
    if body is not None:
        body = replace(body, group=source.body.group, params=params)
    return replace(other, params=params, body=body, like=other, own=source.own)


@dataclass(frozen=True)
class _Salt:
    """The place of a random mask's number among a kernel's; equal ones stay equal."""

    place: int


class _Description:
    """What emit and render read of a group, with its Values numbered in the order of reading.

    Of a Value that the kernel does not compute they read what it is as memory. Names of atoms are
    part of the text, so frames stand as they are.
    """

    def __init__(
        self, group: Group, inlined: Collection[Value], written: Collection[Value]
    ) -> None:
        self.group, self.inlined, self.written = group, inlined, written
        self.members = set(group.members)
        self.places: dict[Value, int] = {}
        self.salts: dict[int, int] = {}
        self.values: list[Any] = []
        self.extents: list[Any] = []  # of all values
        whole = (
            tuple(group.sizes.items()),
            tuple(group.parts.items()),
            group.domain,
            group.reduced,
            (group.column, group.shares, group.scans),
            tuple(map(self._place, group.members)),
            tuple(map(self._place, group.outputs)),
            tuple((self._place(a), self._place(b)) for a, b in group.stores.items()),
        )
        # a number and the constant expression of it are equal
        types = tuple(map(type, self.extents))
        self.key = (*self.values, whole, None if _NUMBERS.issuperset(types) else types)

    def _place(self, v: Value) -> int:
        place = self.places.get(v)
        if place is None:
            place = self.places[v] = len(self.places)
            self.values.append(self._described(v))
        return place

    def _described(self, v: Value) -> tuple[Any, ...]:
        member, inlined, kind = v in self.members, v in self.inlined, v.kind
        sizes = v.shape + v.strides  # as many of the ones as of the others
        self.extents += sizes
        frame, written = self.group.frames.get(v), v in self.written
        # who made what is in memory does not matter; frames are looked for behind views and casts
        if not (member or inlined or kind in ("view", "cast", "full")):
            return v.dtype, sizes, frame, written, is_seed(v)
        return (
            v.dtype,
            sizes,
            frame,
            written,
            kind,
            v.op,
            None if v.params is None else self._parameter(v.params),
            self._salted(v) if kind == "random" else self._arguments(v),
            member,
            inlined,
            None if v.node is None else v.node.target,
        )

    def _salted(self, v: Value) -> tuple[Any, ...]:
        seed, salt, threshold = v.args
        number = _Salt(self.salts.setdefault(salt, len(self.salts)))
        return self._place(seed), number, threshold

    def _arguments(self, v: Value) -> tuple[Any, ...]:
        found: list[Any] = []
        for a in v.args:
            if isinstance(a, Value):
                place = self.places.get(a)
                found.append(self._place(a) if place is None else place)
            else:  # 1, 1.0 and True are equal, and so are 0.0 and -0.0
                found.append((type(a), a.expr if isinstance(a, SizeArg) else repr(a)))
        return tuple(found)

    def _parameter(self, p: Any) -> Any:
        if isinstance(p, View):
            return p.key
        if isinstance(p, Value):
            return ("value", self._place(p))
        return tuple(map(self._parameter, p)) if isinstance(p, (tuple, list)) else p
