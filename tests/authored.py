"""Pointwise functions as users would write them, in a module of theirs."""

import torch
import triton
import triton.language as tl

import gems_compile
from gems_compile.kernels import activation

HALF = tl.constexpr(0.5)
SHIFT = 3


@gems_compile.pointwise
@triton.jit
def gelu_and_mul(x, y, approximate: tl.constexpr = "none"):
    """gelu(x) * y."""
    return activation.gelu(x, approximate) * y


@gelu_and_mul.backward
@gems_compile.pointwise(outputs=2)
@triton.jit
def gelu_and_mul_backward(dz, x, y, approximate: tl.constexpr = "none"):
    return activation.gelu_backward(dz * y, x, approximate), dz * activation.gelu(x, approximate)


@gems_compile.pointwise(promotion=("x", "y"))
@triton.jit
def plus(x, y, alpha=1):
    """x + alpha * y, with the result's dtype as torch.add has it."""
    return x + y * alpha


@gems_compile.pointwise
@triton.jit
def scaled(x, factor: float):
    return x * factor


@gems_compile.pointwise(promotion=("x", "y"))
@triton.jit
def pick(condition, x, y):
    return tl.where(condition, x, y)


@gems_compile.pointwise(promotion="int_to_float")
@triton.jit
def half_of(x):
    return x * HALF


@triton.jit
def _shifted(x):
    """A helper, and a global number of its own."""
    return x + SHIFT


@gems_compile.pointwise(outputs=3, promotion=["default", ("x", "int_to_float"), "always_bool"])
@triton.jit
def three(x, y):
    return _shifted(x) * y, x * HALF, x > y


def _three_backward(dproduct, dhalf, x, y):
    return dproduct * y + dhalf * 0.5, dproduct * (x + 3)


three.backward(_three_backward)


@gems_compile.pointwise(backward=lambda dy, x: dy * 2 * x)
@triton.jit
def square(x):
    return x * x


@gems_compile.pointwise
@triton.jit
def no_gradient(x):
    return x + 1


def plain(x: torch.Tensor, y: torch.Tensor, approximate: str = "none") -> torch.Tensor:
    """gelu_and_mul in PyTorch."""
    return torch.nn.functional.gelu(x, approximate=approximate) * y
