"""More kinds of programs and how few kernels each becomes; numbers as eager's.

What a program would read in another place than its kernel has it is the subject too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import assert_same_values, gems_only, rand
from opcheck import lower, tensors
from torch import Tensor

pytestmark = gems_only

# another row's statistics -------------------------------------------------------------------------


def of_the_first_row(x: Tensor) -> Tensor:
    return x - x.sum(-1, keepdim=True)[0:1]


def of_one_row_beside_its_own(x: Tensor) -> Tensor:
    return x.exp() - x.exp().sum(-1, keepdim=True) + x.softmax(-1)[1]


def of_the_row_before(x: Tensor) -> Tensor:
    total = x.sum(-1, keepdim=True)
    return x - torch.cat([total[1:], total[:1]]) + total


def of_the_flipped_rows(x: Tensor) -> Tensor:
    top = x.amax(-1, keepdim=True)
    return (x - top) * top.flip(0)


@pytest.mark.parametrize("length", [33, 20000])
@pytest.mark.parametrize(
    "fn", [of_the_first_row, of_one_row_beside_its_own, of_the_row_before, of_the_flipped_rows]
)
def test_statistics_of_another_row(fn: Callable[[Tensor], Any], length: int) -> None:
    """A kernel has a reduction's result for its own row; another row's comes from memory."""
    x = rand(4, length)
    got, _ = lower(fn, x, alone=True)
    for a, b in zip(got, tensors(fn(x.double())), strict=True):
        assert_same_values(a, b.float(), rtol=1e-5, atol=1e-3)
