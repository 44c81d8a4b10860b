"""Convolutions of one tap, in channels-last, are called as the matrix products that they are.

cuDNN computes them with the same kernels, and takes several times as long on the host to choose one
and to launch it. Only the call is another: for the graph it stays a convolution.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from .convolutions import BACKWARD, FORWARD
from .graph import is_tensor, value_of
from .indexing import Size, size_of
from .strides import is_channels_last

if TYPE_CHECKING:
    from .executor import Writer

#: float32 ones may use TF32 where products may not
DTYPES = (torch.float16, torch.bfloat16)
#: a GPU's products alone are known to be as fast; tests say otherwise
DEVICES = {"cuda"}


def is_product(node: Node) -> bool:
    """Whether the node is a convolution, or a backward of one, that is matrix products of memory as
    it lies: nothing is copied. What has a bias is not: it is added before the sum is rounded."""
    args: Any = node.args
    made: Any = node.meta.get("val")
    if node.target is FORWARD:
        x, weight, bias, *rest = args
        images, weights, biased = [value_of(x), made], [value_of(weight)], bias is not None
    elif node.target is BACKWARD:
        gradient, x, weight, _, *rest, (of_input, of_weight, biased) = args
        images = [value_of(gradient), value_of(x), *([made[0]] if of_input else [])]
        weights = [value_of(weight), *([made[1]] if of_weight else [])]
    else:
        return False
    stride, padding, _, transposed, _, groups = rest
    plain = not transposed and groups == 1 and set(stride) == {1} and set(padding) == {0}
    return plain and not biased and all(map(_is_matrix, weights)) and all(map(_is_rows, images))


def _is_matrix(weight: Any) -> bool:
    """Whether it is one of (channels written, channels read), row by row."""
    if not is_tensor(weight) or weight.ndim != 4 or list(weight.shape[2:]) != [1, 1]:
        return False
    if weight.dtype not in DTYPES or weight.device.type not in DEVICES:
        return False
    return bool(weight.stride(0) == weight.shape[1] and weight.stride(1) == 1)


def _is_rows(images: Any) -> bool:
    """Whether it is a row of channels for each pixel."""
    return is_tensor(images) and images.dtype in DTYPES and is_channels_last(images)


def product_call(writer: Writer, node: Node) -> str:
    """The text of the call: of one product, or of a tuple of those that are wanted."""
    args: Any = node.args
    mm = writer.constant(torch.ops.aten.mm.default, "f")
    if node.target is FORWARD:
        x, w = args[:2]
        out = f"{mm}({_rows(writer, x)}, {_weight(writer, w, turned=True)})"
        return _as(writer, out, value_of(node))
    gradient, x, w = args[:3]
    results: Any = node.meta["val"]
    of_input = f"{mm}({_rows(writer, gradient)}, {_weight(writer, w)})"
    of_weight = f"{mm}({_rows(writer, gradient, turned=True)}, {_rows(writer, x)})"
    texts = [
        _as(writer, text, value) if wanted else "None"
        for text, value, wanted in zip((of_input, of_weight), results, args[-1], strict=False)
    ]
    return f"({', '.join(texts)}, None)"


def _rows(writer: Writer, images: Node, turned: bool = False) -> str:
    batch, channels, height, width = (size_of(n) for n in value_of(images).shape)
    return _matrix(writer, images, batch * height * width, channels, turned)


def _weight(writer: Writer, weight: Node, turned: bool = False) -> str:
    written, read = (size_of(n) for n in value_of(weight).shape[:2])
    return _matrix(writer, weight, written, read, turned)


def _matrix(writer: Writer, node: Node, rows: Size, columns: Size, turned: bool) -> str:
    shape, strides = [rows, columns], [columns, 1]
    if turned:
        shape, strides = shape[::-1], strides[::-1]
    return _view(writer, writer.arg(node), shape, strides)


def _as(writer: Writer, text: str, value: torch.Tensor) -> str:
    shape, strides = ([size_of(n) for n in ns] for ns in (value.shape, value.stride()))
    return _view(writer, text, shape, strides)


def _view(writer: Writer, text: str, shape: list[Size], strides: list[Size]) -> str:
    return f"view({text}, {writer.sizes(shape)}, {writer.sizes(strides)}, 0)"
