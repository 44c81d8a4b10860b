"""What channels-last is worth to a convolution: cuDNN's fast kernels read and write it alone, and
others wrap them into conversions of all that they read and write.

Measured on an H200 with torch 2.11 and cuDNN 9.19, 64 images, both layouts, in us (NCHW, NHWC):

    bfloat16                          forward     backward    | float32 forward   backward
    3 x 3, 64 -> 64, 56 x 56           93,  41    190,   89   |  143,  74    366,  241
    1 x 1, 1024 -> 256, 14 x 14        40,  16    112,   38   |   51,  35    147,   82
    1 x 1, 64 -> 256, 56 x 56          40,  40     83,   83   |   80,  78    156,  149
    depthwise 7 x 7, 96, 56 x 56      662, 142   2175,  458   |  631, 358   2108, 4888
    depthwise 3 x 3, 576, 14 x 14      72,  21    249,   53   |   71,  25    251,   63
    8 groups of 64, 14 x 14            59,  30    112,   55   |   84,  47    300,  182
    10 groups of 24, 28 x 28          138, 323    265,  607   |  175, 353    471,  802
    2 groups of 112, 56 x 56          192, 571   1678, 1717   |  284, 307   3079, 3141
    7 x 7, 3 -> 64, 224 x 224         630, 451    472,  298   |  610, 403    525,  456
    4 x 4, 3 -> 96, 224 x 224         106, 132    239,  119   |  151, 100    156,  165
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from .graph import is_tensor, value_of

aten = torch.ops.aten

FORWARD, BACKWARD = aten.convolution.default, aten.convolution_backward.default
#: where (the tensors, the weight, stride, dilation, transposed, groups) stand among the arguments
_PLACES = {FORWARD: ((0,), 1, 3, 6, 8), BACKWARD: ((0, 1), 2, 4, 7, 9)}
#: fewer channels are an image's
FEW = 5
#: a group of so many channels, or of a multiple, has a fast kernel
GROUP = 32


class Convolution:
    """The facts of one node."""

    def __init__(self, node: Node) -> None:
        args: Any = node.args
        images, weight, stride, transposed, groups = _PLACES[node.target]  # type: ignore[index]
        self.node = node
        self.images: list[Node] = [args[k] for k in images]
        self.weight: Node = args[weight]
        self.input = self.images[-1]
        self.stride, self.padding, self.dilation = map(_pair, args[stride : stride + 3])
        self.transposed, self.groups = args[transposed], args[groups]
        self.backward = node.target is BACKWARD
        #: which gradients are asked for: of the input, of the weight, of the bias
        self.wanted: list[bool] = list(args[-1]) if self.backward else []
        self.bias: Node | None = None if self.backward else args[2]

    @property
    def results(self) -> Any:
        """The tensors that it writes, weights' gradients aside."""
        value: Any = self.node.meta.get("val")
        return [value[0] if isinstance(value, (tuple, list)) else value]


def _pair(sizes: Any) -> list[Any]:
    """(down, across), where one number may stand for both."""
    return list(sizes) * (2 if len(sizes) == 1 else 1)


def were_measured(target: Any) -> bool:
    """Whether what is known of cuDNN's kernels holds on a target."""
    return target.name == "nvidia" and isinstance(target.arch, int) and target.arch >= 80


def convolution_of(node: Node) -> Convolution | None:
    """A two-dimensional convolution, or a backward of one; None of anything else."""
    if node.target not in _PLACES:
        return None
    found = Convolution(node)
    tensors = [value_of(n) for n in (*found.images, found.weight)]
    return found if all(is_tensor(t) and t.ndim == 4 for t in tensors) else None


def why_not(conv: Convolution, training: bool) -> str | None:
    """Why channels-last may be the slower layout, or None."""
    x, w = value_of(conv.input), value_of(conv.weight)
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"{x.dtype} was not measured"
    wide = x.dtype == torch.float32
    if wide and not torch.backends.cudnn.allow_tf32:
        return "float32 without TF32 was not measured"
    if conv.groups == 1:
        return None
    if conv.transposed:
        return "transposed in groups"
    inside = hint(w.shape[1])
    if inside == 1:
        return "depthwise float32, whose gradients are slower" if wide and training else None
    if inside % GROUP:
        return f"groups of {inside} channels are slower"
    return None


def saved_bytes(conv: Convolution) -> int:
    """At least what cuDNN moves to convert what it is given, and what it returns, from and to the
    other layout. (It takes twice as long for that as bytes at full bandwidth.)"""
    x, w = value_of(conv.input), value_of(conv.weight)
    taps = [hint(k) for k in w.shape[2:]]
    strides = [hint(s) for s in conv.stride]
    if taps == [1, 1] and strides == [1, 1] and hint(x.shape[2] * x.shape[3]) % 8 == 0:
        return 0  # a matrix product in either layout
    if hint(x.shape[1]) < FEW and taps == strides:
        return 0  # patches of an image: slower or faster, by the dtype
    tensors = [*(value_of(n) for n in conv.images), *conv.results]
    return sum(2 * bytes_of(t) for t in tensors if is_tensor(t))


def bytes_of(tensor: torch.Tensor) -> int:
    total = tensor.element_size()
    for n in tensor.shape:
        total *= hint(n)
    return total


def hint(size: Any) -> int:
    """A size; of a symbolic one, that which the graph was traced with."""
    if isinstance(size, int):
        return size
    try:
        found = size.node.hint
    except Exception:  # of a size that depends on data there is none
        found = None
    return int(found) if found is not None else 1
