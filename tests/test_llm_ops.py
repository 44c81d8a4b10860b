"""``gems_compile.llm``: forward and backward as near to float64 as torch's own functions are."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accuracy import assert_accurate, error_in_ulps, in_float64
from helpers import DEVICE, FLOATS, assert_same_bits, compile_, gems_only, ints, no_new_graph, rand
from llm_cases import CASES, Case, linear_cross_entropy, llama_norm
from torch import Tensor

import gems_compile
from gems_compile import llm, own_ops
from gems_compile.errors import ArgumentError

pytestmark = gems_only

#: one case of each function
ONE_EACH = [
    case
    for case in CASES
    if case.name
    in (
        "rms_norm", "fused_add_rms_norm", "add_layer_norm", "silu_and_mul", "gelu_and_mul",
        "rotary_pairs_of_a_part", "cross_entropy", "linear_cross_entropy_bias", "topk_softmax",
    )
]  # fmt: skip
IN_DTYPES = [(c, d) for c in CASES for d in (FLOATS if c in ONE_EACH else [torch.bfloat16])]

cases = pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])


@pytest.fixture(autouse=True)
def kernels_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    """As whoever imports `gems_compile.llm` has it; counts begin anew."""
    monkeypatch.setattr("gems_compile.kernels.served._server", own_ops.serve)
    own_ops._handlers.clear()


def run(fn: Callable[..., Any], args: Any) -> list[Tensor]:
    """Results, and gradients of what wants any."""
    out = fn(*args)
    out = [out] if isinstance(out, Tensor) else list(out)
    torch.manual_seed(5)
    used = [t for t in out if t.requires_grad]
    grads = [torch.randn(t.shape).to(t) for t in used]
    leaves = [a for a in args if a.requires_grad]
    return [*out, *torch.autograd.grad(used, leaves, grads)]


def widened(args: Any) -> list[Tensor]:
    wide = in_float64(args, floats_only=True)
    return [w.requires_grad_(a.requires_grad) for a, w in zip(args, wide, strict=True)]


def compare(case: Case, fn: Callable[..., Any], args: Any) -> None:
    got, eager, exact = (
        run(fn, args),
        run(case.reference, args),
        run(case.reference, widened(args)),
    )
    for k, (a, b, c) in enumerate(zip(got, eager, exact, strict=True)):
        assert (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device), f"result {k}"
        more = functools.partial(usual, case, args[0].dtype, k)  # 16-bit logits are rounded by luck
        assert_accurate(a, b, c, f"result {k}", scale="tensor", usual=more)


def usual(case: Case, dtype: torch.dtype, k: int) -> float:
    """The error of the reference's result k in some more draws."""
    errors = []
    for seed in range(10, 20):
        torch.manual_seed(seed)
        args = case.make(dtype)
        found, exact = run(case.reference, args)[k], run(case.reference, widened(args))[k]
        errors.append(error_in_ulps(found, exact, found.dtype, "tensor"))
    return max(errors)


def all_ours() -> bool:
    rows = [row for row in own_ops.stats().values() if row["ours"] or row["native"]]
    return bool(rows) and not any(row["native"] for row in rows)


@pytest.mark.parametrize(
    ("case", "dtype"), IN_DTYPES, ids=[f"{case.name}-{dtype}" for case, dtype in IN_DTYPES]
)
def test_eager(case: Case, dtype: torch.dtype) -> None:
    compare(case, case.fn, case.make(dtype))
    assert all_ours(), own_ops.stats()


@cases
def test_without_kernels(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs where there is no GPU and no interpreter."""
    monkeypatch.setattr(own_ops, "current_target", lambda vendor: None)
    compare(case, case.fn, case.make(torch.bfloat16))
    assert not own_ops.stats()


@cases
def test_compiled(case: Case) -> None:
    compare(case, compile_(case.fn), case.make(torch.bfloat16))
    reports = gems_compile.reports()
    assert tuple(r.launches + r.aten_calls for r in reports) == case.calls
    whys = {why for report in reports for why in report.aten}
    if case.name.startswith("linear_cross_entropy"):
        whys = {why for why in whys if not why.startswith("gems.linear_cross_entropy.default")}
    else:
        assert not own_ops.stats()
    assert all("alone: nothing to fuse it with" in why for why in whys), whys


def test_float64() -> None:
    for case in ONE_EACH:
        args = case.make(torch.float64)
        for a, b in zip(run(case.fn, args), run(case.reference, args), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", ONE_EACH, ids=lambda case: case.name)
def test_torch_checks_the_ops(case: Case) -> None:
    """Every ``gems::`` op that the call comes to, its backward's too."""
    called: list[tuple[Any, tuple[Any, ...]]] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "gems":
                called.append((func, args))
            return func(*args, **(kwargs or {}))

    args = case.make(torch.float32)
    with Watch():
        run(case.fn, args)
    assert len(called) == 2
    for (op, given), grads in zip(called, (True, False), strict=True):
        fresh = [
            a.detach().clone().requires_grad_(grads and a.is_floating_point() and a.dim() > 1)
            if isinstance(a, Tensor)
            else a
            for a in given
        ]
        if op.name() == "gems::rotary":  # whose tables have no gradient
            fresh[2:4] = [t.detach() for t in fresh[2:4]]
        tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
        if grads and case.name in ("silu_and_mul", "cross_entropy"):  # one each takes seconds
            tests.append("test_aot_dispatch_dynamic")
        torch.library.opcheck(op, tuple(fresh), test_utils=tests)


def test_rotary_rounds_as_models_do() -> None:
    for case in CASES:
        if case.name.startswith("rotary"):
            args = case.make(torch.bfloat16)
            for k, (a, b) in enumerate(zip(case.fn(*args), case.reference(*args), strict=True)):
                assert_same_bits(a.detach(), b.detach(), f"{case.name}, result {k}")


def test_neighbours_fuse() -> None:
    def block(x: Tensor, residual: Tensor, weight: Tensor, gate: Tensor) -> Tensor:
        y, h = llm.fused_add_rms_norm(x * 2, residual, weight)
        return llm.silu_and_mul(gate + 1, y) + h

    args = [rand(4, 40, grad=True), rand(4, 40, grad=True), rand(40), rand(4, 40, grad=True)]
    for a, b in zip(run(compile_(block), args), run(block, args), strict=True):
        torch.testing.assert_close(a, b)
    assert [(r.launches, r.aten_calls) for r in gems_compile.reports()] == [(1, 0), (1, 0)]


def test_lengths_that_vary_are_one_graph() -> None:
    def f(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return llm.linear_cross_entropy(llm.rms_norm(x), weight, target, chunk=4)

    compiled, weight = compile_(f, dynamic=True), rand(17, 8, grad=True)
    for rows in (6, 11):
        args = [rand(rows, 8, grad=True), weight, ints(rows, high=17)]
        context = no_new_graph() if rows == 11 else torch.enable_grad()
        with context:
            got = run(compiled, args)
        want = run(lambda x, w, t: linear_cross_entropy(llama_norm(x), w, t), args)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)


def test_another_backend_calls_the_ops() -> None:
    args = [rand(3, 34, grad=True)]
    got = run(torch.compile(llm.silu_and_mul, backend="aot_eager", fullgraph=True), args)
    for a, b in zip(got, run(llm.silu_and_mul, args), strict=True):
        torch.testing.assert_close(a, b)
    ours = {name: row["ours"] for name, row in own_ops.stats().items()}
    assert ours == {"packed_act_and_mul": 2, "packed_act_and_mul_backward": 2}


@pytest.mark.parametrize("through", [lambda fn: fn, compile_], ids=["eager", "compiled"])
def test_autocast(through: Callable[..., Any]) -> None:
    """The projection is in 16 bits, as torch's linear; other ops keep what they are given."""
    hidden, weight = rand(5, 8, grad=True), rand(17, 8, grad=True)
    target = ints(5, high=17)

    def f(h: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return llm.linear_cross_entropy(h, w, target), llm.silu_and_mul(h @ w.t()[:, :16])

    with torch.autocast(DEVICE, torch.bfloat16):
        loss, act = through(f)(hidden, weight)
    assert (loss.dtype, act.dtype) == (torch.float32, torch.bfloat16)
    low = [t.detach().bfloat16() for t in (hidden, weight)]
    want = linear_cross_entropy(*low, target)
    torch.testing.assert_close(loss, want, rtol=1e-2, atol=1e-2)
    grads = torch.autograd.grad(loss, [hidden, weight])
    assert [g.dtype for g in grads] == [torch.float32] * 2


def test_logits_are_never_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []

    def watched(name: str, plain: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        seen.extend(tuple(a.shape) for a in args if isinstance(a, Tensor))
        return own_ops.serve(name, plain, args)

    monkeypatch.setattr("gems_compile.kernels.served._server", watched)
    hidden, weight = rand(64, 8, grad=True), rand(96, 8, grad=True)
    llm.linear_cross_entropy(hidden, weight, ints(64, high=96), chunk=10).backward()
    assert seen.count((10, 96)) == 6 and seen.count((4, 96)) == 1
    assert (64, 96) not in seen


@pytest.mark.gpu
def test_peak_memory() -> None:
    """Of float32 gradients of the weight, and few rows' logits; all rows' would take 0.5 GiB."""
    hidden = rand(4096, 256, dtype=torch.bfloat16, grad=True)
    weight = rand(32768, 256, dtype=torch.bfloat16, grad=True)
    target = ints(4096, high=32768)
    llm.linear_cross_entropy(hidden, weight, target).backward()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    llm.linear_cross_entropy(hidden, weight, target).backward()
    assert torch.cuda.max_memory_allocated() - before < 2**27


def test_no_target_counts() -> None:
    target = torch.full((3,), -100, device=DEVICE)
    for fn, args in (
        (llm.cross_entropy, [rand(3, 8, grad=True), target]),
        (llm.linear_cross_entropy, [rand(3, 4, grad=True), rand(8, 4, grad=True), target]),
    ):
        loss, *grads = run(fn, args)
        assert loss.isnan()
        assert all(not g.any() for g in grads)


@pytest.mark.parametrize("wrong", [-1, 8, 10**12])
def test_a_class_that_is_none_is_nan(wrong: int) -> None:
    target = ints(4, high=8)
    target[1] = wrong
    loss = llm.cross_entropy(rand(4, 8), target, reduction="none")
    assert loss.isnan().tolist() == [False, True, False, False]
    assert llm.linear_cross_entropy(rand(4, 3), rand(8, 3), target).isnan()


def test_nothing_to_do() -> None:
    x = rand(0, 8, grad=True)
    results = [*run(llm.rms_norm, [x]), *run(llm.fused_add_rms_norm, [x, x])]
    results += run(llm.silu_and_mul, [x])
    assert all(t.shape[0] == 0 for t in results)
    target = ints(0, high=4)
    assert llm.cross_entropy(x, target).isnan()
    assert llm.cross_entropy(x, target, reduction="sum") == 0
    weight = rand(4, 8, grad=True)
    llm.linear_cross_entropy(x, weight, target, reduction="sum").backward()
    assert not weight.grad.any()


def test_only_what_is_wanted_has_a_gradient() -> None:
    hidden, weight, target = rand(5, 8, grad=True), rand(17, 8), ints(5, high=17)
    llm.linear_cross_entropy(hidden, weight, target).backward()
    assert weight.grad is None and hidden.grad.shape == hidden.shape
    x, residual = rand(3, 8, grad=True), rand(3, 8)
    y, h = llm.fused_add_rms_norm(x, residual, rand(8))
    h.sum().backward(retain_graph=True)
    torch.testing.assert_close(x.grad, torch.ones_like(x))
    x.grad = None
    y.sum().backward()
    (want,) = torch.autograd.grad(llama_norm(x + residual).sum(), x)
    assert x.grad.shape == want.shape and residual.grad is None


def test_a_second_gradient_raises() -> None:
    x = rand(3, 8, grad=True)
    with pytest.raises(RuntimeError, match="gems::packed_act_and_mul has no second gradient"):
        torch.autograd.grad(llm.silu_and_mul(x).sum(), x, create_graph=True)


def test_equal_experts_come_in_order() -> None:
    logits = torch.zeros(2, 6, device=DEVICE)
    weights, indices = llm.topk_softmax(logits, 3)
    assert indices.tolist() == [[0, 1, 2]] * 2
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / 3))


def test_memory_is_that_of_new_tensors() -> None:
    """A call's results are its own: kernels for one description are used again."""
    x = rand(4, 32)
    first = llm.silu_and_mul(x)
    kept = first.clone()
    second = llm.silu_and_mul(x + 1)
    assert first.data_ptr() != second.data_ptr()
    torch.testing.assert_close(first, kept)


X, L, C = torch.zeros(2, 3, 8), torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64)
Q, K = torch.zeros(2, 4, 3, 8), torch.zeros(2, 2, 3, 8)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: llm.rms_norm(X, torch.zeros(7)), r"weight is (7,); it must be [8]"),
        (lambda: llm.fused_add_rms_norm(X, X[0]), "residual is (3, 8) and x (2, 3, 8)"),
        (lambda: llm.add_layer_norm(X, X, None, torch.zeros(1)), "bias is (1,); it must be [8]"),
        (lambda: llm.silu_and_mul(X[..., :7]), "x's last dim is 7, which has no two halves"),
        (lambda: llm.silu_and_mul(X, X[0]), "up is (3, 8) and x (2, 3, 8)"),
        (lambda: llm.gelu_and_mul(X, X, "erf"), "approximate is 'erf'; valid: 'none', 'tanh'"),
        (lambda: llm.apply_rotary(Q, K, X[0], X[0], heads_dim=3), "heads_dim is 3; valid: 1"),
        (lambda: llm.apply_rotary(Q, X, X[0], X[0]), "q and k have 4 and 3 dims"),
        (lambda: llm.apply_rotary(Q, K, X[0, 0], X[0, 0]), "cos has 1 dims; valid: 2"),
        (lambda: llm.apply_rotary(Q, K, X[0, :2], X[0, :2]), "have 3, 3 and 2 positions"),
        (lambda: llm.apply_rotary(Q, K, X[0], X[0]), "cos turns 16 features"),
        (lambda: llm.cross_entropy(L, C[0]), "target is (3,) and logits (2, 3, 5)"),
        (lambda: llm.cross_entropy(L, C, reduction="max"), "reduction is 'max'; valid: 'mean'"),
        (lambda: llm.cross_entropy(L, C.float()), "target is torch.float32; valid: class indices"),
        (lambda: llm.cross_entropy(L, C, label_smoothing=2.0), "label_smoothing is 2.0; valid: 0"),
        (lambda: llm.cross_entropy(L, C, softcap=0.0), "softcap is 0.0; valid: a positive number"),
        (lambda: llm.linear_cross_entropy(X, L, C), "weight is (2, 3, 5); it must be [classes, 8]"),
        (lambda: llm.linear_cross_entropy(X, X[0], C[0]), "target is (3,); it must be (2, 3)"),
        (lambda: llm.linear_cross_entropy(X, X[0].half(), C), "weight torch.float16; hidden,"),
        (lambda: llm.linear_cross_entropy(X, X[0], C, chunk=0), "chunk is 0; valid: a positive"),
        (lambda: llm.linear_cross_entropy(X, X[0], C, reduction="none"), "reduction is 'none'"),
        (lambda: llm.topk_softmax(L, 6), "k is 6; valid: 1 to 5, the number of experts"),
    ],
)  # fmt: skip
def test_mistakes(call: Callable[[], Any], said: str) -> None:
    with pytest.raises(ArgumentError) as raised:
        call()
    assert said in str(raised.value)


def test_tables_with_a_gradient_raise() -> None:
    table = torch.zeros(3, 4, requires_grad=True)
    with pytest.raises(ArgumentError, match="has none here: detach"):
        llm.apply_rotary(Q, K, table, table)
