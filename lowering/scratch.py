"""Memory for small values that only kernels touch: one slab a call, planned ahead."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import torch

from .group import Group
from .indexing import is_static, product
from .ir import BITS, Value
from .source import Source

if TYPE_CHECKING:
    from .executor import Writer

#: larger values get tensors of their own, which are free for others as soon as they are read
MOST_BYTES = 2**20
#: a line of memory; kernels assume 16
ALIGNMENT = 128


class Slab:
    """The part of the Writer that makes the slab. ``offsets``, ``size``: see ``plan_scratch``."""

    def __init__(self, writer: Writer, offsets: dict[Value, int], size: int) -> None:
        self.writer, self.offsets, self.size = writer, offsets, size

    @property
    def lines(self) -> list[str]:
        dtype = self.writer.constant(torch.uint8, "d")
        empty = f"scratch = empty(({self.size},), (1,), {dtype})"
        return [empty, f"s0 = {self.writer.use('scratch')}.data_ptr()"]

    def stand_in_parts(self) -> None:
        """Every part that a CUDA graph may hold has a slab of its own: see ``cut.py``."""
        if self.size and self.writer.cut is not None:
            self.writer.ledger.allocate("scratch", len(self.writer.lines), self.size)

    def begin(self, source: Source) -> None:
        """It is there from the first kernel on that touches it."""
        held = self.writer.ledger.held
        if "scratch" in held or not any(what in self.offsets for _, _, what in source.params):
            return
        self.writer.ledger.allocate("scratch", len(self.writer.lines), self.size)
        for line in self.lines:
            self.writer.runs.ahead(line)


def plan_scratch(
    steps: Sequence[Any], sources: dict[Group, Source], escapes: Collection[Value]
) -> tuple[dict[Value, int], int]:
    """(value -> its offset in the slab, bytes of the slab).

    A value's place is free again behind its last reader. ``escapes`` are read by ATen or returned.
    """
    last: dict[Value, int] = {}
    for place, step in enumerate(steps):
        if isinstance(step, Group):
            last.update((what, place) for _, role, what in sources[step].params if role != "size")
    free = _FreeList()
    offsets: dict[Value, int] = {}
    ends: dict[int, list[tuple[int, int]]] = {}  # what a step reads last
    for place, step in enumerate(steps):
        for out in step.outputs if isinstance(step, Group) else ():
            size = 0 if out in escapes else _bytes_of(out)
            if 0 < size <= MOST_BYTES:
                offsets[out] = free.take(size)
                ends.setdefault(last[out], []).append((offsets[out], size))
        for offset, size in ends.pop(place, ()):
            free.give(offset, size)
    return offsets, free.top


def _bytes_of(v: Value) -> int:
    """How much memory the value spans; 0 if that is not known."""
    if not is_static(*v.shape, *v.strides):
        return 0
    if not product(v.shape):
        return 0
    span = 1 + sum((n - 1) * s for n, s in zip(v.shape, v.strides, strict=True))
    size = span * BITS[v.dtype] // 8
    return -(-size // ALIGNMENT) * ALIGNMENT


class _FreeList:
    """First fit over the gaps below ``top``, neighbours joined."""

    def __init__(self) -> None:
        self.top = 0
        self.gaps: list[tuple[int, int]] = []  # (offset, size), sorted

    def take(self, size: int) -> int:
        for k, (offset, room) in enumerate(self.gaps):
            if room >= size:
                self.gaps[k : k + 1] = [(offset + size, room - size)] if room > size else []
                return offset
        self.top += size
        return self.top - size

    def give(self, offset: int, size: int) -> None:
        joined: list[tuple[int, int]] = []
        for start, room in sorted([*self.gaps, (offset, size)]):
            if joined and sum(joined[-1]) == start:
                joined[-1] = (joined[-1][0], joined[-1][1] + room)
            else:
                joined.append((start, room))
        self.gaps = joined
