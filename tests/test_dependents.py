"""Kernels that are set up while the one before them ends: who waits, and that it does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import DEVICE, compile_, gems_only, rand
from machine_code import assembly, sources
from opcheck import trace
from test_sweeps import layer_norm_gradients, saved
from torch import Tensor

import gems_compile
from gems_compile.kernels.target import compile_target
from gems_compile.lowering.runs import GRID, TENSOR, Launch, Multiply, Operand, Run

pytestmark = gems_only


def gradients(arch: int) -> list:
    x, dy = (torch.empty(8192, 512, dtype=torch.bfloat16) for _ in range(2))
    w, m = torch.empty(512, dtype=torch.bfloat16), torch.empty(8192, 1)
    return sources(trace(layer_norm_gradients, x, dy, w, m, m), "cuda", arch, alone=False)


def is_behind_the_wait(ptx: str) -> bool:
    """Whether every access to memory is, loads of a pipelined loop included."""
    lines = [line.strip() for line in ptx.splitlines()]
    accesses = ("ld.global", "st.global", "cp.async", "atom.", "red.global")
    touched = [k for k, line in enumerate(lines) if any(a in line for a in accesses)]
    waits = [k for k, line in enumerate(lines) if line.startswith("griddepcontrol.wait")]
    assert touched
    return bool(waits) and waits[0] < touched[0]


def softmax_of_sums(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Any:
    y = (a + b).softmax(-1)
    return y, (y * c).sum(0), (d * 2).amax(0)


def concatenated(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Any:
    return torch.cat([a.sin(), b * 2, c[:, 1:]], 1), torch.stack([c, d]).mean(0)


def optimizer_step(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Any:
    moved = torch._foreach_add(torch._foreach_mul([a, b], 0.9), [c, d])
    return [*moved, *torch._foreach_sub([a, b], moved)]


@pytest.mark.parametrize("arch", [80, 90])
def test_who_waits_does_so_first(arch: int) -> None:
    """What a kernel reads may not be there, and what it writes may still be read."""
    waits = compile_target("nvidia", arch).waits
    assert waits == (arch == 90)
    found = gradients(arch)
    assert len(found) == 2
    for source in found:
        assert source.waits == waits == ("dependents" in source.text)


def test_a_sweep_releases_behind_its_loop() -> None:
    sweep, sums = (source.text for source in gradients(90))
    assert (
        sweep.index("tl.range") < sweep.index("dependents.release()") < sweep.index("column_sum(")
    )
    assert "release" not in sums


def test_no_access_is_ahead_of_the_wait(tmp_path: Path) -> None:
    for source in gradients(90):
        assert is_behind_the_wait(assembly(source, tmp_path))


def test_joined_kernels_wait(tmp_path: Path) -> None:
    def fn(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, ...]:
        return a.sin() * 2, b.cos() + 1, (c * 2).sum(0), (d + 1).sum(0)

    xs = [torch.empty(2**18), torch.empty(2**18), torch.empty(256, 768), torch.empty(256, 768)]
    found = sources(trace(fn, *xs), "cuda", 90, alone=False)
    joined = [source for source in found if "_and_" in source.name]
    assert joined
    for source in joined:
        assert source.waits
        assert is_behind_the_wait(assembly(source, tmp_path))


def test_who_does_not_wait_is_not_early() -> None:
    """Kernels alike that share a launch have a text of their own, which does not wait."""

    def fn(*xs: Tensor) -> list[Tensor]:
        return [x * 2 + 1 for x in xs]

    (source,) = sources(trace(fn, *(torch.empty(2**14) for _ in range(6))), "cuda", 90, alone=False)
    assert source.name == "fused_mul_add_x6"
    assert not source.waits and "dependents" not in source.text


@pytest.mark.parametrize(
    "program", [softmax_of_sums, concatenated, optimizer_step], ids=lambda f: f.__name__
)
def test_whoever_is_said_to_wait_does(program: Callable[..., Any], tmp_path: Path) -> None:
    xs = [torch.empty(512, 384) for _ in range(4)]
    for source in sources(trace(program, *xs), "cuda", 90, alone=False):
        assert is_behind_the_wait(assembly(source, tmp_path)) == source.waits, source.name


def test_only_behind_a_kernel_of_ours() -> None:
    x = Operand(TENSOR, "x")
    own = Launch("k0", "fused", Operand(GRID, plus=1), [x], waits=True)
    product = Multiply("k1", "mm", Operand(GRID, plus=1), [x, x, x], problem=None)
    run = Run("r0", [own, own, product, own, own])
    assert [run.is_early(k) for k in (0, 1, 3, 4)] == [False, True, False, True]


@pytest.mark.skipif(DEVICE != "cuda", reason="nothing is launched early on a CPU")
@pytest.mark.parametrize("graph", [False, True])
def test_what_the_kernel_before_wrote_is_read(graph: bool) -> None:
    """Kernels long enough that one which did not wait would read what is not there yet."""
    x, w, dy = rand(65536, 512), rand(512), rand(65536, 512) / 64

    def step(x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
        m, r = saved(x)
        dx, dw, db = layer_norm_gradients(x, dy, w, m, r)
        y = (dx * dw + db).softmax(-1)
        return dx, dw, db, y, y.sum(0).tanh()

    run = compile_(step)
    want = step(x, dy)
    got = run(x, dy)
    runs = [run for report in gems_compile.reports() for run in report.runs]
    assert any(run.is_early(k) for run in runs for k in range(len(run.launches)))
    replay = None
    if graph:
        replay = torch.cuda.CUDAGraph()
        with torch.cuda.graph(replay):
            got = run(x, dy)
    for _ in range(30):
        for t in got:
            t.fill_(float("nan"))
        if replay is not None:
            replay.replay()
        else:
            got = run(x, dy)
        for one, other in zip(got, want, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
