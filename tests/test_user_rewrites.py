"""``@gems_compile.rewrite``: it fires where its pattern stands, says why not, is never wrong."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import triton
from helpers import DEVICE, compile_, gems_only, no_new_graph, rand
from rewritecheck import MANY, capped, capping, fired, missed, no_rule_is_left, rewrites, rule_of
from torch import Tensor, nn
from warmcheck import results, said

import gems_compile
from gems_compile.kernels import mathlib
from gems_compile.lowering import calls
from gems_compile.lowering.whole_graphs import FROM_CACHE, KEPT

pytestmark = gems_only


_no_rule_is_left = pytest.fixture(autouse=True)(no_rule_is_left)


# it fires -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "program",
    [
        lambda x: torch.tanh(x / 3.0) * 3.0,
        lambda x: x.div(3).tanh().mul(3),
        lambda x: 3 * (x / 3.0).tanh(),
        lambda x: torch.multiply(torch.tanh(torch.true_divide(x, 3)), 3),
    ],
)
def test_a_chain_is_found_however_it_is_spelt(program: Callable) -> None:
    x = rand(3, 5)
    got, log = rewrites(capping(), program, x)
    assert (fired(log), missed(log)) == (["by_sigmoid"], [])
    torch.testing.assert_close(got, program(x))
    assert log.fired[0].because == "the test wants it" and ".py:" in log.fired[0].source


def test_names_that_are_one_op_have_one_schema() -> None:
    for other, name in calls._SAME_AS.items():
        ops = [getattr(torch.ops.aten, n.removeprefix("aten.")) for n in (other, name)]
        for overload in set(ops[0].overloads()) - {"out", "Tensor_out", "Scalar_out", "names"}:
            given = [
                [(a.name, str(a.type)) for a in getattr(op, overload)._schema.arguments]
                for op in ops
                if overload in op.overloads()
            ]
            assert len(given) == 2 and given[0] == given[1], (other, overload)


def test_the_replacement_is_what_runs() -> None:
    with capping():
        compile_(lambda x: capped(x, 3.0))(rand(3, 5))
    (report,) = gems_compile.reports()
    ops = {str(node.target) for group in report.plan.groups for node in group.nodes}
    assert "aten.sigmoid.default" in ops and "aten.tanh.default" not in ops
    assert report.launches == 1 and report.aten_calls == 0


def test_behind_the_block_it_holds_no_more() -> None:
    rule, program, x = capping(), lambda x: capped(x, 3.0), rand(3, 5)
    assert fired(rewrites(rule, program, x)[1]) == ["by_sigmoid"]
    torch._dynamo.reset()
    compile_(program)(x)
    log = gems_compile.reports()[0].rewrites
    assert (fired(log), missed(log)) == ([], [])


def test_which_rewrites_the_option_asks_for() -> None:
    rule, program, x = capping(memory=True), lambda x: capped(x, 3.0), rand(3, 5)
    for level, wanted in ((True, []), ("memory", ["by_sigmoid"])):
        _, log = rewrites(rule, program, x, options={"rewrites": level})
        assert fired(log) == wanted
    rewrites(capping(), program, x, options={"rewrites": False})
    assert gems_compile.reports()[0].rewrites is None


def test_training_differentiates_the_replacement() -> None:
    weight = rand(8, 8, dtype=torch.float64)

    def program(x: Tensor) -> Tensor:
        return capped(x @ weight, 5.0).square().sum()

    found = []
    for run in (program, lambda x: rewrites(capping(), program, x)[0]):
        x = rand(4, 8, dtype=torch.float64).fill_(0.3).requires_grad_()
        run(x).backward()
        found.append(x.grad)
    assert fired(gems_compile.reports()[0].rewrites) == ["by_sigmoid"]
    torch.testing.assert_close(*found)
    (backward,) = (r for r in gems_compile.reports() if r.kind == "backward")
    assert any("sigmoid" in m.op for g in backward.plan.groups for m in g.members if m.op)


def test_equal_layers_and_checkpoints() -> None:
    class Layer(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.utils.checkpoint.checkpoint(capped, x, 2.0, use_reentrant=False) + 1

    model, x = nn.Sequential(Layer(), Layer()), rand(3, 5).requires_grad_()
    got, log = rewrites(capping(), model, x)
    assert fired(log) == ["by_sigmoid"] * 2
    torch.testing.assert_close(got, model(x))


def scaled(x: Tensor) -> Tensor:
    return (x / math.sqrt(x.shape[-1])).softmax(-1)


def scaled_by_product(x: Tensor) -> Tensor:
    return (x * (1 / math.sqrt(x.shape[-1]))).softmax(-1)


def test_a_pattern_may_ask_for_shapes() -> None:
    """Its example has rows of 8; what counts is the chain's own size, and its last dim."""
    rule = rule_of(scaled, scaled_by_product, (4, 8))
    got, log = rewrites(rule, lambda x: (x / 4.0).softmax(2), x := rand(2, 3, 16))
    assert fired(log) == ["scaled_by_product"]
    torch.testing.assert_close(got, (x / 4.0).softmax(2))
    _, log = rewrites(rule, lambda x: (x / 4.0).softmax(1), x)
    assert missed(log) == ["scaled_by_product: the program has 1, where the pattern has 2"]
    _, log = rewrites(rule, lambda x: (x / 8.0).softmax(-1), x)
    assert missed(log) == ["scaled_by_product: the program has 8.0, where the pattern has 4.0"]


def test_dims_that_count_from_either_end_are_told_apart() -> None:
    """-1 is the last of the broadcast dims here, and 1 is not, though the first operand has two."""
    rule = rule_of(
        lambda x, y: F.cosine_similarity(x, y, dim=-1) * 2.0,
        lambda x, y: 2.0 * F.cosine_similarity(x, y, dim=-1),
        (4, 4), (3, 4, 4),
    )  # fmt: skip
    x, y = rand(4, 4), rand(3, 4, 4)
    for dim, times in ((-1, 1), (1, 0)):
        program = lambda x, y, d=dim: F.cosine_similarity(x, y, dim=d) * 2.0  # noqa: E731
        got, log = rewrites(rule, program, x, y)
        assert len(fired(log)) == times
        torch.testing.assert_close(got, program(x, y))


def test_dynamic_sizes_compile_once() -> None:
    rule = rule_of(halves, halves_at_once, (4, 8))
    with rule:
        compiled = compile_(lambda x: halves(x + 1), dynamic=True)
        x = rand(6, 16)
        torch.testing.assert_close(compiled(x), halves(x + 1))
        assert fired(gems_compile.reports()[0].rewrites) == ["halves_at_once"]
        with no_new_graph():
            for shape in ((7, 16), (3, 32)):
                x = rand(*shape)
                torch.testing.assert_close(compiled(x), halves(x + 1))


def halves(x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([-b, a], -1)


def halves_at_once(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat([-x[..., half:], x[..., :half]], -1)


def turned(pairs: Tensor, turns: Tensor) -> Tensor:
    return torch.view_as_real(torch.view_as_complex(pairs) * turns)


def turned_in_reals(pairs: Tensor, turns: Tensor) -> Tensor:
    x, y = pairs.unbind(-1)
    cos, sin = torch.view_as_real(turns).unbind(-1)
    return torch.stack((x * cos - y * sin, x * sin + y * cos), -1)


def test_complex_numbers() -> None:
    angles = torch.arange(12.0).reshape(3, 4)
    rule = rule_of(turned, turned_in_reals, (2, 3, 4, 2), torch.polar(torch.ones(3, 4), angles))
    assert set(rule.check()) == {"float32", "float64"}
    pairs, turns = rand(5, 3, 4, 2), torch.polar(torch.ones(3, 4), angles).to(DEVICE)
    got, log = rewrites(rule, turned, pairs, turns)
    assert fired(log) == ["turned_in_reals"]
    torch.testing.assert_close(got, turned(pairs, turns))
    wide = [
        t.to(torch.float64 if t.is_floating_point() else torch.complex128) for t in (pairs, turns)
    ]
    torch.testing.assert_close(got.double(), turned(*wide), rtol=1e-6, atol=1e-6)


@gems_compile.pointwise
@triton.jit
def soft_cap(x, cap: float):
    return cap * mathlib.tanh(x / cap)


@soft_cap.backward
@gems_compile.pointwise
@triton.jit
def soft_cap_backward(dy, x, cap: float):
    t = mathlib.tanh(x / cap)
    return dy * (1 - t * t)


def test_a_kernel_of_the_users_as_replacement() -> None:
    rule = rule_of(capped, lambda x, cap: soft_cap(x, cap), (4, 8), 2.0, dtypes=MANY)
    assert set(rule.check()) == set(MANY)
    x = rand(3, 5).requires_grad_()
    got, log = rewrites(rule, lambda x: capped(x + 1, 3.0) * 2, x)
    got.sum().backward()
    assert len(fired(log)) == 1
    assert [(r.launches, r.aten_calls) for r in gems_compile.reports()] == [(1, 0), (1, 0)]
    wide = x.detach().double().requires_grad_()
    (capped(wide + 1, 3.0) * 2).sum().backward()
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("inside", [False, True])
def test_autocast(inside: bool) -> None:
    """Around the whole, or a region of the program: the chain's dtype is what it gives there."""
    x, w = rand(4, 8), rand(8, 8)

    def program(x: Tensor) -> Tensor:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=inside):
            return capped(x @ w, 3.0)

    with torch.autocast(DEVICE, torch.bfloat16, enabled=not inside):
        run = program if inside else lambda x: capped(x @ w, 3.0)
        got, log = rewrites(capping(dtypes=MANY), run, x)
        want = run(x)
    assert fired(log) == ["by_sigmoid"] and got.dtype == want.dtype == torch.bfloat16
    torch.testing.assert_close(got, want, rtol=2**-6, atol=2**-6)


@pytest.mark.skipif(
    DEVICE != "cpu", reason="a GPU's attention in float32 is less exact, so refused"
)
def test_attention_as_replacement_goes_on_to_the_built_in_rewrites() -> None:
    def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(torch.einsum("bhld,bhsd->bhls", q, k) / 4.0, -1) @ v

    def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, scale=1 / 4.0).clone(
            memory_format=torch.contiguous_format
        )

    heads = (2, 3, 8, 16)
    rule = rule_of(written_out, fused, heads, heads, heads, dtypes=("float32",))
    q, k, v = (rand(2, 4, 8, 16) for _ in range(3))
    got, log = rewrites(rule, written_out, q, k, v)
    assert fired(log) == ["fused"], missed(log)
    torch.testing.assert_close(got, written_out(q, k, v), rtol=1e-4, atol=1e-5)


def test_dropout_that_drops_nothing_is_part_of_a_chain() -> None:
    rule = rule_of(lambda x: F.dropout(x.exp(), 0.5, False) * 2.0, lambda x: 2.0 * x.exp(), (4,))
    model = nn.Dropout(0.5).to(DEVICE)
    for training, wanted in ((False, ["<lambda>"]), (True, [])):
        model.train(training)
        _, log = rewrites(rule, lambda x: model(x.exp()) * 2.0, rand(4))
        assert fired(log) == wanted


def test_a_function_transform_is_left_alone() -> None:
    x = rand(3, 5)
    got, log = rewrites(capping(), torch.func.vmap(lambda x: capped(x, 3.0)), x)
    assert (fired(log), missed(log)) == ([], [])
    torch.testing.assert_close(got, capped(x, 3.0))


# it does not, and says why ------------------------------------------------------------------------


def also_returned(x: Tensor) -> tuple[Tensor, Tensor]:
    h = torch.tanh(x / 3.0)
    return 3.0 * h, h


def written_between(x: Tensor) -> Tensor:
    h, y = x / 3.0, x.clone()
    y.mul_(2)
    return 3.0 * torch.tanh(h) + y


NEARLY = [
    (also_returned, "h is also returned"),
    (
        written_between,
        "an in-place op or a change of mode stands between the first op and the last",
    ),
    (lambda x: 3.0 * torch.tanh(x / 4.0), "cap is 4.0 in one place, 3.0 in another"),
    (
        lambda x: 3.0 * torch.tanh(x - 3.0),
        "sub is aten.sub.Tensor, where the pattern has aten.div.Tensor",
    ),
]


@pytest.mark.parametrize(("program", "reason"), NEARLY)
def test_a_near_miss_says_why(program: Callable, reason: str) -> None:
    x = rand(3, 5)
    got, log = rewrites(capping(), program, x)
    assert fired(log) == []
    (found,) = missed(log)
    assert reason in found
    for a, b in zip(*(r if isinstance(r, tuple) else (r,) for r in (got, program(x))), strict=True):
        torch.testing.assert_close(a, b)


def test_what_has_half_of_the_calls_is_no_near_miss() -> None:
    _, log = rewrites(capping(), lambda x: torch.sigmoid(x) * 3.0, rand(3, 5))
    assert (fired(log), missed(log)) == ([], [])


def test_explain_and_dumps_tell_of_both(tmp_path: Any) -> None:
    def program(x: Tensor) -> tuple[Tensor, Any]:
        return capped(x, 3.0), also_returned(x)

    with capping(), gems_compile.dump(tmp_path):
        found = gems_compile.explain(program, rand(3, 5))
    text = next(tmp_path.glob("graph_*/rewrites.txt")).read_text()
    for told in (str(found), text):
        assert "by_sigmoid" in told and "the test wants it" in told
    assert len(found.why("by_sigmoid")) == 2 and "by_sigmoid" in found.to_json()


def test_declines() -> None:
    rule = capping(declines=lambda x, cap: "short rows" if x.shape[-1] < 8 or cap > 50 else None)
    program = lambda x: capped(x, 3.0)  # noqa: E731
    assert missed(rewrites(rule, program, rand(3, 5))[1]) == ["by_sigmoid: short rows"]
    assert fired(rewrites(rule, program, rand(3, 9))[1]) == ["by_sigmoid"]
    wrong = capping(declines=lambda x, cap: x.shape[-1] < 8)
    assert "returned True, which is neither" in missed(rewrites(wrong, program, rand(3, 5))[1])[0]


def test_dtypes() -> None:
    rule, program = capping(dtypes=("float64",)), lambda x: capped(x, 3.0)
    _, log = rewrites(rule, program, rand(3, 5))
    assert missed(log) == ["by_sigmoid: a tensor is float32; the rule is for float64"]
    _, log = rewrites(rule, program, rand(3, 5, dtype=torch.float64))
    assert fired(log) == ["by_sigmoid"]


def test_a_number_for_a_tensor() -> None:
    rule = rule_of(lambda x, y: torch.exp(x * y), lambda x, y: torch.exp(y * x), (4,), (4,))
    _, log = rewrites(rule, lambda x: torch.exp(x * 2.0), rand(4))
    assert missed(log) == ["<lambda>: y is 2.0, where the pattern has a tensor"]


def multiplied(times: int) -> Callable:
    return lambda x: x * times


def test_whole_numbers_are_looked_at_too() -> None:
    ones = torch.ones(4, dtype=torch.int64)
    program, x = lambda x: x * 3 - x, ones.to(DEVICE)
    for times, wanted in ((2, ["<lambda>"]), (5, [])):
        rule = rule_of(lambda x: x * 3 - x, multiplied(times), ones)
        got, log = rewrites(rule, program, x)
        assert fired(log) == wanted and torch.equal(got, program(x))
    floats = rule_of(lambda x: x * 3 - x, lambda x: x * 2, (4,))
    _, log = rewrites(floats, program, x)
    assert missed(log) == ["<lambda>: x is int64, where its example is float32"]


def test_another_dtype_of_the_chain_is_seen() -> None:
    """With 16-bit operands this replacement gives float32: no program may get that instead."""
    rule = rule_of(lambda x: x.abs() * 2.0, lambda x: x.float().abs() * 2.0, (4,), dtypes=MANY)
    _, log = rewrites(rule, lambda x: x.abs() * 2.0, rand(4, dtype=torch.bfloat16))
    (reason,) = missed(log)
    assert "gives float32 [4] with strides [1]" in reason and "the pattern bfloat16 [4]" in reason


# the cache ----------------------------------------------------------------------------------------


def other_sigmoid(x: Tensor, cap: float) -> Tensor:
    """The same calls, from another text: torch's own key does not tell them apart."""
    twice = 2 * torch.sigmoid(2 * (x / cap))
    return cap * (twice - 1)


def test_a_kept_graph_is_of_its_rule(caches: Any) -> None:
    """With the rule, without it, and with another of its name: each has a graph of its own."""
    another = rule_of(capped, other_sigmoid, (4, 8), 2.0)
    another.name = "by_sigmoid"
    x, seen = rand(3, 5), []
    for rule in (None, capping(), None, capping(), another):
        if rule is not None:
            rule.add()
        _, reports = results(lambda f: [f(x)], lambda: lambda x: capped(x, 3.0))
        seen.append(said(reports))
        if rule is not None:
            rule.remove()
    assert seen == [{KEPT}, {KEPT}, {FROM_CACHE}, {FROM_CACHE}, {KEPT}]


def test_what_a_function_names_is_part_of_the_digest() -> None:
    def replaced(two: float) -> Callable:
        return lambda x: (x + x) * two

    first, again, other = (
        rule_of(lambda x: 2.0 * x * 1.0, replaced(two), (4,)).digest for two in (1.0, 1.0, 2.0)
    )
    assert first == again != other
