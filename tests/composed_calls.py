"""Calls of composed overloads that torch's samples do not come to: convolutions of which there is a
kernel, and bags of embeddings with what ATen saves of them. See ``test_forms``."""

from __future__ import annotations

from typing import Any

import torch
from helpers import DEVICE, ints
from torch import Tensor

#: how windows lie, of four channels each by itself
DEPTHWISE = ([1, 1], [1, 1], [1, 1], False, [0, 0], 4)


def bags_of(count: int) -> tuple[Tensor, Tensor]:
    """So many indices, and where three bags of them begin."""
    return ints(count, high=11), torch.tensor([0, 2, 5], device=DEVICE)


def bag_of_each(count: int) -> Tensor:
    return torch.searchsorted(bags_of(count)[1], torch.arange(count, device=DEVICE), right=True) - 1


def counts_of(count: int) -> Tensor:
    return torch.bincount(bag_of_each(count))


CALLS: dict[str, Any] = {
    "aten._conv_depthwise2d.default": lambda r: (
        *(r(2, 4, 7, 6), r(4, 1, 3, 3), [3, 3], r(4)),
        *([1, 1], [1, 1], [1, 1]),
    ),
    "aten.convolution.default": lambda r: (r(2, 4, 7, 6), r(4, 1, 3, 3), r(4), *DEPTHWISE),
    "aten.convolution_backward.default": lambda r: (
        *(r(2, 4, 7, 6), r(2, 4, 7, 6), r(4, 1, 3, 3), [4]),
        *(*DEPTHWISE, [True] * 3),
    ),
    "aten._embedding_bag.default": lambda r: (r(11, 5), *bags_of(9), False, 1),
    "aten._embedding_bag_forward_only.default": lambda r: (r(11, 5), *bags_of(9), False, 1),
    "aten._embedding_bag_dense_backward.default": lambda r: (
        *(r(3, 5), ints(9, high=11), bag_of_each(9), counts_of(9), counts_of(9)),
        *(11, False, 1, None),
    ),
    "aten._embedding_bag_per_sample_weights_backward.default": lambda r: (
        *(r(3, 5), r(11, 5), *bags_of(9), bag_of_each(9)),
        0,
    ),
}
