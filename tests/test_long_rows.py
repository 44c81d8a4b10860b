"""Rows too long for one program's registers: how often they are read, and the numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE, assert_same_values, gems_only, ints, rand
from opcheck import lower, options, trace
from torch import Tensor

from gems_compile.lowering.pipeline import compile_graph

pytestmark = gems_only

ROWS = 16 if DEVICE == "cpu" else 600  # enough that no row is reduced in parts
LENGTHS = [20000, 16385, 32768]  # steps and a rest, a rest of one element, whole steps


def _by_hand(x: Tensor) -> Tensor:
    e = (x - x.amax(-1).unsqueeze(-1)).exp()
    return e / e.sum(-1, keepdim=True)


def _with_odd_rows(length: int) -> Tensor:
    """Infinities and a NaN, at the ends too."""
    x = rand(ROWS, length)
    x[1] = float("-inf")
    x[2, length - 1] = float("inf")
    x[3, 5] = float("nan")
    x[4, :-1] = float("-inf")
    x[5] = 3e4 * x[5]
    return x


SOFTMAX: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda x: torch.softmax(x, -1),
    "by_hand": _by_hand,
    "log_softmax": lambda x: torch.log_softmax(x, -1),
    "logsumexp": lambda x: torch.logsumexp(x, -1),
}


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", SOFTMAX)
def test_softmax(name: str, length: int) -> None:
    x = _with_odd_rows(length)
    got, report = lower(SOFTMAX[name], x, alone=True)
    assert report.launches == 1
    assert_same_values(got[0], SOFTMAX[name](x.double()).float(), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["softmax", "by_hand"])
def test_softmax_reads_its_row_twice(name: str) -> None:
    """Maximum and sum from one loop, the results from another that finds the row in cache."""
    _, report = lower(SOFTMAX[name], rand(ROWS, 32768), alone=True)
    text = report.sources[0].text
    assert text.count("for start in") == 2
    assert text.count("evict_last") == 1


def test_a_maximum_of_other_rows_is_not_the_row_s_own() -> None:
    """x[i, j] - max(x[j]), which only looks like a softmax."""

    def fn(x: Tensor) -> Tensor:
        return (x - x.amax(-1)).exp().sum(-1)

    x = rand(64, 64)
    got, _ = lower(fn, x, alone=True)
    assert_same_values(got[0], fn(x), rtol=1e-5, atol=1e-5)


def test_rounded_exponents_are_summed_as_they_are() -> None:
    """Where eager rounds to 16 bits between the steps, so do we."""
    x = rand(ROWS, 20000, dtype=torch.bfloat16)
    got, report = lower(_by_hand, x, alone=True)
    assert report.launches == 1
    assert_same_values(got[0], _by_hand(x), rtol=2**-6, atol=1e-6)


@pytest.mark.parametrize("length", LENGTHS)
def test_cross_entropy(length: int) -> None:
    """The loss of bfloat16 logits, whose statistics take one loop."""
    logits = rand(ROWS, length, dtype=torch.bfloat16)
    labels = ints(ROWS, high=length)
    labels[3] = -100

    def fn(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), labels)

    got, report = lower(fn, logits, labels, alone=True)
    (first, *_) = [s.text for s in report.sources if "for start in" in s.text]
    assert first.count("for start in") == 1
    assert first.count("running_logsumexp") == (1 if length == 32768 else 2)
    assert_same_values(got[0], F.cross_entropy(logits.double(), labels).float(), rtol=1e-5)


@pytest.mark.parametrize("length", [32768, 17 * 1801, 16411])
@pytest.mark.parametrize("name", ["argmax", "argmin"])
def test_places_from_parts(name: str, length: int) -> None:
    """Few long rows are cut in parts, among which are the first of equals and the first NaN."""
    worst = float("-inf") if name == "argmax" else float("inf")
    x = torch.full((5, length), worst, device=DEVICE)
    x[1] = ints(length, high=3).float()
    x[2, 20000 % length], x[2, 9000] = float("nan"), float("nan")
    x[3, length - 1], x[3, 700] = 1.0, 1.0
    x[4, 9001] = -worst
    op = getattr(torch, name)
    best = torch.max if name == "argmax" else torch.min
    got, report = lower(lambda x: (op(x, -1), op(x[1]), *best(x, -1)), x, alone=True)
    assert report.aten_calls == 0
    expected = (op(x, -1), op(x[1]), *best(x, -1))
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a.nan_to_num(9), b.nan_to_num(9)), f"{a}, eager: {b}"


def test_a_lone_place_comes_from_parts() -> None:
    x = rand(3, 32768, dtype=torch.bfloat16)
    got, report = lower(lambda x: x.argmax(-1, keepdim=True), x)
    assert (report.launches, report.aten_calls) == (2, 0)
    assert torch.equal(got[0], x.argmax(-1, keepdim=True))


@pytest.mark.parametrize("shape, ours", [((16, 600), True), ((16, 9), False), ((3, 600), False)])
def test_a_lone_scan(shape: tuple[int, ...], ours: bool) -> None:
    """Of rows enough to keep the GPU busy it is a kernel of ours."""
    rows, length = shape
    x = rand(rows if DEVICE == "cpu" or not ours else 600, length)
    got, report = lower(lambda x: x.cumsum(-1), x)
    assert (report.launches, report.aten_calls) == ((1, 0) if ours else (0, 1))
    assert_same_values(got[0], x.double().cumsum(-1).float(), rtol=1e-5, atol=1e-5)


ODD: dict[str, Callable[[Tensor], Tensor]] = {
    "whole": lambda x: x,
    "part": lambda x: x[:, 3:-2],  # rows that begin at any address, with more behind them
    "every_other": lambda x: x[::2],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [32773, 49151])
@pytest.mark.parametrize("name", ODD)
def test_odd_rows(name: str, length: int, dtype: torch.dtype) -> None:
    """Rows that are no whole number of 16 bytes: whole vectors, and nothing beside the row."""
    x = rand(ROWS, length, dtype=dtype)
    x[2, 7], x[4, -4] = float("inf"), float("nan")  # seen by their own rows only

    def fn(x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.softmax(ODD[name](x), -1), ODD[name](x).logsumexp(-1)

    near = {"rtol": 2e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2**-7, "atol": 1e-3}
    for k in (0, 1):
        (got,), report = lower(lambda x, k=k: fn(x)[k], x, alone=True)
        assert_same_values(got, fn(x.double())[k].to(got.dtype), name, **near)
        moved = any("tl.multiple_of" in s.text for s in report.sources)
        assert moved == (name == "whole" or k == 1)  # else its results' rows begin elsewhere


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [4093, 4097, 2047, 6140])
@pytest.mark.parametrize("name", ODD)
def test_odd_rows_with_a_number_each(name: str, length: int, dtype: torch.dtype) -> None:
    x, scale = rand(20, length, dtype=dtype), rand(20, 1)
    scale = scale[::2].contiguous() if name == "every_other" else scale

    def fn(x: Tensor, scale: Tensor) -> Tensor:
        return (ODD[name](x) * scale).to(dtype)

    got, _ = lower(fn, x, scale, alone=True)
    assert_same_values(got[0], fn(x, scale))


@pytest.mark.parametrize(("batch", "first"), [(16, True), (1, False), (2, False)])
def test_results_make_way_for_a_bias_that_the_batch_shares(batch: int, first: bool) -> None:
    """Not where nothing is read again, nor where a reader may find the results in the cache."""

    def fn(x: Tensor, bias: Tensor) -> Tensor:
        return torch.softmax(x + bias, -1)

    shape, kind = (12, 256, 512), {"dtype": torch.bfloat16, "device": DEVICE}
    x, bias = (torch.empty(b, *shape, **kind) for b in (batch, 1))
    (source,) = compile_graph(trace(fn, x, bias), [], options())[1].sources
    (store,) = [line for line in source.text.split("\n") if "tl.store" in line]
    assert ("evict_first" in store) is first


@pytest.mark.parametrize(("rows", "warps"), [(8, 16), (40, 4)])
def test_few_rows_keep_a_gpu_busy(rows: int, warps: int) -> None:
    """A multiprocessor that has one or two rows reads more of them at a time."""
    x = torch.empty(rows, 20000, device=DEVICE)
    target = dataclasses.replace(options().target, multiprocessors=8)
    graph = trace(lambda x: torch.logsumexp(x, -1), x)
    (source,) = compile_graph(graph, [], options(target=target))[1].sources
    assert source.meta["num_warps"] == warps


PICKS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "at a place": lambda x, y: y.gather(-1, x.argmax(-1, keepdim=True)),
    "at a computed place": lambda x, y: y.gather(-1, (x > 0).sum(-1, keepdim=True) // 2),
    "and then a reduction": lambda x, y: (y - y.gather(-1, x.argmax(-1, keepdim=True))).amax(-1),
    "of what is computed": lambda x, y: (y * 2).gather(-1, x.argmin(-1, keepdim=True)) + 1,
    "of all rows": lambda x, y: y.flatten()[x.flatten().argmax()[None]] * 2,
    "of another shape": lambda x, y: y.flatten().gather(0, (x > 0).sum(-1)) - 1,
    "twice": lambda x, y: y.gather(-1, (y.gather(-1, x.argmax(-1, True)) > 0).long() + 3),
}


@pytest.mark.parametrize("name", PICKS)
@pytest.mark.parametrize("length", [70001, 20000, 33])
def test_elements_are_picked_behind_the_loop_that_finds_them(name: str, length: int) -> None:
    rows = 3 if length > 50000 and DEVICE == "cpu" else ROWS
    x, y = rand(rows, length), rand(rows, length)
    got, report = lower(PICKS[name], x, y, alone=True)
    assert report.aten_calls == 0
    assert torch.equal(got[0], PICKS[name](x, y))


# shares -------------------------------------------------------------------------------------------


WHOLE: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda x: x.sum(),
    "mean of squares": lambda x: (x * x - 1).mean(),
    "largest": lambda x: x.amax(),
    "smallest of rows": lambda x: (x * 2).amin(-1),
    "rows": lambda x: x.sum(-1, keepdim=True) * 2,
    "any": lambda x: (x > 4).any(),
    "variance": lambda x: x.var(),
    "outer dims": lambda x: x.unflatten(-1, (-1, 1)).sum((-1, -2)),
}


@pytest.mark.parametrize("name", WHOLE)
def test_rows_of_any_length_in_shares(name: str) -> None:
    """One row keeps a GPU busy, whatever its length; also one that has fewer elements than there
    are shares."""
    wanted = WHOLE[name]
    x = rand(2, 700_001)
    how = options(target=dataclasses.replace(options().target, multiprocessors=132))
    run, report = compile_graph(trace(wanted, x, dynamic=True), [x], how)
    assert report.aten_calls == 0
    assert any("whole = first" in s.text for s in report.sources)
    for shape in ((2, 70_001), (3, 5), (2, 4096), (7, 2 * 4096 + 1), (1, 200_003)):
        x = rand(*shape)
        (got,) = run([x])
        assert_same_values(got, wanted(x), name, rtol=1e-4, atol=1e-5)


def test_a_prime_length_in_shares() -> None:
    """No number of parts cuts it evenly."""
    x = rand(10 * 2**17 + 1)  # 1310721 is 3 * 436907
    got, report = lower(lambda x: (x * 3).sum(), x, multiprocessors=132)
    assert report.launches == 2 and report.sources[0].grid == 528
    assert_same_values(got[0], (x * 3).sum(), rtol=1e-4, atol=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("length", [2**31 - 2**15, 2**31 + 5])
def test_shares_of_a_row_that_32_bits_hardly_count(length: int) -> None:
    """The kernel of a short row, and that in 64 bits."""
    x = torch.ones(700_001, dtype=torch.int8, device=DEVICE)
    run, report = compile_graph(trace(lambda x: x.sum(), x, dynamic=True), [x], options())
    assert any("whole = first" in s.text for s in report.sources)
    for n in (len(x), length):
        (got,) = run([torch.ones(n, dtype=torch.int8, device=DEVICE)])
        assert got.item() == n
