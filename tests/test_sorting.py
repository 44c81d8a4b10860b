"""Rows put in order by a kernel of ours: sort, topk, kthvalue, medians, behind eager PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from eagercheck import nothing_left, ours, whys  # noqa: F401
from helpers import DEVICE, assert_same_metadata, ints, rand
from torch import Tensor

import gems_compile
from gems_compile.calls.ordering import MOST
from gems_compile.kernels.sorting import LONGEST

NAN, INF = float("nan"), float("inf")


def in_order(name: str, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """(Ours, ATen's); ours came from a kernel."""
    want, before = fn(*args, **kwargs), ours(name)
    with gems_compile.use_gems(only=[name]):
        got = fn(*args, **kwargs)
    assert ours(name) > before, whys(name)
    for a, b in zip(got, want, strict=True):
        assert_same_metadata(a, b, name)
    torch.testing.assert_close(got[0], want[0], rtol=0, atol=0, equal_nan=True)
    return got, want


def odd_ones(x: Tensor) -> Tensor:
    """With NaNs, infinities and both zeros among its elements."""
    flat = x.reshape(-1)
    flat[::7], flat[1::11], flat[2::13], flat[3::5], flat[4::9] = NAN, INF, -INF, 0.0, -0.0
    return x


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.int16, torch.uint8],
)
@pytest.mark.parametrize(
    ("shape", "dim"), [((5, 33), -1), ((3, 20, 4), 1), ((64,), 0), ((9, 1), 1)]
)
def test_stable_sort(
    shape: tuple[int, ...], dim: int, dtype: torch.dtype, descending: bool
) -> None:
    x = odd_ones(rand(*shape)).to(dtype) if dtype.is_floating_point else ints(*shape).to(dtype)
    how = {"dim": dim, "stable": True, "descending": descending}
    got, want = in_order("sort.stable", torch.sort, x, **how)
    assert torch.equal(got[1], want[1])


def test_bools() -> None:
    x = ints(4, 19, high=2).bool()
    got, want = in_order("sort.stable", torch.sort, x, stable=True)
    assert torch.equal(got[1], want[1])


@pytest.mark.parametrize("size", [MOST, 1000])
def test_long_rows(size: int) -> None:
    x = torch.randperm(2 * size, device=DEVICE).view(2, size).float()
    got, want = in_order("sort", torch.sort, x)
    assert torch.equal(got[1], want[1])


@pytest.mark.parametrize("k", [1, 2, 100])
def test_the_first_of_long_rows(k: int) -> None:
    x = torch.randperm(2 * LONGEST, device=DEVICE).view(2, LONGEST).float()
    got, want = in_order("topk", torch.topk, x, k)
    assert torch.equal(got[1], want[1])


def test_what_is_atens() -> None:
    """Longer rows, more of a row than ATen sorts as fast, wider elements, no rows."""
    for x in (rand(1, LONGEST + 1), rand(1, MOST + 1), rand(3, 4).double(), rand(3, 0), ints(3, 4)):
        want = torch.sort(x)
        with gems_compile.use_gems(only=["sort"]):
            got = torch.sort(x)
        assert all(map(torch.equal, got, want)) and not ours("sort")


def test_rows_with_gaps() -> None:
    x = rand(6, 40)[:, ::2]
    got, want = in_order("sort", torch.sort, x)
    assert torch.equal(got[1], want[1])


def test_out() -> None:
    x = rand(4, 17)
    want = torch.sort(x)
    places = torch.empty(4, 17, device=DEVICE), torch.empty(4, 17, device=DEVICE).long()
    with gems_compile.use_gems(only=["sort"]):
        torch.sort(x, out=places)
    assert all(map(torch.equal, places, want))


@pytest.mark.parametrize("largest", [False, True])
@pytest.mark.parametrize("dim", [0, -1])
def test_topk(dim: int, largest: bool) -> None:
    x = rand(21, 35)
    got, want = in_order("topk", torch.topk, x, 5, dim, largest)
    assert torch.equal(got[1], want[1])


@pytest.mark.parametrize("keepdim", [False, True])
@pytest.mark.parametrize("dim", [0, 1])
def test_kthvalue(dim: int, keepdim: bool) -> None:
    x = rand(8, 13)
    got, want = in_order("kthvalue", torch.kthvalue, x, 4, dim, keepdim)
    assert torch.equal(got[1], want[1])


@pytest.mark.parametrize("name", ["median", "nanmedian"])
def test_medians(name: str) -> None:
    x = rand(7, 12)
    x[2, 3] = x[2, 9] = x[5] = NAN
    got, want = in_order(f"{name}.dim", getattr(torch, name), x, 1)
    some = ~x.isnan().all(1)  # the place in a row of NaNs is anyone's
    assert torch.equal(got[1][some], want[1][some])
    for y in (x, rand(7, 12), rand(1)):
        expected = getattr(torch, name)(y)
        with gems_compile.use_gems(only=[name]):
            found = getattr(torch, name)(y)
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert ours(name) == 3


def test_gradients_go_to_the_places() -> None:
    x, weight = rand(5, 16, grad=True), rand(5, 3)
    (want,) = torch.autograd.grad((torch.topk(x, 3)[0] * weight).sum(), x)
    with gems_compile.use_gems(only=["topk"]):
        (got,) = torch.autograd.grad((torch.topk(x, 3)[0] * weight).sum(), x)
    assert torch.equal(got, want)
