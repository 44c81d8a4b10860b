"""Convolutions of images, whose channels are too few for cuDNN's fast kernels.

Where windows lie side by side (the patches of a vision transformer, a ConvNeXt's stem), they are
the rows of a matrix that holds each pixel once: the convolution is a copy and a matrix product.
Elsewhere it is a kernel of our own, of images that a copy frames in memory (``image_kernels``).
Sixty-four images of 3 x 224 x 224, bfloat16, H200, in us, copies not counted:

    16 x 16 to 768 channels, stride 16, of contiguous images    cuDNN 566, the product 27
    4 x 4 to 96 channels, stride 4                                    107,             21
    7 x 7 to 64 channels, stride 2, of channels-last images           450, our kernel 118
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import fx

from .convolutions import FEW, Convolution, convolution_of, were_measured
from .graph import same, value_of
from .image_kernels import LEAST, MOST_TERMS
from .rewrite import call_before
from .schedule import power_of_two
from .strides import is_channels_last, is_contiguous

aten = torch.ops.aten

#: float32 gains little (patches: 1.1 to 1.6 times), for products do without TF32
DTYPES = (torch.float16, torch.bfloat16)
#: a pixel of so many channels, or of a multiple, is aligned
PIXEL = 4


class Window(NamedTuple):
    """A convolution's sizes, each (down, across): how large a window is, how far the next one is,
    what the images are padded with before their first pixel, how many windows there are."""

    size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    counts: tuple[int, int]

    @property
    def side_by_side(self) -> bool:
        return self.size == self.stride and not any(self.padding)

    def row(self, pixel: int) -> int:
        """The columns of a row that is filled up to a power of two."""
        return power_of_two(max(self.size[1], LEAST // pixel))


def take_images(gm: fx.GraphModule, target: Any) -> int:
    """Replace convolutions of images, and the gradients of their weights; returns how many. The
    graph is the one before it is split, or one of inference; layouts are decided.

    Biases are added, and their gradients summed, as ``conv_bias`` says.
    """
    return replace_images(gm, target.multiprocessors) if were_measured(target) else 0


def replace_images(gm: fx.GraphModule, multiprocessors: int, contiguous: bool = False) -> int:
    """The same on any target. ``contiguous``: also windows that overlap and whose results are not
    in channels-last, which a graph would rather have so."""
    found = [c for c in map(convolution_of, list(gm.graph.nodes)) if c is not None]
    images = _Images(gm.graph, 2 * max(1, multiprocessors))
    windows = [(conv, _window(conv, contiguous)) for conv in found]
    count = sum(images.take(conv, window) for conv, window in windows if window)
    if count:
        gm.recompile()
    return count


def _window(conv: Convolution, contiguous: bool) -> Window | None:
    """None of a convolution that is not taken."""
    x, weight = value_of(conv.input), value_of(conv.weight)
    made = value_of(conv.images[0] if conv.backward else conv.node)
    sizes = [*x.shape[1:], *weight.shape, *made.shape[2:]]
    if x.dtype not in DTYPES or same(x.shape[0], 0) or conv.transposed or conv.groups != 1:
        return None
    if not all(type(n) is int and n > 0 for n in sizes) or x.shape[1] >= FEW:
        return None
    if conv.dilation != [1, 1] or list(weight.shape[2:]) == [1, 1]:
        return None
    found = Window(*map(tuple, (weight.shape[2:], conv.stride, conv.padding, made.shape[2:])))
    if found.side_by_side:
        return found
    pixel = _filled(x.shape[1])
    fits = found.size[0] * found.row(pixel) * pixel <= MOST_TERMS
    of_images = conv.backward and conv.wanted[0]  # that gradient is cuDNN's
    laid_out = is_channels_last(made) or (contiguous and is_contiguous(made))
    return found if fits and not of_images and laid_out else None


def _filled(channels: int) -> int:
    return -(-channels // PIXEL) * PIXEL


class _Images:
    """The edit of one graph. ``shares``: of the pixels, that a weight's gradient is summed in."""

    def __init__(self, graph: fx.Graph, shares: int) -> None:
        self.graph, self.shares = graph, shares
        self.known: dict[Any, fx.Node] = {}  # copies that a convolution and its backward share

    def take(self, conv: Convolution, window: Window) -> bool:
        picks = {user.args[1]: user for user in conv.node.users} if conv.backward else {}
        if not all(conv.wanted[k] for k in picks):  # type: ignore[index]
            return False
        self.at = conv.node
        if window.side_by_side:
            results = self._of_patches(conv, window)
        elif conv.backward:
            results = {1: self._weight_of_frames(conv, window)}
        else:
            results = {0: self._of_frames(conv, window)}
        if conv.bias is not None:
            column = self._view(conv.bias, -1, 1, 1)
            results[0] = self._call(aten.add.Tensor, results[0], column)
        if conv.backward and conv.wanted[2]:
            results[2] = self._call(aten.sum.dim_IntList, conv.images[0], [0, 2, 3])
        for k, node in picks.items() if conv.backward else [(0, conv.node)]:
            first = is_contiguous(value_of(node))
            layout = torch.contiguous_format if first else torch.channels_last
            node.replace_all_uses_with(self._clone(results[k], layout))  # type: ignore[index]
        for node in (*picks.values(), conv.node):
            self.graph.erase_node(node)
        return True

    # nodes ---------------------------------------------------------------------------------------

    def _call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return call_before(self.at, target, *args, **kwargs)

    def _clone(self, x: fx.Node, layout: torch.memory_format) -> fx.Node:
        return self._call(aten.clone.default, x, memory_format=layout)

    def _view(self, x: fx.Node, *sizes: int) -> fx.Node:
        return self._call(aten.view.default, x, list(sizes))

    def _permute(self, x: fx.Node, *order: int) -> fx.Node:
        return self._call(aten.permute.default, x, list(order))

    def _pad(self, x: fx.Node, *edges: int) -> fx.Node:
        return self._call(aten.constant_pad_nd.default, x, list(edges)) if any(edges) else x

    def _cut(self, x: fx.Node, axis: int, size: int) -> fx.Node:
        if value_of(x).shape[axis] == size:
            return x
        return self._call(aten.slice.Tensor, x, axis, 0, size)

    def _matrix(self, x: fx.Node, columns: int) -> fx.Node:
        """The elements in the order of x's axes, in rows."""
        return self._view(self._clone(x, torch.contiguous_format), -1, columns)

    # windows side by side ------------------------------------------------------------------------

    def _of_patches(self, conv: Convolution, window: Window) -> dict[int, fx.Node]:
        channels = int(value_of(conv.input).shape[1])
        written = int(value_of(conv.weight).shape[0])
        # of a window's (channels, rows, columns), as images lie
        order = (1, 2, 0) if is_channels_last(value_of(conv.input)) else (0, 1, 2)
        sizes = [(channels, *window.size)[k] for k in order]
        terms = channels * window.size[0] * window.size[1]
        patches = self._patches(conv, window, order)
        matrix = self._matrix(self._permute(conv.weight, 0, *(1 + k for k in order)), terms)
        if not conv.backward:
            product = self._call(aten.mm.default, patches, self._permute(matrix, 1, 0))
            return {0: self._permute(self._view(product, -1, *window.counts, written), 0, 3, 1, 2)}
        given = self._matrix(self._permute(conv.images[0], 0, 2, 3, 1), written)
        back = [order.index(k) for k in range(3)]
        results = {}
        if conv.wanted[0]:
            product = self._call(aten.mm.default, given, matrix)
            apart = self._view(product, -1, *window.counts, *sizes)
            results[0] = self._images_of(conv, window, apart, [3 + k for k in back])
        if conv.wanted[1]:
            product = self._call(aten.mm.default, self._permute(given, 1, 0), patches)
            results[1] = self._permute(
                self._view(product, written, *sizes), 0, *(1 + k for k in back)
            )
        return results

    def _patches(self, conv: Convolution, window: Window, order: Sequence[int]) -> fx.Node:
        """[windows, what each holds]."""
        key = "patches", conv.input, window
        if key not in self.known:
            (down, across), (lines, columns) = window.size, window.counts
            channels = int(value_of(conv.input).shape[1])
            x = self._cut(self._cut(conv.input, 2, lines * down), 3, columns * across)
            apart = self._view(x, -1, channels, lines, down, columns, across)
            apart = self._permute(apart, 0, 2, 4, *((1, 3, 5)[k] for k in order))
            self.known[key] = self._matrix(apart, channels * down * across)
        return self.known[key]

    def _images_of(
        self, conv: Convolution, window: Window, apart: fx.Node, axes: Sequence[int]
    ) -> fx.Node:
        """The gradient of images: each pixel is of one window, or of none at the edges. ``axes``:
        where ``apart`` has channels, rows and columns."""
        (down, across), (lines, columns) = window.size, window.counts
        _, channels, height, width = value_of(conv.input).shape
        channel, row, column = axes
        whole = self._permute(apart, 0, channel, 1, row, 2, column)
        whole = self._clone(whole, torch.contiguous_format)
        whole = self._view(whole, -1, channels, lines * down, columns * across)
        return self._pad(whole, 0, width - columns * across, 0, height - lines * down)

    # windows that overlap ------------------------------------------------------------------------

    def _framed(self, conv: Convolution, window: Window) -> fx.Node:
        """The images with their frame, and with channels of zeros up to a whole pixel."""
        key = "framed", conv.input, window
        if key not in self.known:
            _, channels, height, width = value_of(conv.input).shape
            pixel, (above, left) = _filled(channels), window.padding
            reach = window.size[0], window.row(pixel)
            down, across = (
                (n - 1) * step + k
                for n, step, k in zip(window.counts, window.stride, reach, strict=True)
            )
            down, across = max(down, above + height), max(across, left + width)
            across += -across * pixel % (2 * PIXEL) // pixel  # lines begin aligned
            edges = left, across - left - width, above, down - above - height
            framed = self._pad(conv.input, *edges, 0, pixel - channels)
            self.known[key] = self._clone(framed, torch.channels_last)
        return self.known[key]

    def _of_frames(self, conv: Convolution, window: Window) -> fx.Node:
        images, taps = self._framed(conv, window), window.size[1]
        channels = int(value_of(conv.weight).shape[1])
        pixel = _filled(channels)
        filled = self._pad(conv.weight, 0, window.row(pixel) - taps, 0, 0, 0, pixel - channels)
        filled = self._clone(filled, torch.channels_last)
        last = is_channels_last(value_of(conv.node))
        how = taps, list(window.stride), list(window.counts), last
        return self._call(torch.ops.gems.image_convolution.default, images, filled, *how)

    def _weight_of_frames(self, conv: Convolution, window: Window) -> fx.Node:
        images, (rows, taps) = self._framed(conv, window), window.size
        weight = value_of(conv.weight)
        channels = int(weight.shape[1])
        how = taps, [rows, window.row(_filled(channels))], list(window.stride), self.shares
        target = torch.ops.gems.image_weight_parts.default
        parts = self._call(target, conv.images[0], images, *how)
        whole = self._call(aten.sum.dim_IntList, parts, [0])  # of whole lines
        whole = self._call(aten._to_copy.default, whole, dtype=weight.dtype)
        return self._permute(self._cut(self._cut(whole, 2, taps), 3, channels), 0, 3, 1, 2)
