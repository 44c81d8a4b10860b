"""Norms whose rows or channels are too long for one program."""

from __future__ import annotations

import pytest
import torch
from helpers import DEVICE, compile_, gems_only
from opcheck import lower
from torch import nn

from gems_compile.backend import Gems


def channels(offset: float, first: float) -> torch.Tensor:
    """[8, 6, 16, 16] with four kinds of channels; ``first`` stands where each part begins."""
    torch.manual_seed(5)
    x = torch.randn(8, 6, 16, 16)
    scale = torch.tensor([1.0, 1e-3, 1e3, 1.0, 0.1, 10.0])[:, None, None]
    x = x * scale + offset * scale
    x[:, :, 0, 0] += first * scale[:, 0, 0]
    return x.to(DEVICE)


@gems_only
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize(
    ("offset", "first", "rtol"),
    # the first element of a part may be far out; then the variance keeps fewer digits
    [(0.0, 0.0, 1e-5), (100.0, 0.0, 1e-4), (0.0, 30.0, 1e-4), (-1000.0, 30.0, 1e-3)],
)
def test_batch_norm_moments(layout, offset, first, rtol):
    x = channels(offset, first).contiguous(memory_format=layout)
    norm = nn.BatchNorm2d(6, momentum=1.0).to(DEVICE)
    y = compile_(norm)(x)
    exact = x.double()
    mean, var = exact.mean((0, 2, 3)), exact.var((0, 2, 3))
    torch.testing.assert_close(norm.running_mean.double(), mean, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(norm.running_var.double(), var, rtol=rtol, atol=0)
    wanted = nn.functional.batch_norm(exact, None, None, training=True)
    torch.testing.assert_close(y.double(), wanted, rtol=1e-3, atol=1e-3 if offset else 1e-4)


@gems_only
def test_batch_norm_reads_a_long_channel_twice():
    """Once for the moments, once to normalise: no kernel loops over it two times."""
    x = channels(0.0, 0.0).contiguous(memory_format=torch.channels_last)
    backend = Gems()
    torch.compile(nn.BatchNorm2d(6).to(DEVICE), backend=backend)(x)
    (report,) = [r for r in backend.reports if r.kind != "backward"]
    readers = [
        source.text
        for source in report.source_of.values()
        if any(role == "in" and what.shape == x.shape for _, role, what in source.params)
    ]
    assert len(readers) == 2
    assert all(text.count("for start in") <= 1 for text in readers)


def kernels(fn, *args) -> list[tuple[str, list[tuple[str, tuple[int, ...]]]]]:
    """Of each kernel of the last graph: its text, and (role, shape) of each tensor."""
    backend = Gems()
    torch.compile(fn, backend=backend)(*args)
    return [
        (s.text, [(role, tuple(what.shape)) for _, role, what in s.params if role != "size"])
        for s in backend.reports[-1].source_of.values()
    ]


def gradients(fn, *args):
    """fn's result and the gradients of its floating arguments, in one graph."""
    y, back = torch.func.vjp(fn, *args)
    return [y, *back(torch.ones_like(y))]


def relu_of_batch_norm(x, w, b):
    return nn.functional.relu(nn.functional.batch_norm(x, None, None, w, b, training=True))


def silu_of_group_norm(x, w, b):
    return nn.functional.silu(nn.functional.group_norm(x, 2, w, b))


@gems_only
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_batch_norm_backward_reads_two_tensors_twice(layout):
    """For the sums of each channel and for dx; nothing that large lies between them."""
    x, dy = (channels(0.0, 0.0).contiguous(memory_format=layout).bfloat16() for _ in range(2))
    w, mean, rstd = (torch.rand(6, device=DEVICE) + 0.5 for _ in range(3))

    def backward(dy, x):
        mask = [True, True, True]
        return torch.ops.aten.native_batch_norm_backward(
            dy, x, w, None, None, mean, rstd, True, 1e-5, mask
        )

    roles = [r for _, args in kernels(backward, dy, x) for r, shape in args if shape == x.shape]
    assert roles.count("out") == 1 and roles.count("in") <= 4


@gems_only
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_of_relu_after_batch_norm(layout, dtype):
    """On which side of zero a result lies is seen from the input, with the forward's rounding."""
    torch.manual_seed(3)
    x = torch.randn(4, 6, 5, 7).to(DEVICE, dtype).contiguous(memory_format=layout)
    w, b = torch.randn(6, device=DEVICE), torch.randn(6, device=DEVICE)
    norm = nn.BatchNorm2d(6).to(DEVICE)
    norm.load_state_dict({**norm.state_dict(), "weight": w, "bias": b})
    results = []
    for run in (compile_(norm), norm):
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        y = nn.functional.relu(run(leaf))
        norm.zero_grad()
        y.backward(torch.ones_like(y))
        results.append([y, leaf.grad, norm.weight.grad.clone(), norm.bias.grad.clone()])
    for got, wanted in zip(*results, strict=True):
        tight = 1e-4 if dtype == torch.float32 else 3e-2
        torch.testing.assert_close(got, wanted, rtol=tight, atol=tight)


@gems_only
def test_relu_saves_no_result_for_backward():
    """The backward of ReLU of batch norm is given its input alone, among what is as large."""
    x = channels(0.0, 0.0).requires_grad_()
    w, b = (torch.rand(6, device=DEVICE).requires_grad_() for _ in range(2))
    mean, var = torch.zeros(6, device=DEVICE), torch.ones(6, device=DEVICE)
    backend = Gems()

    def fn(x, w, b):
        return torch.relu(nn.functional.batch_norm(x, mean, var, w, b, training=True))

    torch.compile(fn, backend=backend)(x, w, b).sum().backward()
    (report,) = [r for r in backend.reports if r.kind == "backward"]
    large = {
        what
        for source in report.source_of.values()
        for _, role, what in source.params
        if role == "in" and tuple(what.shape) == tuple(x.shape)
    }
    assert len(large) == 2  # dy and x


@gems_only
@pytest.mark.parametrize("shape", [(2, 6, 5, 7), (3, 8, 64, 40), (2, 4), (3, 6, 1)])
@pytest.mark.parametrize("affine", [True, False])
def test_group_norm_with_gradients(shape, affine):
    torch.manual_seed(4)
    x = torch.randn(shape, device=DEVICE) * 3 + 5
    w, b = (torch.randn(shape[1], device=DEVICE) for _ in range(2))
    args = (x, w, b) if affine else (x,)

    def fn(x, w=None, b=None):
        return (
            gradients(silu_of_group_norm, x, w, b)
            if affine
            else gradients(lambda x: silu_of_group_norm(x, None, None), x)
        )

    wanted = fn(*(a.double() for a in args))
    for got, exact in zip(compile_(fn)(*args), wanted, strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=2e-4, atol=2e-4)


@gems_only
@pytest.mark.parametrize("rows", [2048, 2047, 1056])
def test_layer_norm_gradients_from_a_sweep(rows: int) -> None:
    """Where steps cut the rows evenly there is no mask; the two sums of a row end together."""
    torch.manual_seed(3)
    dy, x = torch.randn(2, rows, 96, device=DEVICE)
    w, b = torch.randn(2, 96, device=DEVICE)

    def fn(*args: torch.Tensor) -> list[torch.Tensor]:
        dy, x, w, b = args
        var, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
        rstd = torch.rsqrt(var + 1e-5)
        backward = torch.ops.aten.native_layer_norm_backward
        return list(backward(dy, x, [96], mean, rstd, w, b, [True, True, True]))

    got, report = lower(fn, dy, x, w, b, multiprocessors=4)
    for a, e in zip(got, fn(*(t.double() for t in (dy, x, w, b))), strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-4, atol=1e-4)
    (sweep,) = [s for s in report.sources if "tl.range(share" in s.text]
    assert "reductions.row_sums(" in sweep.text
    assert ("xmask" in sweep.text) == (rows % sweep.meta["constants"]["XBLOCK"] != 0)
