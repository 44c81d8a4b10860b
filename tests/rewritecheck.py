"""What tests of users' rewrites share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from helpers import compile_
from torch import Tensor

import gems_compile
from gems_compile import registered

MANY = ("float32", "float16", "bfloat16")


def capped(x: Tensor, cap: float) -> Tensor:
    return cap * torch.tanh(x / cap)


def by_sigmoid(x: Tensor, cap: float) -> Tensor:
    return cap * (2 * torch.sigmoid(2 * (x / cap)) - 1)


def rule_of(
    pattern: Callable, replacement: Callable, *example: Any, **more: Any
) -> gems_compile.rewriting.Rewriting:
    more = {"because": "the test wants it", "dtypes": ("float32", "float64"), **more}
    rule = gems_compile.rewrite(pattern, example=example, **more)(replacement)
    rule.remove()
    return rule


def capping(**more: Any) -> Any:
    return rule_of(capped, by_sigmoid, (4, 8), 2.0, **more)


def rewrites(rule: Any, program: Callable, *args: Any, **options: Any) -> tuple[Any, Any]:
    """The result of the compiled program, and what the rewrites did."""
    torch._dynamo.reset()
    with rule:
        result = compile_(program, **options)(*args)
    return result, gems_compile.reports()[0].rewrites


def fired(log: Any) -> list[str]:
    return [f.rule for f in log.fired]


def missed(log: Any) -> list[str]:
    return [f"{m.rule}: {m.reason}" for m in log.near_misses]


def no_rule_is_left() -> Iterator[None]:
    """A fixture: a test that leaves a rule behind fails, and alone."""
    yield
    left = dict(registered._rules)
    registered._rules.clear()
    assert not left
