"""Dropout, whose random numbers are our own, and the other random ops."""

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE, MLP_NEAR, assert_same_bits, check, compile_, rand
from torch import nn


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_statistics(p):
    x = rand(64, 64).abs() + 1
    out = compile_(lambda x: F.dropout(x * 1.0, p))(x)
    kept = out != 0
    share = kept.float().mean().item()
    sigma = (p * (1 - p) / x.numel()) ** 0.5
    assert abs(share + p - 1) < 5 * sigma
    torch.testing.assert_close(out[kept], x[kept] / (1 - p), rtol=1e-6, atol=0)
    for dim in (0, 1):  # no row and no column is treated alike
        shares = kept.float().mean(dim)
        assert (shares - (1 - p)).abs().max() < 6 * (p * (1 - p) / 64) ** 0.5
        assert shares.unique().numel() > 3
    assert not torch.equal(kept[0], kept[1]) and not torch.equal(kept[:, 0], kept[:, 1])


def test_dropout_is_reproducible():
    x = rand(16, 16)
    fn = compile_(lambda x: F.dropout(x, 0.5))
    torch.manual_seed(5)
    first, second = fn(x), fn(x)
    torch.manual_seed(5)
    again = fn(x), fn(x)
    assert torch.equal(first, again[0]) and torch.equal(second, again[1])
    assert not torch.equal(first, second)
    torch.manual_seed(6)
    assert not torch.equal(fn(x), first)


def test_dropout_draws_afresh_at_each_place():
    x = rand(16, 16).abs() + 1
    a, b = compile_(lambda x: (F.dropout(x * 1.0, 0.5), F.dropout(x * 1.0, 0.5)))(x)
    assert not torch.equal(a == 0, b == 0)


def test_dropout_backward_uses_the_forward_mask():
    x = (rand(16, 16).abs() + 1).requires_grad_()
    fn = compile_(lambda x: F.dropout(x * 1.0, 0.25))
    for _ in range(2):
        x.grad = None
        out = fn(x)
        torch.rand(3)  # moves the generator between forward and backward
        out.sum().backward()
        torch.testing.assert_close(x.grad, (out != 0) / 0.75)
        assert 0 < (x.grad == 0).sum() < x.numel()


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_dropout_of_nothing_and_of_all(p):
    check(lambda x: F.dropout(x * 2, p) + 1, rand(3, 4, grad=True))


def test_dropout_in_eval():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).to(DEVICE).eval()
    check(model, rand(3, 4, grad=True), **MLP_NEAR)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dropout_in_half_precision(dtype):
    x = (rand(16, 16).abs() + 1).to(dtype)
    out = compile_(lambda x: F.dropout(x, 0.5))(x)
    assert out.dtype == dtype
    assert_same_bits(out[out != 0], (x * 2)[out != 0])


def test_dropout_dynamic():
    fn = compile_(lambda x: F.dropout(x, 0.5).sum(-1), dynamic=True)
    for n in (5, 17):
        out = fn(torch.ones(n, 64, device=DEVICE))
        assert 0.3 < out.mean().item() / 64 < 1.7


def test_random_ops_are_reproducible():
    def fn(x):
        return torch.rand_like(x) + x, torch.randn(4, device=x.device), torch.bernoulli(x.sigmoid())

    run = compile_(fn)
    x = rand(8, 8)
    torch.manual_seed(3)
    first = run(x)
    torch.manual_seed(3)
    for a, b in zip(run(x), first, strict=True):
        assert torch.equal(a, b)
    uniform = first[0] - x
    assert uniform.min() >= -1e-6 and uniform.max() <= 1 + 1e-6
