"""Quotients by a divisor of a whole row: bit by bit those of a division."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import DEVICE, gems_only
from opcheck import lower
from torch import Tensor

pytestmark = gems_only
ENDS = [
    *(0.0, 1.0, 3.0, 1 / 3, 127.0, 1e-5, 2.0**-62, 2.0**62, 2.0**-61.9, 2.0**61.9, 2.0**126),
    *(2.0**-126, 2.0**-149, 2.0**-140, 2.0**-102, 2.0**127, 3.4028234663852886e38, float("inf")),
]


def bits(t: Tensor) -> Tensor:
    """The bits of each number, those of a NaN apart: which of them it has is nobody's affair."""
    return torch.where(t.isnan(), torch.full((), 2**31 - 1, device=t.device), t.view(torch.int32))


def any_numbers(*shape: int) -> Tensor:
    """Of all exponents alike, infinities, NaN and the smallest included."""
    return torch.randint(-(2**31), 2**31, shape).to(torch.int32).view(torch.float32)


def usual_numbers(*shape: int) -> Tensor:
    return torch.randn(*shape) * 2.0 ** torch.randint(-30, 30, shape)


def divisors() -> Tensor:
    ends = torch.tensor([*ENDS, *(-e for e in ENDS), float("nan")])
    near = torch.nextafter(torch.ones(()), torch.tensor([0.0, 2.0]))
    return torch.cat([ends, near, usual_numbers(40), any_numbers(40)])[:, None].to(DEVICE)


@pytest.mark.parametrize("numbers", [any_numbers, usual_numbers])
def test_of_rows(numbers) -> None:
    y = divisors()
    x = numbers(len(y), 1024)
    x[:, : 2 * len(ENDS)] = torch.tensor([*ENDS, *(-e for e in ENDS)])
    x = x.to(DEVICE)
    (got,), report = lower(lambda x, y: x / y, x, y, alone=True)
    assert report.kernels == 1
    assert torch.equal(bits(got), bits(x / y))


@pytest.mark.parametrize("columns", [1, 3, 5, 37, 1000])
def test_of_rows_of_any_length(columns: int) -> None:
    y = divisors()
    x = usual_numbers(len(y), columns).to(DEVICE)
    (got,), _ = lower(lambda x, y: x / (y * 2), x, y, alone=True)
    assert torch.equal(bits(got), bits(x / (y * 2)))


def test_by_what_a_row_makes() -> None:
    x = usual_numbers(50, 300).to(DEVICE)
    x[3], x[4, ::2], x[5, 7], x[6] = 0.0, -0.0, float("inf"), 2.0**-140

    def scaled(x: Tensor) -> tuple[Tensor, Tensor]:
        most = x.abs().amax(-1, keepdim=True)
        return most, x / most

    (most, got), _ = lower(scaled, x)
    assert torch.equal(bits(got), bits(x / most))


def fma(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """x * y + z of float32 with one rounding: float64 holds the product, and the sum is rounded to
    odd before it is rounded to nearest (Boldo and Melquiond 2008)."""
    product, z = x.astype(np.float64) * y, z.astype(np.float64)
    total = product + z
    part = total - product
    lost = (product - (total - part)) + (z - part)
    even = (total.view(np.int64) & 1) == 0
    odd = np.where((lost != 0) & even, np.nextafter(total, np.copysign(np.inf, lost)), total)
    return odd.astype(np.float32)


def hardest(y: np.ndarray, distance: int) -> tuple[np.ndarray, np.ndarray]:
    """x and y in [1, 2) whose quotient lies ``distance`` from the middle of two numbers, in units
    of 2 ** -48 / y: with integers X * 2**25 - M * Y = distance, M odd."""
    whole = (y * 2**23).astype(np.int64)
    inverse = whole.copy()
    for _ in range(5):
        inverse = inverse * (2 - whole * inverse) % 2**25
    middle = -distance * inverse % 2**25
    x = (distance + middle * whole) >> 25
    fits = (middle >= 2**24) & (middle % 2 == 1) & (x >= 2**23) & (x < whole)
    return (x[fits] / 2**23).astype(np.float32), y[fits]


def test_the_hardest_quotients() -> None:
    """The formula of ``kernels/quotient.py``, where rounding is nearest to going the other way."""
    step = 2.0**-23
    y = (1 + step * (2 * np.random.default_rng(0).integers(0, 2**22, 2**18) + 1)).astype(np.float32)
    tried, one_product = 0, 0
    for distance in (-5, -3, -1, 1, 3, 5):
        x, divisor = hardest(y, distance)
        z = np.float32(1) / divisor
        q = x * z
        rest = fma(q, divisor, -x)
        assert (fma(-z, rest, q) == x / divisor).all()
        tried += len(x)
        one_product += int((q != x / divisor).sum())
    assert tried > 2**17
    assert one_product > tried / 3  # the case is hard
