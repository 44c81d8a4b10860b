"""Truth values: torch adds, fills and reduces bools as bools, whatever the literals beside them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import DEVICE, bools, compile_, gems_only, ints
from machine_code import assembly, sources
from opcheck import overload, trace
from torch import Tensor

from gems_compile.kernels.op import BODIES
from gems_compile.lowering.spelling import QUESTIONS

pytestmark = gems_only

OF_TWO: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": lambda x, y: (x + y).int(),
    "sum of sums": lambda x, y: ((x + y) + y).int() + x,
    "with alpha": lambda x, y: torch.add(x, y, alpha=2).int(),
    "with alpha 0": lambda x, y: torch.add(x, y, alpha=0).int(),
    "with True": lambda x, y: (x + True).int() + y,
    "product": lambda x, y: (x * y).int() + x,
    "not": lambda x, y: ~(x + y),
    "compared": lambda x, y: (x + y) == x,
    "with a number": lambda x, y: (x == 1).int() + (y != 2).int() + (x < 0.5).int(),
    "condition": lambda x, y: torch.where(x + y, 1.5, 2.5),
    "counted": lambda x, y: (x + y).sum(1),
    "counted so far": lambda x, y: (x + y).cumsum(1),
    "maximum": lambda x, y: torch.maximum(x, y).int() + 1,
    "selected": lambda x, y: torch.where(x, y, x + y).int() + 1,
    **{
        f"filled with {value}": lambda x, y, value=value: x.masked_fill(y, value).int() + 1
        for value in (2, 0.5, -1, 0, 256, float("nan"))
    },
    "filled with a tensor": lambda x, y: x.masked_fill(y, torch.tensor(3, device=x.device)).int(),
    "padded": lambda x, y: torch.nn.functional.pad(x, (1, 2), value=2).int() + 1,
}


@pytest.mark.parametrize("name", OF_TWO)
def test_of_two(name: str) -> None:
    x, y = bools(5, 33), bools(5, 33)
    assert torch.equal(compile_(OF_TWO[name])(x, y), OF_TWO[name](x, y))


@pytest.mark.parametrize("name", ["sum", "with alpha 0", "filled with 2", "selected"])
def test_of_two_compiled_for_a_gpu(name: str, tmp_path: Path) -> None:
    x, y = torch.empty(5, 33, dtype=torch.bool), torch.empty(5, 33, dtype=torch.bool)
    (source,) = sources(trace(OF_TWO[name], x, y), "cuda", 90)
    assert "st.global" in assembly(source, tmp_path)


@pytest.mark.parametrize("shape", [(5, 33), (5, 32), (3, 40_000)], ids=str)
@pytest.mark.parametrize("value", [False, True])
@pytest.mark.parametrize("op", [torch.amax, torch.amin, torch.any, torch.all])
def test_reduced(op: Callable[..., Tensor], value: bool, shape: tuple[int, int]) -> None:
    """Lanes beyond the row's end are none of it."""
    x = torch.full(shape, value, device=DEVICE)
    for dim, given in ((1, x), (0, x.t().contiguous())):
        assert bool((compile_(lambda t, dim=dim: op(t, dim).float())(given) == value).all())
    torch._dynamo.reset()
    assert bool((compile_(lambda t: op(t > 0, 1).float())(x.float() - 0.5) == value).all())


@pytest.mark.parametrize("value", [-1, 255, 0])
def test_bytes_filled_with_what_wraps(value: int) -> None:
    x, mask = ints(5, 33, high=200, dtype=torch.uint8), bools(5, 33)

    def fn(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return x.masked_fill(mask, value).int() + 1, torch.full_like(x, value).int() + x

    for a, b in zip(compile_(fn)(x, mask), fn(x, mask), strict=True):
        assert torch.equal(a, b)


def test_which_ops_are_questions() -> None:
    """Those, and only those, whose result is bool for floats."""
    found = set()
    for op in BODIES.values():
        if op.kind != "pointwise" or not op.overloads[0].startswith("aten."):
            continue
        one = overload(op.overloads[0])
        tensors = [a for a in one._schema.arguments if str(a.type) == "Tensor"]
        more = [a for a in one._schema.arguments if not a.has_default_value()]
        try:
            given = [torch.ones(2)] * len(tensors) + [1.0] * (len(more) - len(tensors))
            result = one(*given)
        except (RuntimeError, TypeError, IndexError):
            continue  # of integers alone, or with operands of its own kinds
        if result.dtype == torch.bool:
            found.add(op.name)
    assert found == set(QUESTIONS)


NARROW = [torch.bool, torch.uint8, torch.int8, torch.int16]
WITH_REDUCED: dict[str, Callable[[Tensor], Tensor]] = {
    "amax": lambda x: (x.amax(1, keepdim=True) + x).float(),
    "amin": lambda x: (x.amin(1, keepdim=True) + x).float(),
    "amax of columns": lambda x: (x.amax(0) + x).float(),
    "amin of columns": lambda x: (x.amin(0) + x).float(),
    "amax of all": lambda x: (x.amax() + x).float(),
    "max": lambda x: (x.max(1)[0][:, None] + x).float(),
    "any": lambda x: (x.any(1, keepdim=True) + x).float(),
    "not": lambda x: (~x.amin(1, keepdim=True) + ~x).float(),
    "doubled": lambda x: (x.amax(1) + x.amax(1)).float(),
    "sum": lambda x: (x.sum(1, keepdim=True, dtype=x.dtype) + x).float(),
}


@pytest.mark.parametrize("shape", [(5, 33), (3, 40_000), (700, 64)], ids=str)
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("name", WITH_REDUCED)
def test_what_is_reduced_stays_narrow(
    name: str, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    """A kernel that goes on with it adds bools as bools, and bytes wrap as eager's do."""
    if dtype == torch.bool:
        x = bools(*shape)
        x[:, 0], x[1] = True, False
    else:
        largest = torch.iinfo(dtype).max
        x = ints(*shape, low=largest - 9, high=largest, dtype=dtype)
        x[0, 0] = torch.iinfo(dtype).min
    step = WITH_REDUCED[name]
    assert torch.equal(compile_(step)(x), step(x))
