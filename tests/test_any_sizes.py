"""Kernels with sizes as arguments: each sample of each declared op, behind eager PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
from eagercheck import nothing_left  # noqa: F401
from helpers import gems_only
from opcheck import DECLARED, RANDOM, calls, compare, make, overload, scale_of, tensors

import gems_compile
from gems_compile import eager
from gems_compile.calls import varying
from gems_compile.kernels.op import OPS
from gems_compile.kernels.target import current_target

pytestmark = gems_only


@pytest.fixture(autouse=True)
def for_any_sizes(monkeypatch: Any) -> None:
    monkeypatch.setattr(varying, "OWN_SIZES", 0)


def _served() -> dict[str, str]:
    """Declared ops that eager mode can take over, and how it names them."""
    target = current_target()
    names = {str(op): name for name, op in eager._overloads().items()}
    return {
        op: names[op]
        for op in DECLARED
        if op in names
        and op not in RANDOM
        and calls(op)
        and eager.why_not_replaced(names[op], target) is None
    }


SERVED = _served()


@pytest.mark.parametrize("op", SERVED)
def test_op(op: str) -> None:
    name, declared = SERVED[op], OPS[op]
    dtype = "float32" if "float32" in declared.dtypes else declared.dtypes[0]
    for sample in calls(op):
        args, kwargs = make(sample, dtype)
        with gems_compile.use_gems(only=[name]):
            got = overload(op)(*args, **kwargs)
        compare(tensors(got), overload(op), args, kwargs, declared.name, scale_of(declared))


def test_most_have_such_a_kernel() -> None:
    """Not so: ops whose form depends on sizes, and those that read none."""
    shared = 0
    for op, name in SERVED.items():
        args, kwargs = make(calls(op)[0], OPS[op].dtypes[0])
        with gems_compile.use_gems(only=[name]):
            overload(op)(*args, **kwargs)
        handler = eager._state.handlers[name]
        shared += any(v.shared for v in handler.variants.values())
    assert shared > 0.8 * len(SERVED), (shared, len(SERVED))
