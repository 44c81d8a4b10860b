"""Steps of ``fused=True`` optimizers behind eager PyTorch, against float64 and ATen's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accuracy import assert_accurate
from eagercheck import nothing_left, ours, whys  # noqa: F401
from helpers import DEVICE
from torch import Tensor, optim
from torch.nn import Parameter

import gems_compile
from gems_compile import eager
from gems_compile.calls.one_call import aten_name
from gems_compile.calls.optimizers import optimizers
from gems_compile.calls.varying import MAX_NUMBERS

SHAPES = [(5, 7), (7,), (33, 65), ()]
NAMES = [str(form.overload) for form in optimizers()]

Make = Callable[..., optim.Optimizer]


def rate(value: float) -> Tensor:
    return torch.tensor(value, device=DEVICE)


MAKES: dict[str, tuple[str, Make]] = {
    "adam": ("_fused_adam_", lambda p, **k: optim.Adam(p, lr=1e-2, **k)),
    "adam, decay": ("_fused_adam_", lambda p, **k: optim.Adam(p, lr=1e-2, weight_decay=0.1, **k)),
    "adam, lr": ("_fused_adam_.tensor_lr", lambda p, **k: optim.Adam(p, lr=rate(1e-2), **k)),
    "adamw": ("_fused_adamw_", lambda p, **k: optim.AdamW(p, lr=1e-2, weight_decay=0.3, **k)),
    "adamw, lr": ("_fused_adamw_.tensor_lr", lambda p, **k: optim.AdamW(p, lr=rate(1e-2), **k)),
    "amsgrad": (
        "_fused_adamw_",
        lambda p, **k: optim.AdamW(p, lr=1e-2, amsgrad=True, maximize=True, **k),
    ),
    "sgd": ("_fused_sgd_", lambda p, **k: optim.SGD(p, lr=0.1, **k)),
    "sgd, lr": ("_fused_sgd_.tensor_lr", lambda p, **k: optim.SGD(p, lr=rate(0.1), **k)),
    "nesterov": (
        "_fused_sgd_",
        lambda p, **k: optim.SGD(
            p, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True, maximize=True, **k
        ),
    ),
    "dampening": (
        "_fused_sgd_",
        lambda p, **k: optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.2, **k),
    ),
}


def drawn(dtype: torch.dtype, steps: int) -> list[list[Tensor]]:
    """Parameters, then each step's gradients."""
    torch.manual_seed(3)
    return [[torch.randn(s, device=DEVICE).to(dtype) for s in SHAPES] for _ in range(steps + 1)]


def stepped(make: Make, given: list[list[Tensor]], dtype: torch.dtype, **options: Any) -> Any:
    """Parameters and an optimizer's state after as many steps as there are gradients."""
    params = [Parameter(t.to(dtype, copy=True)) for t in given[0]]
    optimizer = make(params, **options)
    for grads in given[1:]:
        for p, g in zip(params, grads, strict=True):
            p.grad = g.to(dtype, copy=True)
        optimizer.step()
    states = [optimizer.state[p] for p in params]
    kept = [t for s in states for t in s.values() if isinstance(t, Tensor)]
    return [p.detach() for p in params] + kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", MAKES)
def test_steps(name: str, dtype: torch.dtype) -> None:
    overload, make = MAKES[name]
    given = drawn(dtype, 4)
    want = stepped(make, given, dtype, fused=True)
    exact = stepped(make, given, torch.float64, foreach=False)
    with gems_compile.use_gems(only=NAMES):
        got = stepped(make, given, dtype, fused=True)
    copies = name == "dampening"  # its first step keeps gradients as they are: a copy is ATen's
    assert ours(overload) == 4 - copies, whys(overload)
    for k, (a, b, c) in enumerate(zip(got, want, exact, strict=True)):
        assert_accurate(a, b, c, f"{name}, {k}", "tensor", least=4.0)


@pytest.mark.parametrize("name", MAKES)
def test_a_step_in_bfloat16(name: str) -> None:
    """Computed in float32 and rounded once. ATen's on a CPU is another, of SGD."""
    overload, make = MAKES[name]
    given = drawn(torch.bfloat16, 1)
    exact = stepped(make, given, torch.float64, foreach=False)
    with gems_compile.use_gems(only=NAMES):
        got = stepped(make, given, torch.bfloat16, fused=True)
    assert ours(overload) == 1, whys(overload)
    for a, b in zip(got, exact, strict=True):
        torch.testing.assert_close(a.cpu().double(), b.cpu().double(), rtol=2**-8, atol=1e-6)


def test_a_scaled_step_is_atens() -> None:
    """As GradScaler asks for it: an infinite gradient leaves everything as it was."""
    grads = {"grad_scale": rate(4.0), "found_inf": rate(1.0)}
    params, given = [rate(2.0)], [rate(8.0)]
    numbers: dict[str, Any] = dict(weight_decay=0.0, momentum=0.0, lr=0.5, dampening=0.0)
    flags = dict(nesterov=False, maximize=False, is_first_step=False)
    with gems_compile.use_gems(only=NAMES):
        torch._fused_sgd_(params, given, [], **numbers, **flags, **grads)
        assert params[0].item() == 2.0
        grads["found_inf"].zero_()
        torch._fused_sgd_(params, [rate(8.0)], [], **numbers, **flags, **grads)
        assert params[0].item() == 1.0
    assert not ours("_fused_sgd_") and any("a scaler" in why for why in whys("_fused_sgd_"))


def test_parameters_in_one_memory_are_atens() -> None:
    whole = torch.randn(8, device=DEVICE)
    want = whole - 0.5
    numbers: dict[str, Any] = dict(weight_decay=0.0, momentum=0.0, lr=0.5, dampening=0.0)
    flags = dict(nesterov=False, maximize=False, is_first_step=False)
    grads = [torch.ones(4, device=DEVICE) for _ in range(2)]
    with gems_compile.use_gems(only=NAMES):
        torch._fused_sgd_([whole[:4], whole[4:]], grads, [], **numbers, **flags)
    assert not ours("_fused_sgd_")
    torch.testing.assert_close(whole, want)


def test_a_rate_that_never_repeats() -> None:
    """Some are compiled; a tensor's value is no part of a kernel."""
    p = [Parameter(torch.ones(5, device=DEVICE))]
    number, tensor = optim.SGD(p, lr=0.1, fused=True), optim.SGD(p, lr=rate(0.1), fused=True)
    p[0].grad = torch.ones(5, device=DEVICE)
    with gems_compile.use_gems(only=NAMES):
        for step in range(MAX_NUMBERS + 3):
            number.param_groups[0]["lr"] = 0.1 + step / 64
            number.step()
            tensor.param_groups[0]["lr"].fill_(0.1 + step / 64)
            tensor.step()
    rows = eager.stats()
    assert rows["_fused_sgd_"]["compiled"] == MAX_NUMBERS
    steps = {"ours": MAX_NUMBERS + 3, "native": 0, "compiled": 1}
    assert rows["_fused_sgd_.tensor_lr"] == steps
    total = 1 - 2 * sum(0.1 + step / 64 for step in range(MAX_NUMBERS + 3))
    torch.testing.assert_close(p[0].detach(), torch.full_like(p[0], total), rtol=1e-5, atol=1e-5)


def test_every_one_is_tested() -> None:
    assert {aten_name(f.overload) for f in optimizers()} == {
        overload for overload, _ in MAKES.values()
    }
