"""Where the cheaper bodies of ops are taken: for what is seen only after a rounding to 16 bits."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE, compile_, gems_only, rand
from opcheck import lower, options, trace
from torch import Tensor

from gems_compile.lowering.pipeline import compile_graph

pytestmark = gems_only
HALF = torch.bfloat16
FUNCTIONS = [F.gelu, lambda x: F.gelu(x, approximate="tanh"), F.silu, torch.sigmoid]


def quick(fn, *inputs: Tensor) -> set[str]:
    """The cheaper bodies that the kernels of fn call."""
    _, report = lower(fn, *inputs)
    return {name for s in report.sources for name in re.findall(r"\.quick_(\w+)", s.text)}


def twice(function, x: Tensor) -> Tensor:
    """2 * function(x), exact and not alone."""
    return compile_(lambda x: function(x) * 2.0)(x)


def test_sixteen_bit_results_are_quick() -> None:
    x = rand(4, 33, dtype=HALF)
    assert quick(lambda x: F.gelu(x) * F.silu(x), x) == {"gelu", "silu"}
    assert quick(lambda x: x.softmax(-1) * 2, x) == {"exp"}


def test_float32_results_are_not() -> None:
    x = rand(4, 33)
    assert not quick(lambda x: F.gelu(x) * F.silu(x) + x.softmax(-1) + x.sigmoid(), x)


def test_a_float32_value_is_if_all_its_readers_round_it() -> None:
    x = rand(4, 33, dtype=HALF)
    assert quick(lambda x: (x.float().sigmoid() * 2).to(HALF), x) == {"sigmoid"}
    assert quick(lambda x: x.float().softmax(-1).sum(0).to(HALF), x) <= {"exp"}


def test_a_float32_value_that_is_seen_is_not() -> None:
    x = rand(4, 33, dtype=HALF)

    def stored(x: Tensor) -> tuple[Tensor, Tensor]:
        y = x.float().sigmoid()
        return y, y.to(HALF)

    assert not quick(stored, x)
    assert not quick(lambda x: (x.float().sigmoid() * 99).to(torch.int32), x)
    assert not quick(lambda x: torch.where(x.float().sigmoid() > 0.5, x, 0), x)


def test_exp_and_quotients_of_a_program_keep_their_bits() -> None:
    x, y = rand(4, 33, dtype=HALF), rand(4, 33, dtype=HALF)
    assert not quick(lambda x, y: (x.float().exp() / (y.float().abs() + 1)).to(HALF), x, y)
    assert not quick(lambda x, y: x / (y.abs() + 1) + 1, x, y)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_they_round_as_float64_does(function, dtype: torch.dtype) -> None:
    """Of every number from -20 to 20, almost none to the other side."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    x = every[every.abs() <= 20].to(DEVICE)
    got = twice(function, x)
    want = function(x.double()) * 2
    assert (got.double() - want).abs().max() <= (want.to(dtype).double() - want).abs().max() * 1.01
    normal = want.abs() > 4 * torch.finfo(dtype).smallest_normal
    assert (got != want.to(dtype))[normal].float().mean() < 2e-3


@pytest.mark.parametrize("function", FUNCTIONS[:3])  # sigmoid's is made of its rounded result
def test_their_gradients_round_as_float64_does(function) -> None:
    x = torch.linspace(-15, 15, 2**14, device=DEVICE).to(HALF).requires_grad_()
    dy = rand(2**14, dtype=HALF)
    (got,) = torch.autograd.grad(twice(function, x), x, dy)
    wide = x.detach().double().requires_grad_()
    (want,) = torch.autograd.grad(function(wide) * 2, wide, dy.double())
    close = (got.double() - want).abs() <= want.abs() * 2.0**-8 + 1e-5
    assert close.all()


@pytest.mark.parametrize("function", FUNCTIONS)
def test_at_the_ends(function) -> None:
    ends = [float("inf"), float("-inf"), float("nan"), 0.0, -0.0, 3e38, -3e38, -90.0, 90.0]
    x = torch.tensor(ends, device=DEVICE, dtype=HALF)
    got, want = twice(function, x), (function(x.double()) * 2).to(HALF)
    if function is FUNCTIONS[1]:  # the polynomial of the largest numbers is inf in float32
        want = (function(x.float()) * 2).to(HALF)
    torch.testing.assert_close(got, want, equal_nan=True, atol=1e-30, rtol=0)


# alone --------------------------------------------------------------------------------------------


def kernels(fn, *inputs: Tensor) -> int:
    _, report = compile_graph(trace(fn, *inputs), [], options(alone=False))
    return report.kernels


def test_a_large_gelu_alone_is_ours() -> None:
    large = torch.empty(2**21, dtype=HALF, device=DEVICE)
    assert kernels(F.gelu, large) == 1
    assert kernels(torch.ops.aten.gelu_backward, large, large) == 1
    assert kernels(F.gelu, large.float()) == 0
    assert kernels(F.gelu, large[:1000]) == 0
    assert kernels(F.relu, large) == 0
