"""Scatters, index_add and index_put as stores and atomic additions of the kernel that makes what is
put, into memory that the kernel before it fills; or, of few elements a line, as one kernel."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE, assert_same_values, bools, check, compile_, gems_only, ints, rand
from opcheck import options, trace
from torch import Tensor

import gems_compile
from gems_compile.kernels.target import current_target
from gems_compile.lowering import embedding
from gems_compile.lowering.pipeline import compile_graph

pytestmark = gems_only

NARROW = (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, *NARROW)


@pytest.fixture(autouse=True)
def undetermined() -> Iterator[None]:
    """The order of sums is nobody's; the tests otherwise ask for deterministic algorithms."""
    before = torch.get_deterministic_debug_mode()
    torch.use_deterministic_algorithms(False)
    yield
    torch.set_deterministic_debug_mode(before)


def launches() -> list[tuple[int, int]]:
    """(kernels, ATen's calls) of each graph that the last ``check`` compiled."""
    return [(r.launches, r.aten_calls) for r in gems_compile.reports()]


# what they are for --------------------------------------------------------------------------------


def combine(expert_out: Tensor, weight: Tensor, token: Tensor, tokens: Tensor) -> Tensor:
    return torch.zeros_like(tokens).index_add(0, token, expert_out * weight[:, None])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dynamic", [False, True])
def test_tokens_of_a_mixture_of_experts(dtype: torch.dtype, dynamic: bool) -> None:
    """The kernel that weighs what an expert made of a token adds it to the token."""
    token, tokens = ints(21, high=7), rand(7, 24, dtype=dtype)
    # whole numbers, whose sums are the same in any order, also in 16 bits
    inputs = (ints(21, 24, high=7) - 3).to(dtype), (ints(21, high=5) - 2).to(dtype), token, tokens
    check(combine, *inputs, dynamic=dynamic, exact=True)
    assert launches() == [(2, 0)]


def test_no_places() -> None:
    """Nothing is read, and a gradient of zeros."""
    check(lambda x, i: (x * 2).gather(0, i) + 1, rand(3, 4, grad=True), ints(0, 4, high=3))
    check(lambda x, i: x.index_select(0, i).sum(0) + x[0], rand(3, 4, grad=True), ints(0, high=3))


def test_histogram() -> None:
    def fn(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        bins = (x * 10).long().clamp(0, 9).view(-1)
        counts = torch.zeros(10, dtype=torch.int64, device=x.device)
        sums = torch.zeros(10, device=x.device)
        ones = torch.ones_like(bins)
        return counts.scatter_add(0, bins, ones), sums.scatter_add(0, bins, weight.exp().view(-1))

    check(fn, torch.rand(40, 5).to(DEVICE), rand(40, 5), atol=1e-4)
    assert launches() == [(2, 0)]  # both fills, and both sums of what one kernel finds


def test_one_hot() -> None:
    def fn(x: Tensor, i: Tensor) -> Tensor:
        return torch.zeros_like(x).scatter(-1, i[:, None], 1) * x

    check(fn, rand(5, 16), ints(5, high=16))
    assert launches() == [(1, 0)]


def test_mask_of_the_largest() -> None:
    def fn(x: Tensor) -> Tensor:
        keep = torch.full_like(x, float("-inf")).scatter(-1, x.topk(3, -1)[1], 0.0)
        return (x + keep).softmax(-1)

    check(fn, rand(5, 16))
    assert launches() == [(1, 1)]  # topk is ATen's


def test_router_weights() -> None:
    def fn(x: Tensor) -> Tensor:
        weight, expert = x.softmax(-1).topk(2, -1)
        return torch.zeros_like(x).scatter(-1, expert, weight / weight.sum(-1, keepdim=True))

    check(fn, rand(5, 16, grad=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_of_an_embedding(dtype: torch.dtype) -> None:
    def fn(table: Tensor, i: Tensor, dy: Tensor) -> Tensor:
        return torch.zeros_like(table).index_put((i,), dy * 2, accumulate=True) + table

    i = ints(3, 20, low=-7, high=7)
    check(fn, rand(7, 8, dtype=dtype), i, rand(3, 20, 8, dtype=dtype), rtol=3e-2, atol=0.2)
    (report,) = gems_compile.reports()
    assert report.launches == (2 if dtype == torch.float32 else 3), report.aten


def test_mask_as_index() -> None:
    def fn(x: Tensor, keep: Tensor, row: Tensor) -> Tensor:
        y = x * 2
        y[~keep] = 3.0
        y[keep[:, 0]] = row
        return y.exp()

    check(fn, rand(6, 5), bools(6, 5), rand(5))
    assert launches() == [(1, 0)]


# gradients ----------------------------------------------------------------------------------------


def gather_few(x: Tensor, i: Tensor) -> Tensor:
    return (x * 2).gather(1, i[:, :1]).exp()


def gather_many(x: Tensor, i: Tensor) -> Tensor:
    return (x * 2).gather(1, i).exp()


def take_along(x: Tensor, i: Tensor) -> Tensor:
    return torch.take_along_dim(x * 2, i, 1).sin()


def select(x: Tensor, i: Tensor) -> Tensor:
    return (x * 2).index_select(0, i[0] % 6).sigmoid()


def index(x: Tensor, i: Tensor) -> Tensor:
    return (x * 2)[i[0] % 6 - 3].sigmoid()


def index_pairs(x: Tensor, i: Tensor) -> Tensor:
    return (x * 2)[i[:, :4] % 6, i[:1, :4]].sigmoid()


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fn", [gather_few, gather_many, take_along, select, index, index_pairs])
def test_gradient(fn: Callable[..., Tensor], dtype: torch.dtype, dynamic: bool) -> None:
    x, i = rand(6, 16, dtype=dtype, grad=True), ints(6, 12, high=16)
    wide = dtype == torch.float32
    check(fn, x, i, dynamic=dynamic, rtol=1e-5 if wide else 2e-2, atol=1e-5 if wide else 5e-2)
    backward = gems_compile.reports()[-1]
    assert backward.aten.keys() <= {"aten.mul.Tensor: alone: nothing to fuse it with"}
    assert backward.launches + backward.aten_calls == (1 if fn is gather_few else 3)


def test_second_gradient() -> None:
    """Of functions whose first gradient scatters: the second one gathers."""

    def fn(x: Tensor, i: Tensor) -> Tensor:
        return (x.gather(1, i).exp() * x.index_select(1, i[0])).sum()

    def penalty(fn: Callable[..., Tensor], x: Tensor) -> Tensor:
        (dx,) = torch.autograd.grad(fn(x, i), x, create_graph=True)
        dx.square().sum().backward()
        assert x.grad is not None
        return x.grad

    x, i = rand(6, 16), ints(6, 12, high=16)
    want = penalty(fn, x.clone().requires_grad_())
    got = penalty(compile_(fn), x.clone().requires_grad_())
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("padding", [None, 3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("large", [False, True])
def test_gradient_of_a_table(
    dtype: torch.dtype, padding: int | None, large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In 16 bits, a small table is summed in float32, of a large one the ids that occur twice."""
    monkeypatch.setattr(embedding, "FEW_TOKENS", 16)
    monkeypatch.setattr(embedding, "CACHED", 0 if large else 2**22)

    def fn(table: Tensor, i: Tensor) -> Tensor:
        return F.embedding(i, table, padding_idx=padding).sin() * 2

    rows = (torch.randn(40, 24) / 4).to(DEVICE, dtype)
    i = torch.cat([ints(4, 10, high=40), torch.full((4, 3), 7).to(DEVICE)], 1)
    wide = rows.double().requires_grad_()
    dy = rand(4, 13, 24, dtype=dtype)
    fn(wide, i).backward(dy.double())
    assert wide.grad is not None

    got = rows.clone().requires_grad_()
    compile_(fn)(got, i).backward(dy)
    assert got.grad is not None
    near = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(got.grad.double(), wide.grad, rtol=near, atol=near)
    backward = gems_compile.reports()[-1]
    assert not any("embedding" in key for key in backward.aten)
    sums = [s for s in backward.sources if "tl.atomic_add(" in s.text]
    assert len(sums) == (2 if large and dtype != torch.float32 else 1)  # one counts ids


def test_gradient_of_a_table_that_is_atens() -> None:
    """Few tokens are not sorted, and many to one row would wait for each other."""

    def fn(table: Tensor, i: Tensor) -> Tensor:
        return F.embedding(i, table) * 2

    check(fn, rand(9, 8, dtype=torch.bfloat16, grad=True), ints(12, high=9), atol=0.1)
    check(fn, rand(2, 8, grad=True), ints(1200, high=2), rtol=1e-4, atol=1e-3)
    for report in gems_compile.reports()[1::2]:
        assert any("embedding_dense_backward" in key for key in report.aten)


def test_gradient_of_a_table_of_any_number_of_tokens() -> None:
    def fn(table: Tensor, i: Tensor) -> Tensor:
        return F.embedding(i, table) * 2

    table, run = rand(9, 8, grad=True), compile_(fn)
    for count in (5, 7):
        i = ints(3, count, high=9)
        torch._dynamo.mark_dynamic(i, 1)
        (got,) = torch.autograd.grad(run(table, i).sum(), table)
        (want,) = torch.autograd.grad(fn(table, i).sum(), table)
        assert_same_values(got, want)
    assert launches() == [(1, 0), (2, 0)]


# who reads and writes what, in which order --------------------------------------------------------


def chain(x: Tensor, y: Tensor, i: Tensor) -> Any:
    z = torch.mm(x, x).index_add(0, i, y.exp())
    return z.index_add(0, i, y.sin()).index_copy(0, i, y * 2)


def base_is_read_later(x: Tensor, y: Tensor, i: Tensor) -> Any:
    z = x * 2
    w = z.index_copy(0, i, y * 3)
    return w + z, z.index_add(0, i, y * 4), w.index_add(0, i, w[:5].sum(0).expand(5, 6) + y)


def source_is_of_the_base(x: Tensor, y: Tensor, i: Tensor) -> Any:
    z = x * 2
    return z.index_add(0, i, z[:5].sin()), z.sum(0)


def rows_of_a_norm(x: Tensor, y: Tensor, i: Tensor) -> Any:
    new = F.layer_norm(y * 2, (6,))
    return torch.zeros_like(x).index_add(0, i, new).exp(), new


def sums_of_rows(x: Tensor, y: Tensor, i: Tensor) -> Any:
    return x[:, 0].exp().index_add(0, i, (y * 2).sum(-1)) * 2


def into_an_input(x: Tensor, y: Tensor, i: Tensor) -> Any:
    x.index_add_(0, i, y * 2, alpha=3)
    x.scatter_add_(1, i.expand(8, 5), y[:1].exp().expand(8, 6))
    return x * 2


def copied_into_an_input(x: Tensor, y: Tensor, i: Tensor) -> Any:
    old = x.sin()
    x.copy_(torch.zeros_like(x).index_add(0, i, y.exp()))
    return old


def views(x: Tensor, y: Tensor, i: Tensor) -> Any:
    z = torch.zeros(6, 8, device=x.device).t()
    z = z.index_put((i,), y.exp())
    return z.t() * 2, z[1:3]


def fill(x: Tensor, y: Tensor, i: Tensor) -> Any:
    part = y.sin()[:1, :5].expand(8, 5)
    return (x * 2).index_fill(0, i, 3).exp(), x.scatter(1, i.expand(8, 5), part * 2)


def a_part(x: Tensor, y: Tensor, i: Tensor) -> Any:
    x[1:5, 2:].index_add_(0, i % 4, y[:, 2:] * 2)
    return x + 1


ORDERS = [
    chain,
    base_is_read_later,
    source_is_of_the_base,
    rows_of_a_norm,
    sums_of_rows,
    into_an_input,
    copied_into_an_input,
    views,
    fill,
    a_part,
]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("fn", ORDERS)
def test_order(fn: Callable[..., Any], dynamic: bool) -> None:
    x, y, i = rand(8, 6), rand(5, 6), torch.randperm(6)[:5].to(DEVICE)
    if fn is chain:
        x, y, i = rand(8, 8), rand(5, 8), i
    check(fn, x, y, i, dynamic=dynamic, rtol=1e-4, atol=1e-4)
    (report,) = gems_compile.reports()
    left = [key for key in report.aten if "index_" in key or "scatter" in key]
    assert len(left) == (fn is base_is_read_later), left  # what reads all that it adds to


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_index_of_few_bits(dtype: torch.dtype) -> None:
    def fn(x: Tensor, y: Tensor, i: Tensor) -> Any:
        z = torch.zeros_like(x)
        return z.index_add(0, i, y * 2), z.index_put((i - 8,), y.exp(), accumulate=True)

    check(fn, rand(8, 6), rand(5, 6), ints(5, high=8, dtype=dtype))
    assert launches() == [(2, 0)]


@pytest.mark.parametrize("how", ["sum", "amax", "amin"])
def test_reductions_of_integers(how: str) -> None:
    def fn(x: Tensor, i: Tensor, y: Tensor) -> Tensor:
        return (x + 1).scatter_reduce(0, i, y * 2, how)

    check(fn, ints(8, 6, high=99), ints(9, 6, high=8), ints(9, 6, high=99))
    assert launches() == [(2, 0)]


def test_integers_also_where_deterministic_algorithms_are_asked_for() -> None:
    """Their sums are the same in any order; those of floats are ATen's."""

    def fn(x: Tensor, i: Tensor) -> Tensor:
        return torch.zeros_like(x).index_add(0, i, (x * 2)[:5])

    torch.use_deterministic_algorithms(True, warn_only=True)
    check(fn, ints(8, 6), ints(5, high=8))
    assert launches() == [(2, 0)]
    check(fn, rand(8, 6), ints(5, high=8))
    assert "aten.index_add_.default: deterministic algorithms are asked for" in (
        gems_compile.reports()[-1].aten
    )


def test_out_of_range_is_dropped() -> None:
    """No memory of others is written; ATen's device assertion would end the process."""

    def fn(x: Tensor, y: Tensor, i: Tensor) -> Any:
        z = torch.zeros_like(x)
        few = z.scatter_add(0, i[:1, None].expand(1, 3), y)
        return z.index_add(0, i, y * 2), z.index_put((i,), y * 2, accumulate=True), few

    i = torch.tensor([1, 7, -2, -9, 4], device=DEVICE)
    x, y = rand(4, 3), rand(5, 3)
    added, put, few = compile_(fn)(x, y, i)
    want = torch.zeros_like(x)
    want[1] = y[0] * 2
    assert_same_values(added, want)
    want[2] = y[2] * 2  # from the end
    assert_same_values(put, want)
    assert_same_values(few, torch.zeros_like(x).index_add(0, i[:1], y[:1]))


# what is left to ATen -----------------------------------------------------------------------------


def masked_sums(x: Tensor, y: Tensor, i: Tensor) -> Tensor:
    return x.index_put((x > 0,), y.sum().expand(()), accumulate=True)


def sums_of_what_is_put_alone(x: Tensor, y: Tensor, i: Tensor) -> Tensor:
    return (x * 2).scatter_reduce(0, i[:, None], y * 2, "sum", include_self=False)


def means(x: Tensor, y: Tensor, i: Tensor) -> Tensor:
    return (x * 2).scatter_reduce(0, i[:, None], y * 2, "mean")


def largest(x: Tensor, y: Tensor, i: Tensor) -> Tensor:
    return (x * 2).scatter_reduce(0, i[:, None], y * 2, "amax")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fn", [masked_sums, sums_of_what_is_put_alone, means, largest])
def test_what_atens_call_does(fn: Callable[..., Tensor], dtype: torch.dtype) -> None:
    check(fn, rand(8, 6, dtype=dtype), rand(5, 6, dtype=dtype), ints(5, high=8), atol=0.1)
    (report,) = gems_compile.reports()
    assert sum("index_put_" in key or "scatter_reduce_" in key for key in report.aten) == 1


def test_lone_scatter_is_atens() -> None:
    """It moves what ATen's moves; of ``index_put``, ATen sorts the places first."""

    def adds(x: Tensor, i: Tensor, y: Tensor) -> Tensor:
        return x.index_add(0, i, y)

    def puts(x: Tensor, i: Tensor, y: Tensor) -> Tensor:
        return x.index_put((i,), y, accumulate=True)

    inputs = rand(8, 6), ints(5, high=8), rand(5, 6)
    check(adds, *inputs)
    assert launches() == [(0, 2)]
    check(puts, *inputs)
    assert launches()[-1] == (1, 1)  # the copy is ATen's


def graph_of(dtype: torch.dtype, arch: int, rows: int) -> Any:
    """The report of a 16-bit sum of 64 rows into so many, for an NVIDIA GPU."""

    def fn(i: Tensor, y: Tensor) -> Any:
        z = torch.zeros(rows, 2048, dtype=y.dtype, device=y.device)
        return z.index_add(0, i, y * 2), z.index_put((i,), y * 2, accumulate=True)

    target = dataclasses.replace(current_target(), backend="cuda", arch=arch)
    graph = trace(fn, ints(64), rand(64, 2048, dtype=dtype))
    return compile_graph(graph, [], dataclasses.replace(options(), target=target))


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", NARROW)
def test_sums_of_16_bits(dtype: torch.dtype, arch: int) -> None:
    """ATen rounds each sum of ``index_add``, and those of ``index_put``, sorted first, less often:
    they are float32 in memory, if it is little."""
    if DEVICE == "cuda" and torch.cuda.get_device_capability() != (arch // 10, arch % 10):
        pytest.skip("kernels are loaded where they were compiled for")
    _, small = graph_of(dtype, arch, 100)
    each = dtype == torch.float16 or arch == 90  # for which the target has an atomic addition
    assert (small.launches, small.aten_calls) == (3, 0)  # both in each: fill, add, round
    filled = [what.dtype for s in small.sources for _, role, what in s.params if role == "out"]
    assert filled.count("float32") == (1 if each else 2)
    _, large = graph_of(dtype, arch, 10000)
    assert [key for key in large.aten if "index_put" in key] == [
        f"aten.index_put_.default: sums in {str(dtype)[6:]}, which ATen rounds less often"
    ]
    assert any("index_add" in key for key in large.aten) != each
