"""Frames around images whose rows are no whole number of vectors: eight places a thread."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import gems_only, rand
from test_fuse import fused
from torch import Tensor

pytestmark = gems_only

FORM = "over = lane >= "


def affine(pad: tuple[int, ...], value: float = 0.0) -> Callable[..., Tensor]:
    """A number for each channel, which the kernel reads for the row of a thread's first place."""
    return lambda x, scale: F.pad(F.relu(x * scale + 1), pad, value=value) * 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("pad", "shape"),
    [
        ((1, 1, 1, 1), (3, 4, 16, 32)),  # 18 x 34
        ((2, 1, 1, 0), (2, 8, 17, 28)),  # rows of an odd length, and no frame below
        ((0, 3, 2, 1), (2, 4, 21, 24)),  # none before a row
        ((3, 0, 3, 0), (2, 4, 21, 32)),  # none behind one
        ((0, 0, 2, 2), (2, 8, 28, 19)),  # whole rows
        ((5, 6, 1, 2), (8, 4, 5, 19)),
        ((-1, 2, 1, 1), (4, 4, 14, 22)),  # a column less
    ],
)
def test_frame(pad: tuple[int, ...], shape: tuple[int, ...], dtype: Any) -> None:
    x, scale = rand(*shape, dtype=dtype), rand(shape[1], 1, 1, dtype=dtype)
    report = fused(affine(pad, -2.5), x, scale, kernels=1, multiprocessors=1)
    assert FORM in report.sources[0].text


def test_the_last_program_is_masked() -> None:
    x = rand(2, 5, 22, 26)  # 5 x 2 x 24 x 28 places: no whole number of programs
    report = fused(affine((1, 1, 1, 1)), x, rand(5, 1, 1), kernels=1, multiprocessors=1)
    assert FORM in report.sources[0].text and "xmask = first < 6720" in report.sources[0].text


PROGRAMS: dict[str, Callable[..., Any]] = {
    "beside_a_whole_operand": lambda x, y, c: F.pad(x * c, (1, 1, 1, 1)) + y,
    "two_frames": lambda x, y, c: F.pad(x * 2, (1, 1, 1, 1)) * F.pad(x * c, (0, 2, 2, 0)) + y,
    "two_results": lambda x, y, c: ((a := F.pad(x * c, (1, 1, 1, 1)) + 1), a * y),
    "patch": lambda x, y, c: torch.slice_scatter(
        y * 2, torch.slice_scatter((y * 2)[:, :, 1:17], x * c, 3, 1, 33), 2, 1, 17
    ),
    "frame_of_a_frame": lambda x, y, c: F.pad(
        F.pad(x * c, (1, 0, 1, 0), value=2.0) + 1, (0, 1, 0, 1)
    ),
    "column_numbers": lambda x, y, c: F.pad(x * c + x.new_ones(32), (1, 1, 1, 1)) + y[0, 0, 0],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PROGRAMS)
def test_what_reads_a_frame(name: str, dtype: Any) -> None:
    x, y, c = rand(3, 4, 16, 32), rand(3, 4, 18, 34), rand(4, 1, 1)
    report = fused(PROGRAMS[name], *(t.to(dtype) for t in (x, y, c)), kernels=1, multiprocessors=1)
    assert FORM in report.sources[0].text


APART: dict[str, tuple[Callable[..., Any], tuple[int, ...]]] = {
    # a plane's first row is read where the last one of another ends
    "no_frame_above": (lambda x: F.pad(x * 2, (1, 1, 0, 2)) + 1, (3, 4, 16, 32)),
    "a_number_for_each_row": (
        lambda x: F.pad(x * 2, (1, 1, 1, 1)) + x[0, 0, :1, :18].t(),
        (3, 4, 16, 32),
    ),
    "whole_vectors": (lambda x: F.pad(x * 2, (1, 1, 1, 1)) + 1, (3, 4, 16, 30)),
    "few_places": (lambda x: F.pad(x * 2, (1, 1, 1, 1)) + 1, (2, 2, 16, 32)),
    "channels_last": (
        lambda x: F.pad(x.contiguous(memory_format=torch.channels_last) * 2, (1, 1, 1, 1)) + 1,
        (3, 4, 16, 32),
    ),
    "every_other_column": (
        lambda x: torch.slice_scatter(x.new_zeros(12, 4, 18, 34) + 1, x * 2, 3, 1, 33, 2),
        (12, 4, 18, 16),
    ),
}


@pytest.mark.parametrize("name", APART)
def test_what_is_not_carried(name: str) -> None:
    fn, shape = APART[name]
    report = fused(fn, rand(*shape), kernels=1, multiprocessors=1)
    assert FORM not in report.sources[0].text


def test_a_number_for_each_of_many_planes() -> None:
    """So many that they are no longer read without a mask."""
    x, scale = rand(65, 64, 3, 8), rand(65, 64, 1, 1)
    report = fused(affine((2, 3, 1, 1)), x, scale, kernels=1, multiprocessors=1)
    assert FORM not in report.sources[0].text  # rows of 13
    report = fused(affine((5, 5, 1, 1)), x, scale, kernels=1, multiprocessors=1)
    assert FORM in report.sources[0].text


def test_large_pads_are_carried_on_a_large_gpu() -> None:
    """Stores of 16 bytes and a division a thread, not one for each place."""
    x, scale = rand(16, 64, 24, 24), rand(64, 1, 1)
    report = fused(affine((1, 1, 1, 1)), x, scale, kernels=1, multiprocessors=132)
    assert FORM in report.sources[0].text
