"""Writes into an input at computed places, by the kernel that computes the values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same_values, check, compile_, gems_only, rand
from opcheck import options, trace
from torch import Tensor

import gems_compile
from gems_compile.lowering.pipeline import compile_graph

pytestmark = gems_only


@pytest.fixture
def undetermined() -> Iterator[None]:
    """Of equal places any value may stay; the tests otherwise ask for deterministic algorithms."""
    before = torch.get_deterministic_debug_mode()
    torch.use_deterministic_algorithms(False)
    yield
    torch.set_deterministic_debug_mode(before)


def rope(k: Tensor, cos: Tensor) -> Tensor:
    return k * cos + torch.cat([-k[..., 4:], k[..., :4]], -1) * (1 - cos)


def by_index_copy(cache: Tensor, k: Tensor, cos: Tensor, at: Tensor) -> None:
    cache.index_copy_(2, at, rope(k, cos))


def by_index_put(cache: Tensor, k: Tensor, cos: Tensor, at: Tensor) -> None:
    cache[:, :, at] = rope(k, cos)


def by_index_put_from_the_end(cache: Tensor, k: Tensor, cos: Tensor, at: Tensor) -> None:
    cache[:, :, at - 12] = rope(k, cos)


def by_slice(cache: Tensor, k: Tensor, cos: Tensor, at: Tensor) -> None:
    cache[:, :, 3:6] = rope(k, cos)


def normed(cache: Tensor, k: Tensor, cos: Tensor, at: Tensor) -> None:
    cache.index_copy_(2, at, F.layer_norm(k * 2, (8,)) * cos)


def sums(cache: Tensor, k: Tensor, cos: Tensor, at: Tensor) -> None:
    cache[..., 0].index_copy_(2, at, (k * cos).sum(-1))


def by_index_put_of_pairs(cache: Tensor, k: Tensor, cos: Tensor, at: Tensor) -> None:
    cache[at[:2] - 3, :, at[:2]] = k[:, :, 0] * 2 + 1


WRITES = [
    by_index_copy,
    by_index_put,
    by_index_put_from_the_end,
    by_slice,
    normed,
    sums,
    by_index_put_of_pairs,
]


def write(fn: Callable[..., None], dtype: torch.dtype, dynamic: bool, kernels: int) -> None:
    cos, at = rand(3, 8, dtype=dtype), torch.tensor([3, 4, 9], device=rand(1).device)
    cache, k = rand(2, 3, 12, 8, dtype=dtype), rand(2, 3, 3, 8, dtype=dtype)
    want, got = cache.clone(), cache.clone()
    fn(want, k, cos, at)
    with torch.no_grad():
        compile_(fn, dynamic=dynamic)(got, k, cos, at)
    assert_same_values(got, want)
    (report,) = gems_compile.reports()
    assert (report.launches, report.aten_calls) == (kernels, 0), report.aten


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fn", WRITES)
def test_write_of_a_chain(fn: Callable[..., None], dtype: torch.dtype, undetermined: None) -> None:
    """The kernel that computes the new keys puts them into the cache."""
    write(fn, dtype, False, kernels=1)


@pytest.mark.parametrize("fn", [by_index_copy, by_index_put, normed])
def test_write_of_symbolic_size(fn: Callable[..., None], undetermined: None) -> None:
    write(fn, torch.float32, True, kernels=1)


def read_before(cache: Tensor, k: Tensor, at: Tensor) -> Any:
    old = cache * 2
    cache.index_copy_(0, at, k * 3)
    return old


def read_after(cache: Tensor, k: Tensor, at: Tensor) -> Any:
    cache.index_copy_(0, at, k * 3)
    return cache * 2, cache[1:3] + 1


def read_on_both_sides(cache: Tensor, k: Tensor, at: Tensor) -> Any:
    old = cache[:2].exp()
    cache.index_copy_(0, at, k * 3 + old)
    return cache + old[0], cache


def write_twice(cache: Tensor, k: Tensor, at: Tensor) -> Any:
    cache.index_copy_(0, at, k * 3)
    cache.index_copy_(0, at + 1, k * 5)
    return cache.sum(0), cache


def write_what_was_there(cache: Tensor, k: Tensor, at: Tensor) -> Any:
    cache.index_copy_(0, at, cache[1:3] * 2 + k)
    return k * 3


def move_down(cache: Tensor, k: Tensor, at: Tensor) -> Any:
    cache[1:] = cache[:-1] * 2
    return k + 1


def write_and_return(cache: Tensor, k: Tensor, at: Tensor) -> Any:
    new = k * 3 + 1
    cache.index_copy_(0, at, new)
    return new, cache.view(-1), (new * 2).sum(-1)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    "fn",
    [
        read_before,
        read_after,
        read_on_both_sides,
        write_twice,
        write_what_was_there,
        move_down,
        write_and_return,
    ],
)
def test_write_among_reads(fn: Callable[..., Any], dynamic: bool, undetermined: None) -> None:
    """Who reads the old memory runs before the kernel that writes it, the others behind it."""
    at = torch.tensor([4, 1], device=rand(1).device)
    check(fn, rand(6, 5), rand(2, 5), at, dynamic=dynamic, rtol=1e-5, atol=1e-5)


def test_write_out_of_range_is_dropped(undetermined: None) -> None:
    """No memory of others is written; ATen's device assertion would end the process."""

    def fn(cache: Tensor, k: Tensor, at: Tensor) -> None:
        cache.index_copy_(0, at, k * 3)

    whole = torch.zeros(12, 5, device=rand(1).device)
    k, at = rand(3, 5), torch.tensor([1, 7, -2], device=whole.device)
    with torch.no_grad():
        compile_(fn)(whole[4:8], k, at)
    want = torch.zeros_like(whole)
    want[5] = k[0] * 3
    assert_same_values(whole, want)


def test_keys_and_values_are_written_by_one_kernel(undetermined: None) -> None:
    """They share nothing but the places."""

    def fn(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, cos: Tensor, at: Tensor) -> None:
        keys.index_copy_(2, at, rope(k, cos))
        values.index_copy_(2, at, v.transpose(1, 2))

    cos, at = rand(3, 8), torch.tensor([3, 4, 9], device=rand(1).device)
    inputs = rand(2, 3, 3, 8), rand(2, 3, 3, 8), cos, at
    want = [rand(2, 3, 12, 8), rand(2, 3, 12, 8)]
    got = [x.clone() for x in want]
    fn(*want, *inputs)
    with torch.no_grad():
        compile_(fn)(*got, *inputs)
    assert_same_values(got[0], want[0])
    assert_same_values(got[1], want[1])
    (report,) = gems_compile.reports()
    assert (report.launches, report.aten_calls) == (1, 0), report.aten


@pytest.mark.parametrize("start", [0, 1, 8])
def test_write_off_the_16_byte_boundary(start: int, undetermined: None) -> None:
    """The kernel writes an aligned copy, which goes back before ATen reads the cache."""

    def fn(cache: Tensor, k: Tensor, at: Tensor) -> Any:
        cache.index_copy_(0, at, k * 3)
        return cache.cumsum(0), cache * 2

    whole, k, at = rand(80, dtype=torch.bfloat16), rand(3, 5, dtype=torch.bfloat16), [5, 0, 3]
    want, places = whole.clone(), torch.tensor(at, device=whole.device)
    with torch.no_grad():
        got = compile_(fn)(whole[start : start + 60].view(12, 5), k, places)
    for a, b in zip(got, fn(want[start : start + 60].view(12, 5), k, places), strict=True):
        assert_same_values(a, b)
    assert_same_values(whole, want)
    (report,) = gems_compile.reports()
    assert not any(source.meta["unaligned"] for source in report.sources)


def test_write_is_atens() -> None:
    """With deterministic algorithms, with sums, and where the kernel would only copy."""

    def fn(cache: Tensor, k: Tensor, at: Tensor) -> None:
        cache.index_copy_(0, at, k * 3)

    def adds(cache: Tensor, k: Tensor, at: Tensor) -> None:
        cache.index_put_((at,), k * 3, accumulate=True)

    def copies(cache: Tensor, k: Tensor, at: Tensor) -> None:
        cache.index_copy_(0, at, k)

    at = torch.tensor([4, 1], device=rand(1).device)
    for case in (fn, adds, copies):
        check(case, rand(6, 5), rand(2, 5), at)
        assert sum("index_" in key for key in gems_compile.reports()[-1].aten) == 1


def test_copies_into_a_view_of_a_whole_input() -> None:
    """The second such view is the input itself, which waits for nobody."""

    def fn(cache: Tensor, k: Tensor, cos: Tensor, at: Tensor) -> Tensor:
        cache[:, :, at] = k * cos
        cache[:, :1, :3] = k[:, :1] * 2
        return k + 1

    cos, at = rand(3, 8), torch.tensor([3, 4, 9], device=rand(1).device)
    cache, k = rand(2, 3, 12, 8), rand(2, 3, 3, 8)
    graph = trace(fn, cache.clone(), k, cos, at, dynamic=True)
    run, _ = compile_graph(graph, [], options())
    want, got = cache.clone(), cache.clone()
    returned = fn(want, k, cos, at)
    assert_same_values(run([got, k, cos, at])[0], returned)
    assert_same_values(got, want)
