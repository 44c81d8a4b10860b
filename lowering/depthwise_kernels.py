"""The kernels of ``gems::depthwise_convolution`` and ``gems::depthwise_weight_parts``.

There are more multiplications to an element than a tensor's bytes leave time for anything else, and
no matrix instruction does them. So a lane computes a tile of results, and reads each element of
their windows once: of 7 x 7 taps and 8 x 2 results 14 x 8 elements, not 16 x 49. The windows are
written out, and with them which element meets which tap of which result.

Lanes are numbered as the tensors lie: tiles along a row of a channel's image, or, in channels-last,
channels; so a warp reads and writes what lies together. Sums are float32, of one order.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..kernels.target import Target
from .image_kernels import NARROW
from .indexing import ceil_div, is_static
from .ir import BITS, Declined, Value
from .schedule import power_of_two
from .source import WAIT, Lines, Source, whole_kernel

#: lanes of a program, one a thread
LANES = 128
WARPS = 4
#: results of a lane, side by side; and at most so many one below the other
ACROSS = 2
MOST_DOWN = 8
#: taps of a window, each of which has a register of a lane
MOST_TAPS = 49
#: channels, in channels-last, of a program that sums the gradient of a weight
TOGETHER = 32
#: instructions that come with a load: its test, its widening, and what is in its place outside
LOAD = 4
#: programs that a multiprocessor is to have, of those that sum the gradient of a weight
PROGRAMS = 8


@dataclass(frozen=True)
class Axis:
    """One axis of an image, down or across. Result o and tap k meet at o * stride + k * dilation -
    padding of what is read; ``back``: at (o + padding - k * dilation) / stride, where that is
    whole. There are ``made`` results and ``given`` elements."""

    taps: int
    stride: int
    padding: int
    dilation: int
    given: int
    made: int
    back: bool = False

    def meetings(self, tile: int) -> dict[int, list[tuple[int, int]]]:
        """For a tile of so many results: each place that is read, counted from ``step`` times the
        tile's number on, and the (result, tap) that meet there. Going back, a tile is a multiple of
        the stride."""
        found: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for o in range(tile):
            for k in range(self.taps):
                if not self.back:
                    found[o * self.stride + k * self.dilation - self.padding].append((o, k))
                    continue
                place, rest = divmod(o + self.padding - k * self.dilation, self.stride)
                if not rest:
                    found[place].append((o, k))
        return dict(sorted(found.items()))

    def step(self, tile: int) -> int:
        return tile // self.stride if self.back else tile * self.stride

    def tiles(self, tile: int) -> int:
        return -(-self.made // tile)

    def tests(self, tile: int, first: str, place: int) -> list[str]:
        """What a lane must ask before it reads there: ``first`` is where its tile begins."""
        tests = [f"({first} >= {-place})"] if place < 0 else []
        furthest = (self.tiles(tile) - 1) * self.step(tile) + place
        return tests + ([f"({first} < {self.given - place})"] if furthest >= self.given else [])

    def beyond(self, tile: int, o: int) -> bool:
        """Whether the last tile's result ``o`` is none."""
        return (self.tiles(tile) - 1) * tile + o >= self.made


@dataclass(frozen=True)
class Windows:
    """``batch`` images of ``channels``; ``last``: in channels-last."""

    batch: int
    channels: int
    down: Axis
    across: Axis
    last: bool

    @property
    def taps(self) -> int:
        return self.down.taps * self.across.taps

    def lanes(self, tile: tuple[int, int]) -> int:
        return self.batch * self.channels * self.down.tiles(tile[0]) * self.across.tiles(tile[1])

    def tile(self, multiprocessors: int = 0) -> tuple[int, int]:
        """(results down, across) of a lane: those that take the fewest instructions, unless that
        leaves some of the multiprocessors idle."""
        one = self.down.stride if self.down.back else 1
        across = self.across.stride if self.across.back else 1
        across *= -(-min(ACROSS, self.across.made) // across)
        found = [(down, across) for down in range(one, max(MOST_DOWN, one) + 1, one)]
        busy = [t for t in found if self.lanes(t) >= 2 * LANES * multiprocessors] or found[:1]
        return min(busy, key=lambda tile: (self.lanes(tile) * self._effort(tile), -tile[0]))

    def _effort(self, tile: tuple[int, int]) -> int:
        rows = self.down.meetings(tile[0]).values()
        columns = self.across.meetings(tile[1]).values()
        return LOAD * len(rows) * len(columns) + sum(map(len, rows)) * sum(map(len, columns))


def windows_of(
    shape: Any,
    made: Any,
    window: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    last: bool,
    back: bool = False,
) -> Windows:
    """``shape``: of what is read; ``made``: the size of what is written. A signal is a row."""
    batch, channels, *given = map(int, shape)
    backs = [back] * len(given)
    facts = zip(window, stride, padding, dilation, given, made, backs, strict=True)
    axes = [Axis(*fact) for fact in facts]
    down, across = axes if len(axes) == 2 else (Axis(1, 1, 0, 1, 1, 1, back), *axes)
    return Windows(batch, channels, down, across, last)


def _check(x: Value, window: Any, last: bool) -> None:
    if not is_static(*x.shape):
        raise Declined("its kernel is for images of a fixed size")
    if math.prod(window) > MOST_TAPS:
        raise Declined(f"its kernel is for windows of at most {MOST_TAPS} taps")
    expected: Any = [math.prod(map(int, x.shape[k + 1 :])) for k in range(x.ndim)]
    if last:
        _, c, h, w = x.shape
        expected = (h * w * c, 1, w * c, c)
    if any(n != 1 and s != e for n, s, e in zip(x.shape, x.strides, expected, strict=True)):
        raise Declined("its kernel reads dense images, contiguous or in channels-last")


def of_convolution(
    x: Value,
    weight: Value,
    bias: Value | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    size: Any,
    back: bool,
    last: bool,
) -> Windows:
    window = weight.shape[:2] if last else weight.shape[2:]
    _check(x, window, last)
    return windows_of(x.shape, size, window, stride, padding, dilation, last, back)


def of_weight_parts(
    gradient: Value,
    x: Value,
    window: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    shares: int,
    last: bool,
) -> Windows:
    for images in (gradient, x):
        _check(images, window, last)
    return windows_of(x.shape, gradient.shape[2:], window, stride, padding, dilation, last)


# ------------------------------------------------------------------------------------------ kernels


def convolution(v: Value, target: Target) -> Source:
    """A lane computes a tile of results of one channel."""
    w: Windows = v.params
    x, weight, *bias = v.inputs
    text = _Text(v, target, w.tile(target.multiprocessors))
    lanes, add = w.lanes(text.tile), text.add
    add(f"lane = {text.program} * {LANES} + tl.arange(0, {LANES})")
    if lanes % LANES:
        add(f"here = lane < {lanes}")
        add("lane = tl.where(here, lane, 0)")
    text.place_lanes("lane")
    add(f"taps = weight + {'c' if w.last else f'c * {w.taps}'}")
    for k in range(w.taps):
        add(f"w{k} = tl.load(taps + {k * w.channels if w.last else k}).to(tl.float32)")
    begin = "tl.load(bias + c).to(tl.float32)" if bias else f"tl.zeros([{LANES}], tl.float32)"
    add(f"begin = {begin}")
    for o, p in text.results():
        add(f"total{o}_{p} = begin")
    text.place_reads()
    for name, rows, columns in text.reads():
        for o, k in rows:
            for p, m in columns:
                tap = k * w.across.taps + m
                add(f"total{o}_{p} = tl.fma({name}, w{tap}, total{o}_{p})")
    _store(text, lanes, BITS[v.dtype])
    params = [("x", "in", x), ("weight", "in", weight)]
    params += [("bias", "in", b) for b in bias]
    params.append(("out", "out", v))
    grid = ceil_div(lanes, LANES)
    imports = ("depthwise",)
    name = "depthwise_convolution"
    return whole_kernel(name, text, params, grid, WARPS, target.waits, imports, lanes=True)


def _store(text: _Text, lanes: int, bits: int) -> None:
    """Two results side by side are one number, where all such pairs begin at even places."""
    w, (down, across), add = text.windows, text.tile, text.add
    made_down, made_across = w.down.made, w.across.made
    pairs = across == 2 and not w.last and made_across % 2 == 0
    size, pixel = made_down * made_across, w.channels if w.last else 1
    place = f"(tile_down * {down * made_across} + tile_across * {across}) * {pixel}"
    add(f"at = out + (image * {size * pixel} + {place}{' + c' if w.last else ''})")
    for o in range(down):
        for p in range(1 if pairs else across):
            tests = ["here"] if lanes % LANES else []
            if w.down.beyond(down, o):
                tests.append(f"(tile_down < {-(-(made_down - o) // down)})")
            if w.across.beyond(across, p):
                tests.append(f"(tile_across < {-(-(made_across - p) // across)})")
            where, value = f"at + {(o * made_across + p) * pixel}", f"total{o}_{p}"
            if pairs:
                where = f"({where}).to(tl.pointer_type(tl.uint{2 * bits}))"
                value = f"depthwise.joined(total{o}_0, total{o}_1, out.dtype.element_ty)"
            else:
                value = f"{value}.to(out.dtype.element_ty)"
            mask = f", mask={' & '.join(tests)}" if tests else ""
            add(f"tl.store({where}, {value}{mask})")


def weight_parts(v: Value, target: Target) -> Source:
    """A program sums its share of the tiles of some channels: each lane a number for each tap, and
    then the lanes of a channel."""
    w: Windows = v.params
    gradient, x = v.inputs
    text = _Text(v, target, w.tile())
    add, shares = text.add, v.shape[0]
    side = together(w)
    tall, blocks = LANES // side, -(-w.channels // side)
    tiles = w.lanes(text.tile) // w.channels
    each = -(-tiles // (shares * tall)) * tall
    add(f"share = {text.program} // {blocks}")
    add(f"c = (tl.program_id(0) % {blocks}) * {side} + tl.arange(0, {side})[None, :]")
    add(f"known = c < {w.channels}")
    add("c = tl.where(known, c, 0)")
    for k in range(w.taps):
        add(f"total{k} = tl.zeros([{tall}, {side}], tl.float32)")
    add(
        f"for start in tl.range(share * {each}, tl.minimum((share + 1) * {each}, {tiles}), {tall}):"
    )
    text.depth += 1
    add(f"number = start + tl.arange(0, {tall})[:, None]")
    add(f"here = (number < {tiles}) & known")
    add(f"number = tl.where(number < {tiles}, number, 0)")
    text.place_tiles("number")
    text.place_gradients()
    text.place_reads("here")
    for name, rows, columns in text.reads():
        for o, k in rows:
            for p, m in columns:
                tap, seen = k * w.across.taps + m, name
                if tests := text.missing(o, p):  # 0 of a result that is none, times infinity
                    seen = f"tl.where({tests}, {name}, 0.0)"
                add(f"total{tap} = tl.fma({seen}, given{o}_{p}, total{tap})")
    text.depth -= 1
    add(f"c = (tl.program_id(0) % {blocks}) * {side} + tl.arange(0, {side})")
    add(f"at = out + (share * {w.taps * w.channels} + {'c' if w.last else f'c * {w.taps}'})")
    for k in range(w.taps):
        where = f"at + {k * w.channels if w.last else k}"
        add(f"tl.store({where}, tl.sum(total{k}, 0), mask=c < {w.channels})")
    params = [("gradient", "in", gradient), ("x", "in", x), ("out", "out", v)]
    grid = shares * blocks
    name = "depthwise_weight_parts"
    return whole_kernel(name, text, params, grid, WARPS, target.waits, lanes=True)


def together(w: Windows) -> int:
    """Channels of a program that sums the gradient of a weight."""
    return min(TOGETHER, power_of_two(w.channels)) if w.last else 1


def shares_of(w: Windows, multiprocessors: int) -> int:
    """Parts in which that gradient is summed."""
    side = together(w)
    most = -(-w.lanes(w.tile()) // w.channels * side // LANES)
    return max(1, min(most, -(-PROGRAMS * multiprocessors // -(-w.channels // side))))


class _Text(Lines):
    """The lines of one of the kernels; ``tile``: (results down, across) of a lane."""

    def __init__(self, v: Value, target: Target, tile: tuple[int, int]) -> None:
        super().__init__()
        self.windows: Windows = v.params
        self.tile, self.depth = tile, 1
        self.asked = False  # whether every read is behind a test
        sizes = [math.prod(t.shape) for t in (*v.inputs, v)]
        #: the number of the program
        wide = ".to(tl.int64)" if max(sizes) >= NARROW else ""
        self.program = f"tl.program_id(0){wide}"
        if target.waits:
            self.add(WAIT)

    def results(self) -> Iterator[tuple[int, int]]:
        for o in range(self.tile[0]):
            for p in range(self.tile[1]):
                yield o, p

    # where lanes are -----------------------------------------------------------------------------

    def _tiles(self) -> tuple[int, int]:
        w = self.windows
        return w.down.tiles(self.tile[0]), w.across.tiles(self.tile[1])

    def place_lanes(self, lane: str) -> None:
        """A lane's channel, its image (of one channel, or of all) and its tile in that."""
        w, (down, across), add = self.windows, self._tiles(), self.add
        if w.last:
            add(f"c = {lane} % {w.channels}")
        each = w.channels if w.last else 1
        add(f"tile_across = {lane} // {each} % {across}")
        add(f"tile_down = {lane} // {each * across} % {down}")
        add(f"image = {lane} // {each * across * down}")
        if not w.last:
            add(f"c = image % {w.channels}")

    def place_tiles(self, number: str) -> None:
        """The same of a tile's number among those of a channel that is known."""
        w, (down, across), add = self.windows, self._tiles(), self.add
        add(f"tile_across = {number} % {across}")
        add(f"tile_down = {number} // {across} % {down}")
        whole = f"{number} // {across * down}"
        add(f"image = {whole}" if w.last else f"image = {whole} * {w.channels} + c")

    # what they read ------------------------------------------------------------------------------

    def _place(self, height: int, width: int, row: str, column: str) -> str:
        """The element at a row and a column of a lane's channel."""
        w = self.windows
        pixel = w.channels if w.last else 1
        channel = " + c" if w.last else ""
        return f"image * {height * width * pixel} + ({row} * {width} + {column}) * {pixel}{channel}"

    def place_reads(self, also: str = "") -> None:
        """Where a lane's windows begin, and what it must ask in each of their rows and columns."""
        w, add = self.windows, self.add
        for axis, tile, name in ((w.down, self.tile[0], "row"), (w.across, self.tile[1], "column")):
            add(f"{name} = tile_{'down' if name == 'row' else 'across'} * {axis.step(tile)}")
            for k, place in enumerate(axis.meetings(tile)):
                tests = axis.tests(tile, name, place)
                if also and name == "row":
                    tests.append(also)
                if tests:
                    add(f"{name}{k} = {' & '.join(tests)}")
        add(f"at = x + ({self._place(w.down.given, w.across.given, 'row', 'column')})")
        self.asked = bool(also)

    def reads(self) -> Iterator[tuple[str, list[tuple[int, int]], list[tuple[int, int]]]]:
        """Each element that is read: its name, the (result, tap) that meet in its row, and those
        that do in its column."""
        w, (down, across) = self.windows, self.tile
        pixel = w.channels if w.last else 1
        rows, columns = w.down.meetings(down), w.across.meetings(across)
        for k, (row, met) in enumerate(rows.items()):
            asks = bool(w.down.tests(down, "row", row)) or self.asked
            for m, (column, with_) in enumerate(columns.items()):
                tests = [f"row{k}"] if asks else []
                tests += [f"column{m}"] if w.across.tests(across, "column", column) else []
                mask = f", mask={' & '.join(tests)}, other=0" if tests else ""
                where = f"at + {(row * w.across.given + column) * pixel}"
                name = f"x{k}_{m}"
                self.add(f"{name} = tl.load({where}{mask}).to(tl.float32)")
                yield name, met, with_

    def place_gradients(self) -> None:
        """The gradients of a lane's tile of results."""
        w, (down, across), add = self.windows, self.tile, self.add
        place = self._place(
            w.down.made, w.across.made, f"(tile_down * {down})", f"tile_across * {across}"
        )
        add(f"at = gradient + ({place})")
        pixel = w.channels if w.last else 1
        for axis, tile, name in ((w.down, down, "down"), (w.across, across, "across")):
            for o in range(tile):
                if axis.beyond(tile, o):
                    add(f"is_{name}{o} = tile_{name} < {-(-(axis.made - o) // tile)}")
        for o, p in self.results():
            tests = " & ".join(filter(None, ("here", self.missing(o, p))))
            where = f"at + {(o * w.across.made + p) * pixel}"
            load = f"tl.load({where}, mask={tests}, other=0).to(tl.float32)"
            add(f"given{o}_{p} = {load}")

    def missing(self, o: int, p: int) -> str:
        """The tests of whether a tile has this result, where some tile has not."""
        w, (down, across) = self.windows, self.tile
        tests = [f"is_down{o}"] if w.down.beyond(down, o) else []
        return " & ".join(tests + ([f"is_across{p}"] if w.across.beyond(across, p) else []))
