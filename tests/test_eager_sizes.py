"""Ops behind eager PyTorch whose results' sizes are data, and scans of few long rows."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accuracy import assert_accurate
from eagercheck import nothing_left, ours, whys  # noqa: F401
from helpers import DEVICE, assert_same, assert_same_metadata, ints, pretend_multiprocessors, rand
from machine_code import assembly
from opcheck import FULL, SEED, tensors
from torch import Tensor

import gems_compile
from gems_compile import eager
from gems_compile.calls import long_scans
from gems_compile.kernels.sorting import LONGEST
from gems_compile.lowering import pipeline

NAN, INF = float("nan"), float("inf")
BLOCK = long_scans.BLOCK
DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
]


def served(name: str, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Tensor]:
    """Our results, which are ATen's bit for bit; they came from kernels."""
    want, before = fn(*args, **kwargs), ours(name)
    with gems_compile.use_gems(only=[name]):
        got = fn(*args, **kwargs)
    assert ours(name) > before, whys(name)
    for a, b in zip(tensors(got), tensors(want), strict=True):
        assert_same_metadata(a, b, name)
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    return tensors(got)


def kernels_of(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Reports of all that is compiled from now on."""
    reports, compile_graph = [], pipeline.compile_graph

    def noted(*args: Any, **kwargs: Any) -> Any:
        run, report = compile_graph(*args, **kwargs)
        reports.append(report)
        return run, report

    monkeypatch.setattr(pipeline, "compile_graph", noted)
    return reports


def few(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Small whole numbers, a third of them zeros."""
    return ints(*shape, high=3).to(dtype)


# what is kept -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(7,), (1,), (3, 5), (1, 4), (2, 3, 1, 4), (BLOCK + 3,)])
def test_nonzero(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    served("nonzero", torch.nonzero, few(*shape, dtype=dtype))


@pytest.mark.parametrize("size", [BLOCK - 1, BLOCK, 5 * BLOCK + 1])
def test_several_blocks(size: int) -> None:
    x = rand(size)
    served("nonzero", torch.nonzero, x > 1.5)
    served("nonzero", torch.nonzero, (x > 0).view(-1, 1).expand(size, 3))
    served("masked_select", torch.masked_select, x, x < 0)


def test_all_and_none() -> None:
    for x in (torch.zeros(3, 40), torch.ones(3, 40), torch.zeros(9), torch.ones(9)):
        served("nonzero", torch.nonzero, x.to(DEVICE))


def test_nan_and_the_negative_zero() -> None:
    served("nonzero", torch.nonzero, torch.tensor([NAN, -0.0, 0.0, INF, 1e-45], device=DEVICE))


def test_gaps_and_transposes() -> None:
    x = few(6, 20, 4)
    for y in (x[:, ::2], x.transpose(0, 2), x[:, 4:5].expand(6, 3, 4)):
        served("nonzero", torch.nonzero, y)
        served("masked_select", torch.masked_select, y, y > 1)
        served("unique_consecutive", torch.unique_consecutive, y, True, True)


@pytest.mark.parametrize("name", ["nonzero", "masked_select", "_unique2"])
def test_another_count_compiles_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = {
        "nonzero": lambda x: x.nonzero(),
        "masked_select": lambda x: x.masked_select(x > 0),
        "_unique2": lambda x: torch.unique(x, return_inverse=True, return_counts=True),
    }
    call, x = calls[name], torch.zeros(3, 100, device=DEVICE)
    served(name, call, x)  # of no element, or one
    reports = kernels_of(monkeypatch)
    for count in (1, 2, 16, 63, 300):
        x.view(-1)[:count] = torch.arange(1.0, count + 1)
        served(name, call, x)
    assert not reports
    assert eager.stats()[name]["compiled"] == 1


def test_empty_and_0_dim_are_atens() -> None:
    for x in (torch.zeros(0, 3), torch.tensor(2.0), torch.tensor(0)):
        x = x.to(DEVICE)
        want = x.nonzero(), x.masked_select(x > 1), torch.unique(x)
        with gems_compile.use_gems(only=["nonzero", "masked_select", "_unique2"]):
            got = x.nonzero(), x.masked_select(x > 1), torch.unique(x)
        for a, b in zip(got, want, strict=True):
            assert_same(a, b, exact=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_select(dtype: torch.dtype) -> None:
    x = few(4, 9, dtype=dtype)
    served("masked_select", torch.masked_select, x, few(4, 9) > 0)
    served("masked_select", torch.masked_select, x[:1], few(4, 1) > 0)
    served("masked_select", torch.masked_select, x, few(3, 1, 9) > 0)


def test_a_gradient_goes_to_what_was_selected() -> None:
    x, mask = rand(5, 7, grad=True), few(5, 7) > 0
    (want,) = torch.autograd.grad(x.masked_select(mask).square().sum(), x)
    with gems_compile.use_gems(only=["masked_select"]):
        (got,) = torch.autograd.grad(x.masked_select(mask).square().sum(), x)
    assert ours("masked_select") == 1
    assert_same(got, want, exact=True)


@pytest.mark.parametrize("size", [1, 5, 12, 40])
@pytest.mark.parametrize("shape", [(12,), (3, 4)])
def test_nonzero_static(shape: tuple[int, ...], size: int) -> None:
    x = few(*shape)
    served("nonzero_static", torch.nonzero_static, x, size=size)
    served("nonzero_static", torch.nonzero_static, x, size=size, fill_value=7)


def test_errors_are_atens() -> None:
    with gems_compile.use_gems(only=["masked_select", "repeat_interleave"]):
        with pytest.raises(RuntimeError, match="must match"):
            rand(3).masked_select(rand(4) > 0)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="negative"):
                torch.repeat_interleave(torch.tensor([2, -1], device=DEVICE))
        repeats = torch.tensor([2, 1], device=DEVICE)
        assert torch.repeat_interleave(repeats).tolist() == [0, 0, 1]


# copies -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("count", [1, 30, 20000])
def test_repeat_interleave(count: int, dtype: torch.dtype) -> None:
    repeats = ints(count, high=4).to(dtype)
    name = "repeat_interleave.Tensor"
    served(name, torch.repeat_interleave, repeats)
    served(name, torch.repeat_interleave, repeats, output_size=int(repeats.sum()))
    served(name, torch.repeat_interleave, torch.zeros_like(repeats))


def test_repeat_interleave_of_a_tensor() -> None:
    x, repeats = rand(5, 3), torch.tensor([2, 0, 1, 3, 1], device=DEVICE)
    served("repeat_interleave.Tensor", torch.repeat_interleave, x, repeats, dim=0)


# distinct values ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unique(dtype: torch.dtype) -> None:
    if dtype == torch.bool and DEVICE == "cuda":
        pytest.skip("ATen returns nothing where nothing was asked for, and bools stay its own")
    x = few(9, 5, dtype=dtype)
    for inverse in (False, True):
        for counts in (False, True):
            served("_unique2", torch.unique, x, True, inverse, counts)
            served("unique_consecutive", torch.unique_consecutive, x, inverse, counts)


@pytest.mark.parametrize("size", [1, LONGEST, LONGEST + 1, 3 * LONGEST])
def test_unique_of_many(size: int) -> None:
    x = ints(size, high=size // 2 + 1).float()
    served("_unique2", torch.unique, x, True, True, True)


def test_every_nan_is_another() -> None:
    x = torch.tensor([NAN, 1.0, NAN, -INF, 1.0, INF, 0.0], device=DEVICE)
    values, inverse, counts = served("_unique2", torch.unique, x, True, True, True)
    assert len(values) == 6 and counts.sum() == len(x)
    torch.testing.assert_close(values[inverse], x, equal_nan=True)


def test_slices_are_atens() -> None:
    x = few(6, 2)
    want = torch.unique_consecutive(x, dim=0)
    with gems_compile.use_gems(only=["unique_consecutive"]):
        assert torch.equal(torch.unique_consecutive(x, dim=0), want)
    assert not ours("unique_consecutive")


# draws --------------------------------------------------------------------------------------------


def drawn(name: str, fn: Callable[[], Tensor], seed: int = 3) -> Tensor:
    before = ours(name)
    torch.manual_seed(seed)
    with gems_compile.use_gems(only=[name]):
        out = fn()
    assert ours(name) > before, whys(name)
    return out


def is_likely(counts: Tensor, expected: Tensor) -> bool:
    """By chi squared, six deviations away."""
    freedom = expected.numel() - 1
    chi = ((counts - expected) ** 2 / expected).sum().item()
    return chi < freedom + 6 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.float32])
@pytest.mark.parametrize("size", [2, 5, 100, LONGEST])
def test_randperm(size: int, dtype: torch.dtype) -> None:
    fn = lambda: torch.randperm(size, dtype=dtype, device=DEVICE)  # noqa: E731
    a, again = drawn("randperm", fn), drawn("randperm", fn)
    assert_same_metadata(a, fn())
    assert torch.equal(a, again)
    assert torch.equal(a.sort()[0], torch.arange(size, dtype=dtype, device=DEVICE))
    assert size < 100 or not torch.equal(a, drawn("randperm", fn, seed=4))


def test_randperm_is_uniform() -> None:
    """Each of 24 orders is as likely, over the seeds that a generator goes through."""
    draws = 3000 if DEVICE == "cuda" else 720
    torch.manual_seed(11)
    with gems_compile.use_gems(only=["randperm"]):
        found = torch.stack([torch.randperm(4, device=DEVICE) for _ in range(draws)])
    which = (found * torch.tensor([64, 16, 4, 1], device=DEVICE)).sum(1).unique(return_counts=True)
    assert len(which[0]) == 24
    assert is_likely(which[1].double(), torch.full((24,), draws / 24, device=DEVICE))


def test_randperm_of_a_generator_and_in_place() -> None:
    own = lambda: torch.Generator(DEVICE).manual_seed(5)  # noqa: E731
    fn = lambda: torch.randperm(30, generator=own(), device=DEVICE)  # noqa: E731
    assert torch.equal(drawn("randperm.generator", fn), drawn("randperm.generator", fn, seed=9))
    place = torch.empty(30, dtype=torch.int64, device=DEVICE)
    drawn("randperm.out", lambda: torch.randperm(30, out=place))
    assert torch.equal(place.sort()[0], torch.arange(30, device=DEVICE))


def test_long_permutations_are_atens() -> None:
    with gems_compile.use_gems(only=["randperm"]):
        assert len(torch.randperm(LONGEST + 1, device=DEVICE)) == LONGEST + 1
    assert not ours("randperm")


WEIGHTS = [0.0, 1.0, 2.0, 0.0, 4.0, 0.5, 0.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [0, 3])
def test_multinomial_with_replacement(rows: int, dtype: torch.dtype) -> None:
    p = torch.tensor(WEIGHTS, dtype=dtype, device=DEVICE)
    p = p.expand(rows, -1) if rows else p
    fn = lambda: torch.multinomial(p, 4000, True)  # noqa: E731
    got = drawn("multinomial", fn)
    assert_same_metadata(got, fn())
    assert torch.equal(got, drawn("multinomial", fn))
    check_frequencies(got, torch.tensor(WEIGHTS))


def test_multinomial_of_one() -> None:
    p = torch.tensor(WEIGHTS, device=DEVICE).expand(4000, -1)
    for replacement in (False, True):
        got = drawn("multinomial", lambda r=replacement: torch.multinomial(p, 1, r))
        assert_same_metadata(got, torch.multinomial(p, 1))
        check_frequencies(got, torch.tensor(WEIGHTS))


def check_frequencies(places: Tensor, weights: Tensor) -> None:
    counts = torch.bincount(places.flatten().cpu(), minlength=len(weights)).double()
    assert not counts[weights == 0].any()
    expected = weights.double() / weights.sum() * places.numel()
    assert is_likely(counts[weights > 0], expected[weights > 0])


def test_multinomial_without_replacement() -> None:
    """Of two draws the first is as probable as its weight, the second as its share of the rest."""
    p = torch.tensor(WEIGHTS, device=DEVICE).expand(4000, -1)
    got = drawn("multinomial", lambda: torch.multinomial(p, 2)).cpu()
    weights = torch.tensor(WEIGHTS, dtype=torch.float64)
    share = weights / weights.sum()
    expected = share[:, None] * share[None, :] / (1 - share[:, None]) * len(got)
    expected.fill_diagonal_(0)
    counts = torch.bincount(got[:, 0] * len(WEIGHTS) + got[:, 1], minlength=expected.numel())
    counts = counts.view_as(expected)
    assert not counts[expected == 0].any()
    assert is_likely(counts[expected > 0].double(), expected[expected > 0])


def test_zeros_among_many_sums_are_never_drawn() -> None:
    """Sums of so many differ by the order of addition, also where nothing is added."""
    p = rand(9000).abs()
    p[::2] = 0
    got = drawn("multinomial", lambda: torch.multinomial(p, 20000, True))
    assert (p[got] > 0).all()
    assert len(got.unique()) > 3000
    some = drawn("multinomial", lambda: torch.multinomial(p[:4000], 2000)).sort()[0]
    assert torch.equal(some, p[:4000].nonzero().view(-1))


def test_generators_and_invalid_probabilities() -> None:
    p = torch.tensor(WEIGHTS, device=DEVICE)
    own = lambda: torch.Generator(DEVICE).manual_seed(5)  # noqa: E731
    fn = lambda: torch.multinomial(p, 9, True, generator=own())  # noqa: E731
    assert torch.equal(drawn("multinomial", fn), drawn("multinomial", fn, seed=8))
    if DEVICE == "cuda":
        return  # an assertion of the device ends the process's use of it
    with gems_compile.use_gems(only=["multinomial"]):
        for bad in (-1.0, NAN, INF):
            with pytest.raises(RuntimeError):
                torch.multinomial(torch.tensor([1.0, bad, 1, 1, 1, 1, 1]), 9, True)
    drawn("multinomial", fn)  # one such call does not make others ATen's


# long rows ----------------------------------------------------------------------------------------

SCANS = {
    "cumsum": lambda x: x.cumsum(-1),
    "cumprod": lambda x: x.cumprod(-1),
    "logcumsumexp": lambda x: x.logcumsumexp(-1),
    "cummax": lambda x: x.cummax(-1),
    "cummin": lambda x: x.cummin(-1),
}
LONG = 20001


@pytest.mark.parametrize("name", ["cumsum", "cumprod", "logcumsumexp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(LONG,), (2, LONG)])
def test_long_scans(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = (1 + rand(*shape) / 1000 if name == "cumprod" else rand(*shape)).to(dtype)
    with gems_compile.use_gems(only=[name]):
        got = SCANS[name](x)
    assert ours(name) == 1, whys(name)
    want, exact = SCANS[name](x), SCANS[name](x.double())
    assert_same_metadata(got, want)
    if dtype == torch.float64:  # whose errors are those of this many sums
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    elif (name, dtype) == ("cumprod", torch.float32):  # a walk of roundings; a CPU's are float64's
        walk = 4 * math.sqrt(LONG) * torch.finfo(dtype).eps / 2
        torch.testing.assert_close(got.double(), exact, rtol=walk, atol=0)
    else:
        assert_accurate(got, want, exact, name, "tensor", least=4.0)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.bool], ids=str)
def test_long_whole_numbers(dtype: torch.dtype) -> None:
    x = ints(3, LONG, high=9, low=-5).to(dtype)
    for y in (x[0], x, x.t().contiguous().t()):
        served("cumsum", SCANS["cumsum"], y)
    served("cumsum", lambda x: x.t().cumsum(0), x)
    served("cumsum", lambda x: x.cumsum(1, dtype=torch.float32), x)
    served("cumprod", SCANS["cumprod"], x)


@pytest.mark.parametrize("name", ["cummax", "cummin"])
def test_long_extremes(name: str) -> None:
    """Of equal ones the last, of NaNs as well; one of another block lasts."""
    x = ints(2, LONG, high=9).float()
    served(name, SCANS[name], x)
    x[0, 700], x[1, 3000] = (99, 50) if name == "cummax" else (-99, -50)
    served(name, SCANS[name], x)
    x[0, 9000::700] = NAN
    served(name, SCANS[name], x)
    served(name, SCANS[name], ints(LONG, high=10**6))


def test_infinities_among_sums() -> None:
    x = rand(LONG)
    x[4000], x[15000] = INF, -INF
    with gems_compile.use_gems(only=["cumsum"]):
        got = x.cumsum(0)
    assert ours("cumsum") == 1
    assert got[:4000].isfinite().all() and (got[4000:15000] == INF).all()
    assert got[15000:].isnan().all()


# what is compiled ---------------------------------------------------------------------------------

CALLS: dict[str, Callable[[], Any]] = {
    "nonzero": lambda: few(5000).nonzero(),
    "nonzero of dims": lambda: (rand(40, 30, 7) > 0).nonzero(),
    "nonzero_static": lambda: torch.nonzero_static(few(40, 90), size=33),
    "masked_select": lambda: rand(5000).bfloat16().masked_select(few(5000) > 0),
    "repeat_interleave": lambda: torch.repeat_interleave(ints(20000, high=3)),
    "_unique2": lambda: torch.unique(few(60, 70), True, True, True),
    "unique_consecutive": lambda: torch.unique_consecutive(few(9000) > 1, True, True),
    "randperm": lambda: torch.randperm(1000, device=DEVICE),
    "multinomial": lambda: (
        torch.multinomial(rand(8, 900).abs(), 5),
        torch.multinomial(rand(8, 900).abs(), 1),
        torch.multinomial(rand(8, 9000).abs().bfloat16(), 500, True),
    ),
    "long scans": lambda: [
        scan(x) for scan in SCANS.values() for x in (rand(2, LONG).bfloat16(), rand(LONG))
    ],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    return tmp_path_factory.mktemp("ptx")


#: those that a day compiles: it takes a second a kernel
OF_THE_DAY = sorted(CALLS) if FULL else random.Random(SEED).sample(sorted(CALLS), 2)


@pytest.mark.parametrize("name", OF_THE_DAY)
def test_kernels_are_legal_on_a_gpu(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Triton's compiler has them, which is stricter than its interpreter."""
    pretend_multiprocessors(monkeypatch, 132)
    reports = kernels_of(monkeypatch)
    with gems_compile.use_gems(all=True):
        CALLS[name]()
    sources = {s.key: s for report in reports for s in report.sources}
    assert sources
    for source in sources.values():
        assert "st.global" in assembly(source, folder)


@pytest.mark.parametrize(
    ("name", "fn", "count"),
    [
        ("nonzero", lambda: few(9 * BLOCK).nonzero(), 3),
        ("masked_select", lambda: rand(9 * BLOCK).masked_select(few(9 * BLOCK) > 0), 3),
        ("cumsum", lambda: rand(LONG).cumsum(0), 4),
        ("_unique2", lambda: torch.unique(few(60, 50)), 5),
        ("randperm", lambda: torch.randperm(500, device=DEVICE), 6),
    ],
)
def test_launches(name: str, fn: Any, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_multiprocessors(monkeypatch, 132)
    reports = kernels_of(monkeypatch)
    with gems_compile.use_gems(only=[name]):
        fn()
    assert sum(report.launches for report in reports) == count, [
        [source.name for source in report.sources] for report in reports
    ]
