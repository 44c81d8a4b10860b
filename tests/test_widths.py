"""Kernels of symbolic sizes: 32 bits for places, and 64 where a call's sizes need them."""

from __future__ import annotations

import itertools
import mmap
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import DEVICE, Pair, gems_only, ints, no_new_graph, rand
from machine_code import assembly
from torch import Tensor

from gems_compile.backend import Gems
from gems_compile.lowering import load, widths
from gems_compile.lowering.reach import LIMIT_32

pytestmark = gems_only


@pytest.fixture
def compiled_wide(monkeypatch) -> list[str]:
    """The names of the 64-bit kernels that calls compiled."""
    names = []
    real = load.WhenNeeded._compiled

    def compiled(self: Any) -> Any:
        names.append(self.narrow.source.widen().name)
        return real(self)

    monkeypatch.setattr(load.WhenNeeded, "_compiled", compiled)
    return names


def report_of(fn: Callable[..., Any], *args: Any, dynamic: bool = True) -> Any:
    backend = Gems()
    torch.compile(fn, backend=backend, fullgraph=True, dynamic=dynamic)(*args)
    (report,) = backend.reports
    return report


FUNCTIONS = {
    "pointwise": lambda x: (x * 2 + 1).relu(),
    "rows": lambda x: (x * 2).softmax(-1) + 1,
    "columns": lambda x: (x * 2).sum(0) + 1,
    "transposed": lambda x: x.t().contiguous() * 2,
    "flip": lambda x: x.flip(0, 1) * 2 + x,
    "concatenated": lambda x: torch.cat([x.exp(), x * 2], 1),
    "strided": lambda x: x[1::2, ::3] * 2 + 1,
    "expanded": lambda x: x[:, None] * x[None, :, :1] + 1,
    "reshaped": lambda x: x.reshape(-1)[1:] * 2 + 1,
    "size as number": lambda x: x * x.shape[0] + x.shape[1],
    "gathered": lambda x: x[torch.arange(3, device=x.device) * 2] * 2 + 1,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_both_widths_are_right(name, monkeypatch, compiled_wide) -> None:
    """Nothing is compiled for sizes within the limit, one kernel for those above, and Dynamo is
    not asked again."""
    monkeypatch.setattr(widths, "LIMIT_32", 1000)
    pair = Pair(FUNCTIONS[name], dynamic=True)
    pair(rand(7, 8))
    with no_new_graph():
        pair(rand(9, 6))
        assert not compiled_wide
        pair(rand(33, 70), rtol=1e-5, atol=1e-4)
        first = list(compiled_wide)
        assert first and all(n.endswith("_wide") for n in first)
        pair(rand(35, 66), rtol=1e-5, atol=1e-4)
        pair(rand(7, 9))
    assert compiled_wide == first


def test_training_in_both_widths(monkeypatch, compiled_wide) -> None:
    monkeypatch.setattr(widths, "LIMIT_32", 1000)
    pair = Pair(lambda x, w: torch.nn.functional.layer_norm(x.exp(), (8,), w), dynamic=True)
    pair(rand(5, 8, grad=True), rand(8, grad=True))
    with no_new_graph():
        pair(rand(300, 8, grad=True), rand(8, grad=True), rtol=1e-4, atol=1e-4)
        assert compiled_wide


def test_one_kernel_and_one_comparison() -> None:
    """Two kernels whose bounds are equal share the comparison."""

    def fn(x: Tensor) -> tuple[Tensor, Tensor]:
        y = (x * 2 + 1).relu()
        return y, (y @ x[:4]).exp() * 3

    report = report_of(fn, rand(5, 4))
    assert report.launches == report.kernels == 2
    assert report.wrapper.count("wide0 = ") == 1 and "wide1" not in report.wrapper


def test_the_comparison_is_exact() -> None:
    x = rand(5, 4)
    torch._dynamo.mark_dynamic(x, 0)
    report = report_of(lambda x: (x * 2 + 1).relu(), x, dynamic=None)
    (source,) = report.sources
    (size,) = source.bound.free_symbols
    assert source.bound == 4 * size
    assert f"wide0 = (4*i0) > {LIMIT_32}" in report.wrapper


def test_places_stay_within_the_bound() -> None:
    """Of every index, over all its atoms, for several sizes."""
    seen = 0
    for name, fn in FUNCTIONS.items():
        torch._dynamo.reset()
        for source in report_of(fn, rand(7, 8)).sources:
            symbols = sorted(source.bound.free_symbols, key=str)
            for sizes in itertools.product((2, 3, 6, 11), repeat=len(symbols)):
                values = dict(zip(symbols, sizes, strict=True))
                bound = int(_at(source.bound, values))
                for far in _farthest(source.body, values):
                    seen += 1
                    assert far <= bound, (name, values, source.text)
    assert seen > 400


def _at(size: Any, values: dict[Any, int]) -> int:
    return size if type(size) is int else int(size.xreplace(values))


def _farthest(body: Any, values: dict[Any, int]) -> Any:
    """How far from zero each index lies, at the most, with its sum in any order."""
    for steps in body.sections.values():
        for index in (i for instr in steps for i in instr.indices):
            if all(a in body.group.sizes for a in index.atoms):
                ends = [
                    _at(c, values) * (_at(body.group.sizes[a], values) - 1) for a, c in index.terms
                ]
                const = _at(index.const, values)
                up = sum(e for e in ends if e > 0)
                down = sum(-e for e in ends if e < 0)
                yield max(up, down, up + const, down - const)


def test_a_known_range_needs_no_comparison() -> None:
    x = rand(5, 4)
    torch._dynamo.mark_dynamic(x, 0, min=2, max=10**6)
    report = report_of(lambda x: (x * 2 + 1).relu(), x, dynamic=None)
    assert "wide" not in report.wrapper and "r0(stream, " in report.wrapper
    torch._dynamo.reset()
    x = rand(5, 4)
    torch._dynamo.mark_dynamic(x, 0, min=2, max=LIMIT_32 // 4 + 1)
    assert "wide" in report_of(lambda x: (x * 2 + 1).relu(), x, dynamic=None).wrapper


def test_static_sizes_have_one_width() -> None:
    report = report_of(lambda x: (x * 2 + 1).relu(), rand(5, 4), dynamic=False)
    assert "wide" not in report.wrapper and report.sources[0].bound is None


def test_dropout_draws_the_same_mask(monkeypatch, compiled_wide) -> None:
    def fn(x: Tensor) -> Tensor:
        return torch.nn.functional.dropout(x, 0.5) + 1

    x = torch.ones(40, 8, device=DEVICE)
    found = []
    for limit in (LIMIT_32, 10):
        torch._dynamo.reset()
        monkeypatch.setattr(widths, "LIMIT_32", limit)
        torch.manual_seed(3)
        found.append(torch.compile(fn, backend="gems", dynamic=True)(x))
    assert compiled_wide and torch.equal(*found)


def test_a_large_number_among_the_sizes(compiled_wide) -> None:
    pair = Pair(lambda x, n: x * n + n // 3, dynamic=True)
    pair(rand(6, 4), 7)
    assert not compiled_wide
    with no_new_graph():
        pair(rand(9, 4), 2**33)
    assert compiled_wide


# places beyond 2 ** 31, of which few are touched --------------------------------------------------

needs_sparse = pytest.mark.skipif(
    DEVICE != "cpu" or sys.platform != "linux", reason="memory that is there when it is written"
)


def sparse(count: int) -> Tensor:
    """So many zeros, in memory that exists once it is written."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    return torch.frombuffer(mmap.mmap(-1, count, flags=flags), dtype=torch.int8)


def strided(rows: int, columns: int, stride: int) -> Tensor:
    x = sparse((rows - 1) * stride + columns).as_strided((rows, columns), (stride, 1))
    return x.copy_(ints(rows, columns, high=9, dtype=torch.int8))


BEYOND: dict[str, Callable[[Tensor], Tensor]] = {
    "pointwise": lambda x: x * 2 + 1,
    "flip": lambda x: x.flip(0) * 2 + 1,
    "rows": lambda x: (x * 2).amax(1) + 1,
    "columns": lambda x: (x * 2).amax(0) + 1,
    "expanded": lambda x: x[:, None].expand(-1, 3, -1) * 2 + 1,
    "part": lambda x: x[2:] * 2 + x[:-2],
}


@needs_sparse
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", BEYOND)
def test_the_largest_offset_counts(name, dynamic, compiled_wide) -> None:
    """Few elements, and a stride by which they reach beyond 32 bits."""
    fn = BEYOND[name]
    compiled = torch.compile(fn, backend="gems", dynamic=dynamic, fullgraph=True)
    for stride in (64, 2**28 + 32):
        for rows in (9, 10):
            x = strided(rows, 16, stride)
            torch.testing.assert_close(compiled(x), fn(x))
            assert (dynamic and stride > 64) or not compiled_wide
    assert len(compiled_wide) == dynamic


@needs_sparse
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_gathered_rows_beyond(dtype, dynamic) -> None:
    x = strided(9, 16, 2**28 + 32)

    def fn(x: Tensor, i: Tensor) -> Tensor:
        return x[i] * 2 + 1

    i = torch.tensor([8, 0, 7, 3], dtype=dtype)
    compiled = torch.compile(fn, backend="gems", dynamic=dynamic, fullgraph=True)
    torch.testing.assert_close(compiled(x, i), fn(x, i))


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU, and its memory")
def test_more_elements_than_32_bits_count() -> None:
    count = 2**31 + 8
    if torch.cuda.mem_get_info()[0] < 4 * count:
        pytest.skip("too little memory")

    def fn(x: Tensor) -> Tensor:
        return (x * 2 + 1).relu()

    compiled = torch.compile(fn, backend="gems", dynamic=True, fullgraph=True)
    small = torch.randint(-9, 9, (1000,), dtype=torch.int8, device=DEVICE)
    assert torch.equal(compiled(small), fn(small))
    x = torch.zeros(count, dtype=torch.int8, device=DEVICE)
    x[-1000:] = small
    with no_new_graph():
        got = compiled(x)
    assert torch.equal(got[-1000:], fn(small)) and bool((got[: 2**20] == 1).all())


def test_rows_of_whole_vectors_are_moved_in_such(tmp_path) -> None:
    """A symbolic number of rows, each a multiple of 16 elements: compiled for sm_90, no GPU."""
    x = rand(40, 64, dtype=torch.bfloat16)
    torch._dynamo.mark_dynamic(x, 0)
    (source,) = report_of(lambda x: (x * 2 + 1).relu(), x, dynamic=None).sources
    for width in (source, source.widen()):
        text = assembly(width, tmp_path)
        assert "ld.global.v4" in text and "st.global.v4" in text


def test_the_wide_kernel_alone_computes_in_64_bits() -> None:
    (source,) = report_of(lambda x: x.flip(1) * 2 + x, rand(5, 4)).sources
    wide = source.widen()
    assert "int64" not in source.text and "tl.program_id(0).to(tl.int64)" in wide.text
    assert {t for t in source.meta["signature"].values() if t[0] == "i"} == {"i32"}
    assert {t for t in wide.meta["signature"].values() if t[0] == "i"} == {"i64"}
