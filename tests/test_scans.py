"""Scans: alone in a chain, with reductions, in steps, and where nothing may be fused with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import assert_same_values, check, gems_only, ints, rand
from opcheck import lower, tensors
from test_fuse import fused
from test_generality import symbolic
from torch import Tensor

pytestmark = gems_only

SCANS: dict[str, Callable[[Tensor, int], Any]] = {
    "cumsum": lambda x, dim: (x * 2).cumsum(dim) + 1,
    "cumprod": lambda x, dim: (x * 0.5 + 1).cumprod(dim) + 1,
    "cummax": lambda x, dim: (x * 2).cummax(dim),
    "cummin": lambda x, dim: (x * 2).cummin(dim),
    "logcumsumexp": lambda x, dim: (x * 2).logcumsumexp(dim) + 1,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape, dim", [((7, 33), 1), ((7, 33), 0), ((3, 6, 5), 1)])
@pytest.mark.parametrize("name", SCANS)
def test_scan(name: str, shape: tuple[int, ...], dim: int, dtype: torch.dtype) -> None:
    """Sums of the narrow floats are float32 until they are stored."""
    fn, x = SCANS[name], rand(*shape, dtype=dtype)
    got, report = lower(lambda x: fn(x, dim), x)
    assert (report.launches, report.aten_calls) == (1, 0)
    wide = tensors(fn(x.float(), dim)) if name != "cumprod" else tensors(fn(x, dim))
    near = (
        {"rtol": 2**-6, "atol": 2**-6} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    )
    for a, b, eager in zip(got, wide, tensors(fn(x, dim)), strict=True):
        assert (a.dtype, a.stride()) == (eager.dtype, eager.stride())
        assert_same_values(a, b.to(a.dtype), name, **near)


@pytest.mark.parametrize("name", SCANS)
def test_scan_of_symbolic_size(name: str) -> None:
    for dim in (0, 1):
        symbolic(lambda x, d=dim: SCANS[name](x, d), rand(7, 33), kernels=1)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("name", SCANS)
def test_long_scan(name: str, dim: int) -> None:
    """In steps, each of which goes on where the last one ended."""
    x = rand(3, 20000) if name != "cumprod" else rand(3, 20000) * 0.01
    x = x if dim else x.t().contiguous()
    got, report = lower(lambda x: SCANS[name](x, dim), x)
    assert report.launches == 1
    assert "for start in " in report.sources[0].text
    for a, b in zip(got, tensors(SCANS[name](x.double(), dim)), strict=True):
        assert_same_values(a, b.to(a.dtype), name, rtol=1e-4, atol=1e-3)


def cumulated_share(x: Tensor) -> Tensor:
    p = x.softmax(-1)
    return p.cumsum(-1) / p.sum(-1, keepdim=True)


def below_the_peak(x: Tensor) -> Tensor:
    running = (x * 2).cumsum(-1)
    return running - running.amax(-1, keepdim=True)


def sum_of_sums(x: Tensor) -> Tensor:
    return x.cumsum(-1).cumsum(-1) * 0.5


def top_p(x: Tensor) -> Tensor:
    p = x.softmax(-1)
    return torch.where(p.cumsum(-1) - p > 0.9, 0.0, p)


def places_of_tokens(x: Tensor) -> Tensor:
    return torch.cumsum(x > 0, -1) * (x > 0)


def from_the_end(x: Tensor) -> Tensor:
    return (x * 2).flip(-1).cumsum(-1) + 1


def several(x: Tensor) -> Any:
    return x.cumsum(-1), (x * x).cumsum(-1), x.sum(-1), x.cummax(-1).values


CHAINS = [
    cumulated_share,
    below_the_peak,
    sum_of_sums,
    top_p,
    places_of_tokens,
    from_the_end,
    several,
]


@pytest.mark.parametrize("length", [33, 20000])
@pytest.mark.parametrize("fn", CHAINS)
def test_scans_with_reductions(fn: Callable[[Tensor], Any], length: int) -> None:
    x = rand(9, length)
    # many multiprocessors would share a long row out, which a scan does not
    got, report = lower(fn, x, multiprocessors=4)
    assert (report.launches, report.aten_calls) == (1, 0)
    for a, b in zip(got, tensors(fn(x.double())), strict=True):
        rounding = 2e-6 * float(b.abs().max()) + 1e-4  # of the largest, where sums cross zero
        assert_same_values(a, b.to(a.dtype), rtol=1e-4, atol=rounding)


def test_scan_read_in_another_place() -> None:
    """By the flipped row, by the other dim, and by a part: from memory."""
    for fn in (
        lambda x: (x * 2).cumsum(-1).flip(-1) + 1,
        lambda x: (lambda s: s[:, 1:] - s[:, :-1])((x * 2).cumsum(-1)),
        lambda x: (x * 2).cumsum(-1).cumsum(0) + 1,
        lambda x: (x * 2).cumsum(-1) + x.cumsum(0),
        lambda x: (x * 2).cumsum(-1).sum(0) + 1,
        lambda x: (lambda s: s - s[:, -1:])((x * 2).cumsum(-1)),
        lambda x: x.view(2, 3, 33).sum((0, 2)) + x.cumsum(-1).sum(),
        lambda x: x.t().reshape(-1).cumsum(0) + x.reshape(-1).cumsum(0),
        lambda x: (x.view(2, 3, 33).permute(1, 0, 2).reshape(-1, 33) * 2).cumsum(-1),
    ):
        x = rand(6, 33)
        got, _ = lower(fn, x)
        assert_same_values(got[0], fn(x.double()).float(), rtol=1e-4, atol=1e-4)


def test_whole_numbers_are_summed_in_64_bits() -> None:
    for dtype in (torch.int32, torch.int64):
        fused(lambda x: (x * 2).cumsum(-1) + 1, ints(5, 40, high=2**30, dtype=dtype), kernels=1)
        fused(lambda x: (x + 2).cumprod(0) + 1, ints(5, 40, high=9, dtype=dtype), kernels=1)
    fused(lambda x: torch.cumsum(x > 0, 0), rand(5, 40), kernels=1)
    fused(lambda x: torch.cumsum(x > 0, 0, dtype=torch.float32) * 2, rand(5, 40), kernels=1)


@pytest.mark.parametrize("length", [33, 20000])
def test_scans_of_nan_infinities_and_equals(length: int) -> None:
    """Of equals and of NaNs the last place, as in eager."""
    x = rand(9, length)
    x[0, 7], x[0, 20] = float("nan"), float("nan")
    x[1, 5], x[1, 9] = float("inf"), float("-inf")
    x[2] = ints(length, high=3).float()
    x[3] = float("-inf")
    x[4, 3], x[4, -1] = float("inf"), 0.0

    def fn(x: Tensor) -> Any:
        y = x + 0
        return (*y.cummax(-1), *y.cummin(-1), y.cumsum(-1), y.logcumsumexp(-1))

    got, report = lower(fn, x)
    assert report.aten_calls == 0
    for k, (a, b) in enumerate(zip(got, fn(x.double()), strict=True)):
        assert_same_values(a, b.to(a.dtype), f"output {k}", rtol=1e-4, atol=1e-2)


def test_one_long_row_is_atens() -> None:
    fused(lambda x: (x > 0).cumsum(0) + 1, rand(16384), kernels=1)
    x = rand(1, 20000)
    _, report = lower(lambda x: (x * 2).cumsum(1) + 1, x)
    assert "aten.cumsum.default: one long row, which ATen scans with the whole GPU" in report.aten


def test_scan_of_single_elements() -> None:
    for fn in SCANS.values():
        check(lambda x, fn=fn: fn(x, 1), rand(3, 1))
        check(lambda x, fn=fn: fn(x, -1), rand(1))


def test_scans_with_gradients() -> None:
    for fn in (cumulated_share, top_p, lambda x: (x * 2).logcumsumexp(-1) * x):
        check(fn, rand(6, 11, grad=True), rtol=1e-4, atol=1e-4)
    check(lambda x: (x * 2).cummax(-1).values * x, rand(6, 11, grad=True))
    check(lambda x: (x * 0.1 + 1).cumprod(-1) * x, rand(6, 11, grad=True), rtol=1e-4, atol=1e-4)
