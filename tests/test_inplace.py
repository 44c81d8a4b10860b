"""A kernel writes over an operand that nobody needs any more, and over no other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE, assert_same_values, gems_only, rand
from opcheck import lower
from torch import Tensor

pytestmark = gems_only
X, W = (2, 4, 6, 6), (4, 4, 3, 3)


def allocated(fn: Callable[..., Any], *inputs: Tensor, launches: int = 1) -> int:
    """How many results get memory of their own, after a check of the numbers."""
    given = [x.clone() for x in inputs]
    got, report = lower(fn, *inputs)
    wanted = fn(*(x.double() for x in inputs))
    for a, b in zip(got, wanted if isinstance(wanted, tuple) else (wanted,), strict=True):
        assert_same_values(a, b.to(a.dtype), rtol=1e-3, atol=1e-4)
    assert all(map(torch.equal, given, inputs))
    assert report.launches == launches, report.wrapper
    return report.wrapper.count("= empty(")


def conv(x: Tensor, w: Tensor) -> Tensor:
    return F.conv2d(x, w, padding=1)


def test_a_sum_after_a_convolution() -> None:
    x, w = rand(*X), rand(*W)
    assert allocated(lambda x, w: F.relu(conv(x, w) * 2 + x), x, w) == 0
    assert allocated(lambda x, w: F.relu(conv(x, w) + conv(x * 2 + 1, w)), x, w, launches=2) == 1
    nhwc = x.to(memory_format=torch.channels_last)
    assert allocated(lambda x, w: F.relu(conv(x, w) * 2 + x), nhwc, w) == 0


def test_a_kernels_own_result() -> None:
    """Read by a convolution, then by the kernel that writes over it."""

    def fn(x: Tensor, w: Tensor) -> Tensor:
        y = F.gelu(x * 2 + 1)
        return conv(conv(y, w), w) * 3 + y

    assert allocated(fn, rand(*X), rand(*W), launches=2) == 1


def test_two_results_and_two_operands() -> None:
    def both(x: Tensor, w: Tensor) -> Any:
        a, b = conv(x, w), conv(x.flip(0) + 1, w)
        return a * 2 + b, a - b * 3

    assert allocated(both, rand(*X), rand(*W), launches=2) == 1  # the flipped x


@pytest.mark.parametrize(
    "fn",
    [
        lambda x, w: (lambda y: (y * 2 + 1, y))(conv(x, w)),  # it leaves
        lambda x, w: (lambda y: (y * 2 + 1, conv(y, w)))(conv(x, w)),  # or is read later
        lambda x, w: (lambda y: (y * 2 + 1, y[0]))(conv(x, w)),  # through a view
        lambda x, w: conv(x, w).flip(-1) * 2 + x,  # it is read at another place
        lambda x, w: (lambda y: y * 2 + y.flip(-1))(conv(x, w)),  # or at two
        lambda x, w: (conv(x, w) * 2 + x).bfloat16(),  # its elements have another size
        lambda x, w: x * 2 + 1 + w[0, 0, 0, 0],  # it is the caller's
        lambda x, w: torch.softmax(conv(x, w) * 2, -1),  # a row is read before it is written
    ],
)
def test_memory_that_is_needed(fn: Callable[..., Any]) -> None:
    got, report = lower(fn, x := rand(*X), w := rand(*W))
    wanted = fn(x.double(), w.double())
    for a, b in zip(got, wanted if isinstance(wanted, tuple) else (wanted,), strict=True):
        near = 1e-2 if a.dtype == torch.bfloat16 else 1e-4
        torch.testing.assert_close(a.double(), b.double(), rtol=near, atol=near)
    kernels = [n for n in report.wrapper.splitlines() if " = empty(" in n]
    assert len(kernels) >= 1, report.wrapper


def test_peak_memory_of_a_residual_block() -> None:
    """In whole: what a compiled block allocates beyond what it returns."""
    x, w = rand(*X), rand(*W)

    def block(x: Tensor, w: Tensor) -> Tensor:
        for _ in range(3):
            x = F.relu(conv(x, w) + x)
        return x

    assert allocated(block, x, w, launches=3) == 0
    assert x.device.type == DEVICE
