"""Kernels of equal layers are written once: who is alike, and what a taken-over source says.

That it is what would have been written is checked in every test of the suite: see conftest.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE, check, gems_only, rand
from torch import Tensor, nn

from gems_compile.backend import Gems
from gems_compile.lowering import pipeline

pytestmark = gems_only


def sources(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
    backend = Gems()
    torch.compile(fn, backend=backend, fullgraph=True, **kwargs)(*args)
    return [s for report in backend.reports for s in report.source_of.values()]


def taken_over(found: list[Any]) -> int:
    return sum(s.like is not None for s in found)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(F.gelu(self.norm(x)))


@pytest.mark.parametrize("dynamic", [False, True])
def test_layers_take_over_the_sources_of_the_first(dynamic: bool) -> None:
    model = nn.Sequential(*(Block(32) for _ in range(9))).to(DEVICE)
    x = rand(6, 32)
    check(model, x, dynamic=dynamic)
    found = sources(model, x, dynamic=dynamic)
    assert taken_over(found) >= len(found) // 2
    assert len({s.key for s in found}) <= len(found) - taken_over(found)


def test_a_taken_over_source_names_its_own_tensors_and_lines() -> None:
    def fn(a: Tensor, w: Tensor) -> Tensor:
        first = a.softmax(-1) * 2
        second = (first @ w).softmax(-1) * 2
        return second @ w

    args = rand(8, 8), rand(8, 8)
    check(fn, *args)
    found = [s for s in sources(fn, *args) if "softmax" in s.name]
    assert [s.like for s in found] == [None, found[0]]
    assert found[0].text == found[1].text
    assert "first = " in found[0].commented
    assert "second = " in found[1].commented
    assert not {w for _, _, w in found[0].params} & {w for _, _, w in found[1].params}


@pytest.mark.parametrize(
    "other",
    [
        lambda x: (x * 2.0).softmax(-1),  # the number is another
        lambda x: (x * 3 + 1).softmax(-1),
        lambda x: (x * 3).softmax(-2),
        lambda x: (x * 3).t().softmax(-1),  # other strides
        lambda x: (x * 3).softmax(-1).half(),
        lambda x: (x[:4] * 3).softmax(-1),
        lambda x: (x.bfloat16() * 3).softmax(-1),
    ],
)
def test_what_differs_is_written(other: Callable[[Tensor], Tensor]) -> None:
    def fn(a: Tensor, w: Tensor) -> Tensor:
        return other((a * 3).softmax(-1) @ w)  # one waits for the other: no launch is shared

    args = rand(8, 8), rand(8, 8)
    check(fn, *args)
    assert not taken_over(sources(fn, *args))


def test_an_operand_used_twice_is_not_two_operands() -> None:
    def fn(a: Tensor, b: Tensor, w: Tensor) -> Tensor:
        y = (a * b).softmax(-1) @ w
        return (y * y).softmax(-1)

    args = rand(8, 8), rand(8, 8), rand(8, 8)
    check(fn, *args)
    assert not taken_over(sources(fn, *args))


def test_masks_of_two_layers_differ() -> None:
    """A mask's number is an argument: one text, two masks."""

    def fn(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        first = F.dropout(x, 0.5)
        return first, F.dropout((first * 0 + 1) @ w, 0.5)

    x = torch.ones(64, 64, device=DEVICE)
    one, two = torch.compile(fn, backend="gems", fullgraph=True)(x, x)
    assert not torch.equal(one == 0, two == 0)


def test_what_compiles_longest_is_written_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """And runs where the graph has it."""
    written, source_for = [], pipeline.source_for

    def write(group: Any, *more: Any) -> Any:
        source = source_for(group, *more)
        written.append(source.name)
        return source

    monkeypatch.setattr(pipeline, "source_for", write)

    def fn(a: Tensor, w: Tensor) -> Tensor:
        middle = F.gelu((a.neg().exp() @ w).softmax(-1) * 2 + a)
        return (middle @ w).sin().cos()

    found = [source.name for source in sources(fn, rand(8, 8), rand(8, 8))]
    assert "exp" in found[0] and "softmax" in found[1] and "cos" in found[2]
    assert written == [found[1], found[0], found[2]]
