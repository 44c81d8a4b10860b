"""What is known of an overload, once, is what its schema says."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch

from gems_compile.lowering.builder import Builder, _reshape
from gems_compile.lowering.ir import Value
from gems_compile.lowering.overload import Facts, _known, facts_of, name_of

aten = torch.ops.aten


@pytest.mark.parametrize(
    ("target", "memory", "written", "effect", "pure"),
    [
        (aten.add.Tensor, "new", (), False, True),
        (aten.add_.Tensor, "written", ((0, "self"),), True, False),
        (aten.view.default, "first", (), False, True),
        (aten._unsafe_view.default, "first", (), False, True),
        (aten.native_dropout.default, "new", (), True, False),
        (aten._foreach_add_.List, "new", ((0, "self"),), True, False),
        (aten.add.out, "written", ((3, "out"),), True, False),
    ],
    ids=str,
)
def test_facts(target: Any, memory: str, written: Any, effect: bool, pure: bool) -> None:
    facts = facts_of(target)
    assert facts is not None
    assert (facts.name, facts.memory, facts.written) == (str(target), memory, written)
    assert (facts.effect, facts.pure) == (effect, pure)
    assert facts.fresh is (memory == "new" and not written)


@pytest.mark.parametrize("target", [operator.add, "output", torch.ops.higher_order.cond], ids=str)
def test_what_is_no_overload(target: Any) -> None:
    assert facts_of(target) is None
    assert name_of(target) == ""


def test_an_id_is_never_another_overloads() -> None:
    """Facts are found by id: the overload must live as long as they do."""
    assert isinstance(facts_of(aten.mul.Tensor), Facts)
    assert all(facts.target is not None and id(facts.target) == k for k, facts in _known.items())


def test_equal_reshapes_are_one_view_unless_sizes_are_symbols() -> None:
    import sympy

    n, known = sympy.Symbol("n", positive=True, integer=True), _reshape.cache_info().currsize
    b = Builder()
    symbolic = [b.reshape(Value("buffer", None, (), (n, 4), "float32"), (n, 2, 2)) for _ in "ab"]
    assert symbolic[0].params is not symbolic[1].params
    assert _reshape.cache_info().currsize == known
    static = [b.reshape(Value("buffer", None, (), (7, 4), "float32"), (7, 2, 2)) for _ in "ab"]
    assert static[0].params is static[1].params
