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


def allocated(
    fn: Callable[..., Any],
    *inputs: Tensor,
    launches: int = 1,
    multiprocessors: int | None = None,
) -> int:
    """How many results get memory of their own, after a check of the numbers."""
    given = [x.clone() for x in inputs]
    got, report = lower(fn, *inputs, multiprocessors=multiprocessors)
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


def linear(x: Tensor, w: Tensor) -> Tensor:
    return F.linear(x, w)


def test_another_shape_of_the_same_memory() -> None:
    """A product of matrices knows rows and columns, a convolution another order of axes."""
    x, w = rand(4, 8, 32), rand(32, 32) / 8

    def mlp(x: Tensor, w: Tensor) -> Tensor:
        return linear(F.gelu(linear(x, w)) * 2, w)

    assert allocated(mlp, x, w) == 0
    nhwc = rand(*X).to(memory_format=torch.channels_last)

    def block(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        y = linear(conv(x, w).permute(0, 2, 3, 1), v).permute(0, 3, 1, 2)
        return y * v[0].reshape(1, -1, 1, 1) + x

    assert allocated(block, nhwc, rand(*W), rand(4, 4)) == 0


ROWS = (16, 64, 256)


@pytest.mark.parametrize(
    "fn",
    [
        lambda y: torch.softmax(y * 2, -1),
        lambda y: F.layer_norm(y, y.shape[-1:]),
        lambda y: F.layer_norm(y + 1, y.shape[-1:]) * 2,
        lambda y: F.layer_norm(y, y.shape[-1:]) + torch.softmax(y, -1),
    ],
)
def test_rows(fn: Callable[..., Any]) -> None:
    """All of a row is loaded before any of it is stored."""
    assert allocated(lambda x, w: fn(linear(x, w)), rand(*ROWS), rand(256, 256) / 16) == 0
    short = rand(2, 3, 8), rand(8, 8)  # of fewer elements than threads: they hold copies
    assert allocated(lambda x, w: fn(linear(x, w)), *short) == 1


def test_rows_read_twice() -> None:
    """A row that is too long for one tile is read anew where it is written."""
    x, w = rand(64, 16), rand(20000, 16) / 4

    def fn(x: Tensor, w: Tensor) -> Tensor:
        return torch.softmax(linear(x, w) * 2, -1)

    assert allocated(fn, x, w, multiprocessors=4) == 1  # not reduced in parts


def test_a_gradient_and_its_sums() -> None:
    """Programs that add up columns as they go visit each element once."""

    def backward(y: Tensor, x: Tensor, w: Tensor) -> Any:
        dy = linear(y, w) * (x > 0)
        return dy, dy.reshape(-1, dy.shape[-1]).sum(0)

    def norm(y: Tensor, x: Tensor, w: Tensor) -> Any:
        dy, size = linear(y, w), [w.shape[0]]
        mean, var = x.mean(-1, keepdim=True), x.var(-1, correction=0, keepdim=True)
        rstd = torch.rsqrt(var + 1e-5)
        grads = torch.ops.aten.native_layer_norm_backward(
            dy, x, size, mean, rstd, w[0], w[1], [True, True, True]
        )
        return tuple(grads)

    rows = rand(64, 64, 256)
    for fn in (backward, norm):
        got, report = lower(fn, *(inputs := (rows, rand(64, 64, 256), rand(256, 256) / 16)))
        wanted = fn(*(x.double() for x in inputs))
        for a, b in zip(got, wanted, strict=True):
            assert_same_values(a, b.to(a.dtype), rtol=1e-3, atol=1e-3)
        assert "empty((64, 64, 256,)" not in report.wrapper, report.wrapper


def test_results_of_a_tuple() -> None:
    """A convolution's backward makes fresh tensors."""

    def backward(y: Tensor, x: Tensor, w: Tensor) -> Any:
        args = ([0], [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, True, False])
        dx, dw, _ = torch.ops.aten.convolution_backward(y, x, w, *args)
        return dx * 2 + y, dw

    assert allocated(backward, rand(*X), rand(*X), rand(*W)) == 0


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
        lambda x, w: torch.softmax(conv(x, w) * 2, -1),  # threads hold copies of short rows
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
    _, report = lower(block, x, w)
    assert report.peak_bytes == 2 * x.nbytes  # of the convolution's operand and its result


def test_peak_bytes() -> None:
    """What the function allocates, as long as a variable holds it or a view of it."""

    def peak(fn: Callable[..., Any], *inputs: Tensor) -> int | None:
        return lower(fn, *inputs)[1].peak_bytes

    x, w = rand(64, 64), rand(64, 64)
    size = x.nbytes
    assert peak(lambda x: (x * 2 + 1,), x) == size
    assert peak(lambda x, w: x @ w @ w @ w, x, w) == 2 * size
    assert peak(lambda x, w: (x @ w, x @ w @ w @ w), x, w) == 3 * size
    assert peak(lambda x, w: (x @ w).t() @ w @ w, x, w) == 2 * size
    assert peak(lambda x: torch.sort(x * 2 + 1, -1)[0] @ x, x) == 4 * size  # int64 places
    _, report = lower(lambda x: x * 2 + 1, x, dynamic=True)
    assert report.peak_bytes is None
