"""Rows and columns in one pass: gradients of norms and of biases, and shares of rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import compile_, gems_only, rand
from machine_code import assembly, wide_sources
from test_fuse import fused
from torch import Tensor

import gems_compile
from gems_compile.lowering.parts import sweep_parts

pytestmark = gems_only


def layer_norm_gradients(x: Tensor, dy: Tensor, w: Tensor, m: Tensor, r: Tensor) -> Any:
    shape = list(x.shape[-1:])
    return torch.ops.aten.native_layer_norm_backward(dy, x, shape, m, r, w, w, [True] * 3)


def saved(x: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, rstd) of each row, as layer norm saves them."""
    var, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
    return mean, torch.rsqrt(var + 1e-5)


@pytest.mark.parametrize("shape", [(512, 33), (4, 197, 40), (601, 130), (32, 16, 64)])
def test_norm_gradients_in_one_pass(shape: tuple[int, ...]) -> None:
    """dx needs whole rows, dw and db whole columns: one kernel reads them, one adds up."""
    x, dy, w = rand(*shape), rand(*shape) / 16, rand(shape[-1])  # sums of a size near 1
    report = fused(layer_norm_gradients, x, dy, w, *saved(x), kernels=2)
    assert "tl.range" in report.sources[0].text


@pytest.mark.parametrize(
    ("rows", "length", "wanted"),
    [
        (8192, 4096, 256),
        (16384, 4096, 261),
        (264, 4096, 264),
        (265, 4096, 133),
        (100, 4096, 100),
        (8192, 8192, 131),
        (131072, 128, 264),
        (0, 4096, 0),
    ],
)
def test_as_few_programs_as_end_in_the_same_step(rows: int, length: int, wanted: int) -> None:
    """Where a step is of one row; with several, as many as there is room for."""
    assert sweep_parts(rows, length, 132) == wanted


@pytest.mark.parametrize("width", [128, 256, 768, 1024, 4096])
def test_a_step_reads_its_rows_once(width: int, tmp_path: Path) -> None:
    """Compiled for sm_90, without a GPU: Triton lays out a step's rows in one way, not also as it
    does the weight. Where it did, rows were read twice, by other threads."""
    x, dy = (torch.empty(8192, width, dtype=torch.bfloat16) for _ in range(2))
    w, m = torch.empty(width, dtype=torch.bfloat16), torch.empty(8192, 1)
    sweep = wide_sources(layer_norm_gradients, x, dy, w, m, m)[0]
    tile = f"tensor<{sweep.meta['constants']['XBLOCK']}x{sweep.meta['constants']['RBLOCK']}xbf16"
    lines = assembly(sweep, tmp_path, "ttgir").splitlines()
    assert sum("ttg.local_load" in line and tile in line for line in lines) == 2  # x and dy


def test_what_follows_the_norm_gradient_is_added_up_too() -> None:
    """A residual's gradient joins, and the bias gradient of the layer below."""

    def fn(x: Tensor, dy: Tensor, w: Tensor, m: Tensor, r: Tensor, res: Tensor) -> Any:
        dx, dw, db = layer_norm_gradients(x, dy, w, m, r)
        dx = dx + res
        return dx, dw, db, dx.sum(0)

    x = rand(600, 48)
    fused(fn, x, rand(600, 48) / 16, rand(48), *saved(x), rand(600, 48) / 16, kernels=2)


def test_few_rows_are_not_swept() -> None:
    """Each program would have one row to walk over."""
    x = rand(7, 33)
    report = fused(layer_norm_gradients, x, rand(7, 33), rand(33), *saved(x), kernels=1)
    assert report.sources[0].name.endswith("_and_1")  # small kernels, one launch
    assert not any("tl.range" in s.text for s in report.sources)


def test_gradient_and_its_column_sum_in_one_pass() -> None:
    """GELU's gradient is stored for the matmuls, and added up for the bias."""

    def fn(dy: Tensor, x: Tensor) -> Any:
        dx = torch.ops.aten.gelu_backward(dy, x)
        return dx, dx.sum(0)

    fused(fn, rand(600, 640) / 16, rand(600, 640), kernels=1, multiprocessors=4)


@pytest.mark.parametrize("shape", [(1000, 33), (5, 401, 40), (1024, 8)])
def test_uneven_shares_of_rows(shape: tuple[int, ...]) -> None:
    """Shares need not divide the rows; one kernel for them, one for their results."""
    rows = tuple(range(len(shape) - 1))

    def fn(x: Tensor) -> Any:
        return (x + 1).amax(rows), (x + 1).amin(rows)

    report = fused(fn, rand(*shape), kernels=2)
    assert "share" in report.sources[0].text


def test_shares_of_a_symbolic_number_of_rows() -> None:
    """The kernel of one length serves another, shorter than it has shares."""

    def fn(x: Tensor) -> Any:
        return (x * 2).amax(0)

    run = compile_(fn, dynamic=True)
    for rows in (700, 3, 1, 2049):
        x = rand(rows, 64)
        torch._dynamo.mark_static(x, 1)
        assert torch.equal(run(x), fn(x))
    assert any("share" in s.text for r in gems_compile.reports() for s in r.sources)
