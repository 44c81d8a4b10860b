"""Convolutions of one tap, in channels-last, are called as the matrix products that they are.

cuDNN computes them with the same kernels, and takes several times as long on the host to choose one
and to launch it. Only the call is another: for the graph it stays a convolution.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.fx import Node

from .convolutions import BACKWARD, FORWARD
from .graph import is_tensor, value_of
from .indexing import Size, size_of
from .strides import is_channels_last

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


class Factor(NamedTuple):
    """A matrix that lies in a node's memory, from its first element on."""

    node: Node
    shape: tuple[Size, Size]
    strides: tuple[Size, Size]

    @property
    def turned(self) -> Factor:
        (rows, columns), (row, column) = self.shape, self.strides
        return Factor(self.node, (columns, rows), (column, row))


def factors(node: Node) -> tuple[tuple[Factor, Factor] | None, ...] | None:
    """What is multiplied for each of the node's results but a bias's, None for one that is not
    wanted; None where the node is no product."""
    if not is_product(node):
        return None
    args: Any = node.args
    if node.target is FORWARD:
        return ((_rows(args[0]), _weight(args[1]).turned),)
    gradient, x, weight = args[:3]
    of_input = (_rows(gradient), _weight(weight))
    of_weight = (_rows(gradient).turned, _rows(x))
    wanted = args[-1]
    return (of_input if wanted[0] else None, of_weight if wanted[1] else None)


def _rows(images: Node) -> Factor:
    batch, channels, height, width = (size_of(n) for n in value_of(images).shape)
    return Factor(images, (batch * height * width, channels), (channels, 1))


def _weight(weight: Node) -> Factor:
    written, read = (size_of(n) for n in value_of(weight).shape[:2])
    return Factor(weight, (written, read), (read, 1))
