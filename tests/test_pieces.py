"""Concatenations and patches: which comparisons are left, and kernels cut where a part begins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same_values, check, gems_only, rand
from opcheck import lower, tensors
from torch import Tensor

pytestmark = gems_only


def text_of(fn: Callable[..., Any], *inputs: Tensor) -> str:
    """The text of the one kernel that fn becomes, which gives eager's numbers."""
    got, report = lower(fn, *inputs)
    for a, b in zip(got, tensors(fn(*inputs)), strict=True):
        assert_same_values(a, b)
    (source,) = report.sources
    return source.text


def two_chains(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return torch.cat([F.silu(a), b * c.sigmoid()], -1) * 2


def three_parts(a: Tensor, b: Tensor, c: Tensor) -> Any:
    x = torch.cat([a + 1, b * 2, c.exp()], 0)
    return x, x.relu() - 1


def channels(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return torch.cat([a, b.relu(), c], 1) + 1


def nested(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return torch.cat([torch.cat([a, b * 2], 1).exp(), c], 1) * 3


def padded(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return F.pad(a * b + c, (0, 0, 3, 2), value=0.5) * 2


def scattered(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return torch.slice_scatter(a * 2, b.exp() + c, 0, 5, 13).relu()


def with_a_number_a_row(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return torch.cat([a * c, b + c], 1)


LONG: dict[str, tuple[Callable[..., Any], list[tuple[int, ...]], int]] = {
    "two chains, even": (two_chains, [(16, 2048)] * 3, 2),
    "two chains, odd": (two_chains, [(17, 2051)] * 3, 2),
    "rows": (with_a_number_a_row, [(40, 4096), (40, 2048), (40, 1)], 2),
    "three parts": (three_parts, [(20, 999), (1, 999), (50, 999)], 3),
    "channels": (channels, [(2, 5, 40, 40), (2, 9, 40, 40), (2, 7, 40, 40)], 3),
    "nested": (nested, [(4, 6000), (4, 6000), (4, 8000)], 3),
    "padded": (padded, [(70, 1024)] * 3, 3),
    "scattered": (scattered, [(70, 1000), (8, 1000), (8, 1000)], 3),
}


@pytest.mark.parametrize("case", LONG)
def test_long_parts_have_programs_of_their_own(case: str) -> None:
    fn, shapes, pieces = LONG[case]
    text = text_of(fn, *(rand(*s) for s in shapes))
    assert text.count("@triton.jit") == pieces + 1
    assert "tl.where(m" not in text and "mask=m" not in text  # nothing is asked of an element


@pytest.mark.parametrize("case", LONG)
def test_long_parts_of_16_bits(case: str) -> None:
    fn, shapes, _ = LONG[case]
    check(fn, *(rand(*s, dtype=torch.bfloat16) for s in shapes))


def test_parts_of_other_layouts() -> None:
    check(
        channels,
        rand(2, 40, 5, 40).transpose(1, 2),
        rand(2, 9, 40, 40),
        rand(4, 7, 80, 40)[::2, :, ::2],
    )


@pytest.mark.parametrize(
    "shapes",
    [
        [(512, 64)] * 3,  # short runs
        [(4, 64)] * 3,  # little in all
        [(1, 2000)] * 3,
    ],
)
def test_short_parts_share_their_programs(shapes: list[tuple[int, ...]]) -> None:
    text = text_of(two_chains, *(rand(*s) for s in shapes))
    assert text.count("@triton.jit") == 1 and "tl.where(m" in text


def test_symbolic_parts() -> None:
    check(two_chains, *(rand(40, 1000) for _ in range(3)), dynamic=True)


def test_what_sizes_decide_is_not_asked() -> None:
    text = text_of(two_chains, *(rand(8, 64) for _ in range(3)))
    assert text.count(" < ") == 1 and text.count(" >= ") == 1


def test_a_frame_is_one_patch() -> None:
    x = rand(2, 3, 14, 14)
    scale = rand(3, 1, 1)
    text = text_of(lambda x, s: F.pad((x * s).relu(), (1, 2, 3, 4)) * 0.5, x, scale)
    assert text.count("tl.where(m") == 1
    assert "tl.load(in1 + (a1), mask=xmask" in text  # so small: no mask but the tile's
    assert "tl.store(out0 + (x)" in text  # what is contiguous is addressed as such
    for pad in ((1, 0), (0, 2), (-1, 3), (2, -1, 0, 1), (-2, -3), (0, 0, 1, 1)):
        check(lambda x, pad=pad: F.pad(x + 1, pad, value=2.0) * 3, x)


def test_a_part_of_columns_is_loaded_where_its_mask_is() -> None:
    """Of a sum over rows of unknown number: s is the same for all of them, and the mask of its part
    was made in the loop over them, which s was loaded ahead of."""

    def fn(x: Tensor, s: Tensor) -> Tensor:
        y = s / (x.abs() + 1)
        return torch.cat([y, y * 2], 1).sum(0)

    check(fn, rand(100, 33), rand(33), dynamic=True)
