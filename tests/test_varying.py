"""Calls whose sizes or numbers never repeat: a few kernels serve them all, with eager's results."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import triton
from eagercheck import nothing_left, ours, same  # noqa: F401
from helpers import DEVICE, assert_same, gems_only, rand
from hypothesis import given, settings
from hypothesis import strategies as st
from opcheck import tensors
from torch import Tensor

import gems_compile
from gems_compile import eager
from gems_compile.calls import one_op, varying
from gems_compile.calls.varying import MAX_NUMBERS, family_of
from gems_compile.kernels.target import current_target

pytestmark = gems_only

OWN_SIZES = 4


@pytest.fixture(autouse=True)
def own_sizes_first(monkeypatch: Any) -> None:
    """Also where ``--any-sizes`` is asked for, and whatever measured slower on some GPU."""
    monkeypatch.setattr(varying, "OWN_SIZES", OWN_SIZES)
    monkeypatch.setattr(one_op, "worth_sharing", lambda name, which, target: True)


def sizes(count: int = 10, step: int = 1) -> list[tuple[int, int]]:
    """Of one family: about as large, and no two equal."""
    return [((5 + k) * step, (17 + 2 * k) * step) for k in range(count)]


def same_of(program: Callable[[int, int], Any], n: int, m: int, op: str) -> None:
    """``program`` draws the same numbers each time."""

    def run() -> Any:
        torch.manual_seed(n)
        return program(n, m)

    same(run, served=(op,))


def kernels(name: str) -> int:
    return eager.stats()[name]["compiled"]


def handler_of(name: str) -> one_op.Handler:
    (found,) = (h for h in eager._state.handlers.values() if h.name == name)
    return found


# sizes -------------------------------------------------------------------------------------------

index = lambda n, m: torch.arange(n, device=DEVICE) * 3 % m  # noqa: E731
PROGRAMS: dict[str, tuple[str, Callable[[int, int], Any]]] = {
    "pointwise": ("gelu", lambda n, m: F.gelu(rand(n, m))),
    "two operands": ("mul.Tensor", lambda n, m: rand(n, m) * rand(n, m)),
    "a row and a column": ("add.Tensor", lambda n, m: rand(1, m) + rand(n, 1)),
    "a vector": ("add.Tensor", lambda n, m: rand(n, m) + rand(m)),
    "expanded": ("exp", lambda n, m: rand(n, 1).expand(n, m).exp()),
    "transposed": ("exp", lambda n, m: rand(n, m).t().exp()),
    "a part": ("exp", lambda n, m: rand(n, 4 * m)[:, :m].exp()),
    "every other": ("exp", lambda n, m: rand(n, 2 * m)[:, ::2].exp()),
    "channels last": (
        "relu",
        lambda n, m: rand(1, 2, n, m).to(memory_format=torch.channels_last).relu(),
    ),
    "rows": ("sum.dim_IntList", lambda n, m: rand(n, m).sum(1)),
    "columns": ("sum.dim_IntList", lambda n, m: rand(n, m).sum(0)),
    "all": ("sum", lambda n, m: rand(n, m).sum()),
    "softmax": ("_softmax", lambda n, m: rand(n, m).softmax(-1)),
    "softmax of columns": ("_softmax", lambda n, m: rand(n, m).softmax(0)),
    "the largest": ("max.dim", lambda n, m: rand(n, m).max(1)),
    "variance": ("var_mean.correction", lambda n, m: torch.var_mean(rand(n, m), 1)),
    "norm of fixed rows": (
        "native_layer_norm",
        lambda n, m: F.layer_norm(rand(n, 33), (33,), rand(33), rand(33)),
    ),
    "running sums": ("cumsum", lambda n, m: rand(n, m).cumsum(1)),
    "sorted rows of one length": ("sort", lambda n, m: rand(n, 33).sort()),
    "the first of rows of one length": ("topk", lambda n, m: rand(n, 33).topk(3)),
    "joined": ("cat", lambda n, m: torch.cat([rand(n, m), rand(n, 3)], 1)),
    "gathered": ("embedding", lambda n, m: F.embedding(index(n, m), rand(m, 7))),
    "indexed": ("index.Tensor", lambda n, m: rand(m, n)[index(n, m)]),
    "gathered along rows": ("gather", lambda n, m: rand(n, m).gather(1, index(n, m)[:, None])),
    "a triangle": ("tril", lambda n, m: rand(n, m).tril()),
    "windows": ("avg_pool2d", lambda n, m: F.avg_pool2d(rand(1, 2, n, m), 2)),
    "windows over an edge": (
        "max_pool2d_with_indices",
        lambda n, m: F.max_pool2d(rand(1, 2, n, m), 3, 2, 1, return_indices=True),
    ),
    "in place": ("mul_.Tensor", lambda n, m: rand(n, m).mul_(rand(m))),
    "a place": ("add.out", lambda n, m: torch.add(rand(n, m), 1, out=rand(n, m))),
    "a place of a composed op": (
        "mse_loss.out",
        lambda n, m: torch.ops.aten.mse_loss.out(
            rand(n, m), rand(n, m), out=torch.empty((), device=DEVICE)
        ),
    ),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_sizes_that_never_repeat_share_a_kernel(name: str) -> None:
    """The first few have their own; of further ones, two families, for they grow, one each."""
    op, program = PROGRAMS[name]
    for n, m in sizes():
        same_of(program, n, m, op)
    assert OWN_SIZES < kernels(op) <= OWN_SIZES + 3, eager.stats()[op]


@pytest.mark.parametrize("name", ["pointwise", "rows", "softmax", "a vector", "joined"])
def test_rows_of_whole_vectors(name: str) -> None:
    """Multiples of 16 are known as such; another length does not meet the kernel's conditions."""
    op, program = PROGRAMS[name]
    for n, m in sizes(8, step=16):
        same_of(program, n, m, op)
    whole = kernels(op)
    same_of(program, 16 * 13, 16 * 33 + 1, op)
    assert kernels(op) == whole + 1


def test_gradients() -> None:
    for n, m in sizes():
        x, w = rand(n, m, grad=True), rand(m, grad=True)
        same(lambda x, w: F.gelu(x * w).log_softmax(-1), x, w, served=("gelu_backward",))
    assert kernels("_log_softmax_backward_data") < 9


def test_narrow_and_integer_dtypes() -> None:
    for n, m in sizes(7):
        for dtype in (torch.bfloat16, torch.float16, torch.int64, torch.bool):
            x = (rand(n, m) * 4).to(dtype)
            same(lambda x=x: (x.sum(1), x == x[0], x.float() * 2), served=("eq.Tensor",))


def test_sizes_of_one_and_none_are_kinds_of_their_own() -> None:
    with gems_compile.use_gems(only=["add.Tensor"]):
        for n, m in sizes(8):
            rand(n, m) + rand(n, m)
        before = kernels("add.Tensor")
        a, b = rand(1, 40), rand(6, 1)
        got = a + b
        assert kernels("add.Tensor") == before + 1
        assert (rand(0, 5) + rand(0, 5)).shape == (0, 5)
    assert_same(got, a + b)


def test_two_sizes_that_were_equal() -> None:
    """One symbol stands for both, which is a condition."""
    with gems_compile.use_gems(only=["cat"]):
        for n in range(5, 12):
            assert torch.cat([rand(n, 3), rand(n, 3)]).shape == (2 * n, 3)
        for n in range(5, 12):
            a, b = rand(n, 3), rand(n + 2, 3)
            assert torch.equal(torch.cat([a, b])[n:], b)


def test_about_as_large() -> None:
    """A kernel for rows of a few elements is not the one for rows of many."""
    few, many = ([torch.float32, torch.Size(s), (s[1], 1), -1, 0] for s in ((8, 9), (800, 900)))
    alike = [torch.float32, torch.Size((9, 10)), (10, 1), -1, 0]
    assert family_of(few) == family_of(alike) != family_of(many)
    order = [torch.float32, torch.Size((9, 10)), (1, 9), -1, 0]
    assert family_of(order) != family_of(alike)


def test_what_has_no_kernel_for_any_sizes_keeps_its_own() -> None:
    """How long a row is that a program sorts is part of its text."""
    for m in range(17, 29):
        same_of(lambda n, m: rand(n, m).topk(3), 6, m, "topk")
    assert kernels("topk") == 12


def test_more_sizes_than_are_remembered(monkeypatch: Any) -> None:
    monkeypatch.setattr(one_op, "MAX_VARIANTS", OWN_SIZES + 3)
    with gems_compile.use_gems(only=["exp"]):
        for n in range(33, 60):
            x = rand(n)
            assert_same(x.exp(), torch.special.expm1(x) + 1)
        for _ in range(2):
            torch.ones(2, dtype=torch.complex64, device=DEVICE).exp()
        row = eager.stats()["exp"]
        assert (row["ours"], row["native"]) == (27, 2) and row["compiled"] <= OWN_SIZES + 2, row
        for n in range(60, 66):  # it is forgotten, too, and counted
            rand(n).exp()
    assert eager.stats()["exp"] == row | {"ours": 33}


def test_a_layout_that_eager_returns_otherwise_is_noticed(monkeypatch: Any) -> None:
    """A shared kernel's results are compared with ATen's when it is first run."""
    real = varying.Sizes.condition
    made: list[Any] = []
    monkeypatch.setattr(varying.Sizes, "condition", lambda self: made.append(self) or real(self))
    monkeypatch.setattr(one_op, "layout_of", lambda t: (t.shape, next(count)))
    count = iter(range(10**6))  # no two layouts are equal
    with gems_compile.use_gems(only=["exp"]):
        for n in range(33, 41):
            rand(n).exp()
    assert not made and ours("exp") == 0


def test_draws_are_those_of_a_kernel_for_its_own_sizes(monkeypatch: Any) -> None:
    def drawn() -> list[Tensor]:
        eager._state.handlers.clear()
        torch.manual_seed(5)
        x = torch.ones(7, 33, device=DEVICE)
        with gems_compile.use_gems():
            return [F.dropout(x[:n].clone(), 0.3) for n in range(2, 8)]

    own = drawn()
    monkeypatch.setattr(varying, "OWN_SIZES", 0)
    for a, b in zip(own, drawn(), strict=True):
        assert torch.equal(a, b)


POINTWISE = {
    "add": lambda a, b: a + b,
    "where": lambda a, b: torch.where(a > b, a, b),
    "row": lambda a, b: a + b[:1],
    "sum": lambda a, b: (a.sum(0), b.sum(-1)),
    "softmax": lambda a, b: a.softmax(-1) - b.softmax(0),
    "joined": lambda a, b: torch.cat([a, b.flip(0)]),
}


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(sorted(POINTWISE)),
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=3, max_size=6),
    st.sampled_from(["as it is", "transposed", "a part"]),
)
def test_any_sizes_in_any_order(name: str, shapes: list[tuple[int, int]], layout: str) -> None:
    """All sizes are arguments from the first call on; handlers outlive the examples."""
    lay: dict[str, Callable[[Tensor], Tensor]] = {
        "as it is": lambda t: t,
        "transposed": lambda t: t.t().contiguous().t(),
        "a part": lambda t: F.pad(t, (0, 5))[:, : t.shape[1]],
    }
    given_own, varying.OWN_SIZES = varying.OWN_SIZES, 0
    try:
        for n, m in shapes:
            a, b = lay[layout](rand(n, m)), lay[layout](rand(n, m))
            want = POINTWISE[name](a, b)
            with gems_compile.use_gems(
                only=[
                    "add.Tensor",
                    "where.self",
                    "gt.Tensor",
                    "flip",
                    "sum.dim_IntList",
                    "_softmax",
                    "sub.Tensor",
                    "cat",
                ]
            ):
                got = POINTWISE[name](a, b)
            for a, b in zip(tensors(got), tensors(want), strict=True):
                assert_same(a, b)
    finally:
        varying.OWN_SIZES = given_own


@pytest.mark.gpu
def test_another_size_while_a_graph_is_captured() -> None:
    """Nothing is compiled then, and nothing need be."""
    with gems_compile.use_gems(only=["exp"]):
        for n in range(100, 108):
            rand(n).exp()
        x = rand(120)
        graph = torch.cuda.CUDAGraph()
        before = ours("exp")
        with torch.cuda.graph(graph):
            y = x.exp()
        assert ours("exp") == before + 1
        x.copy_(rand(120))
        graph.replay()
    assert_same(y, x.exp())


@pytest.mark.gpu
def test_places_beyond_32_bits(monkeypatch: Any) -> None:
    """The shared kernel of a small call serves no large one; that of a large one counts in 64."""
    monkeypatch.setattr(varying, "OWN_SIZES", 0)
    with gems_compile.use_gems(only=["bitwise_not"]):
        for n in (2**31 - 64, 2**31 + 4096):
            x = torch.zeros(n, dtype=torch.uint8, device=DEVICE)
            x[-1] = 7
            y = x.bitwise_not()
            assert y[-1] == 248 and y[0] == 255 and ours("bitwise_not")
            del x, y


@pytest.mark.parametrize(
    ("name", "fn", "idle"),
    [
        ("argmax", lambda x: x.argmax(), True),
        ("sum", lambda x: x.sum(), False),
        ("max.dim", lambda x: x.max(0), True),
    ],
)
def test_no_kernel_is_shared_that_leaves_a_gpu_idle(
    name: str, fn: Callable[[Tensor], Any], idle: bool, monkeypatch: Any
) -> None:
    """One program for a long row: each length has a kernel of its own, of parts."""
    if current_target().name == "interpreter":
        target = dataclasses.replace(current_target(), multiprocessors=132)
        monkeypatch.setattr(eager, "current_target", lambda vendor=None: target)
    monkeypatch.setattr(varying, "OWN_SIZES", 1)
    for n in (40_000, 50_000):
        same_of(lambda n, m: fn(rand(n)), n, 0, name)
    assert [v.shared for v in handler_of(name).variants.values() if v.run] == [False, not idle]


def test_what_measured_slower_is_not_shared(monkeypatch: Any) -> None:
    """Where the first size alone varies it may be, if that is faster."""
    asked: list[str] = []

    def worth(name: str, which: str, target: Any) -> bool:
        asked.extend([which] * (name == "gelu"))
        return which == "first"

    monkeypatch.setattr(one_op, "worth_sharing", worth)
    monkeypatch.setattr(varying, "OWN_SIZES", 1)
    for n, m in ((33, 40), (34, 40), (34, 41), (35, 41)):
        same_of(lambda n, m: F.gelu(rand(n, m)), n, m, "gelu")
    variants = handler_of("gelu").variants.values()
    assert [v.shared for v in variants] == [False, True, False, False]
    assert asked == ["first", "all", "all"]


def test_a_shared_kernel_that_fails(monkeypatch: Any) -> None:
    """What no kernel can share is compiled for its own sizes, as without; nothing is raised."""
    real, asked = one_op.compile_one, []

    def compile_one(*args: Any) -> Any:
        made = real(*args)
        if args[-1] is not None:
            asked.append(args[-1])
            made.run = fails
        return made

    def fails(tensors: Any) -> Any:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(one_op, "compile_one", compile_one)
    monkeypatch.setenv("GEMS_STRICT", "0")
    for n, m in sizes():
        same_of(lambda n, m: F.gelu(rand(n, m)), n, m, "gelu")
    assert 1 <= len(asked) <= 2  # once a family
    assert kernels("gelu") == len(sizes())


# users' functions --------------------------------------------------------------------------------


@gems_compile.pointwise
@triton.jit
def scaled_square(x, scale):
    return x * x * scale


def test_users_functions() -> None:
    for n, m in sizes():
        x, scale = rand(n, m), rand(m)
        assert_same(scaled_square(x, scale), x * x * scale)
        place = rand(n, m)
        scaled_square(x, scale, out=place)
        assert_same(place, x * x * scale)
    served = scaled_square.served
    assert len({id(v) for v in served.variants.values()}) <= 2 * (OWN_SIZES + 3)


# numbers -----------------------------------------------------------------------------------------


def test_numbers_that_never_repeat() -> None:
    """Whatever the sizes are, further ones are ATen's; those that were met stay ours."""
    with gems_compile.use_gems(only=["mul.Tensor", "addcmul", "leaky_relu"]):
        for k in range(MAX_NUMBERS + 5):
            x = rand(5 + k % 3, 40)
            number = 1 + k / 64
            assert_same(x * number, torch.mul(x, torch.full_like(x, number)))
            torch.addcmul(x, x, x, value=number)
            F.leaky_relu(x, number)
        for name in ("addcmul", "leaky_relu"):
            assert eager.stats()[name]["native"] == 5, name
            assert eager.stats()[name]["ours"] == MAX_NUMBERS
        before = ours("leaky_relu")
        F.leaky_relu(rand(5, 40), 1.0)
        assert ours("leaky_relu") == before + 1


def test_zeros_of_both_signs_and_no_number_are_kinds_of_their_own() -> None:
    x = torch.tensor([1.0, -2.0], device=DEVICE)
    with gems_compile.use_gems(only=["mul.Tensor"]):
        for zero, negative in ((0.0, [False, True]), (-0.0, [True, False])):
            assert torch.signbit(x * zero).tolist() == negative
        assert torch.isnan(x * float("nan")).all() and ours("mul.Tensor") == 2
