"""How many elements a thread of a pointwise kernel has, by what it reads of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from helpers import DEVICE, compile_, gems_only, ints
from opcheck import options, trace
from torch import Tensor

from gems_compile.lowering.pipeline import compile_graph
from gems_compile.lowering.source import Source

pytestmark = gems_only


def dequantize(q: Tensor, scale: Tensor) -> Tensor:
    return (q.float() * scale).bfloat16()


def normalize(q: Tensor, m: Tensor) -> Tensor:
    """With two numbers to a row, as images have them to a channel."""
    return ((q.float() - m[0]) * m[1]).bfloat16()


def with_gelu(q: Tensor, scale: Tensor) -> Tensor:
    return torch.nn.functional.gelu(q.float() * scale)


def where(q: Tensor, x: Tensor) -> Tensor:
    return torch.where(q > 0, x, 0)


BFLOAT16 = {"dtype": torch.bfloat16}
#: program, second operand, (XBLOCK, warps): 32, 16 or 8 elements of a thread, and those of rows
#: whose programs have 32, and 16
CASES: dict[str, tuple[Callable[..., Tensor], Tensor, tuple[int, int]]] = {
    "a number to a row": (dequantize, torch.ones(40, 1), (2048, 2)),
    "a number to all": (dequantize, torch.ones(1), (2048, 2)),
    "a number to a column": (dequantize, torch.ones(4096), (1024, 2)),
    "numbers of their own": (where, torch.ones(40, 4096, **BFLOAT16), (1024, 2)),
    "numbers to a row": (normalize, torch.ones(2, 40, 1), (2048, 2)),
    "long": (with_gelu, torch.ones(40, 1), (2048, 4)),
}


BY_ROWS = ("numbers to a row", "long")


def written(program: Callable[..., Tensor], other: Tensor, multiprocessors: int) -> Source:
    q = torch.empty(40, 4096, dtype=torch.int8, device=DEVICE)
    target = dataclasses.replace(options().target, multiprocessors=multiprocessors)
    graph = trace(program, q, other.to(DEVICE))
    (source,) = compile_graph(graph, [], options(target=target))[1].sources
    return source


@pytest.mark.parametrize("case", CASES)
def test_elements_of_a_thread(case: str) -> None:
    program, other, tile = CASES[case]
    source = written(program, other, multiprocessors=8)
    assert (source.meta["constants"]["XBLOCK"], source.meta["num_warps"]) == tile
    assert ("z = pid" in source.text) == (case in BY_ROWS)


@pytest.mark.parametrize("case", ["a number to a row", "a number to all", "numbers to a row"])
def test_more_of_them_where_there_is_work_for_long_tiles(case: str) -> None:
    program, other, tile = CASES[case]
    source = written(program, other, multiprocessors=1)
    wanted = tile if case in BY_ROWS else (4096, 2)
    assert (source.meta["constants"]["XBLOCK"], source.meta["num_warps"]) == wanted


@pytest.mark.parametrize("shape", [(40, 4096), (37, 1111), (2, 3, 2049)], ids=str)
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8], ids=str)
def test_numbers_of_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    q = ints(*shape, high=100, dtype=dtype)
    for scale in (torch.rand(*shape[:-1], 1), torch.rand(shape[-1])):
        got = compile_(dequantize)(q, scale.to(DEVICE))
        assert torch.equal(got, dequantize(q, scale.to(DEVICE)))
    both = torch.rand(2, *shape[:-1], 1).to(DEVICE)
    assert torch.equal(compile_(normalize)(q, both), normalize(q, both))
