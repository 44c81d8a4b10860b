"""The kernels of ``gems::image_convolution`` and ``gems::image_weight_parts``.

Both are matrix products of which one factor is never stored: row p of it is the window of pixel p,
so many rows of an image one after another. As images are framed and of 4 channels (or 8), a row of
a window is aligned, and needs no test for the image's edges. What a row holds beyond its last tap
is not multiplied by zero but left out: it might be no number.

H200, 64 images of 3 x 224 x 224, bfloat16, in us (cuDNN, this, framing the images not counted):

    7 x 7 to 64 channels, stride 2     forward 450, 118   weight's gradient 302,  97
    3 x 3 to 32 channels, stride 2             129,  47                     150,  47
    3 x 3 to 64 channels                       525, 204                     375, 121
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..kernels.target import Target
from .indexing import Size, ceil_div, is_static, product
from .ir import BITS, Declined, Value
from .schedule import power_of_two
from .source import WAIT, Lines, Source, whole_kernel

#: elements of a tensor from which on 32 bits do not count its places
NARROW = 2**31
#: elements of an accumulator, which 4 warps hold
ACCUMULATOR = 16384
#: elements of a window, rows filled up: the most that an accumulator has columns for
MOST_TERMS = 256
#: as short as an axis of a matrix product may be: a row of a window is no shorter
LEAST = 16
WARPS = 4


@dataclass(frozen=True)
class Windows:
    """Where windows begin in images, in elements: ``image``, ``down`` and ``across`` from the one
    before; there are ``height`` times ``width`` in an image. A window is ``rows`` rows, ``line``
    apart, of ``row`` elements, of which the first ``valid`` count."""

    image: int
    down: int
    across: int
    height: int
    width: int
    rows: int
    line: int
    row: int
    valid: int

    @property
    def terms(self) -> int:
        return self.rows * self.row


def _windows(
    images: Value, taps: int, window: Any, stride: Any, height: Size, width: Size
) -> Windows:
    _, channels, lines, columns = images.shape
    numbers = channels, lines, columns, height, width
    if not all(type(n) is int for n in numbers):
        raise Declined("its kernel is for images of a fixed size")
    line: int = columns * channels
    if images.strides[1:] != (1, line, channels):
        raise Declined("its kernel reads images in channels-last")
    rows, across = window
    return Windows(
        lines * line,
        stride[0] * line,
        stride[1] * channels,
        height,
        width,
        rows,
        line,
        across * channels,
        taps * channels,
    )


def of_convolution(
    images: Value, weight: Value, taps: int, stride: Any, size: Any, last: bool
) -> Windows:
    _, channels, rows, columns = weight.shape
    if weight.strides != (rows * columns * channels, 1, columns * channels, channels):
        raise Declined("its kernel reads weights in channels-last")
    return _windows(images, taps, (rows, columns), stride, *size)


def of_weight_parts(
    gradient: Value, images: Value, taps: int, window: Any, stride: Any, shares: int
) -> Windows:
    _, written, height, width = gradient.shape
    last: Any = (width * written * height, 1, width * written, written)
    first: Any = (width * written * height, height * width, width, 1)
    if gradient.strides not in (last, first):
        raise Declined("its kernel reads dense gradients, contiguous or in channels-last")
    return _windows(images, taps, window, stride, height, width)


# ------------------------------------------------------------------------------------------ kernels


def convolution(v: Value, target: Target) -> Source:
    """[pixels, terms] times [terms, channels written]."""
    w: Windows = v.params
    written: Any = v.shape[1]
    pixels = product((v.shape[0], w.height, w.width))
    columns = max(LEAST, min(128, power_of_two(written)))
    across = -(-written // columns)
    tall = min(256 if w.terms > 64 else 128, ACCUMULATOR // columns)
    while is_static(pixels) and tall > 64 and pixels * across < 2 * tall * target.multiprocessors:
        tall //= 2
    step = min(32, power_of_two(w.terms))
    text = _Text(v, target, ("x", "weight", "out"))
    add = text.add
    add(f"m = ({text.program} // {across}) * {tall} + tl.arange(0, {tall})")
    add(f"o = (tl.program_id(0) % {across}) * {columns} + tl.arange(0, {columns})")
    text.place_windows("pixels" if not is_static(pixels) else str(pixels))
    inside = "" if written % columns == 0 else f"(o < {written})[None, :]"
    add(f"total = tl.zeros([{tall}, {columns}], tl.float32)")
    add(f"for first in tl.range(0, {w.terms}, {step}, num_stages=2):")
    text.depth += 1
    add(f"k = first + tl.arange(0, {step})")
    some = [] if w.terms % step == 0 else [f"k < {w.terms}"]
    mask = text.taps("k", some)
    add(f"a = tl.load(x + (window[:, None] + {text.within('k')}[None, :]){_masked(mask)})")
    mask = _both(inside, f"({some[0]})[:, None]" if some else "")
    add(f"b = tl.load(weight + (o[None, :] * {w.terms} + k[:, None]){_masked(mask)})")
    add("total = tl.dot(a, b, total)")
    text.depth -= 1
    mask = _both("here[:, None]", inside)
    add(f"tl.store(out + ({text.pixel_of(v)}), total.to(out.dtype.element_ty), mask={mask})")
    return text.source("image_convolution", (*v.inputs, v), pixels, ceil_div(pixels, tall) * across)


def weight_parts(v: Value, target: Target) -> Source:
    """[channels written, pixels] times [pixels, terms], of one share of the pixels a program."""
    w: Windows = v.params
    gradient, images = v.inputs
    shares, written = v.shape[:2]
    pixels = product((gradient.shape[0], w.height, w.width))
    wide = max(LEAST, min(128, power_of_two(w.terms)))  # of one product
    firsts = range(0, w.terms, wide)
    rows = max(LEAST, min(128, power_of_two(written), ACCUMULATOR // (wide * len(firsts))))
    above = -(-written // rows)
    tall = 128 if w.terms <= 64 else 64
    bytes_a_stage = tall * (rows + wide * len(firsts)) * BITS[images.dtype] // 8
    stages = max(1, min(3, target.shared // bytes_a_stage))
    text = _Text(v, target, ("gradient", "x", "out"))
    add = text.add
    count = str(pixels) if is_static(pixels) else "pixels"
    add(f"share = {text.program} // {above}")
    add(f"o = (tl.program_id(0) % {above}) * {rows} + tl.arange(0, {rows})")
    add(f"each = ({count} + {shares * tall - 1}) // {shares * tall} * {tall}")
    add(f"end = tl.minimum((share + 1) * each, {count})")
    inside = "" if written % rows == 0 else f"(o < {written})"
    for k, first in enumerate(firsts):
        add(f"k{k} = {first} + tl.arange(0, {wide})")
        add(f"total{k} = tl.zeros([{rows}, {wide}], tl.float32)")
    add(f"for start in tl.range(share * each, end, {tall}, num_stages={stages}):")
    text.depth += 1
    add(f"m = start + tl.arange(0, {tall})")
    text.place_windows("end")
    mask = _both("here[:, None]", f"{inside}[None, :]" if inside else "")
    add(f"given = tl.load(gradient + ({text.pixel_of(gradient)}), mask={mask}, other=0)")
    add("given = tl.trans(given)")
    last = w.terms % wide != 0
    for k in range(len(firsts)):
        mask = _both("here[:, None]", text.taps(f"k{k}", [f"k{k} < {w.terms}"] if last else []))
        within = text.within(f"k{k}")
        add(f"a = tl.load(x + (window[:, None] + {within}[None, :]){_masked(mask)})")
        add(f"total{k} = tl.dot(given, a, total{k})")
    text.depth -= 1
    for k in range(len(firsts)):
        place = f"share * {written * w.terms} + o[:, None] * {w.terms} + k{k}[None, :]"
        mask = _both(f"{inside}[:, None]" if inside else "", f"(k{k} < {w.terms})[None, :]")
        add(f"tl.store(out + ({place}), total{k}, mask={mask})")
    return text.source("image_weight_parts", (*v.inputs, v), pixels, shares * above)


class _Text(Lines):
    """The lines of one of the kernels."""

    def __init__(self, v: Value, target: Target, names: tuple[str, str, str]) -> None:
        super().__init__()
        self.windows: Windows = v.params
        self.names, self.waits, self.depth = names, target.waits, 1
        sizes = [product(t.shape) for t in (*v.inputs, v)]
        self.wide = not is_static(*sizes) or max(sizes) >= NARROW
        #: the number of the program
        self.program = "tl.program_id(0).to(tl.int64)" if self.wide else "tl.program_id(0)"
        if self.waits:
            self.add(WAIT)

    def place_windows(self, end: str) -> None:
        """Where the windows of pixels ``m`` begin; those from ``end`` on are not there."""
        w = self.windows
        self.add(f"here = m < {end}")
        self.add(
            f"window = m // {w.height * w.width} * {w.image}"
            f" + m // {w.width} % {w.height} * {w.down} + m % {w.width} * {w.across}"
        )
        self.add("window = tl.where(here, window, 0)")

    def within(self, k: str) -> str:
        """Where terms ``k`` lie in a window."""
        return f"({k} // {self.windows.row} * {self.windows.line} + {k} % {self.windows.row})"

    def pixel_of(self, images: Value) -> str:
        """Where channels ``o`` of pixels ``m`` lie in what is written, or in its gradient."""
        _, channels, height, width = images.shape
        if images.strides[1] == 1:
            return f"m[:, None] * {channels} + o[None, :]"
        size: Any = height * width
        image = f"(m // {size} * {channels * size} + m % {size})"
        return f"{image}[:, None] + o[None, :] * {size}"

    def taps(self, k: str, tests: list[str]) -> str:
        """Which of the terms ``k`` count, of those that pass ``tests``."""
        w = self.windows
        if w.valid < w.row:
            tests = [f"{k} % {w.row} < {w.valid}", *tests]
        return f"({' & '.join(f'({test})' for test in tests)})[None, :]" if tests else ""

    def source(self, name: str, tensors: Any, pixels: Size, grid: Size) -> Source:
        roles = ("in", "in", "out")
        params: list[Any] = list(zip(self.names, roles, tensors, strict=True))
        if not is_static(pixels):
            params.append(("pixels", "size", pixels))
        return whole_kernel(name, self, params, grid, WARPS, self.waits)


def _both(*masks: str) -> str:
    return " & ".join(filter(None, masks))


def _masked(mask: str) -> str:
    return f", mask={mask}, other=0" if mask else ""
