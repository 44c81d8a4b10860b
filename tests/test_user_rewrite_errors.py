"""``@gems_compile.rewrite``: wrong numbers are never used, and a mistake is one clear sentence."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import compile_, gems_only, rand
from rewritecheck import (
    MANY,
    by_sigmoid,
    capped,
    capping,
    missed,
    no_rule_is_left,
    rewrites,
    rule_of,
)
from torch import Tensor

import gems_compile
from gems_compile import registered
from gems_compile.errors import RewriteError

pytestmark = gems_only


_no_rule_is_left = pytest.fixture(autouse=True)(no_rule_is_left)


# numbers ----------------------------------------------------------------------------------------


def test_wrong_numbers_are_never_used(caplog: pytest.LogCaptureFixture) -> None:
    rule = rule_of(capped, lambda x, cap: cap * torch.tanh(x / cap * 1.001), (4, 8), 2.0)
    program, x = lambda x: capped(x, 3.0), rand(3, 5)
    got, log = rewrites(rule, program, x)
    assert "the result is" in missed(log)[0] and "is its rounding" in missed(log)[0]
    assert "is not applied" in caplog.text
    torch.testing.assert_close(got, program(x))
    with pytest.raises(RewriteError, match=r"in float32 the result is .* from the pattern's"):
        rule.check()


def test_wrong_gradients_are_never_used() -> None:
    rule = rule_of(capped, lambda x, cap: cap * torch.tanh(x.detach() / cap), (4, 8), 2.0)
    with pytest.raises(RewriteError, match="the gradient of x is"):
        rule.check()


def test_infinite_and_missing_numbers_are_compared() -> None:
    """They must stand in the same places, and are no measure of how far others may be."""
    given = torch.tensor([-1.0, 0.0, 2.0, math.inf])
    for replacement, good in (
        (lambda x: x.log() * 2.0, True),
        (lambda x: (x.log() * 2.0).nan_to_num(), False),
        (lambda x: (x * 1.01).log() * 2.0, False),
    ):
        rule = rule_of(lambda x: 2.0 * x.log(), replacement, given)
        if good:
            assert rule.check()["float32"] == "the same numbers"
        else:
            with pytest.raises(RewriteError, match="from the pattern's"):
                rule.check()


def test_sixteen_bits_and_what_check_says() -> None:
    same = rule_of(lambda x: x * 2.0 + 1.0, lambda x: 1.0 + 2.0 * x, (64,), dtypes=MANY)
    assert same.check() == dict.fromkeys(MANY, "the same numbers")
    near = rule_of(lambda x: torch.exp(x) * 2.0, lambda x: (x.float().exp() * 2).to(x), (64,),
                   dtypes=MANY)  # fmt: skip
    assert "within rounding" in near.check()["bfloat16"]
    rough = rule_of(lambda x: x * 3.0, lambda x: (x.bfloat16() * 3.0).to(x), (64,), dtypes=MANY)
    with pytest.raises(RewriteError, match="in float32"):
        rough.check()


# mistakes of users --------------------------------------------------------------------------------

HELD = torch.ones(4)
MISTAKES = [
    (capped, lambda x: x, ((4, 8), 2.0), {}, "the replacement takes x; the pattern takes x, cap"),
    (capped, by_sigmoid, ((4, 8),), {}, "the example has 1 values for 2 parameters (x, cap)"),
    (capped, by_sigmoid, ((4, 8), 2), {}, "the example of cap is 2; a shape such as"),
    (lambda c: c, lambda c: c, (2.0,), {}, "none of its parameters is a tensor"),
    (capped, by_sigmoid, ((4, 8), 2.0), {"because": ""}, "is no reason in words"),
    (lambda x: x, lambda x: x + 0, ((4,),), {}, "the pattern calls nothing"),
    (lambda x: x.sum() * 1 if x.sum() > 0 else x, lambda x: x, ((4,),), {}, "the pattern fails: "),
    (lambda x: (x + 1, x), lambda x: x + 1, ((4,),), {}, "the pattern returns a tuple"),
    (lambda x: x + 1, lambda x: (x + 1, x), ((4,),), {}, "the replacement returns a tuple"),
    (lambda x: x.add_(1), lambda x: x + 1, ((4,),), {}, "it writes into its argument"),
    (lambda x: x + 1, lambda x: x.add_(1), ((4,),), {}, "which writes or is random"),
    (lambda x: F.dropout(x, 0.5), lambda x: x * 1, ((4,),), {}, "draws random numbers"),
    (lambda x: x + HELD, lambda x: x + 1, ((4,),), {}, "the pattern reads a tensor that"),
    (lambda x: x + 1, lambda x: x + HELD, ((4,),), {}, "the replacement reads a tensor that is"),
    (lambda x, c: x * (c * 2), lambda x, c: x, ((4,), 1.0), {}, "no call of the pattern is given"),
    (lambda x: x + 1, lambda x: (x + 1).double(), ((4,),), {}, "gives float64 [4]"),
    (lambda x: x.T.abs(), lambda x: x.abs().T.clone(memory_format=torch.contiguous_format),
     ((4, 5),), {}, "with strides [4, 1]"),
    (lambda x: x * 1.0, lambda x: x, ((4,),), {}, "lies in the memory of a parameter"),
    (lambda x: x + 1, 3, ((4,),), {}, "the replacement 3 is no function"),
    (lambda x: x + 1, None, ((4,),), {"dtypes": ()}, "dtypes=() is for nothing"),
    (lambda x: x + 1, None, ((4,),), {"dtypes": ("float23",)}, "close to it: float32"),
    ("capped", None, ((4,),), {}, "the pattern 'capped' is no function"),
]  # fmt: skip


@pytest.mark.parametrize(("pattern", "replacement", "example", "more", "text"), MISTAKES)
def test_mistakes(pattern: Any, replacement: Any, example: Any, more: Any, text: str) -> None:
    with pytest.raises(RewriteError) as raised:
        rule_of(pattern, replacement, *example, **more)
    assert text in str(raised.value) and "\n" not in str(raised.value)


def test_a_built_in_name_is_taken() -> None:
    def attention(x: Tensor) -> Tensor:
        return x + 1

    with pytest.raises(RewriteError, match="attention is the name of a built-in rewrite"):
        rule_of(lambda x: 1 + x, attention, (4,))


def test_a_cell_that_is_run_again() -> None:
    first, second = capping(), capping(because="another reason")
    first.add()
    with second:
        compile_(lambda x: capped(x, 3.0))(rand(3, 5))
        first.remove()  # it is no longer there, and its successor stays
        assert [r.because for r in registered.active(False)] == ["another reason"]
    (entry,) = gems_compile.reports()[0].rewrites.fired
    assert entry.because == "another reason"


def test_called_it_is_the_replacement() -> None:
    x = rand(3, 5)
    assert torch.equal(capping()(x, 3.0), by_sigmoid(x, cap=3.0))
    assert repr(capping()) == "<rewrite by_sigmoid>"
