"""More kinds of programs and how few kernels each becomes; numbers as eager's.

What a program would read in another place than its kernel has it is the subject too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import Pair, assert_same_values, check, compile_, gems_only, ints, no_new_graph, rand
from opcheck import lower, options, run_poisoned, tensors, trace
from test_fuse import fused
from torch import Tensor

import gems_compile
from gems_compile.kernels.op import T

pytestmark = gems_only


def drawn(specs: list[T], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Random tensors; integers where a spec bounds them."""
    return [
        ints(*s.shape, high=int(s.high)) if s.high is not None else rand(*s.shape, dtype=dtype)
        for s in specs
    ]


def symbolic(fn: Callable[..., Any], *inputs: Tensor, kernels: int) -> None:
    """fn with all its sizes symbolic: as few kernels, and eager's numbers."""
    got, report = run_poisoned(trace(fn, *inputs, dynamic=True), list(inputs), options())
    assert (report.launches, report.aten_calls) == (kernels, 0), report.aten
    assert any(role == "size" for _, role, _ in report.sources[0].params)
    for k, (a, b) in enumerate(zip(got, tensors(fn(*inputs)), strict=True)):
        assert_same_values(a, b, f"output {k}")


# views --------------------------------------------------------------------------------------------


X, INDEX = T(6, 11), T(3, high=6)
VIEWS: dict[str, tuple[Callable[..., Any], list[T]]] = {
    "repeat": (lambda x: (x * 2).repeat(2, 3) + 1, [X]),
    "repeat_into_more_dims": (lambda x: (x * 2).repeat(3, 2, 1) + 1, [X]),
    "repeat_once": (lambda x: (x * 2).repeat(1, 1) + 1, [X]),
    "tile": (lambda x: (x * 2).tile(2) + 1, [X]),
    "unfold": (lambda x: (x * 2).unfold(1, 4, 2) * 3, [X]),
    "unfold_twice": (lambda x: (x * 2).unfold(0, 2, 1).unfold(1, 3, 3) * 3, [X]),
    "windows_of_sums": (lambda x: (x * 2).unfold(1, 4, 1).sum(-1) + 1, [X]),
    "diagonal": (lambda x: (x * 2).diagonal(1) + 1, [X]),
    "diagonal_of_batches": (lambda x: (x * 2).diagonal(-1, 2, 0) + 1, [T(4, 3, 5)]),
    "pad_less": (lambda x: F.pad(x * 2, (-1, 2, 1, -1)) + 1, [X]),
    "crop": (lambda x: F.pad(x * 2, (-1, -2), value=7.0) + 1, [X]),
    "reflect": (lambda x: F.pad(x * 2, (2, 1), mode="reflect") + 1, [T(1, 3, 8)]),
    "reflect_both": (lambda x: F.pad(x * 2, (2, 1, 1, 2), mode="reflect") + 1, [T(1, 3, 8, 7)]),
    "replicate": (lambda x: F.pad(x * 2, (2, 1), mode="replicate") + 1, [T(1, 3, 8)]),
    "split_unequally": (
        lambda x: torch.cat([t * k for k, t in enumerate(torch.split(x * 2, [2, 3, 6], 1))], 1),
        [X],
    ),
    "last_but_one": (lambda x: (x * 2)[:, -3:-1] + (x * 2)[:, 1:3], [X]),
    "diff": (lambda x: (x * 2).diff(dim=1) * 3, [X]),
    "meshgrid": (lambda x, y: sum(torch.meshgrid(x * 2, y * 2, indexing="ij")), [T(4), T(5)]),
    "pick_pairs": (
        lambda x, i, j: (x * 2)[i[:, None], j] + 1,
        [X, INDEX, T(4, high=11)],
    ),
    "pick_with_a_dim_between": (
        lambda x, i, j: (x * 2)[i, :, j] + 1,
        [T(6, 4, 5), INDEX, T(3, high=5)],
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", VIEWS)
def test_view_in_a_chain(name: str, dtype: torch.dtype) -> None:
    fn, specs = VIEWS[name]
    fused(fn, *drawn(specs, dtype), kernels=1)


@pytest.mark.parametrize("name", VIEWS)
def test_view_of_symbolic_size(name: str) -> None:
    fn, specs = VIEWS[name]
    symbolic(fn, *drawn(specs), kernels=1)


STRIDED: dict[str, Callable[[Tensor], Any]] = {
    "input": lambda x: torch.as_strided(x, (5, 4), (7, 2), 3) * 2 + 1,
    "chain": lambda x: torch.as_strided(x * 2, (5, 4), (7, 2), 3) + 1,
    "overlapping": lambda x: torch.as_strided(x, (9, 4), (1, 1)).exp() + 1,
    "transposed": lambda x: torch.as_strided(x.t() * 2, (5, 4), (7, 2), 3) + 1,
    "of_a_view": lambda x: torch.as_strided(x[1:, 2:], (3, 3), (9, 1)) * 2 + 1,
    "of_a_view_from_the_start": lambda x: torch.as_strided(x[1:], (3, 3), (9, 1), 1) * 2 + 1,
    "expanded": lambda x: torch.as_strided(x, (3, 4), (0, 2), 5) * 2 + 1,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", STRIDED)
def test_as_strided(name: str, dtype: torch.dtype) -> None:
    fused(STRIDED[name], rand(8, 9, dtype=dtype), kernels=1)


def test_as_strided_beyond_its_base() -> None:
    """The memory around an input is the caller's; ATen alone may look at it."""
    x = rand(10, 9)[2:, :7]
    fused(lambda x: torch.as_strided(x, (5, 4), (7, 2), 3) * 2 + 1, x, kernels=1, aten=1)


def test_inputs_at_an_offset() -> None:
    check(lambda x: torch.as_strided(x, (5, 4), (7, 2), 10) * 2 + 1, rand(9, 9)[1:])
    check(lambda x: torch.as_strided(x, (5, 4), (7, 2)) * 2 + 1, rand(73)[1:])


def test_views_returned_and_read_by_aten() -> None:
    """They keep eager's strides, and the memory of what they show."""

    def fn(x: Tensor, w: Tensor) -> Any:
        y = x * 2 + 1
        return x.unfold(1, 4, 2), y, y.unfold(1, 4, 2), y.diagonal(1), y.unfold(1, 4, 2) @ w

    check(fn, rand(6, 11), rand(4, 3), grad=False)
    check(lambda x: (x.as_strided((3, 4), (5, 2), 1), x.diagonal()), rand(6, 11), grad=False)


def test_views_with_gradients() -> None:
    check(lambda x: (x * 2).repeat(2, 3).exp() + 1, rand(4, 5, grad=True))
    check(lambda x: (x * 2).unfold(1, 4, 2) * 3, rand(4, 11, grad=True))
    check(lambda x: F.pad(x * 2, (2, 1), mode="reflect") * 3, rand(1, 3, 8, grad=True))
    check(lambda x: F.pad(x * 2, (-2, 1)) * 3, rand(3, 8, grad=True))


def test_views_of_many_lengths() -> None:
    for fn in (
        lambda x: (x * 2).repeat(2, 3) + 1,
        lambda x: (x * 2).unfold(0, 3, 2) * 3,
        lambda x: F.pad(x * 2, (1, 1, -2, 1)) + 1,
        lambda x: F.pad(x[None] * 2, (2, 1), mode="reflect") + 1,
    ):
        pair = Pair(fn, dynamic=True)
        pair(rand(5, 4))
        with no_new_graph():
            for n in (17, 90):
                pair(rand(n, 4))


NEAREST: dict[str, Callable[[Tensor], Tensor]] = {
    "twice": lambda x: F.interpolate(x * 2, scale_factor=2) + 1,
    "size": lambda x: F.interpolate(x * 2, size=(5, 9)) + 1,
    "smaller": lambda x: F.interpolate(x * 2, scale_factor=0.6) + 1,
    "skip": lambda x: F.interpolate(x * 2, scale_factor=2) + F.interpolate(x, size=(16, 14)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NEAREST)
def test_nearest(name: str, dtype: torch.dtype) -> None:
    fused(NEAREST[name], rand(1, 3, 8, 7, dtype=dtype), kernels=1)


def test_nearest_keeps_channels_last() -> None:
    x = rand(2, 3, 8, 7).to(memory_format=torch.channels_last)
    fused(lambda x: F.interpolate(x * 2, scale_factor=2) + 1, x, kernels=1)


# parts replaced -----------------------------------------------------------------------------------


def set_columns(x: Tensor, y: Tensor) -> Tensor:
    z = x * 2
    z[:, 2:6] = y * 3
    return z + 1


def set_every_third(x: Tensor, y: Tensor) -> Tensor:
    z = x.sigmoid()
    z[:, 1:11:3] = y + 1
    return z * 2


def set_last_column(x: Tensor, y: Tensor) -> Tensor:
    z = x * 2
    z[:, -1] = y[:, 0] * 3
    return z.softmax(-1)


def set_row_statistics(x: Tensor, y: Tensor) -> Tensor:
    z = x * 2
    z[:, 3] = x.sum(-1)
    z[:, 4:5] = x.amax(-1, keepdim=True)
    return z + y[:, :1]


def set_part_of_a_part(x: Tensor, y: Tensor) -> Tensor:
    z = x * 2
    z[1:5][:, 2:6][:, :3] = 7
    z[1:5, 1::3] = y[:4]
    z[2, 3:7] = y[0]
    return z + 1


REPLACED = {
    "slice_scatter": lambda x, y: torch.slice_scatter(x * 2, y * 3, 1, 2, 6) + 1,
    "of_another_dtype": lambda x, y: torch.slice_scatter(x * 2, y.half() * 3, 1, 2, 6) + 1,
    "select_scatter": lambda x, y: torch.select_scatter(x * 2, y[0, :1].expand(11), 0, -2) + 1,
    "all": lambda x, y: torch.slice_scatter(x * 2, x + 1, 1) * 3,
    **{
        f.__name__: f
        for f in (
            set_columns,
            set_every_third,
            set_last_column,
            set_row_statistics,
            set_part_of_a_part,
        )
    },
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", REPLACED)
def test_parts_replaced(name: str, dtype: torch.dtype) -> None:
    """No copy of what lies under the part: each place takes the one or the other."""
    fused(REPLACED[name], rand(6, 11, dtype=dtype), rand(6, 4, dtype=dtype), kernels=1)


@pytest.mark.parametrize("name", sorted(set(REPLACED) - {"set_every_third", "set_part_of_a_part"}))
def test_parts_of_symbolic_sizes_replaced(name: str) -> None:
    symbolic(REPLACED[name], rand(6, 11), rand(6, 4), kernels=1)


def test_what_a_copy_overwrites_is_not_read() -> None:
    """Alone, a copy or an update is ATen's only where ATen finds its operands in memory."""
    fused(lambda x, y: torch.ops.aten.copy(x * 2, y), rand(6, 4), rand(6, 4), kernels=1)
    fused(lambda x, y: torch.ops.aten.copy(x, y), rand(6, 4), rand(6, 4), kernels=0, aten=1)

    def nested(x: Tensor, y: Tensor) -> Tensor:
        x = x.clone()
        x[1:3, 2:6] = y
        return x

    fused(nested, rand(6, 11), rand(2, 4), kernels=1)


def test_parts_replaced_with_gradients() -> None:
    check(set_columns, rand(6, 11, grad=True), rand(6, 4, grad=True))
    check(set_part_of_a_part, rand(6, 11, grad=True), rand(6, 4, grad=True))
    check(set_last_column, rand(6, 11, grad=True), rand(6, 4, grad=True))


# the best of a row -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("name", ["max", "min"])
def test_best_and_its_place(name: str, dim: int, dtype: torch.dtype) -> None:
    def fn(x: Tensor) -> Any:
        value, place = getattr(x * 2, name)(dim)
        return value + 1, place

    x = ints(4, 33, 5, high=50) if dtype == torch.int64 else rand(4, 33, 5, dtype=dtype)
    fused(fn, x, kernels=1)
    symbolic(fn, x, kernels=1)


@pytest.mark.parametrize("length", [1, 33, 20000])
def test_best_of_equals_and_nan(length: int) -> None:
    """The first of equals, the first NaN, infinities of the worst sign."""
    x = torch.full((4, length), float("-inf"), device=rand(1).device)
    x[1] = ints(length, high=3).float()
    x[2, length // 2], x[2, -1] = float("nan"), float("nan")
    got, _ = lower(lambda x: (*x.max(-1), *x.min(-1, keepdim=True)), x, alone=True)
    for a, b in zip(got, (*x.max(-1), *x.min(-1, keepdim=True)), strict=True):
        assert_same_values(a, b)


# writes into inputs ------------------------------------------------------------------------------


@pytest.fixture
def undetermined():
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


@pytest.mark.parametrize("fn", [by_index_copy, normed])
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


# scans ------------------------------------------------------------------------------------------

SCANS: dict[str, Callable[[Tensor, int], Any]] = {
    "cumsum": lambda x, dim: (x * 2).cumsum(dim) + 1,
    "cumprod": lambda x, dim: (x * 0.5 + 1).cumprod(dim) + 1,
    "cummax": lambda x, dim: (x * 2).cummax(dim),
    "cummin": lambda x, dim: (x * 2).cummin(dim),
    "logcumsumexp": lambda x, dim: (x * 2).logcumsumexp(dim) + 1,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape, dim", [((7, 33), 1), ((7, 33), 0), ((3, 6, 5), 1)])
@pytest.mark.parametrize("name", SCANS)
def test_scan(name: str, shape: tuple[int, ...], dim: int, dtype: torch.dtype) -> None:
    """Sums of the narrow floats are float32 until they are stored."""
    fn, x = SCANS[name], rand(*shape, dtype=dtype)
    got, report = lower(lambda x: fn(x, dim), x)
    assert (report.launches, report.aten_calls) == (1, 0)
    wide = tensors(fn(x.float(), dim)) if name != "cumprod" else tensors(fn(x, dim))
    near = (
        {"rtol": 2**-6, "atol": 2**-6} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    )
    for a, b, eager in zip(got, wide, tensors(fn(x, dim)), strict=True):
        assert (a.dtype, a.stride()) == (eager.dtype, eager.stride())
        assert_same_values(a, b.to(a.dtype), name, **near)


@pytest.mark.parametrize("name", SCANS)
def test_scan_of_symbolic_size(name: str) -> None:
    for dim in (0, 1):
        symbolic(lambda x, d=dim: SCANS[name](x, d), rand(7, 33), kernels=1)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("name", SCANS)
def test_long_scan(name: str, dim: int) -> None:
    """In steps, each of which goes on where the last one ended."""
    x = rand(3, 20000) if name != "cumprod" else rand(3, 20000) * 0.01
    x = x if dim else x.t().contiguous()
    got, report = lower(lambda x: SCANS[name](x, dim), x)
    assert report.launches == 1
    assert "for start in " in report.sources[0].text
    for a, b in zip(got, tensors(SCANS[name](x.double(), dim)), strict=True):
        assert_same_values(a, b.to(a.dtype), name, rtol=1e-4, atol=1e-3)


def cumulated_share(x: Tensor) -> Tensor:
    p = x.softmax(-1)
    return p.cumsum(-1) / p.sum(-1, keepdim=True)


def below_the_peak(x: Tensor) -> Tensor:
    running = (x * 2).cumsum(-1)
    return running - running.amax(-1, keepdim=True)


def sum_of_sums(x: Tensor) -> Tensor:
    return x.cumsum(-1).cumsum(-1) * 0.5


def top_p(x: Tensor) -> Tensor:
    p = x.softmax(-1)
    return torch.where(p.cumsum(-1) - p > 0.9, 0.0, p)


def places_of_tokens(x: Tensor) -> Tensor:
    return torch.cumsum(x > 0, -1) * (x > 0)


def from_the_end(x: Tensor) -> Tensor:
    return (x * 2).flip(-1).cumsum(-1) + 1


def several(x: Tensor) -> Any:
    return x.cumsum(-1), (x * x).cumsum(-1), x.sum(-1), x.cummax(-1).values


CHAINS = [
    cumulated_share,
    below_the_peak,
    sum_of_sums,
    top_p,
    places_of_tokens,
    from_the_end,
    several,
]


@pytest.mark.parametrize("length", [33, 20000])
@pytest.mark.parametrize("fn", CHAINS)
def test_scans_with_reductions(fn: Callable[[Tensor], Any], length: int) -> None:
    x = rand(9, length)
    got, report = lower(fn, x)
    assert (report.launches, report.aten_calls) == (1, 0)
    for a, b in zip(got, tensors(fn(x.double())), strict=True):
        assert_same_values(a, b.to(a.dtype), rtol=1e-4, atol=2e-2 if length > 33 else 1e-4)


def test_scan_read_in_another_place() -> None:
    """By the flipped row, by the other dim, and by a part: from memory."""
    for fn in (
        lambda x: (x * 2).cumsum(-1).flip(-1) + 1,
        lambda x: (lambda s: s[:, 1:] - s[:, :-1])((x * 2).cumsum(-1)),
        lambda x: (x * 2).cumsum(-1).cumsum(0) + 1,
        lambda x: (x * 2).cumsum(-1) + x.cumsum(0),
        lambda x: (x * 2).cumsum(-1).sum(0) + 1,
        lambda x: (lambda s: s - s[:, -1:])((x * 2).cumsum(-1)),
        lambda x: x.view(2, 3, 33).sum((0, 2)) + x.cumsum(-1).sum(),
        lambda x: x.t().reshape(-1).cumsum(0) + x.reshape(-1).cumsum(0),
        lambda x: (x.view(2, 3, 33).permute(1, 0, 2).reshape(-1, 33) * 2).cumsum(-1),
    ):
        x = rand(6, 33)
        got, _ = lower(fn, x)
        assert_same_values(got[0], fn(x.double()).float(), rtol=1e-4, atol=1e-4)


def test_whole_numbers_are_summed_in_64_bits() -> None:
    for dtype in (torch.int32, torch.int64):
        fused(lambda x: (x * 2).cumsum(-1) + 1, ints(5, 40, high=2**30, dtype=dtype), kernels=1)
        fused(lambda x: (x + 2).cumprod(0) + 1, ints(5, 40, high=9, dtype=dtype), kernels=1)
    fused(lambda x: torch.cumsum(x > 0, 0), rand(5, 40), kernels=1)
    fused(lambda x: torch.cumsum(x > 0, 0, dtype=torch.float32) * 2, rand(5, 40), kernels=1)


@pytest.mark.parametrize("length", [33, 20000])
def test_scans_of_nan_infinities_and_equals(length: int) -> None:
    """Of equals and of NaNs the last place, as in eager."""
    x = rand(9, length)
    x[0, 7], x[0, 20] = float("nan"), float("nan")
    x[1, 5], x[1, 9] = float("inf"), float("-inf")
    x[2] = ints(length, high=3).float()
    x[3] = float("-inf")
    x[4, 3], x[4, -1] = float("inf"), 0.0

    def fn(x: Tensor) -> Any:
        y = x + 0
        return (*y.cummax(-1), *y.cummin(-1), y.cumsum(-1), y.logcumsumexp(-1))

    got, report = lower(fn, x)
    assert report.aten_calls == 0
    for k, (a, b) in enumerate(zip(got, fn(x.double()), strict=True)):
        assert_same_values(a, b.to(a.dtype), f"output {k}", rtol=1e-4, atol=1e-2)


def test_one_long_row_is_atens() -> None:
    fused(lambda x: (x > 0).cumsum(0) + 1, rand(16384), kernels=1)
    x = rand(1, 20000)
    _, report = lower(lambda x: (x * 2).cumsum(1) + 1, x)
    assert "aten.cumsum.default: one long row, which ATen scans with the whole GPU" in report.aten


def test_scan_of_single_elements() -> None:
    for fn in SCANS.values():
        check(lambda x, fn=fn: fn(x, 1), rand(3, 1))
        check(lambda x, fn=fn: fn(x, -1), rand(1))


def test_scans_with_gradients() -> None:
    for fn in (cumulated_share, top_p, lambda x: (x * 2).logcumsumexp(-1) * x):
        check(fn, rand(6, 11, grad=True), rtol=1e-4, atol=1e-4)
    check(lambda x: (x * 2).cummax(-1).values * x, rand(6, 11, grad=True))
    check(lambda x: (x * 0.1 + 1).cumprod(-1) * x, rand(6, 11, grad=True), rtol=1e-4, atol=1e-4)


# another row's statistics -------------------------------------------------------------------------


def of_the_first_row(x: Tensor) -> Tensor:
    return x - x.sum(-1, keepdim=True)[0:1]


def of_one_row_beside_its_own(x: Tensor) -> Tensor:
    return x.exp() - x.exp().sum(-1, keepdim=True) + x.softmax(-1)[1]


def of_the_row_before(x: Tensor) -> Tensor:
    total = x.sum(-1, keepdim=True)
    return x - torch.cat([total[1:], total[:1]]) + total


def of_the_flipped_rows(x: Tensor) -> Tensor:
    top = x.amax(-1, keepdim=True)
    return (x - top) * top.flip(0)


@pytest.mark.parametrize("length", [33, 20000])
@pytest.mark.parametrize(
    "fn", [of_the_first_row, of_one_row_beside_its_own, of_the_row_before, of_the_flipped_rows]
)
def test_statistics_of_another_row(fn: Callable[[Tensor], Any], length: int) -> None:
    """A kernel has a reduction's result for its own row; another row's comes from memory."""
    x = rand(4, length)
    got, _ = lower(fn, x, alone=True)
    for a, b in zip(got, tensors(fn(x.double())), strict=True):
        assert_same_values(a, b.float(), rtol=1e-5, atol=1e-3)
