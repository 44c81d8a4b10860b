"""Users' pointwise functions under torch.func and in forward mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from authored import gelu_and_mul, no_gradient, plain, square, three
from helpers import gems_only, rand
from opcheck import tensors
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, jacfwd, jacrev, jvp, vjp, vmap

from gems_compile import pointwise
from gems_compile.errors import AuthoringError

pytestmark = gems_only

Binary = Callable[[Tensor, Tensor], Any]


def plain_three(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    return (x + 3) * y, x * 0.5, x > y


FUNCTIONS: dict[str, tuple[Binary, Binary]] = {
    "gelu_and_mul": (gelu_and_mul, plain),
    "three": (three, plain_three),
    "square": (lambda x, y: square(x * y), lambda x, y: (x * y).square()),
}


def total(f: Binary) -> Binary:
    return lambda x, y: sum(t.sin().sum() for t in tensors(f(x, y)) if t.is_floating_point())


def dual(f: Binary, x: Tensor, y: Tensor) -> Any:
    """Forward mode without torch.func, of one operand of two."""
    with forward_ad.dual_level():
        out = [t for t in tensors(f(x, forward_ad.make_dual(y, y * 0.5))) if t.is_floating_point()]
        pairs = [forward_ad.unpack_dual(t) for t in out]
        return [torch.zeros_like(p) if t is None else t for p, t in pairs]


def pulled(f: Binary, x: Tensor, y: Tensor) -> Any:
    out, pull = vjp(total(f), x, y)
    return out, pull(torch.ones_like(out))


TRANSFORMS: dict[str, Callable[[Binary, Tensor, Tensor], Any]] = {
    "grad": lambda f, x, y: grad(total(f), (0, 1))(x, y),
    "vjp": pulled,
    "jvp": lambda f, x, y: jvp(total(f), (x, y), (x * 0.5, y + 1)),
    "forward mode": dual,
    "vmap": lambda f, x, y: vmap(f, (0, None))(x, y),
    "gradients of samples": lambda f, x, y: vmap(grad(total(f), 1), (0, None))(x, y),
    "gradient of vmap": lambda f, x, y: grad(lambda y: vmap(total(f), (0, None))(x, y).sum())(y),
    "jacfwd": lambda f, x, y: jacfwd(total(f), 1)(x, y),
    "jacrev": lambda f, x, y: jacrev(lambda y: tensors(f(x, y))[0])(y),
    "gradient of jvp": lambda f, x, y: grad(lambda x: jvp(lambda y: total(f)(x, y), (y,), (y,))[1])(
        x
    ),
}
#: two derivatives of what has a first one alone, or whose backward is a kernel without one
ONCE = ("gradient of jvp",)


@pytest.mark.parametrize("how", TRANSFORMS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_derivatives(name: str, how: str) -> None:
    x, y = rand(3, 4).double(), rand(4).double()
    ours, torchs = FUNCTIONS[name]
    if name == "gelu_and_mul" and how in ONCE:
        with pytest.raises(AuthoringError, match="gelu_and_mul_backward has no backward"):
            TRANSFORMS[how](ours, x, y)
        return
    found, wanted = (tensors(TRANSFORMS[how](f, x, y)) for f in (ours, torchs))
    assert wanted and len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_no_gradient_is_an_error_in_every_mode() -> None:
    x = rand(3)
    for transformed in (
        lambda: grad(lambda x: no_gradient(x).sum())(x),
        lambda: jvp(no_gradient, (x,), (x,)),
    ):
        with pytest.raises(AuthoringError, match="no_gradient has no backward"):
            transformed()
    assert torch.equal(vmap(no_gradient)(x), x + 1)


def test_a_summed_gradient_has_no_forward_mode() -> None:
    function = pointwise(
        gelu_and_mul.function, backward=lambda dz, x, y, _: (dz * y, (dz * x).sum(0))
    )
    x, y = rand(3, 4), rand(4)
    grad(lambda y: function(x, y).sum())(y)
    with pytest.raises(AuthoringError, match=r"sums a gradient to \[4\].*forward mode"):
        jvp(lambda y: function(x, y), (y,), (y,))
