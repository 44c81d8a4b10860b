"""Small independent kernels of equal text in one launch."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import opcheck
import pytest
import torch
from helpers import DEVICE, check, gems_only, rand
from machine_code import assembly, wide_sources
from torch import Tensor

import gems_compile
from gems_compile.backend import Gems
from gems_compile.kernels.target import current_target
from gems_compile.lowering import horizontal, pipeline, small
from gems_compile.lowering.horizontal import MOST_ARGUMENTS, Combined
from gems_compile.lowering.load import Pool
from gems_compile.lowering.pipeline import compile_graph

pytestmark = gems_only


def chains(*xs: Tensor) -> list[Tensor]:
    return [x.sin() * 2 + 1 for x in xs]


def launches(fn: Callable[..., Any], *args: Tensor) -> int:
    """How many kernels one call launches; ATen calls there are none."""
    backend = Gems()
    torch.compile(fn, backend=backend, fullgraph=True)(*args)
    (report,) = backend.reports
    assert report.aten_calls == 0, report.aten
    return report.launches


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_chains_alike_are_one_launch(dtype) -> None:
    xs = [rand(n, 16).to(dtype) for n in (1, 5, 64, 200)]
    check(chains, *xs)
    assert launches(chains, *xs) == 1


def test_shapes_differ_and_layouts_agree() -> None:
    """What counts is that each is one run over memory, whatever its shape."""
    xs = [
        rand(4, 4),
        rand(2, 8, 16),
        rand(64),
        rand(6, 8).t(),
        rand(2, 4, 3, 8).permute(0, 3, 1, 2),
    ]
    check(chains, *xs)
    assert launches(chains, *xs) == 1


def test_odd_sizes_keep_apart_from_those_with_wide_loads() -> None:
    xs = [rand(64), rand(7), rand(128), rand(33)]
    check(chains, *xs)
    assert launches(chains, *xs) == 2


def test_dtypes_keep_apart() -> None:
    xs = [rand(64), rand(32), rand(64).bfloat16(), rand(32).bfloat16()]
    check(chains, *xs)
    assert launches(chains, *xs) == 2


def test_small_chains_that_differ_are_one_launch() -> None:
    def fn(x, y, z):
        return x.sin() * 2 + 1, y.cos() * 2 + 1, z[:, ::2].t() * 3 - 1

    xs = [rand(64), rand(32), rand(8, 16)]
    check(fn, *xs)
    assert launches(fn, *xs) == 1


def test_large_chains_that_differ_keep_apart() -> None:
    """Their launches cost less than what they move."""

    def fn(x, y):
        return x.sin() * 2 + 1, y.cos() * 2 + 1

    xs = [torch.empty(small.SMALL // 8 + k, device="meta") for k in (-64, 0)]
    assert [isinstance(g, small.Joined) for g in planned(fn, *xs)] == [True]
    xs = [torch.empty(small.SMALL // 8 + k, device="meta") for k in (64, 128)]
    assert [isinstance(g, small.Joined) for g in planned(fn, *xs)] == [False, False]


@pytest.mark.parametrize("op", ["sum", "amax"])
def test_small_reductions_are_one_launch(op) -> None:
    """Of equal text, and of unlike."""

    def fn(*xs):
        return [getattr(x * 2, op)(-1) for x in xs] + [(xs[0] + 1).sum(-1).exp()]

    xs = [rand(20, 40), rand(20, 40), rand(20, 40), rand(30, 50)]
    check(fn, *xs)
    assert launches(fn, *xs) == 1


def test_equal_text_of_unlike_numbers_of_rows() -> None:
    """Whole tiles are not masked: nothing but the number of programs tells the kernels apart."""

    def fn(x, y):
        return x.softmax(-1), y.softmax(-1)

    xs = [rand(8, 8), rand(4, 8)]
    _, report = opcheck.lower(fn, *xs, alone=True)
    check(fn, *xs)
    sources = {s.grid for s in report.sources}
    assert report.launches == 1 and sources == {12}


def test_second_steps_of_column_sums_are_one_launch() -> None:
    """The gradients of biases and norm weights: partial sums first, then one kernel for all."""

    def fn(*xs):
        return [(x * 2).sum(0) for x in xs]

    groups = planned(fn, *(torch.empty(4096, 64, device="meta") for _ in range(4)))
    (last,) = [g for g in groups if isinstance(g, small.Joined)]
    assert groups[-1] is last and len(last.groups) == 4
    assert all(any(m.kind == "reduce" for m in g.members) for g in last.groups)


def test_the_numbers_are_those_of_launches_apart(monkeypatch) -> None:
    def fn(x, y, z):
        return x.sin() * 2 + 1, (y * 2).softmax(-1), (z.exp() + 1).sum(-1), (y * 3).mean(-1)

    xs = [rand(64), rand(30, 50), rand(20, 40)]
    together = torch.compile(fn, backend="gems")(*xs)
    assert launches(fn, *xs) == 2  # pointwise kernels, and reductions
    torch._dynamo.reset()
    monkeypatch.setattr(small, "SMALL", 0)
    assert launches(fn, *xs) == 4
    torch._dynamo.reset()
    for a, b in zip(together, torch.compile(fn, backend="gems")(*xs), strict=True):
        assert torch.equal(a, b)


def test_joined_kernels_keep_wide_loads(tmp_path: Path) -> None:
    def fn(a, b, c, d):
        return a.sin() * 2, b.cos() + 1, (c * 2).sum(0), (d + 1).sum(0)

    xs = [torch.empty(2**18, dtype=torch.bfloat16), torch.empty(2**18, dtype=torch.bfloat16)]
    xs += [torch.empty(256, 768), torch.empty(256, 768)]
    for source in (s for s in wide_sources(fn, *xs) if "_and_" in s.name):
        assert "ld.global.v" in assembly(source, tmp_path)


def test_joined_kernels_of_unlike_dtypes(tmp_path: Path) -> None:
    """Each chooses its operands in a branch, and Triton wants one type of a name."""

    def fn(*xs):
        return [(x * 2).sum(-1) for x in xs]

    xs = [torch.empty(20, 40, dtype=d) for d in 2 * [torch.float32] + 2 * [torch.bfloat16]]
    (source,) = (s for s in wide_sources(fn, *xs) if "_and_" in s.name)
    assert assembly(source, tmp_path)


def planned(fn: Callable[..., Any], *args: Tensor) -> list[Any]:
    """The groups of a graph as a large GPU would get them; nothing runs."""
    wide = dataclasses.replace(current_target(), multiprocessors=132)
    graph = opcheck.trace(fn, *(torch.empty_like(a, device=DEVICE) for a in args))
    return compile_graph(graph, [], opcheck.options(target=wide))[1].plan.groups


def test_small_kernels_do_not_pass_a_write() -> None:
    """y is read before it is written, and after."""

    def fn(x, y, z):
        a = (y * 2).sum(-1)
        y.copy_(torch.ops.aten.cumsum.default(z, 0))
        b = (y + 1).amax(-1)
        y.mul_(3)
        return a, b, (x * 2).sum(-1), (y - 1).sum(-1)

    check(fn, rand(8, 16), rand(8, 16), rand(8, 16), rtol=1e-4, atol=1e-4)


def test_a_small_kernel_that_waits_is_launched_for_its_reader() -> None:
    def fn(x, y, w):
        a = (x * 2).sum(-1)
        b = (y + 1).sum(-1)
        c = (a[:, None] @ w).exp() * 2
        return a, b, c, (b * c.sum(-1)).sum()

    check(fn, rand(8, 16), rand(8, 16), rand(1, 4), rtol=1e-4, atol=1e-4)


def test_a_strided_operand_keeps_apart() -> None:
    xs = [rand(8, 8), rand(8, 16)[:, ::2], rand(16, 8), rand(8, 8)[:, 1:]]
    check(chains, *xs)
    assert launches(chains, *xs) > 1


def test_a_dependence_keeps_apart() -> None:
    """The second chain reads the first one's sum, and what both read runs before."""

    def fn(x, y):
        a = x.sin() * 2 + 1
        b = (y + a.sum()).sin() * 2 + 1
        return a, b

    check(fn, rand(64), rand(32), rtol=1e-4, atol=1e-4)

    def three(x, y, z):
        a = x.exp() * 2
        b = (y + a.sum()).exp() * 2
        c = z.exp() * 2
        return a, b, c

    check(three, rand(64), rand(32), rand(16), rtol=1e-4, atol=1e-4)


def test_a_write_between_keeps_its_place() -> None:
    """The second chain reads y as the write between leaves it."""

    def fn(x, y, z):
        a = x.sin() * 2 + 1
        y.copy_(torch.ops.aten.cumsum.default(z, 0))
        b = y.sin() * 2 + 1
        return a, b

    check(fn, rand(64), rand(64), rand(64))


def test_stores_into_inputs() -> None:
    def fn(*xs):
        for x in xs:
            x.mul_(2).add_(1)

    xs = [rand(n) for n in (16, 64, 48, 1600)]
    check(fn, *xs)
    assert launches(fn, *xs) == 1


def test_one_reads_what_another_writes() -> None:
    """y's chain reads the x that its own chain writes."""

    def fn(x, y, z):
        new_y = y * 2 + x
        new_x = x * 2 + z
        x.copy_(new_x)
        y.copy_(new_y)

    for n in (32, 3000):
        check(fn, rand(n), rand(n), rand(n))


def test_a_shared_operand_is_passed_once() -> None:
    def fn(scale, *xs):
        return [x * scale + 1 for x in xs]

    xs = [rand(64), rand(32), rand(48)]
    check(fn, rand(), *xs)
    backend = Gems()
    torch.compile(fn, backend=backend)(rand(), *xs)
    (source,) = backend.reports[0].sources
    assert [role for _, role, _ in source.params].count("in") == 4


def test_more_arguments_than_a_launch_takes() -> None:
    count = MOST_ARGUMENTS // 2 + 3
    xs = [rand(16) for _ in range(count)]
    check(chains, *xs)
    assert launches(chains, *xs) == 2


def test_inputs_off_the_16_byte_boundary() -> None:
    compiled = torch.compile(lambda *xs: [x.mul_(2).add_(1) for x in xs], backend="gems")
    for start in (0, 1, 2):
        wholes = [rand(70), rand(40)]
        want = [w.clone() for w in wholes]
        compiled(*(w[start : start + 32] for w in wholes))
        for w in want:
            w[start : start + 32].mul_(2).add_(1)
        torch.testing.assert_close(wholes, want)


def test_dynamic_sizes_run_apart() -> None:
    compiled = torch.compile(chains, backend="gems", dynamic=True)
    for n in (5, 8):
        xs = [rand(n), rand(n + 3)]
        torch.testing.assert_close(compiled(*xs), chains(*xs))


def test_single_calls_alike_are_no_aten_calls() -> None:
    """One multiplication is left to ATen; ten are one launch."""

    def fn(*xs):
        return [x * 3 for x in xs]

    assert launches(fn, *[rand(16) for _ in range(10)]) == 1
    backend = Gems()
    torch.compile(fn, backend=backend)(rand(16))
    assert backend.reports[0].launches == 0


def test_single_reductions_alike_stay_aten_calls() -> None:
    backend = Gems()
    torch.compile(lambda x, y: (x.sum(0), y.sum(0)), backend=backend)(rand(8, 4), rand(6, 4))
    (report,) = backend.reports
    assert (report.launches, report.aten_calls) == (0, 2)


# what is told of it, and what happens when it fails -----------------------------------------------


def test_the_launch_and_its_parts_are_told(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("GEMS_DUMP", str(tmp_path))
    xs = [rand(64), rand(32)]
    found = gems_compile.explain(chains, *xs)
    (graph,) = found.graphs
    (call,) = graph.calls
    assert call.name.endswith("_x2") and call.parts == (64, 32)
    assert graph.numbers()["launches"] == 1 and graph.numbers()["fused"] == 6
    (plan,) = tmp_path.glob("*/plan.txt")
    assert "2 parts of 64, 32 elements" in plan.read_text()
    data = json.loads(next(tmp_path.glob("*/report.json")).read_text())
    assert data["calls"][0]["parts"] == [64, 32]


def test_a_launch_that_fails_runs_apart(monkeypatch, caplog) -> None:
    monkeypatch.setenv("GEMS_STRICT", "0")
    real = pipeline.Loading.result

    def result(self):
        if self.source.name.endswith("_x2"):
            raise pipeline.CompileError(self.source, "no room")
        return real(self)

    monkeypatch.setattr(pipeline.Loading, "result", result)
    backend = Gems()
    xs = [rand(64), rand(32)]
    got = torch.compile(chains, backend=backend)(*xs)
    torch.testing.assert_close(got, chains(*xs))
    (report,) = backend.reports
    assert report.launches == 2 and not report.aten
    assert "run apart" in caplog.text


def test_a_launch_that_cannot_be_written_runs_apart(monkeypatch) -> None:
    monkeypatch.setenv("GEMS_STRICT", "0")

    def fails(*_):
        raise ValueError("no words")

    monkeypatch.setattr(horizontal, "combined_source", fails)
    backend = Gems()
    xs = [rand(64), rand(32)]
    torch.testing.assert_close(torch.compile(chains, backend=backend)(*xs), chains(*xs))
    assert backend.reports[0].launches == 2


def test_a_launch_that_fails_is_an_error_in_strict_mode(monkeypatch) -> None:
    monkeypatch.setenv("GEMS_STRICT", "1")

    def result(self):
        raise pipeline.CompileError(self.source, "no room")

    monkeypatch.setattr(pipeline.Loading, "result", result)
    with pytest.raises(Exception, match="no room"):
        torch.compile(chains, backend="gems")(rand(64), rand(32))


# copies into another layout -----------------------------------------------------------------------

WEIGHTS = [(16, 8, 3, 3), (5, 3, 7, 7), (33, 12, 1, 7), (7, 70, 5, 5), (4, 100, 3, 3)]


def to_channels_last(*weights: Tensor) -> list[Tensor]:
    return [w.clone(memory_format=torch.channels_last) for w in weights]


def to_contiguous(*weights: Tensor) -> list[Tensor]:
    return [w.clone(memory_format=torch.contiguous_format) for w in weights]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_in_another_layout_are_one_launch(dtype) -> None:
    weights = [rand(*shape, dtype=dtype) for shape in WEIGHTS]
    check(to_channels_last, *weights, exact=True)
    assert launches(to_channels_last, *weights) == 1
    images = to_channels_last(*weights)
    check(to_contiguous, *images, exact=True)
    assert launches(to_contiguous, *images) == 1


def test_copies_of_no_transposed_matrices_keep_apart() -> None:
    def fn(x: Tensor, y: Tensor) -> list[Tensor]:
        return [t.permute(3, 1, 0, 2).clone(memory_format=torch.contiguous_format) for t in (x, y)]

    xs = [rand(4, 6, 5, 7), rand(8, 3, 5, 9)]
    check(fn, *xs, exact=True)
    report = gems_compile.reports()[-1]
    assert report.launches == 0 and report.aten_calls == 2


def test_copies_into_another_layout_compile(tmp_path: Path) -> None:
    """Of shapes that have other tiles: names are of one shape in a kernel."""
    weights = [torch.empty(shape, dtype=torch.bfloat16) for shape in WEIGHTS]
    (source,) = wide_sources(to_channels_last, *weights)
    assert "st.global" in assembly(source, tmp_path)


# the machine code ---------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True], ids=["whole tiles", "masked"])
def test_loads_stay_16_bytes_wide(masked, tmp_path: Path) -> None:
    """Compiled for sm_90, without a GPU: pointers that were selected are as aligned as before."""
    sizes = [1024 * (100 + k) + 16 * masked * k for k in range(16)]
    xs = [torch.empty(n) for n in sizes]
    (source,) = wide_sources(chains, *xs)
    text = assembly(source, tmp_path)
    assert "ld.global.v4" in text and "st.global.v4" in text
    assert "ld.global.b32" not in text


def test_every_target_compiles(tmp_path: Path) -> None:
    pool = Pool(1)
    xs = [torch.empty(n, dtype=torch.bfloat16) for n in (4096, 100, 24, 7, 9)]
    try:
        for k, source in enumerate(wide_sources(chains, *xs)):
            for target in (["cuda", 80, 32], ["hip", "gfx942", 64]):
                path = tmp_path / f"kernel_{k}_{target[1]}.py"
                path.write_text(source.text)
                job = {"path": str(path), "meta": source.meta, "target": target}
                assert pool.submit(job).get(timeout=300) is None
    finally:
        pool.close()


def test_combined_holds_its_parts() -> None:
    backend = Gems()
    torch.compile(chains, backend=backend)(rand(64), rand(32))
    (group,) = backend.reports[0].plan.groups
    assert isinstance(group, Combined)
    assert [len(p.nodes) for p in group.groups] == [3, 3]
    assert len(group.nodes) == 6 and len(group.outputs) == 2
    assert DEVICE in ("cpu", "cuda")
