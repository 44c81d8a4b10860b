"""Which launches become one call, what that does without the native launcher, and with it."""

from __future__ import annotations

import threading

import pytest
import torch
from helpers import DEVICE, gems_only, rand
from opcheck import options, trace

from gems_compile.backend import Gems
from gems_compile.config import cache_dir
from gems_compile.lowering import native, runs
from gems_compile.lowering.pipeline import compile_graph
from gems_compile.lowering.runs import (
    ADDRESS,
    GRID,
    INT32,
    TENSOR,
    Launch,
    Operand,
    Run,
    in_python,
    wide_when_called,
)

pytestmark = gems_only


def test_the_same_in_python() -> None:
    """What a run does where there is no native launcher: the same launches, wide ones if asked."""
    x, s, n = Operand(TENSOR, "x"), Operand(ADDRESS, "s0", 128), Operand(INT32, "n", 0)
    first = Launch("k0", "fused_a", Operand(GRID, "g"), [x, s, n], "wide0")
    run = Run("r0", [first, Launch("k1", "fused_b", Operand(GRID, plus=4), [s])])
    assert run.call == "(r0w if wide0 else r0)(stream, g, x, s0, n)  # fused_a; fused_b"
    seen: list[tuple] = []
    kernels = {k: lambda *a, k=k: seen.append((k, *a)) for k in ("k0", "k1", "k0w")}
    narrow, wide = in_python([run], kernels)["r0"], wide_when_called(run, kernels)
    x = torch.zeros(1)
    narrow(7, 2, x, 1000, 5)
    wide(7, 2, x, 1000, 5)
    narrow(7, 0, x, 1000, 5)
    last = ("k1", 4, 1, 1, 7, 1128)
    one = (2, 1, 1, 7, x.data_ptr(), 1128, 5)
    assert seen == [("k0", *one), last, ("k0w", *one), last, last]


def wrapper(fn, *inputs, dynamic: bool = False):
    backend = Gems()
    compiled = torch.compile(fn, backend=backend, dynamic=dynamic, fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), fn(*inputs))
    return backend.reports[-1]


def two_scales(x: torch.Tensor):
    """No launch of its own has both sums: z needs all of y."""
    y = (x * 2 + 1).sum(0, keepdim=True)
    z = (x.exp() + y.tanh()).sum(1, keepdim=True)
    return y.sigmoid() * 2, z.tanh() + 1, (x + 1).softmax(-1)


def test_launches_side_by_side_are_one_call() -> None:
    report = wrapper(two_scales, rand(70, 33))
    lines = report.wrapper.splitlines()
    calls = [line for line in lines if line.lstrip().startswith("r")][:-1]
    assert report.launches > 1 and len(calls) == 1
    assert calls[0].count("fused_") == report.launches == len(report.runs[0].launches)


def test_a_call_of_aten_ends_a_run() -> None:
    report = wrapper(lambda x: ((x * 2 + 1).softmax(-1) @ x + 1).softmax(-1), rand(33, 33))
    assert len(report.runs) == 2


def test_memory_does_not_rise() -> None:
    """Many large values in a row, each dead at the next kernel: they are not kept to the end."""

    def fn(x):
        for _ in range(6):
            x = torch.softmax(x.sum(0, keepdim=True) + x * 2, -1)
        return x

    x = rand(700, 900)  # too large for the slab
    report = compile_graph(trace(fn, x), [], options())[1]
    one = x.nbytes
    assert report.launches > 5 and report.peak_bytes < 3 * one + 2**20, report.wrapper


def test_what_the_program_holds_does_not_die_in_backward(monkeypatch) -> None:
    """A run counts on the memory of what forward saved; not where that was returned as well."""
    seen: list[list[int | None]] = []

    def given(writer):
        found = runs_of_saved(writer)
        seen.append(sorted(block.size for block in found))
        return found

    def fn(x, w, shown):
        hidden = torch.sort(x, -1)[0].exp()  # saved; sorted by ATen, so kept
        logits = torch.sort(hidden @ w, -1)[0]
        return (logits * logits).sum(), (logits[1:] if shown else None)

    runs_of_saved = runs._given
    monkeypatch.setattr(runs, "_given", given)
    x, w = rand(30, 40).requires_grad_(), rand(40, 50).requires_grad_()
    saved = []
    for shown in (False, True):
        torch._dynamo.reset()
        torch.compile(fn, backend="gems")(x, w, shown)[0].backward()
        saved.append(seen[-1])
    logits = 30 * 50 * 4
    assert logits in saved[0], saved
    assert sorted([*saved[1], logits]) == saved[0]


# on a GPU ----------------------------------------------------------------------------------------


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = torch.nn.LayerNorm(96), torch.nn.Linear(96, 96)

    def forward(self, x: torch.Tensor):
        for _ in range(3):
            x = x + torch.nn.functional.gelu(self.linear(self.norm(x)))
        return x.softmax(-1), *two_scales(x)


def results(model, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.detach().requires_grad_()
    outs = model(x)
    grads = torch.autograd.grad(sum(o.square().sum() for o in outs), [x, *model.parameters()])
    return [*outs, *grads]


@pytest.fixture
def spied(monkeypatch):
    """The runs that are bound natively, by name."""
    native.start(cache_dir()).wait()
    seen: list[tuple[str, bool]] = []
    bound = native.launcher

    def launcher(run, *args):
        found = bound(run, *args)
        seen.append((run.name, found is not None))
        return found

    monkeypatch.setattr(native, "launcher", launcher)
    return seen


@pytest.mark.gpu
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_gpu_is_given_the_same_work(monkeypatch, spied, dynamic) -> None:
    model, xs = Block().to(DEVICE), [rand(40, 96), rand(52, 96)]
    compiled = torch.compile(model, backend=Gems(), dynamic=dynamic)
    natively = [results(compiled, x) for x in xs]
    assert spied and all(found for _, found in spied)
    torch._dynamo.reset()
    monkeypatch.setattr(native, "launcher", lambda *args: None)
    compiled = torch.compile(model, backend=Gems(), dynamic=dynamic)
    for x, mine in zip(xs, natively, strict=True):
        for a, b in zip(mine, results(compiled, x), strict=True):
            assert torch.equal(a, b)


@pytest.mark.gpu
def test_captured_and_on_another_stream(spied) -> None:
    model, x = Block().to(DEVICE), rand(40, 96)
    compiled = torch.compile(model, backend=Gems())
    with torch.no_grad():
        wanted = compiled(x)
        assert spied and all(found for _, found in spied)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            found = compiled(x)
        torch.cuda.current_stream().wait_stream(side)
        for a, b in zip(found, wanted, strict=True):
            assert torch.equal(a, b)
        graph = torch.cuda.CUDAGraph()
        static = x.clone()
        with torch.cuda.graph(graph):
            outs = compiled(static)
        static.copy_(rand(40, 96))
        graph.replay()
        for a, b in zip(outs, compiled(static), strict=True):
            assert torch.equal(a, b)


@pytest.mark.gpu
def test_a_new_thread_launches(spied) -> None:
    x, found = rand(33, 65), []
    compiled = torch.compile(two_scales, backend=Gems())
    wanted = compiled(x)
    thread = threading.Thread(target=lambda: found.extend(compiled(x)))
    thread.start()
    thread.join()
    assert [name for name, ok in spied if not ok] == []
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b)


def test_aten_is_called_with_little_in_front() -> None:
    """torch's own binding of an op has its arguments: what is called is told by its results."""
    from gems_compile.lowering.private import BOUND, quick_call

    x, w, bias = rand(2, 4, 6, 6), rand(8, 4, 3, 3), rand(8)
    a, b, c = rand(3, 4, 5), rand(3, 5, 6), rand(4, 6)
    calls = {
        "mm": (a[0], b[0]),
        "bmm": (a, b),
        "addmm": (c, a[0], b[0]),
        "baddbmm": (c, a, b),
        "convolution": (x, w, bias, [1, 2], [1, 0], [1, 1], False, [0, 0], 1),
    }
    for name in BOUND:
        op = getattr(torch.ops.aten, name).default
        assert quick_call(op) is getattr(torch, name)
        if name in calls:
            assert torch.equal(quick_call(op)(*calls[name]), op(*calls[name]))
    scaled = quick_call(torch.ops.aten.addmm.default)(c, a[0], b[0], beta=0.5, alpha=2)
    assert torch.equal(scaled, torch.ops.aten.addmm.default(c, a[0], b[0], beta=0.5, alpha=2))
    assert torch.equal(quick_call(torch.ops.aten.cos.default)(c), c.cos())
    assert quick_call(3) == 3
