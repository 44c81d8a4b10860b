"""``mode="max-autotune"``: the tiles of a graph's kernels, measured on the GPU.

``schedule`` says a tile for each kernel in closed form; here that one competes with its neighbours.
What is fused does not change. Kernels that take the longest come first, and when the seconds are
over the rest stay as they are. What was chosen is remembered (``choices``), so that no other
process, and no other graph with the same kernel, measures it again.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from .alike import in_the_tile_of
from .choices import Choice, Choices, spelled
from .group import Group
from .indexing import Size, is_static
from .ir import BITS, Value
from .load import CompileError, Loading, kernel_folder
from .options import Options
from .progress import Progress
from .schedule import Tile, power_of_two
from .source import Source
from .trial import Hints, Trial, Untimed, places_read, span

log = logging.getLogger("gems_compile.lowering.tune")

#: how much faster than the scheduled tile another one must be: a share, and microseconds, for a
#: clock's noise (a step of a Llama that gained 0.3 us of 7 by it took 1.34 ms, not 1.33; H100)
GAIN, GAIN_US = 0.03, 0.5
#: microseconds a call, and share of all kernels', below which a kernel's are not worth measuring
LEAST_US, LEAST_SHARE = 3.0, 0.01
#: bytes a second, of a GPU that does not say
BANDWIDTH = 2e12

#: see ``Trial.times``
Times = Callable[[Sequence[tuple[Source, Any]], Mapping[Value, int]], list[float]]
_told: set[str] = set()


@dataclass
class Tuned:
    """What became of one kernel. ``times``: (tile, microseconds), the scheduled one first; None
    where the kernel did not run in that tile."""

    kernel: str
    key: str
    launches: int  # a call
    chosen: Tile
    times: tuple[tuple[Tile, float | None], ...] = ()
    remembered: bool = False
    why_not: str = ""  # measured

    @property
    def changed(self) -> bool:
        return bool(self.times) and self.chosen != self.times[0][0]

    def __str__(self) -> str:
        if self.why_not:
            return f"{self.kernel}: {spelled(self.chosen)}, not measured: {self.why_not}"
        known = dict(self.times)
        first, us = self.times[0]
        others = "; ".join(
            f"{spelled(tile)}: {'failed' if us is None else f'{us:.1f} us'}"
            for tile, us in self.times
            if tile not in (self.chosen, first)
        )
        taken = f"{spelled(self.chosen)} {known[self.chosen]:.1f} us"
        was = f", scheduled {spelled(first)} {us:.1f} us" if self.changed else " as scheduled"
        return f"{self.kernel}: {taken}{was}; {others}".removesuffix("; ")


@dataclass(eq=False)
class _Kernel:
    """One kernel, and the groups that launch it with as many programs, each with its source."""

    source: Source
    groups: dict[Group, Source] = field(default_factory=dict)
    us: float = 0.0  # of all its launches, by the bytes that it moves
    path: str = ""
    tiles: list[Tile] = field(default_factory=list)  # the scheduled one first
    places: dict[Value, int] = field(default_factory=dict)  # see ``places_read``
    loading: dict[Tile, tuple[Source, Loading]] = field(default_factory=dict)


class Tuner:
    """Chooses tiles for the kernels of one graph; ``tuned`` says which and why."""

    def __init__(
        self, options: Options, device: torch.device, label: str, hints: Mapping[Any, int]
    ) -> None:
        self.options, self.device, self.label = options, device, label
        self.number = Hints(hints)
        self.tuned: list[Tuned] = []
        self.index = device.index if device.type != "cpu" else None
        self.choices = Choices(device_name(device))
        self.clock: Callable[[], float] = time.monotonic

    def run(self, sources: Mapping[Group, Source]) -> dict[Group, Source]:
        """The sources, those in the scheduled tile too, that the groups should run."""
        times = timer(self.device, self.number)
        if times is None:
            _tell_once("tiles are not measured: there is no GPU")
            return {}
        begin = self.clock()
        kernels = self._kernels(sources)
        chosen: dict[Group, Source] = {}
        left = []
        for kernel in kernels:
            choice = self.choices.recall(kernel.path, kernel.tiles)
            if choice is not None:
                chosen.update(self._take(kernel, choice, remembered=True))
            elif self._may_run(kernel):
                left.append(kernel)
        if left:
            with _disable_current_modes(), torch.no_grad():  # a compile runs under a FakeTensorMode
                chosen.update(self._measured(left, times, begin))
        return chosen

    def _may_run(self, kernel: _Kernel) -> bool:
        """Whether the kernel can run on memory that is made for it."""
        group = next(iter(kernel.groups))
        try:
            kernel.places = places_read(kernel.source, group.members, self.number)
        except Untimed as e:
            self.tuned.append(self._unmeasured(kernel, str(e)))
            return False
        return True

    # which kernels -----------------------------------------------------------------------------

    def _kernels(self, sources: Mapping[Group, Source]) -> list[_Kernel]:
        """Those worth measuring, the ones that take the longest first."""
        found: dict[Any, _Kernel] = {}
        total = 0.0
        for group, source in sources.items():
            us = self._us(source)
            total += us
            if source.tiling is None:
                continue
            extent = self._extent(source)
            kernel = found.setdefault((source.key, extent), _Kernel(source))
            kernel.groups[group] = source
            kernel.us += us
            kernel.path = self._path(source, extent)
        least = max(LEAST_US, LEAST_SHARE * total)
        worth = [kernel for kernel in found.values() if kernel.us >= least]
        for kernel in worth:
            tiling = kernel.source.tiling
            kernel.tiles = [tiling.tile, *tiling.neighbours(self.options.target.warp)]
        return sorted(worth, key=lambda kernel: -kernel.us)

    def _us(self, source: Source) -> float:
        """About how long the kernel takes, by the memory that it is given."""
        try:
            moved = sum(
                span(what, self.number) * BITS[what.dtype] // 8
                for _, role, what in source.params
                if role in ("in", "out")
            )
        except Untimed:
            return 0.0
        return moved / bandwidth(self.device) * 1e6

    def _extent(self, source: Source) -> Any:
        """How much the kernel has to do: exactly, or to a power of two where sizes are symbolic."""
        sizes = [w for _, role, w in source.params if role == "size" and not is_static(w)]
        try:
            return tuple(map(self._about, (source.grid, *sizes)))
        except Untimed:
            return None

    def _about(self, size: Size) -> int:
        n = self.number(size)
        return n if is_static(size) else -power_of_two(n)

    def _path(self, source: Source, extent: Any) -> str:
        kernel = os.path.join(kernel_folder(self.options), source.key)
        return self.choices.path(kernel, extent)

    # measuring -----------------------------------------------------------------------------------

    def _measured(
        self, kernels: Sequence[_Kernel], times: Times, begin: float
    ) -> dict[Group, Source]:
        why = _why_not_now(self.device)
        if why:
            log.info("graph %s: tiles are not measured: %s", self.label, why)
            self.tuned += [self._unmeasured(kernel, why) for kernel in kernels]
            return {}
        chosen: dict[Group, Source] = {}
        end = begin + self.options.tune_seconds
        ahead = max(1, (self.options.threads or os.cpu_count() or 1) // 4)
        with Progress(len(kernels)) as progress:
            for k, kernel in enumerate(kernels):
                if self.clock() >= end:
                    why = f"{self.options.tune_seconds:g} seconds were over"
                    self.tuned += [self._unmeasured(rest, why) for rest in kernels[k:]]
                    break
                for other in kernels[k : k + ahead]:
                    self._begin(other)
                chosen.update(self._one(kernel, times, end))
                progress.step(kernel.source.name)
        seconds = self.clock() - begin
        log.info(
            "graph %s: measured the tiles of %d of %d kernels in %.1f s; %d changed",
            self.label,
            sum(not t.why_not and not t.remembered for t in self.tuned),
            len(kernels),
            seconds,
            sum(t.changed and not t.remembered for t in self.tuned),
        )
        return chosen

    def _begin(self, kernel: _Kernel) -> None:
        """Start to compile the kernel in all its tiles."""
        if kernel.loading:
            return
        tiling = kernel.source.tiling
        seen = set()
        for tile in kernel.tiles:
            scheduled = tile == tiling.tile
            try:
                source = kernel.source
                if not scheduled:
                    source = in_the_tile_of(tiling.write(tile), source)
            except Exception as e:  # the kernel is there without it
                log.info("%s in %s: %s", kernel.source.name, spelled(tile), e)
                continue
            if source.key not in seen:
                seen.add(source.key)
                kernel.loading[tile] = source, Loading(source, self.options, self.index)

    def _one(self, kernel: _Kernel, times: Times, end: float) -> dict[Group, Source]:
        """Measure a kernel in its tiles, and take the best one."""
        ready: list[tuple[Tile, tuple[Source, Any]]] = []
        failed: list[Tile] = []
        first = kernel.tiles[0]
        for tile, (source, loading) in kernel.loading.items():
            if self.clock() >= end and tile != first:
                break
            try:
                ready.append((tile, (source, loading.result())))
            except CompileError as e:
                log.info("%s in %s: %s", source.name, spelled(tile), e)
                failed.append(tile)
        if first in failed:
            self.tuned.append(self._unmeasured(kernel, "it failed to compile"))
            return {}
        try:
            found = times([kernel for _, kernel in ready], kernel.places)
        except Untimed as e:
            self.tuned.append(self._unmeasured(kernel, str(e)))
            return {}
        measured = [(tile, us) for (tile, _), us in zip(ready, found, strict=True)]
        told = ((tile, us if us < math.inf else None) for tile, us in measured)
        choice = Choice(best_of(measured), (*told, *((tile, None) for tile in failed)))
        if len(ready) + len(failed) == len(kernel.loading):
            self.choices.keep(kernel.path, choice)
        return self._take(kernel, choice, remembered=False)

    def _take(self, kernel: _Kernel, choice: Choice, remembered: bool) -> dict[Group, Source]:
        """The sources of the kernel's groups, in the tile that was chosen."""
        source = kernel.source
        fact = self._fact(kernel, choice.tile)
        fact.times, fact.remembered = choice.times, remembered
        self.tuned.append(fact)
        log.debug("graph %s: %s", self.label, fact)
        if choice.tile == source.tiling.tile:
            return {}
        other = source.tiling.write(choice.tile)
        return {group: in_the_tile_of(other, own) for group, own in kernel.groups.items()}

    def _fact(self, kernel: _Kernel, tile: Tile, why_not: str = "") -> Tuned:
        source = kernel.source
        return Tuned(source.name, source.key, len(kernel.groups), tile, why_not=why_not)

    def _unmeasured(self, kernel: _Kernel, why: str) -> Tuned:
        return self._fact(kernel, kernel.source.tiling.tile, why)


def best_of(measured: Sequence[tuple[Tile, float]]) -> Tile:
    """The fastest tile; the first one if none gains much over it."""
    scheduled, us = measured[0]
    tile, least = min(measured, key=lambda pair: pair[1])
    return tile if us - least >= max(GAIN * us, GAIN_US) else scheduled


def timer(device: torch.device, number: Hints) -> Times | None:
    """What times kernels; None where there is no GPU."""
    if device.type != "cuda":
        return None
    trial: list[Trial] = []

    def times(kernels: Sequence[tuple[Source, Any]], places: Mapping[Value, int]) -> list[float]:
        try:
            if not trial:  # it takes memory
                trial.append(Trial(device, number))
            return trial[0].times(kernels, places)
        except torch.OutOfMemoryError as e:
            raise Untimed("the GPU's memory is full") from e

    return times


def bandwidth(device: torch.device) -> float:
    """Bytes a second, about."""
    if device.type != "cuda":
        return BANDWIDTH
    facts: Any = torch.cuda.get_device_properties(device)
    rate, width = getattr(facts, "memory_clock_rate", 0), getattr(facts, "memory_bus_width", 0)
    return rate * 1e3 * 2 * width / 8 or BANDWIDTH


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _why_not_now(device: torch.device) -> str:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return "a CUDA graph is captured"
    return ""


def _tell_once(message: str) -> None:
    if message not in _told:
        _told.add(message)
        log.info("%s", message)
