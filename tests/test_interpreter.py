"""Triton's interpreter: the language is patched for as long as a kernel runs, and once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from helpers import DEVICE, gems_only

pytestmark = [gems_only, pytest.mark.skipif(DEVICE != "cpu", reason="of the interpreter")]


@triton.jit
def twice(x, fails: tl.constexpr):
    tl.static_assert(not fails)
    return tl.sum(tl.zeros([4], tl.float32), 0) + x * 2


@triton.jit
def double(x, n, FAILS: tl.constexpr):
    for k in range(n):
        tl.store(x + k, twice(tl.load(x + k), FAILS))


@pytest.fixture
def patches(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was looked through for what to patch."""
    from triton.runtime import interpreter

    seen, patch = [], interpreter._patch_builtin

    def patch_builtin(module: Any, *rest: Any) -> None:
        seen.append(module)
        patch(module, *rest)

    monkeypatch.setattr(interpreter, "_patch_builtin", patch_builtin)
    return seen


def test_once_a_kernel(patches: list[Any]) -> None:
    x, load, counts = torch.ones(8), tl.load, []
    double[(1,)](torch.ones(1), 1, False)  # rewrites the functions
    patches.clear()
    for n in (2, 8):
        double[(1,)](x, n, False)
        counts.append(len(patches))
        patches.clear()
    assert counts[0] == counts[1] > 0
    assert x.tolist() == [4, 4, 2, 2, 2, 2, 2, 2]
    assert tl.load is load


def test_a_kernel_that_fails() -> None:
    x, load = torch.ones(4), tl.load
    with pytest.raises(Exception, match="AssertionError"):
        double[(1,)](x, 4, True)
    assert tl.load is load
    double[(2,)](x, 4, False)
    assert x.tolist() == [4, 4, 4, 4]
