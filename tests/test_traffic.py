"""The bytes that explain says a call moves are those that it touches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import gems_only, ints, rand
from torch import Tensor

import gems_compile

pytestmark = gems_only


def moved(function: Callable[..., Any], *args: Tensor) -> list[tuple[str, int, int, int]]:
    """(Kind, bytes read, written, and moved by eager) of each call of the only graph."""
    (graph,) = gems_compile.explain(function, *args).graphs
    return [(c.kind, c.read, c.written, c.eager) for c in graph.calls]


ROW = 32 * 4


@pytest.mark.parametrize(
    ("function", "read", "written"),
    [
        (lambda x: x * 2 + 1, 64 * ROW, 64 * ROW),
        (lambda x: (x * 2).sum(-1), 64 * ROW, 64 * 4),
        (lambda x: x[:, :8] * 2 + 1, 64 * 8 * 4, 64 * 8 * 4),
        (lambda x: x[::2].exp() + x[1::2], 64 * ROW, 32 * ROW),
        (lambda x: x[:8].exp() + x[:8].sin(), 8 * ROW, 8 * ROW),
        (lambda x: x.t() * 2 + 1, 64 * ROW, 64 * ROW),
        (lambda x: x[:1].expand(64, 32) * 2 + 1, ROW, 64 * ROW),
        (lambda x: x.expand(3, 64, 32) * 2 + 1, 64 * ROW, 3 * 64 * ROW),
        (lambda x: x.chunk(2, -1)[0].exp() * x.chunk(2, -1)[1], 64 * ROW, 32 * ROW),
    ],
)
def test_parts_of_an_operand(function: Callable[[Tensor], Tensor], read: int, written: int) -> None:
    """Nothing that a view leaves out is read, and what it repeats is read once."""
    (call,) = moved(function, rand(64, 32))
    assert call[:3] == ("kernel", read, written)


def test_rows_of_a_table() -> None:
    """As many as there are places; eager reads no more, and writes and reads what we keep."""
    table, places = rand(1000, 32), ints(24, high=1000)
    (call,) = moved(lambda t, i: torch.nn.functional.embedding(i, t) * 2, table, places)
    read, written = 24 * ROW + 24 * 8, 24 * ROW
    assert call == ("kernel", read, written, read + written + 2 * written)


def test_a_small_table_is_read_once() -> None:
    table, places = rand(3, 32), ints(24, high=3)
    (call,) = moved(lambda t, i: torch.nn.functional.embedding(i, t) * 2, table, places)
    assert call[1] == 3 * ROW + 24 * 8


def test_what_a_loss_picks() -> None:
    """Of logits, which are cast and shifted, one a row: where its target is."""
    logits, target = rand(48, 64, dtype=torch.bfloat16), ints(48, high=64)

    def picked(x: Tensor, t: Tensor) -> Tensor:
        wide = x.float() - 2
        return wide.gather(-1, t[:, None]).exp() * 3

    (call,) = moved(picked, logits, target)
    assert call[1:3] == (48 * 2 + 48 * 8, 48 * 4)


def test_what_is_picked_and_read_in_full() -> None:
    x, t = rand(48, 64), ints(48, high=64)
    (call,) = moved(lambda x, t: x.exp() + x.gather(-1, t[:, None]), x, t)
    assert call[1] == 48 * 64 * 4 + 48 * 8


def test_parts_that_a_product_made() -> None:
    """Each reader of a joint projection reads its own third."""
    linear = torch.nn.Linear(32, 96, bias=False).to(rand(1).device)

    def program(x: Tensor) -> tuple[Tensor, ...]:
        q, k, v = linear(x).chunk(3, -1)
        return q.sin() + 1, (k * 2).sum(-1), v.cumsum(-1) * 2

    with torch.no_grad():
        kernels = [c for c in moved(program, rand(24, 32)) if c[0] == "kernel"]
    assert sum(c[1] for c in kernels) == 3 * 24 * ROW and len(kernels) < 3
