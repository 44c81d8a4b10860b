"""Quantization to int8 in one conversion: what it takes in, and the numbers of eager."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import DEVICE, gems_only
from opcheck import lower
from torch import Tensor

pytestmark = gems_only


def quantized(x: Tensor) -> Tensor:
    return (x * 2).round().clamp(-128, 127).to(torch.int8)


def is_one_conversion(fn: Callable[..., object], *inputs: Tensor) -> bool:
    """Whether fn's kernels round, clamp and cast at once; its results are eager's anyhow."""
    got, report = lower(fn, *inputs, alone=True)
    want = fn(*inputs)
    for a, b in zip(got, want if isinstance(want, tuple) else (want,), strict=True):
        assert torch.equal(a, b)
    return any("round_to_int8" in s.text for s in report.sources)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_ends_and_the_halves(dtype: torch.dtype) -> None:
    ends = [float("inf"), float("-inf"), float("nan"), 3e4, -3e4, 63.75, 64.25, -64.25, -64.5, -0.0]
    halves = torch.arange(-600, 600) / 4 + torch.tensor([0.0, 2**-20, -(2**-20)])[:, None]
    x = torch.cat([torch.tensor(ends), halves.flatten()]).to(DEVICE, dtype)
    assert is_one_conversion(quantized, x)
    for odd in (x[:5], x[3:40], x[:1021]):
        assert is_one_conversion(quantized, odd.contiguous())


def test_large_float32() -> None:
    x = torch.tensor([3e38, -3e38, 2.0**31, -(2.0**31), 2.0**33 + 2.0**20, 1e-40], device=DEVICE)
    assert is_one_conversion(quantized, x)


def test_a_rounded_value_that_is_seen_stays() -> None:
    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        whole = (x * 2).round()
        return whole, whole.clamp(-128, 127).to(torch.int8)

    assert is_one_conversion(both, torch.randn(40, 33, device=DEVICE) * 50)


def test_other_bounds_and_types_are_left_alone() -> None:
    x = torch.randn(40, 33, device=DEVICE) * 50
    assert not is_one_conversion(lambda x: x.round().clamp(-127, 127).to(torch.int8), x)
    assert not is_one_conversion(lambda x: x.round().clamp(-128, 127).to(torch.int16), x)
    assert not is_one_conversion(lambda x: x.floor().clamp(-128, 127).to(torch.int8), x)
    assert not is_one_conversion(lambda x: x.double().round().clamp(-128, 127).to(torch.int8), x)
