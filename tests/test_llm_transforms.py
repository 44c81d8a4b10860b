"""``gems_compile.llm`` under torch.func and in forward mode: derivatives of the plain functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import DEVICE, gems_only, rand
from llm_cases import CASES, Case
from opcheck import tensors
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vjp, vmap

from gems_compile import llm, modules, own_ops

pytestmark = gems_only


@pytest.fixture(autouse=True)
def kernels_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    """As whoever imports `gems_compile.llm` has it."""
    monkeypatch.setattr("gems_compile.kernels.served._server", own_ops.serve)


class Function:
    """A case as a function of what has a gradient."""

    def __init__(self, fn: Callable[..., Any], args: Any) -> None:
        self.fn, self.args = fn, args
        self.places = [k for k, a in enumerate(args) if a.requires_grad]
        self.leaves = tuple(args[k].detach() for k in self.places)

    def __call__(self, *leaves: Tensor) -> tuple[Tensor, ...]:
        args = list(self.args)
        for k, leaf in zip(self.places, leaves, strict=True):
            args[k] = leaf
        return tuple(t for t in tensors(self.fn(*args)) if t.is_floating_point())

    def total(self, *leaves: Tensor) -> Tensor:
        return sum((t.square().sum() for t in self(*leaves)), torch.zeros((), device=DEVICE))

    def slopes(self, *leaves: Tensor) -> tuple[Tensor, ...]:
        return grad(self.total, argnums=tuple(range(len(leaves))))(*leaves)


def batch(leaves: tuple[Tensor, ...]) -> list[Tensor]:
    return [torch.stack([t, t * 0.5, t - 1]) for t in leaves]


def pushed(f: Callable[..., Any], leaves: tuple[Tensor, ...]) -> Any:
    return jvp(f, leaves, tuple(t * 0.25 + 1 for t in leaves))


def pulled(f: Function) -> Any:
    out, pull = vjp(f, *f.leaves)
    return out, pull(tuple(t * 0.5 for t in out))


def dual(f: Function) -> Any:
    """Forward mode without torch.func."""
    with forward_ad.dual_level():
        out = f(*(forward_ad.make_dual(t, t * 0.25 + 1) for t in f.leaves))
        return [forward_ad.unpack_dual(t).tangent for t in out]


def batched_gradients(f: Function) -> Any:
    """Of autograd's own gradient, by vmap of the backward op."""
    leaves = [t.clone().requires_grad_() for t in f.leaves]
    out = f(*leaves)
    return torch.autograd.grad(
        out, leaves, [torch.stack([t, t * 2]) for t in out], is_grads_batched=True
    )


TRANSFORMS: dict[str, Callable[[Function], Any]] = {
    "grad": lambda f: f.slopes(*f.leaves),
    "vjp": pulled,
    "jvp": lambda f: pushed(f, f.leaves),
    "forward mode": dual,
    "vmap": lambda f: vmap(f)(*batch(f.leaves)),
    "vmap of one": lambda f: vmap(f, (0, *[None] * (len(f.leaves) - 1)))(
        batch(f.leaves)[0], *f.leaves[1:]
    ),
    "gradients of samples": lambda f: vmap(f.slopes)(*batch(f.leaves)),
    "gradient of vmap": lambda f: grad(lambda *ts: vmap(f.total)(*ts).sum())(*batch(f.leaves)),
    "forward over reverse": lambda f: pushed(f.slopes, f.leaves),
    "reverse over reverse": lambda f: grad(
        lambda *ts: sum(t.square().sum() for t in f.slopes(*ts))
    )(*f.leaves),
    "batched gradients": batched_gradients,
}


@pytest.mark.parametrize("how", TRANSFORMS)
@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_derivatives(case: Case, how: str) -> None:
    args = case.make(torch.float64)
    found, wanted = (
        tensors(TRANSFORMS[how](Function(fn, args))) for fn in (case.fn, case.reference)
    )
    assert wanted and len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_jacobians() -> None:
    x = rand(2, 6).double()
    want = jacrev(lambda x: torch.nn.functional.silu(x[:, :3]) * x[:, 3:])(x)
    for jacobian in (jacrev, jacfwd):
        torch.testing.assert_close(jacobian(llm.silu_and_mul)(x), want)


def test_modules_in_functional_call() -> None:
    """Gradients of samples of a layer, as torch.func's users compute them."""
    layer = modules.RMSNorm(16).to(DEVICE)
    weights = {name: p.detach() for name, p in layer.named_parameters()}
    x = rand(5, 3, 16)

    def loss(weights: Any, x: Tensor) -> Tensor:
        return functional_call(layer, weights, (x,)).square().sum()

    found = vmap(grad(loss), (None, 0))(weights, x)
    assert found["weight"].shape == (5, 16)
    for k in range(5):
        layer.zero_grad()
        loss(dict(layer.named_parameters()), x[k]).backward()
        torch.testing.assert_close(found["weight"][k], layer.weight.grad)


@pytest.mark.parametrize("backend", ["gems", "aot_eager"])
def test_compiled_transforms(backend: str) -> None:
    def slopes(x: Tensor, weight: Tensor) -> Tensor:
        return vmap(grad(lambda x: llm.rms_norm(x, weight).tanh().sum()))(x)

    x, weight = rand(4, 33), rand(33)
    found = torch.compile(slopes, backend=backend)(x, weight)
    torch.testing.assert_close(found, slopes(x, weight))
