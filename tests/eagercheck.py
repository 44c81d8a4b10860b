"""What the tests of eager mode share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import assert_same
from opcheck import tensors
from torch import Tensor

import gems_compile
from gems_compile import eager
from gems_compile.calls.attention import ATTENTION
from gems_compile.kernels.target import current_target


@pytest.fixture(autouse=True)
def nothing_left():
    """Each test starts with no handler and ends with none registered."""
    gems_compile.disable()
    eager._state.handlers.clear()
    yield
    gems_compile.disable()
    assert not eager._state.blocks and not eager._state.single
    assert gems_compile.enabled_ops() == ()


def ours(name: str) -> int:
    """How many calls of an overload our kernels have served."""
    return eager.stats().get(name, {}).get("ours", 0)


def every_op() -> list[str]:
    """Everything that can be replaced here, whatever is on by default, and gives ATen's numbers."""
    return [n for n in replaceable() if not is_random(n)]


def replaceable() -> list[str]:
    target = current_target()
    return [n for n in eager._overloads() if eager.why_not_replaced(n, target) is None]


def is_random(name: str) -> bool:
    overload = eager._overloads()[name]
    return torch.Tag.nondeterministic_seeded in overload.tags and overload not in ATTENTION


def same(fn: Callable[..., Any], *args: Any, served: tuple[str, ...] = (), **tolerance: Any) -> Any:
    """fn gives eager's results, layouts and gradients with every op replaced."""
    leaves = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
    grads: list[Tensor] = []  # drawn once, by whom does not matter

    def run() -> list[Any]:
        out = tensors(fn(*args))
        torch.manual_seed(3)
        used = [t for t in out if t.requires_grad]
        grads[:] = grads or [torch.randn(t.shape).to(t) for t in used]
        return [*out, *(torch.autograd.grad(used, leaves, grads) if leaves else ())]

    want = run()
    with gems_compile.use_gems(only=every_op()):
        got = run()
    for name in served:
        assert ours(name), f"{name} was ATen's: {whys(name)}"
    for k, (a, b) in enumerate(zip(got, want, strict=True)):
        assert_same(a.detach(), b.detach(), f"result {k}", **tolerance)
    return got


def whys(name: str) -> list[str]:
    return [
        v.why for h in eager._state.handlers.values() if h.name == name for v in h.variants.values()
    ]
