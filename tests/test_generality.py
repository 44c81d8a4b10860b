"""More kinds of programs and how few kernels each becomes; numbers as eager's.

What a program would read in another place than its kernel has it is the subject too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import Pair, assert_same_values, check, gems_only, ints, no_new_graph, rand
from opcheck import lower, options, run_poisoned, tensors, trace
from test_fuse import fused
from torch import Tensor

from gems_compile.kernels.op import T
from gems_compile.lowering.small import Joined

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


def test_as_strided_of_a_copy() -> None:
    """Its offset counts from where the copy starts, so the copy stays."""
    for copy in (torch.clone, lambda x: x * 1.0, lambda x: x.to(x.dtype, copy=True)):
        check(lambda x, copy=copy: torch.as_strided(copy(x[2:]), (2, 3), (2, 1), 1) * 2, rand(9))
    check(lambda x: torch.as_strided(x[2:].clone()[1:], (2, 3), (2, 1), 0) * 2, rand(9))


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


@pytest.mark.parametrize("multiprocessors", [0, 132])
def test_statistics_of_another_column_behind_a_cast(multiprocessors: int) -> None:
    """The patch is computed where it is read, and is a cast of what reads the first column's."""

    def fn(x: Tensor) -> tuple[Tensor, Tensor]:
        positive = x.sum(0) > 0
        first = torch.slice_scatter(positive, positive.narrow(0, 0, 1) * 1, 0, 0, 1)
        return first, first + 1

    x = rand(16, 6)
    got, _ = lower(fn, x, multiprocessors=multiprocessors)
    for a, b in zip(got, fn(x), strict=True):
        assert torch.equal(a, b)


# kernels beside each other ------------------------------------------------------------------------


def rotate_half(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), -1)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    q, k, cos, sin = q.transpose(1, 2), k.transpose(1, 2), cos[:, None], sin[:, None]
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("multiprocessors", [1, 132])
@pytest.mark.parametrize(
    ("batch", "length", "heads", "width"),
    [(2, 6, (4, 2), 16), (1, 40, (4, 2), 128), (1, 7, (3, 2), 10)],  # the last one's are masked
)
def test_rotary_queries_and_keys_are_one_kernel(
    batch: int, length: int, heads: tuple[int, int], width: int, multiprocessors: int, dtype: Any
) -> None:
    q, k = (rand(batch, length, h, width, dtype=dtype) for h in heads)
    cos, sin = (rand(1, length, width, dtype=dtype) for _ in range(2))
    report = fused(rope, q, k, cos, sin, kernels=1, multiprocessors=multiprocessors)
    assert report.kernels == 1
    names = [what for _, role, what in report.sources[0].params if role == "in"]
    assert len(names) == len(set(names)) == 4  # the angles are parameters in common


def test_kernels_of_equal_ops_take_turns_where_their_sizes_share_a_divisor() -> None:
    q, k = rand(1, 128, 4, 32), rand(1, 128, 2, 32)
    cos, sin = rand(1, 128, 32), rand(1, 128, 32)
    report = fused(rope, q, k, cos, sin, kernels=1, multiprocessors=1)
    assert "place = pid % 3" in report.sources[0].text


def test_kernels_where_one_needs_the_other_stay_apart() -> None:
    def fn(x: Tensor, w: Tensor) -> Any:
        a = F.pad(x * w[0, 0], (1, 2)) + 1
        return a, F.pad((a @ w) * w[0, 0], (1, 2)) + 1

    fused(fn, rand(6, 11), rand(14, 5), kernels=2, aten=1)


def test_no_more_kernels_beside_each_other_than_a_launch_takes() -> None:
    """Each is text to compile."""

    def fn(column: Tensor, *xs: Tensor) -> Any:
        return [F.pad(x * column, (1, 2)) + 1 for x in xs]

    fused(fn, rand(3, 1), *(rand(3, n) for n in range(5, 14)), kernels=3)


def test_kernels_that_read_nothing_in_common_stay_apart() -> None:
    """Each may write over its operand then. (Small ones share a launch, for what that costs.)"""
    report = fused(
        lambda x, y: (F.pad(x * 2, (1, 2)) + 1, F.pad(y * 2, (1, 2)) + 1),
        rand(3, 5),
        rand(3, 6),
        kernels=1,
    )
    assert isinstance(report.plan.groups[0], Joined)


def test_a_group_that_runs_apart_is_not_beside_another() -> None:
    """Rows of their own atoms: a transposing tile counts no places in a row."""

    def fn(*xs: Tensor) -> Any:
        return [x.t() * xs[0] + y for x, y in zip(xs[1::2], xs[2::2], strict=True)]

    xs = [rand(1), rand(40, 24), rand(24, 40), rand(48, 32), rand(32, 48)]
    report = fused(fn, *xs, kernels=1)
    assert isinstance(report.plan.groups[0], Joined)
