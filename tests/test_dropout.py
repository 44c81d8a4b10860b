"""Dropout, whose random numbers are our own, and the other random ops."""

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE, MLP_NEAR, assert_same_bits, check, compile_, rand
from torch import nn

from gems_compile.kernels.dropout import _philox as philox


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


def mask_of(shape, p, seed, salt=1):
    """The mask that a graph's dropout number ``salt`` draws, by the ATen implementation."""
    torch.manual_seed(seed)
    drawn = torch.ops.gems.seed(torch.device(DEVICE))
    return torch.ops.gems.dropout_mask(drawn, shape, p, salt)


TILES = {
    "flat": lambda x: x * 1.0,
    "flat, with columns": lambda x: x + torch.arange(x.shape[-1], device=x.device),
    "rows": lambda x: x.softmax(-1),
    "transposed": lambda x: x.transpose(-1, -2).contiguous(),
    "sliced": lambda x: x[..., 3:] * 2.0,
    "columns": lambda x: x.sum(0),
    "both": lambda x: (x * 1.0, x.sum(-1), x.sum(0)),
}


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("shape", [(6, 64), (5, 33), (2, 3, 20)])
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_mask_is_the_same_in_every_tile(tile, shape, dynamic):
    x = rand(*shape)
    torch.manual_seed(11)
    got = compile_(lambda x: TILES[tile](F.dropout(x, 0.4)), dynamic=dynamic)(x)
    want = TILES[tile](x * mask_of(shape, 0.4, seed=11) * (1 / 0.6))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_a_mask_is_the_same_in_a_looped_row_and_in_a_sweep():
    """A row too long for the chip; rows that a program walks over, adding up their columns."""
    for shape in ((2, 20000), (640, 32)):
        x = rand(*shape, grad=True)
        torch.manual_seed(3)
        compile_(lambda x: F.softmax(F.dropout(x, 0.3), -1).square().sum())(x).backward()
        mask = mask_of(shape, 0.3, seed=3)
        twin = x.detach().requires_grad_()
        F.softmax(twin * mask / 0.7, -1).square().sum().backward()
        torch.testing.assert_close(x.grad, twin.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("p", [1e-4, 0.9999])
def test_dropout_at_extreme_rates(p):
    keep = mask_of((1 << 20,), p, seed=1).float().mean().item()
    assert abs(keep - (1 - p)) < 6 * (p * (1 - p) / (1 << 20)) ** 0.5


def test_neighbours_and_dropouts_are_not_correlated():
    """The words of one counter, of counters side by side, and of two dropouts of a graph."""
    n = 1 << 18
    a, b = (mask_of((n,), 0.5, 7, salt).float() - 0.5 for salt in (1, 2))
    for lag in (1, 2, 3, 4, 5, 8, 1024):
        assert abs((a[lag:] * a[:-lag]).mean()) * 4 < 5 / n**0.5
    assert abs((a * b).mean()) * 4 < 5 / n**0.5


def test_masks_are_philox_of_seven_rounds():
    """The first vector of Random123's known answers."""
    assert philox(0, 0) == (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)


def test_every_bit_of_seed_and_counter_counts():
    """Whichever is turned over, each bit of each word is in half of all cases. With five rounds
    some are in a third."""
    n = 1 << 14
    seed, counter = torch.randint(-(2**63), 2**63 - 1, (n,)), torch.randint(2**34, (n,))
    words = torch.stack(philox(seed, counter))
    others = [(seed ^ (1 << bit), counter) for bit in range(63)]
    others += [(seed, counter ^ (1 << bit)) for bit in range(34)]
    for other in others:
        turned = torch.stack(philox(*other)) ^ words
        shares = torch.stack([(turned >> bit & 1).double().mean(1) for bit in range(32)])
        assert (shares - 0.5).abs().max() * 2 * n**0.5 < 6
