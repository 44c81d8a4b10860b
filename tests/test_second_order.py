"""Gradients of gradients of compiled code, which equal eager's; what cannot have one says so."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE, assert_same, compile_, gems_only, rand
from torch import Tensor, nn

pytestmark = gems_only

NEAR = {"rtol": 1e-4, "atol": 1e-5}


def both(fn: Callable[..., Tensor], *inputs: Tensor) -> None:
    """Second gradients of all inputs, of a random combination of the first."""
    seen = []
    for run in (fn, compile_(fn)):
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        torch.manual_seed(2)
        out = run(*leaves)
        first = torch.autograd.grad(out, leaves, torch.randn_like(out), create_graph=True)
        mixed = sum((g * torch.randn_like(g)).sum() for g in first)
        second = torch.autograd.grad(mixed, leaves, allow_unused=True)
        seen.append([out, *first, *(torch.zeros(()) if g is None else g for g in second)])
    for k, (got, want) in enumerate(zip(seen[1], seen[0], strict=True)):
        assert_same(got.detach(), want.detach(), f"value {k}", **NEAR)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * 0.3).softmax(-1) @ v


@pytest.mark.parametrize(
    ("fn", "shapes"),
    [
        (lambda x: x**3, [(3, 4)]),
        (lambda x: F.gelu(x).exp().sum(-1), [(3, 4)]),
        (lambda x, w, b: F.layer_norm(x, (8,), w, b).tanh(), [(3, 8), (8,), (8,)]),
        (lambda x, w: F.silu(F.linear(x, w)).log_softmax(-1), [(3, 8), (5, 8)]),
        (attention, [(2, 4, 8), (2, 4, 8), (2, 4, 8)]),
        (lambda x: x.sin() * 2 + x.detach().cos(), [(7,)]),
        (lambda x: (x**3)[0], [(3, 4)]),
    ],
    ids=["cube", "gelu", "layer_norm", "linear", "attention", "detached", "view of a result"],
)
def test_second_gradients(fn: Callable[..., Tensor], shapes: list[tuple[int, ...]]) -> None:
    both(fn, *(rand(*shape) for shape in shapes))


def test_third_gradient() -> None:
    x = rand(3, 4, grad=True)
    y = compile_(lambda x: x**4)(x)
    for factor, power in ((4, 3), (12, 2), (24, 1)):
        (y,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        assert_same(y.detach(), factor * x.detach() ** power, rtol=1e-5, atol=1e-5)


def test_gradient_penalty_trains_all_parameters() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.LayerNorm(7), nn.Linear(7, 1)).to(DEVICE)
    data, found = rand(6, 5), []
    for model, run in ((net, net), (other := copy.deepcopy(net), compile_(other))):
        x = data.clone().requires_grad_()
        y = run(x)
        (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        (y.mean() + (slope.norm(2, -1) - 1).square().mean()).backward()
        found.append([p.grad for p in model.parameters()])
    for got, want in zip(found[1], found[0], strict=True):
        assert_same(got, want, **NEAR)


def test_through_eager_code_on_both_sides() -> None:
    inner = compile_(lambda x: x.exp() * x)
    x = rand(4, grad=True)
    (first,) = torch.autograd.grad(inner(x * 2).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    y = x.detach().clone().requires_grad_()
    z = y * 2
    (want,) = torch.autograd.grad((z.exp() * z).square().sum(), y, create_graph=True)
    assert_same(second, torch.autograd.grad(want.sum(), y)[0], rtol=1e-4, atol=1e-4)


def with_a_part(x: Tensor) -> tuple[Tensor, Tensor]:
    y = x**3
    return y[0], y[1:]


def written(x: Tensor, seen: Tensor) -> Tensor:
    seen.add_(1)
    return x**3


@pytest.mark.parametrize(
    "fn", [lambda x, seen: F.dropout(x**3, 0.5), written], ids=["random", "written"]
)
def test_what_cannot_be_run_again_raises(fn: Callable[[Tensor, Tensor], Tensor]) -> None:
    x = rand(3, 4, grad=True)
    (g,) = torch.autograd.grad(compile_(fn)(x, rand(1)).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        g.sum().backward()


def test_several_views_of_one_result_raise() -> None:
    x = rand(3, 4, grad=True)
    first, rest = compile_(with_a_part)(x)
    (g,) = torch.autograd.grad(first.sum() + rest.sum(), x, create_graph=True)
    assert_same(g.detach(), 3 * x.detach() ** 2, **NEAR)
    with pytest.raises(RuntimeError):
        g.sum().backward()


def test_a_written_input_is_no_wrong_gradient() -> None:
    x = rand(3, 4, grad=True)
    h = x * 1.0
    y = compile_(lambda h: h**3)(h)
    with torch.no_grad():
        h.mul_(2)
    with pytest.raises(RuntimeError):
        (g,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        g.sum().backward()


def test_inputs_are_let_go_by_backward() -> None:
    import weakref

    x = rand(3, 4, grad=True)
    h = (x * 2).exp()
    gone = weakref.ref(h)
    y = compile_(lambda h: h + 1)(h)
    del h
    y.sum().backward()
    assert gone() is None
