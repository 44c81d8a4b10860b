"""Factories behind eager PyTorch: the tensors that ATen makes, from our kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from eagercheck import nothing_left, ours, replaceable, whys  # noqa: F401
from helpers import DEVICE, assert_same, assert_same_metadata
from torch import Tensor

import gems_compile
from gems_compile import eager
from gems_compile.kernels.factories import FACTORIES

on = {"device": DEVICE}
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
WHOLE = [torch.int32, torch.int64]
NARROW = [torch.uint8, torch.int16, torch.bool]


def made(fn: Callable[[], Any], served: str | None, exact: bool = True) -> Tensor:
    """What ``fn`` makes with every factory replaced, which is what ATen makes."""
    want = fn()
    before = ours(served) if served else 0
    with gems_compile.use_gems(only=FACTORIES):
        got = fn()
    assert_same_metadata(got, want)
    if exact:
        assert_same(got, want, exact=True)
    if served:
        assert ours(served) == before + 1, whys(served)
    return got


CALLS: dict[str, tuple[str, Callable[..., Tensor]]] = {
    "full": ("full", lambda **o: torch.full((3, 5), 3, **on, **o)),
    "ones": ("ones", lambda **o: torch.ones(7, **on, **o)),
    "zeros": ("zeros", lambda **o: torch.zeros((2, 0 + 3, 4), **on, **o)),
    "scalar": ("scalar_tensor", lambda **o: torch.scalar_tensor(5, **on, **o)),
    "arange": ("arange", lambda **o: torch.arange(9, **on, **o)),
    "arange from": ("arange.start", lambda **o: torch.arange(2, 9, **on, **o)),
    "arange by steps": ("arange.start_step", lambda **o: torch.arange(20, 3, -4, **on, **o)),
    "eye": ("eye", lambda **o: torch.eye(5, **on, **o)),
    "eye of columns": ("eye.m", lambda **o: torch.eye(3, 300, **on, **o)),
    "full_like": ("full_like", lambda **o: torch.full_like(torch.empty(3, 4, **on), 2, **o)),
    "ones_like": ("ones_like", lambda **o: torch.ones_like(torch.empty(3, 4, **on), **o)),
    "zeros_like": ("zeros_like", lambda **o: torch.zeros_like(torch.empty(3, 4, **on), **o)),
    "new_full": ("new_full", lambda **o: torch.empty(1, **on).new_full((3,), 4, **o)),
    "new_ones": ("new_ones", lambda **o: torch.empty(1, **on).new_ones((3, 2), **o)),
    "new_zeros": ("new_zeros", lambda **o: torch.empty(1, **on).new_zeros((3, 2), **o)),
}


@pytest.mark.parametrize("dtype", [None, *FLOATS[1::2], WHOLE[0], *NARROW[::2]], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_made_exactly(name: str, dtype: torch.dtype | None) -> None:
    served, make = CALLS[name]
    options = {} if dtype is None else {"dtype": dtype}
    if dtype in NARROW and name.startswith("arange"):
        served = ""  # narrow integers are ATen's
        if dtype == torch.bool:
            return  # which ATen makes no range of
    made(lambda: make(**options), served)


def test_every_factory_is_met() -> None:
    met = {served for served, _ in CALLS.values()} | {"linspace", "logspace", "range", "range.step"}
    assert {f.removeprefix("aten.").removesuffix(".default") for f in FACTORIES} - met == {"zero"}


@pytest.mark.parametrize("dtype", FLOATS)
def test_ranges_of_floats(dtype: torch.dtype) -> None:
    """Within half a unit in the last place of the exact numbers, as they are rounded once."""
    for numbers in ((0.0, 5.0), (-1, 2, 0.1), (3.5, -2.0, -0.7), (0, 1000, 0.3)):
        served = "arange.start" if len(numbers) == 2 else "arange.start_step"
        got = made(lambda n=numbers: torch.arange(*n, dtype=dtype, **on), served, exact=False)
        step = numbers[2] if len(numbers) == 3 else 1
        exact = torch.arange(len(got), dtype=torch.float64) * step + numbers[0]
        assert torch.equal(got.cpu(), exact.to(dtype))
    if dtype == torch.bfloat16 and DEVICE == "cuda":
        return  # of which ATen makes no ``range`` there
    with pytest.warns(UserWarning, match="torch.range is deprecated"):
        got = made(lambda: torch.range(1, 4, 0.5, dtype=dtype, **on), "range.step")


@pytest.mark.parametrize("dtype", FLOATS)
def test_spaces(dtype: torch.dtype) -> None:
    step = torch.finfo(dtype).eps
    for low, high, steps in ((0, 1, 5), (-3.7, 2.2, 33), (5, 5, 3), (2.0, -1.0, 100), (1, 9, 1)):
        got = made(
            lambda a=low, b=high, n=steps: torch.linspace(a, b, n, dtype=dtype, **on),
            "linspace",
            exact=False,
        )
        exact = torch.linspace(low, high, steps, dtype=torch.float64)
        largest = max(abs(low), abs(high))
        assert (got.cpu().double() - exact).abs().max() <= 2 * step * largest
        assert got[0] == torch.tensor(low, dtype=dtype)
    got = made(
        lambda: torch.logspace(-2, 2, 9, dtype=dtype, **on), "logspace", exact=dtype.itemsize == 2
    )
    exact = torch.logspace(-2, 2, 9, dtype=torch.float64)
    assert torch.allclose(got.cpu().double(), exact, rtol=8 * step)


# options -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_the_default_dtype_is_asked_at_each_call(dtype: torch.dtype) -> None:
    program = lambda: (torch.ones(3, **on), torch.full((2,), 1.5, **on))  # noqa: E731
    before = torch.get_default_dtype()
    with gems_compile.use_gems(only=["ones", "full"]):
        first = program()
        try:
            torch.set_default_dtype(dtype)
            second = program()
        finally:
            torch.set_default_dtype(before)
        third = program()
    assert {t.dtype for t in (*first, *third)} == {before}
    assert {t.dtype for t in second} == {dtype}
    assert ours("ones") == ours("full") == 3


def test_the_device_of_a_block() -> None:
    with gems_compile.use_gems(only=["ones", "arange"]), torch.device(DEVICE):
        assert torch.ones(3).device.type == torch.arange(3).device.type == DEVICE
    assert ours("ones") == ours("arange") == 1


def test_a_factory_makes_leaves() -> None:
    with gems_compile.use_gems(only=["ones", "full", "mul", "sum"]):
        a = torch.ones(4, requires_grad=True, **on)
        b = torch.full((4,), 2.0, requires_grad=True, **on)
        (a * b * 3).sum().backward()
    assert a.is_leaf and b.is_leaf and ours("ones") and ours("full")
    assert torch.equal(a.grad.cpu(), torch.full((4,), 6.0))


def test_layouts_of_what_is_like_another() -> None:
    a = torch.randn(2, 3, 4, 5, **on)
    for like in (a.permute(0, 2, 3, 1), a[:, ::2], a.mT, a[:, :1].expand(2, 3, 4, 5)):
        made(lambda t=like: torch.ones_like(t), None)
        made(lambda t=like: torch.zeros_like(t, memory_format=torch.contiguous_format), None)
    channels = a.to(memory_format=torch.channels_last)
    made(lambda: torch.full_like(channels, 2), "full_like")
    made(lambda: torch.zeros_like(a, memory_format=torch.channels_last), "zeros_like")


def test_what_is_atens() -> None:
    program = {
        "zeros": lambda: torch.zeros(3, dtype=torch.complex64, **on),
        "ones": lambda: torch.ones(0, 3, **on),
        "full": lambda: torch.full((2,), -0.0, **on),
        "arange": lambda: torch.arange(3, dtype=torch.uint8, **on),
    }
    for name, fn in program.items():
        made(fn, None)
        assert not ours(name)
    with gems_compile.use_gems(only=replaceable()):
        assert torch.zeros(3, layout=torch.sparse_coo, **on).layout == torch.sparse_coo
        assert torch.zeros_like(torch.empty(3, **on), device="meta").device.type == "meta"
        assert torch.ones(3, device="meta").is_meta
        with pytest.raises(RuntimeError, match="negative"):
            torch.ones(-1, **on)
        with pytest.raises(RuntimeError, match="step must be nonzero"):
            torch.arange(0, 5, 0, **on)
        with pytest.raises(RuntimeError, match=r"larger bound|upper bound"):
            torch.arange(5, 0, 1.0, **on)
    assert not ours("zeros") and not ours("ones") and not ours("arange.start_step")


# places ------------------------------------------------------------------------------------------


def test_what_is_written() -> None:
    names = [n for n in replaceable() if n in eager._forms()]
    with gems_compile.use_gems(only=names):
        a = torch.full((4, 6), 7.0, **on)
        assert a.zero_() is a and not a.any()
        b = torch.full((4, 6), 7.0, **on)
        b[:, ::2].zero_()
        out = torch.empty(5, dtype=torch.float16, **on)
        torch.arange(5, out=out)
        again = torch.empty(2, 3, dtype=torch.int32, **on)
        torch.ones(2, 3, out=again)
        wide = torch.empty(4, **on)
        torch.linspace(0, 1, 4, out=wide)
        torch.zeros(3, out=(grown := torch.empty(0, **on)))  # ATen's: it must be resized
    assert b[:, 1::2].eq(7).all() and not b[:, ::2].any()
    assert out.tolist() == [0, 1, 2, 3, 4] and again.eq(1).all() and grown.shape == (3,)
    assert torch.allclose(wide.cpu(), torch.linspace(0, 1, 4))
    assert ours("zero_") >= 2, whys("zero_")  # ATen's zeros calls it as well
    for name in ("arange.out", "ones.out", "linspace.out"):
        assert ours(name) == 1, whys(name)
