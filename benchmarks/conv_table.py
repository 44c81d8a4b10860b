"""The calls of convolutions, and of bags of embeddings, that are timed: see ``op_cases``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.op_cases import Case, Given, Sizes
from gems_compile import eager
from gems_compile.calls.one_call import aten_name
from gems_compile.kernels.op import Call, T, call

LAST = "-last"  # in a label: images in channels-last


class Conv(NamedTuple):
    """``few``: the images of a test."""

    images: tuple[int, int, int, int]
    few: tuple[int, int, int, int]
    written: int
    window: int
    stride: int
    padding: int

    @property
    def depthwise(self) -> bool:
        return self.written == self.images[1]


CONVS = {
    "depthwise-7x7": Conv((64, 96, 56, 56), (1, 4, 8, 8), 96, 7, 1, 3),
    "depthwise-3x3": Conv((64, 576, 14, 14), (1, 4, 8, 8), 576, 3, 1, 1),
    "depthwise-3x3-large": Conv((64, 96, 112, 112), (1, 4, 9, 9), 96, 3, 1, 1),
    "depthwise-3x3-by-2": Conv((64, 96, 112, 112), (1, 4, 10, 10), 96, 3, 2, 1),
    "stem-7x7": Conv((64, 3, 224, 224), (1, 3, 16, 16), 64, 7, 2, 3),
    "patches-16x16": Conv((64, 3, 224, 224), (1, 3, 32, 32), 768, 16, 16, 0),
}


def convolutions(name: str, sizes: Sizes) -> Iterator[Case]:
    """In both layouts: a forward, and the gradients that a training step asks for; a stem's images
    have none."""
    op, few = aten_name(eager._overloads()[name]), sizes.square < 64
    make = {"convolution": _forward, "convolution_backward": _backward}.get(op)
    if op == "_conv_depthwise2d":
        make = _depthwise
    for label, conv in CONVS.items() if make is not None else ():
        for last in (False, True):
            if op == "_conv_depthwise2d" and (last or not conv.depthwise):
                continue
            made = make(conv, conv.few if few else conv.images, last)  # type: ignore[misc]
            yield Case(name, "image", label + LAST * last, made)


def images(shape: tuple[int, ...], last: bool) -> Given:
    layout = torch.channels_last if last else torch.contiguous_format

    def make(dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.randn(shape, device=device).to(dtype).contiguous(memory_format=layout)

    return Given(shape, make)


def _operands(conv: Conv, size: tuple[int, ...], last: bool) -> tuple[Given, Given, list[Any]]:
    """(Images, weight, how they are convolved)."""
    channels = size[1]
    written = channels if conv.depthwise else conv.written
    weight = (written, 1 if conv.depthwise else channels, conv.window, conv.window)
    groups = channels if conv.depthwise else 1
    how = [[conv.stride] * 2, [conv.padding] * 2, [1, 1], False, [0, 0], groups]
    return images(size, last), images(weight, last and not conv.depthwise), how


def _forward(conv: Conv, size: tuple[int, ...], last: bool) -> Call:
    x, weight, how = _operands(conv, size, last)
    return call(x, weight, None, *how)


def _backward(conv: Conv, size: tuple[int, ...], last: bool) -> Call:
    x, weight, how = _operands(conv, size, last)
    made = [(n + 2 * conv.padding - conv.window) // conv.stride + 1 for n in size[2:]]
    gradient = images((size[0], weight.shape[0], *made), last)
    return call(gradient, x, weight, None, *how, [conv.depthwise, True, False])


def _depthwise(conv: Conv, size: tuple[int, ...], last: bool) -> Call:
    x, weight, how = _operands(conv, size, last)
    return call(x, weight, [conv.window] * 2, None, *how[:3])


# bags of embeddings -------------------------------------------------------------------------------

#: (rows of the table, columns, indices, bags), of a GPU's benchmark and of a test
BAGS = (1_000_000, 128, 65536, 4096), (11, 6, 12, 4)


def bags(name: str, sizes: Sizes) -> Iterator[Case]:
    """Sums and means; of each bag as many indices."""
    op, few = aten_name(eager._overloads()[name]), sizes.square < 64
    rows, columns, count, many = BAGS[few]
    each = count // many
    table, ids = T(rows, columns), T(count, dtype="int64", low=0, high=rows)
    starts = _whole(many, lambda places: places * each)
    whose = _whole(count, lambda places: places // each)
    counts = _whole(many, lambda places: torch.full_like(places, each))
    grad, nowhere = T(many, columns), _whole(0, lambda places: places)
    for mode, label in enumerate(("sum", "mean")):
        made = {
            "_embedding_bag": call(table, ids, starts, False, mode),
            "_embedding_bag_forward_only": call(table, ids, starts, False, mode),
            "_embedding_bag_dense_backward": call(
                grad, ids, whose, counts, nowhere, rows, False, mode, None
            ),
        }
        if mode == 0:
            made["_embedding_bag_per_sample_weights_backward"] = call(
                grad, table, ids, starts, whose, mode
            )
        if op in made:
            yield Case(name, "indexing", label, made[op], whole=False)


def _whole(count: int, of_places: Any) -> Given:
    return Given((count,), lambda dtype, device: of_places(torch.arange(count, device=device)))
