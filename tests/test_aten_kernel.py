"""Overloads of numbers that ATen's GPU kernels put on the device, where no kernel in Python may
meet them: see ``aten_kernel``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from eagercheck import nothing_left, replaceable  # noqa: F401
from helpers import DEVICE, assert_same_metadata

import gems_compile
from gems_compile import eager
from gems_compile.calls.aten_kernel import BY_TENSOR, CALLED_WITH_NUMBERS, ByTensor, companions

aten = torch.ops.aten
DTYPES = (torch.bfloat16, torch.float32, torch.int32, torch.int64)


def arguments(overload: Any, ordered: torch.Tensor, number: Any) -> tuple[Any, ...]:
    return (number, ordered) if BY_TENSOR[overload][1] == 0 else (ordered, number)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("number", [3, 2.5, 3.0, -1, 100, True])
@pytest.mark.parametrize("overload", BY_TENSOR, ids=str)
def test_a_tensor_in_place_of_a_number(overload: Any, number: Any, dtype: torch.dtype) -> None:
    ordered = torch.tensor([0, 1, 2, 3, 3, 3, 5, 8], dtype=dtype, device=DEVICE)
    kernel = ByTensor(overload)
    for more in ({}, {"right": True}, {"out_int32": True}):
        args = arguments(overload, ordered, number)
        kwargs: list[dict[str, Any]] = [dict(more), dict(more)]
        if "out" in overload._overloadname:
            made = torch.int32 if "out_int32" in more else torch.int64
            for given in kwargs:
                given["out"] = torch.empty((), dtype=made, device=DEVICE)
        got, want = kernel.call_boxed(None, *args, **kwargs[0]), overload(*args, **kwargs[1])
        assert_same_metadata(got, want)
        assert torch.equal(got, want), (number, more)


def test_who_is_replaced_beside() -> None:
    """All of ``BY_TENSOR``, wherever the op that they call is ours."""
    assert companions(["aten._to_copy.default", "aten.gelu.default"], "CUDA") == {
        str(overload) for overload in BY_TENSOR
    }
    assert not companions(["aten._to_copy.default"], "CPU")
    declared = eager._overloads()
    assert all(name in declared for names in CALLED_WITH_NUMBERS.values() for name in names)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numbers_where_every_op_is_ours(dtype: torch.dtype) -> None:
    ordered = torch.tensor([0, 1, 2, 3, 3, 5, 8], dtype=dtype, device=DEVICE)
    calls = {
        "searchsorted": lambda: torch.searchsorted(ordered, 2.5),
        "bucketize": lambda: torch.bucketize(3, ordered),
        "power": lambda: torch.pow(2, ordered),
        "power of a float": lambda: torch.pow(2.5, ordered),
        "ldexp": lambda: torch.ldexp(ordered, ordered),
    }
    want = {name: call() for name, call in calls.items()}
    for names in (["_to_copy"], replaceable()):
        with gems_compile.use_gems(only=names):
            for name, call in calls.items():
                torch.testing.assert_close(call(), want[name])
