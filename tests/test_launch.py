"""How kernels are launched, and where small values between them lie."""

from __future__ import annotations

import contextlib
import threading
from types import SimpleNamespace

import pytest
import torch
from helpers import DEVICE, gems_only, rand
from hypothesis import given
from hypothesis import strategies as st

from gems_compile.backend import Gems
from gems_compile.lowering import pipeline, private
from gems_compile.lowering.group import Group
from gems_compile.lowering.ir import Value
from gems_compile.lowering.load import _launchers
from gems_compile.lowering.scratch import MOST_BYTES, plan_scratch
from gems_compile.lowering.source import Source

KERNEL = """
import triton
import triton.language as tl


@triton.jit
def copy(in0, out0, ks0, XBLOCK: tl.constexpr):
    x = tl.program_id(0) * XBLOCK + tl.arange(0, XBLOCK)
    tl.store(out0 + x, tl.load(in0 + x, mask=x < ks0, other=0), mask=x < ks0)
"""


def copy_source() -> Source:
    v = Value("buffer", None, (), (64,), "float32")
    meta = {
        "name": "copy",
        "signature": {"in0": "*fp32", "out0": "*fp32", "ks0": "i64"},
        "constants": {"XBLOCK": 64},
        "num_warps": 4,
        "exact": True,
    }
    params = [("in0", "in", v), ("out0", "out", v), ("ks0", "size", 64)]
    return Source("copy", KERNEL, params, 1, meta)


@gems_only
def test_torchs_launcher_takes_our_kernels(tmp_path, monkeypatch):
    """Whatever the class reads of a Triton kernel, the record of a compiled one must hold."""
    launcher = pytest.importorskip("torch._inductor.runtime.static_triton_launcher")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    import json
    import subprocess
    import sys

    path = tmp_path / "copy.py"
    path.write_text(KERNEL)
    source = copy_source()
    job = {"path": str(path), "meta": source.meta, "target": ["cuda", 90, 32]}
    done = subprocess.run(
        [sys.executable, "-m", "gems_compile.lowering.worker", "1"],
        input=json.dumps(job) + "\n",
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout)["error"] is None
    record = json.loads(path.with_suffix(".json").read_text())
    record["path"] = str(path.with_suffix(".cubin"))
    kernel = launcher.StaticallyLaunchedCudaKernel(private._as_compiled(source, record))
    assert kernel.arg_tys == "OOl" and kernel.cubin_path == record["path"]

    def too_large(self, device):
        raise torch.OutOfMemoryError("out of resource")

    monkeypatch.setattr(launcher.StaticallyLaunchedCudaKernel, "load_kernel", too_large)
    with pytest.raises(torch.OutOfMemoryError):  # the group becomes ATen's: Triton cannot either
        private.static_launcher(source, record, str(path), None)


@gems_only
def test_a_kernel_is_loaded_while_its_device_is_current(monkeypatch):
    """Whatever GPU is current where the graph is called: a stand-in notes which one is."""
    launcher = pytest.importorskip("torch._inductor.runtime.static_triton_launcher")
    current, loaded = [0], []

    @contextlib.contextmanager
    def device(index):
        current.append(index)
        yield
        current.pop()

    kernel = SimpleNamespace(load_kernel=lambda index: loaded.append((index, current[-1])))
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(launcher, "StaticallyLaunchedCudaKernel", lambda compiled: kernel)
    monkeypatch.setattr(private, "_as_compiled", lambda source, record: None)
    monkeypatch.setattr(private, "_direct", lambda kernel: kernel)
    for index in (1, 3):
        assert private.static_launcher(copy_source(), {}, "", index) is kernel
    assert loaded == [(1, 1), (3, 3)] and current == [0]


@gems_only
@pytest.mark.gpu
def test_kernels_do_not_go_through_tritons_jit():
    torch.compile(lambda x: torch.softmax(x + 1, -1) * 2, backend=Gems())(rand(7, 33))
    # without a device: what other tests compiled for the interpreter
    mine = {key: launch for key, launch in _launchers.items() if key[1] is not None}
    assert mine and [key for key, launch in mine.items() if not hasattr(launch, "kernel")] == []


@gems_only
@pytest.mark.gpu
def test_a_first_call_from_a_thread_of_its_own():
    """Which has no context of CUDA's yet."""
    known, found = set(_launchers), []
    run = torch.compile(lambda x: torch.softmax(x * 3 - 1, -1) + 4, backend=Gems())
    x = rand(9, 35)
    thread = threading.Thread(target=lambda: found.append(run(x)))
    thread.start()
    thread.join()
    torch.testing.assert_close(found[0], torch.softmax(x * 3 - 1, -1) + 4)
    new = [launch for key, launch in _launchers.items() if key not in known]
    assert new and all(hasattr(launch, "kernel") for launch in new)


@gems_only
@pytest.mark.gpu
def test_tritons_jit_launches_by_address(tmp_path):
    path = tmp_path / "copy.py"
    path.write_text(KERNEL)
    x, y = rand(64), torch.full((64,), -1.0, device=DEVICE)
    launch = private.jit_launcher(copy_source(), str(path))
    launch(1, 1, 1, None, x.data_ptr(), y.data_ptr(), 60)
    assert torch.equal(y[:60], x[:60]) and torch.equal(y[60:], torch.full_like(x[60:], -1.0))


# values that only kernels touch ----------------------------------------------------------------


def step(number: int, reads: list[Value], writes: list[Value]) -> tuple[Group, Source]:
    group = Group(number)
    group.outputs = writes
    params = [("", "in", v) for v in reads] + [("", "out", v) for v in writes]
    return group, Source("", "", params, 1)


@st.composite
def programs(draw: st.DrawFn) -> tuple[list[tuple[Group, Source]], set[Value]]:
    steps, known, escapes = [], [], set()
    for number in range(draw(st.integers(1, 12))):
        reads = draw(st.lists(st.sampled_from(known), max_size=3, unique=True)) if known else []
        sizes = draw(st.lists(st.integers(0, MOST_BYTES // 2), min_size=1, max_size=3))
        writes = [Value("pointwise", "add", (), (n,), "float32") for n in sizes]
        escapes.update(v for v in writes if draw(st.booleans()))
        steps.append(step(number, reads, writes))
        known += writes
    return steps, escapes


@gems_only
@given(programs())
def test_live_values_do_not_overlap(program):
    steps, escapes = program
    sources = dict(steps)
    offsets, total = plan_scratch([g for g, _ in steps], sources, escapes)
    assert not set(offsets) & escapes
    made = {v: k for k, (g, _) in enumerate(steps) for v in g.outputs}
    last = {v: k for k, (_, s) in enumerate(steps) for _, _, v in s.params}
    placed = [(v, at, at + 4 * v.shape[0]) for v, at in offsets.items()]
    for k, (v, start, end) in enumerate(placed):
        assert start >= 0 and end <= total and start % 16 == 0 and end - start <= MOST_BYTES
        for w, other_start, other_end in placed[:k]:
            together = made[v] <= last[w] and made[w] <= last[v]
            assert not together or end <= other_start or other_end <= start


@gems_only
def test_memory_is_used_again():
    steps = []
    previous = Value("buffer", None, (), (1000,), "float32")
    for number in range(50):
        value = Value("pointwise", "add", (), (1000,), "float32")
        steps.append(step(number, [previous], [value]))
        previous = value
    offsets, total = plan_scratch([g for g, _ in steps], dict(steps), {previous})
    assert len(offsets) == 49 and total <= 3 * 4096


# counters --------------------------------------------------------------------------------------


@gems_only
def test_counters_are_counted_in_one_call():
    class Counting(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for k in range(4):
                self.register_buffer(f"n{k}", torch.full((), 10 * k))
            self.register_buffer("read", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for k in range(4):
                getattr(self, f"n{k}").add_(1)
            before = self.read * 2
            self.read += 0.5
            return x * self.n3 + before + self.read

    module, backend = Counting().to(DEVICE), Gems()
    x = rand(3, 5)
    compiled = torch.compile(module, backend=backend, fullgraph=True)
    for call in range(1, 4):
        y = compiled(x)
        assert [int(getattr(module, f"n{k}")) for k in range(4)] == [
            10 * k + call for k in range(4)
        ]
        wanted = x * (30 + call) + 2 * 0.5 * (call - 1) + 0.5 * call
        torch.testing.assert_close(y, wanted)
    (report,) = backend.reports
    # three counters at once; the two values that are also read are stored where they are computed
    assert report.aten_calls == 1


@gems_only
def test_updates_of_one_run_do_not_depend_on_each_other():
    """Together they have no order: what one writes, no other of the batch writes or reads."""
    import torch.fx as fx

    from gems_compile.lowering.order import batches

    aten, graph = torch.ops.aten, fx.Graph()
    p, q, r, s = (graph.placeholder(name) for name in "pqrs")
    for node in (p, q, r, s):
        node.meta["val"] = torch.empty(3)
    part = graph.call_function(aten.view.default, (p, [3]))
    part.meta["val"] = torch.empty(3)

    def step(op, *args):
        node = graph.call_function(op, args)
        node.meta["val"] = args[0].meta["val"]
        return node

    copy, add = aten.copy_.default, aten.add_.Tensor
    steps = [
        step(add, p, 1.0),
        step(add, q, 1.0),
        step(copy, r, s),
        step(add, p, 1.0),  # p again
        step(copy, s, part),  # reads p
        step(add, q, 0.0),
        step(add, r, -0.0),
    ]
    found = [[steps.index(n) for n in batch] for batch in batches(steps)]
    assert found == [[0, 1], [2], [3], [4], [5], [6]]


@gems_only
def test_kernels_are_waited_for_when_they_first_run(monkeypatch):
    """Those of a forward compile while its backward is planned."""
    events = []
    init, load = pipeline.Compilation.__init__, pipeline.Compilation.load

    def begun(self, *args, **kwargs):
        init(self, *args, **kwargs)
        events.append(f"{self.report.kind} begun")

    def loaded(self):
        events.append(f"{self.report.kind} loaded")
        return load(self)

    monkeypatch.setattr(pipeline.Compilation, "__init__", begun)
    monkeypatch.setattr(pipeline.Compilation, "load", loaded)
    f = torch.compile(lambda x: (x * 2 + 1).softmax(-1), backend=Gems())
    for _ in range(2):
        f(rand(7, 33).requires_grad_()).sum().backward()
    assert events == ["forward begun", "backward begun", "forward loaded", "backward loaded"]


@gems_only
@pytest.mark.parametrize("strict", [False, True])
def test_a_kernel_that_does_not_compile_is_atens(monkeypatch, caplog, strict):
    monkeypatch.setenv("GEMS_STRICT", str(int(strict)))
    result = pipeline.Loading.result

    def fails(self):
        if "softmax" in self.source.name or "exp" in self.source.name:
            raise pipeline.CompileError(self.source, "no room")
        return result(self)

    monkeypatch.setattr(pipeline.Loading, "result", fails)
    backend = Gems()
    f, x = torch.compile(lambda x: (x * 2 + 1).exp(), backend=backend), rand(7, 33)
    if strict:
        with pytest.raises(pipeline.CompileError, match="no room"):
            f(x)
        return
    torch.testing.assert_close(f(x), (x * 2 + 1).exp())
    assert "runs as ATen: CompileError" in caplog.text
    (report,) = backend.reports
    assert (report.launches, len(report.failures)) == (0, 1)
    assert any("its kernel failed" in why for why in report.aten)


def test_the_slab_is_there_from_its_first_kernel_to_its_last() -> None:
    """Not while ATen's calls before and after hold their memory."""

    def fn(a, b):
        x = torch.relu(a @ a).sum(0) + 1  # a product, then the parts of sums
        return (b * (x * x).mean().sqrt().clamp(max=1)) @ b

    backend = Gems()
    args = [rand(256, 256), rand(256, 256)]
    got = torch.compile(fn, backend=backend, fullgraph=True)(*args)
    torch.testing.assert_close(got, fn(*args))
    lines = backend.reports[0].wrapper.splitlines()
    (slab,) = (k for k, line in enumerate(lines) if "scratch = empty" in line)
    (gone,) = (k for k, line in enumerate(lines) if "del " in line and "scratch" in line)
    touched = [k for k, line in enumerate(lines) if "s0" in line and k > slab + 1]
    product = next(n for n, c in backend.reports[0].constants.items() if "mm" in c)
    first, second = (k for k, line in enumerate(lines) if f" {product}(" in line)
    assert first < slab < min(touched) <= max(touched) < gone <= second
