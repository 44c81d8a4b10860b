"""Composite ops of equal operands are taken apart once; of operands that differ, each.

That a recipe makes what the op's body would is checked in every test of the suite: see conftest.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import DEVICE, check, gems_only, rand
from torch import Tensor, nn

from gems_compile.backend import Gems
from gems_compile.lowering import repeats

pytestmark = gems_only


def followed(monkeypatch: pytest.MonkeyPatch, fn: Callable[..., Any], *args: Any) -> int:
    """How many composite ops of a function followed a recipe."""
    count, follow = [0], repeats._Recipe.follow

    def counted(*given: Any) -> Any:
        count[0] += 1
        return follow(*given)

    monkeypatch.setattr(repeats._Recipe, "follow", counted)
    torch.compile(fn, backend=Gems(), fullgraph=True)(*args)
    return count[0]


def test_equal_layers_follow_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)) for _ in range(4)))
    model = model.to(DEVICE)
    check(model, rand(6, 8))
    assert followed(monkeypatch, model, rand(6, 8)) >= 3


@pytest.mark.parametrize(
    "other",
    [
        lambda x: (x @ x).softmax(-2),  # other literals
        lambda x: (x @ x).t().softmax(-1),  # other strides
        lambda x: (x.bfloat16() @ x.bfloat16()).softmax(-1),
        lambda x: (x @ x)[:4].softmax(-1),
        lambda x: torch.log_softmax(x @ x, -1),  # another op
        lambda x: torch.where(x > 0, x, 0.0).softmax(-1),  # who is looked into
    ],
)
def test_what_differs_is_taken_apart(
    monkeypatch: pytest.MonkeyPatch, other: Callable[[Tensor], Tensor]
) -> None:
    def fn(x: Tensor) -> tuple[Tensor, Tensor]:
        return (x @ x).softmax(-1), other(x)

    assert followed(monkeypatch, fn, rand(8, 8)) == 0
    check(fn, rand(8, 8))


def test_the_same_operand_twice_is_no_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    def fn(x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        norm = nn.functional.layer_norm
        return norm(x, (8,), w, w), norm(x, (8,), w, b)

    assert followed(monkeypatch, fn, rand(6, 8), rand(8), rand(8)) == 0
    check(fn, rand(6, 8), rand(8), rand(8))


def test_zero_and_minus_zero() -> None:
    assert repeats._key("op", [0.0]) != repeats._key("op", [-0.0])
    assert len({repeats._key("op", [n]) for n in (1, 1.0, True)}) == 3
