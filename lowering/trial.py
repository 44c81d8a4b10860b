"""How long kernels take on this GPU: each is launched with memory of its own, of zeros.

Before each launch, twice the second-level cache is read, as in ``benchmarks.group_timing``: so a
kernel finds its operands in memory. What it leaves in the cache to be written back is not counted,
and is the same in all tiles. That reading also keeps the GPU busy until the CPU has asked for what
comes next. Kernels that are compared take turns.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch

from .indexing import Size
from .ir import FLOATING, Value, base_of
from .load import Launcher
from .source import NUMBER, Source
from .symbols import number_of

#: calls of each kernel; the second, of those that were near the best one in the first; the third,
#: of one that would be taken, beside the scheduled one: the least of several times is too low
FIRST, SECOND, THIRD = 5, 15, 40
#: times as long as the fastest one, from which on a kernel is not measured twice
FAR = 1.1
#: readings of the cache that the GPU begins with
AHEAD = 3
#: of the memory that is free, the most that a kernel's own may take
SHARE = 0.25


class Untimed(Exception):
    """A kernel cannot be timed; its text says why."""


class Hints:
    """What symbolic sizes were, when the graph was traced."""

    def __init__(self, known: Mapping[Any, int]) -> None:
        self.known = known

    def __call__(self, size: Size) -> int:
        found = number_of(size, self.known)
        if found is None:
            raise Untimed(f"its size {size} depends on data")
        return found


def span(v: Value, number: Callable[[Size], int]) -> int:
    """Elements of memory from a Value's first one to its last."""
    shape, strides = map(number, v.shape), map(number, v.strides)
    steps = [(n, s) for n, s in zip(shape, strides, strict=True)]
    if any(n == 0 for n, _ in steps):
        raise Untimed("it has nothing to do")
    return 1 + sum((n - 1) * s for n, s in steps)


def places_read(
    source: Source, members: Sequence[Value], number: Callable[[Size], int]
) -> dict[Value, int]:
    """Operands that say where another one is read -> how many places that has; raises Untimed
    where the kernel, which computes ``members``, computes such places: nobody knows which contents
    make them places that there are. Or where it writes to such places: of zeros, all to one."""
    loaded = {what for _, role, what in source.params if role == "in"}
    found: dict[Value, int] = {}
    for m in _computed(members, loaded):
        if m.kind == "store" and len(m.args) > 1:
            raise Untimed("it writes where its operands say")
        if m.kind != "gather":
            continue
        for axis, index in zip(m.params[0], m.args[1:], strict=True):
            index = _plain(index, loaded)
            if index not in loaded:
                raise Untimed("it computes where it reads")
            most = number(m.args[0].shape[axis])
            found[index] = min(most, found.get(index, most))
    return found


def _computed(members: Sequence[Value], loaded: Collection[Value]) -> list[Value]:
    """The members, and all that the kernel computes for them beside."""
    found = dict.fromkeys(members)
    stack = list(members)
    while stack:
        for v in map(base_of, stack.pop().inputs):
            if v not in loaded and v not in found:
                found[v] = None
                stack.append(v)
    return list(found)


def _plain(v: Value, loaded: Collection[Value]) -> Value:
    """What is loaded for a Value, seen through views and casts."""
    while v not in loaded and v.kind in ("view", "cast"):
        v = v.args[0]
    return v


def _runs(call: Callable[[], None]) -> bool:
    """Whether the GPU takes a kernel; the first call is slower than others, too."""
    try:
        call()
    except RuntimeError:  # more threads or registers than it has
        return False
    return True


class Trial:
    """Times kernels on one device."""

    def __init__(self, device: torch.device, number: Callable[[Size], int]) -> None:
        self.device, self.number = device, number
        self.stream = torch.cuda.current_stream(device)
        size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
        self.cache = torch.zeros(max(size, 2**22) // 4, device=device)

    def times(
        self, kernels: Sequence[tuple[Source, Launcher]], places: Mapping[Value, int]
    ) -> list[float]:
        """Microseconds of each, infinite of one that cannot be launched; the first one is the
        scheduled one. ``places``: see ``places_read``."""
        with torch.cuda.device(self.device):
            memory = self._memory(kernels[0][0], places)
            calls = [self._call(source, launch, memory) for source, launch in kernels]
            found = dict.fromkeys(range(len(calls)), math.inf)
            runs = [k for k, call in enumerate(calls) if _runs(call)]
            if 0 not in runs:
                raise Untimed("it cannot be launched")
            found.update(self._rounds({k: calls[k] for k in runs}, FIRST))
            far = FAR * min(found.values())
            near = [k for k in runs if k == 0 or found[k] <= far]
            if len(near) > 1:
                found.update(self._rounds({k: calls[k] for k in near}, SECOND))
            sure = {0}
            while (best := min(found, key=found.__getitem__)) not in sure:
                sure.add(best)
                found.update(self._rounds({0: calls[0], best: calls[best]}, THIRD))
            return list(found.values())

    def _memory(self, source: Source, places: Mapping[Value, int]) -> dict[Value, torch.Tensor]:
        """Memory for each operand and result."""
        sizes: dict[Value, int] = {}
        for _, role, what in source.params:
            if role in ("in", "out", NUMBER):
                sizes[what] = span(what, self.number)
        need = sum(n * getattr(torch, v.dtype).itemsize for v, n in sizes.items())
        free, _ = torch.cuda.mem_get_info(self.device)
        free += torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        if need > SHARE * free:
            raise Untimed(f"its operands are {need >> 20} MB")
        return {v: self._filled(v, n, places.get(v)) for v, n in sizes.items()}

    def _filled(self, v: Value, n: int, places: int | None) -> torch.Tensor:
        """Zeros; places of another operand are all over it."""
        dtype = getattr(torch, v.dtype)
        if places is None or v.dtype in FLOATING or v.dtype == "bool":
            return torch.zeros(n, dtype=dtype, device=self.device)
        most = min(places, torch.iinfo(dtype).max)
        spread = torch.arange(n, device=self.device) * 7919 % most
        return spread.to(dtype)

    def _call(
        self, source: Source, launch: Launcher, memory: Mapping[Value, torch.Tensor]
    ) -> Callable[[], None]:
        args = [
            memory[what].data_ptr()
            if role in ("in", "out")
            else 0
            if role == NUMBER
            else self.number(what)
            for _, role, what in source.params
        ]
        grid, stream = self.number(source.grid), self.stream.cuda_stream

        def call() -> None:
            launch(grid, 1, 1, stream, *args)

        return call

    def _rounds(self, calls: Mapping[int, Callable[[], None]], rounds: int) -> dict[int, float]:
        """Medians, in microseconds."""
        marks: dict[int, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {k: [] for k in calls}
        for _ in range(AHEAD):
            self._read()
        order = list(calls)
        for _ in range(rounds):
            for k in order:
                self._read()
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record(self.stream)
                calls[k]()
                end.record(self.stream)
                marks[k].append((begin, end))
            order.reverse()
        self.stream.synchronize()
        return {
            k: statistics.median(a.elapsed_time(b) for a, b in pairs) * 1e3
            for k, pairs in marks.items()
        }

    def _read(self) -> None:
        self.cache.sum()
