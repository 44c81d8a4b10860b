"""The native launcher: its C against a driver that takes notes, its build, and on a GPU."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import shutil
import subprocess
import sys
import threading
import tracemalloc
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import DEVICE, gems_only, rand

from gems_compile.backend import Gems
from gems_compile.lowering import native, private
from gems_compile.lowering.runs import (
    ADDRESS,
    GRID,
    INT32,
    INT64,
    TENSOR,
    Launch,
    Operand,
    Run,
    in_python,
    wide_when_called,
)

pytestmark = gems_only
needs_compiler = pytest.mark.skipif(
    not (shutil.which("gcc") or shutil.which("clang")), reason="needs a C compiler"
)
HERE = Path(__file__).parent


class Noted(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_uint64) for name in ("function", "stream", "n_args")),
        ("args", ctypes.c_uint64 * 64),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("shared", ctypes.c_uint32),
    )


@dataclass
class Driver:
    """The noting driver: see ``native_driver.c``."""

    path: str
    library: ctypes.CDLL

    @property
    def noted(self) -> list[Noted]:
        return [self.library.launched(k).contents for k in range(self.library.launches())]

    @property
    def args(self) -> list[list[int]]:
        return [note.args[: note.n_args] for note in self.noted]

    def run(self, *launches: Launch, nulls: int = 0, device: int = 0, kept: object = ()):
        """The launches as one Run; kernel number k takes what launch k's operands are."""
        run = Run("r0", list(launches))
        for k, launch in enumerate(launches):
            types = "".join("i" if o.kind == INT32 else "q" for o in launch.args) + "q" * nulls
            self.library.takes(k + 1, types.encode())
        kernels = [private.Loaded(k + 1, 128, 16 * k, nulls) for k in range(len(launches))]
        return native.made(extension(), run, kernels, device, kept, self.path)


def extension():
    made = native.start(None).wait()
    assert made.run is not None, made.why
    return made.run


@pytest.fixture(scope="module")
def built_driver(tmp_path_factory) -> Driver:
    path = str(tmp_path_factory.mktemp("driver") / "driver.so")
    command = [*native.find_compiler(), "-shared", "-fPIC", HERE / "native_driver.c", "-o", path]
    subprocess.run(command, check=True)
    library = ctypes.CDLL(path)
    library.launched.restype = ctypes.POINTER(Noted)
    return Driver(path, library)


@pytest.fixture
def driver(built_driver: Driver) -> Driver:
    built_driver.library.forget()
    return built_driver


def launch(*args: Operand, grid: Operand | int = 1, name: str = "fused") -> Launch:
    grid = Operand(GRID, plus=grid) if isinstance(grid, int) else grid
    return Launch("k0", None, name, grid, list(args))


# what the driver is given ------------------------------------------------------------------------


@needs_compiler
def test_arguments_of_every_kind(driver: Driver) -> None:
    args = [
        Operand(TENSOR, "x"),
        Operand(ADDRESS, "s"),
        Operand(ADDRESS, "s", 384),
        Operand(INT32, "n"),
        Operand(INT64, "m"),
        Operand(INT32, plus=-7),
        Operand(INT64, plus=-(2**40)),
        Operand(INT64, "m", 5),
    ]
    x = torch.zeros(3)
    driver.run(launch(*args, grid=9), nulls=2)(77, x, 2**63 + 128, -3, -(2**62))
    (note,) = driver.noted
    assert (note.function, note.stream, note.shared) == (1, 77, 0)
    assert [*note.grid, *note.block] == [9, 1, 1, 128, 1, 1]
    signed = [x.data_ptr(), 2**63 + 128, 2**63 + 512, -3, -(2**62), -7, -(2**40), 5 - 2**62, 0, 0]
    assert driver.args == [[number % 2**64 for number in signed]]


@needs_compiler
def test_many_launches_in_one_call(driver: Driver) -> None:
    """Values are passed once however many kernels take them."""
    x, n = Operand(TENSOR, "x"), Operand(INT64, "n")
    run = Run("r0", [launch(x, n, Operand(INT64, plus=k)) for k in range(6)])
    assert list(run.values) == [(TENSOR, "x"), (INT64, "n")]
    call = driver.run(*run.launches)
    for times in range(1, 4):
        y = torch.zeros(1)
        call(0, y, times)
        assert driver.args[-6:] == [[y.data_ptr(), times, k] for k in range(6)]
        assert [note.function for note in driver.noted[-6:]] == [1, 2, 3, 4, 5, 6]
        assert [note.shared for note in driver.noted[-6:]] == [0, 16, 32, 48, 64, 80]
    call.repeat(5, 2)
    assert driver.args[-12:] == driver.args[-18:-6] and driver.noted[-1].stream == 5


@needs_compiler
def test_grids_that_follow_from_sizes(driver: Driver) -> None:
    one, two = Operand(GRID, "(n // 4)"), Operand(GRID, "n")
    run = driver.run(launch(grid=one), launch(grid=two), launch(grid=3))
    run(0, 2, 8)
    assert [note.grid[0] for note in driver.noted] == [2, 8, 3]
    driver.library.forget()
    run(0, 0, 1)  # a grid of none: no launch
    assert [(note.function, note.grid[0]) for note in driver.noted] == [(2, 1), (3, 3)]


@needs_compiler
def test_what_the_driver_refuses(driver: Driver) -> None:
    x = Operand(INT64, "x")
    run = driver.run(launch(x, name="fused_add"), launch(x, grid=5, name="fused_mul"), device=1)
    driver.library.fail(700, 1)
    with pytest.raises(RuntimeError) as raised:
        run(0, 1)
    assert str(raised.value) == (
        "launching fused_mul failed: CUDA_ERROR_ILLEGAL_ADDRESS (700); grid (5, 1, 1), "
        "block (128, 1, 1), 16 bytes of shared memory, device 1"
    )
    driver.library.fail(4242, 0)
    with pytest.raises(RuntimeError, match=r"fused_add failed: an unknown error \(4242\)"):
        run(0, 1)
    driver.library.forget()
    run(0, 1)
    assert len(driver.noted) == 2


@needs_compiler
def test_a_thread_without_a_context_gets_the_devices(driver: Driver) -> None:
    driver.library.want_context(1)
    run, errors = driver.run(launch(), device=3), []
    thread = threading.Thread(target=lambda: errors.append(run(0)))
    thread.start()
    thread.join()
    assert errors == [None] and len(driver.noted) == 1


@needs_compiler
@pytest.mark.parametrize(
    ("values", "error"),
    [
        ((), TypeError),
        ((0,), TypeError),
        ((0, 3, torch.zeros(1), 1, 2, 4), TypeError),
        ((0, 3, 5, 1, 2), TypeError),  # no tensor
        ((0, 3, None, 1, 2), TypeError),
        ((None, 3, torch.zeros(1), 1, 2), TypeError),
        ((0, 3, torch.zeros(1), 1.0, 2), TypeError),
        ((0, torch.zeros(1), torch.zeros(1), 1, 2), TypeError),
        ((0, 3, torch.zeros(1), 2**31, 2), OverflowError),
        ((0, 3, torch.zeros(1), 1, 2**63), OverflowError),
        ((0, -1, torch.zeros(1), 1, 2), OverflowError),
        ((0, 2**31, torch.zeros(1), 1, 2), OverflowError),
    ],
)
def test_wrong_values(driver: Driver, values, error) -> None:
    args = [Operand(TENSOR, "x"), Operand(INT32, "n"), Operand(INT64, "m")]
    run = driver.run(launch(*args, grid=Operand(GRID, "g")))
    with pytest.raises(error):
        run(*values)
    with pytest.raises(TypeError):
        run(0, 3, torch.zeros(1), 1, m=2)
    assert not driver.noted
    run(0, 0, torch.zeros(1), -(2**31), 2**63 - 1)


@needs_compiler
def test_what_cannot_be_made(driver: Driver) -> None:
    with pytest.raises(OSError, match="no_such"):
        Driver("/no_such.so", driver.library).run(launch())
    with pytest.raises(OSError, match="is no CUDA driver"):
        Driver("libc.so.6", driver.library).run(launch())
    make, method = extension(), private.address_method()
    one = ("k", 1, 1, 32, 0, ())
    for kinds, launches, data_ptr in (
        ("?", (one,), method),
        ("T", (("k", 1, (7, 0), 32, 0, ()),), method),
        ("T", ((1, 1, 1, 32, 0, ()),), method),
        ("T", (one[:-1],), method),
        ("T", (("k", 1, 1, 32, 0, ("x",)),), method),
        ("T" * 5000, (one,), method),
        ("T", (one,), torch.zeros(1).data_ptr),
    ):
        with pytest.raises((TypeError, ValueError)):
            make(driver.path, 0, kinds, launches, (), data_ptr)
    with pytest.raises(Exception, match="format requires"):
        driver.run(launch(Operand(INT32, plus=2**31)))


@needs_compiler
def test_nothing_is_left_behind(driver: Driver) -> None:
    kept, x = object(), torch.zeros(4)
    before = sys.getrefcount(kept)
    run = driver.run(launch(Operand(TENSOR, "x"), Operand(INT64, "n")), kept=kept)
    assert sys.getrefcount(kept) == before + 1
    held, method = sys.getrefcount(x), sys.getrefcount(private.address_method())

    def calls(times: int) -> None:
        for k in range(times):
            run(0, x, 2**40 + k)
            if not k % 100:
                with contextlib.suppress(TypeError):
                    run(0, 1, x)

    calls(1000)
    tracemalloc.start()
    calls(1000)
    first = tracemalloc.get_traced_memory()[0]
    calls(100_000)
    grown = tracemalloc.get_traced_memory()[0] - first
    tracemalloc.stop()
    assert grown < 2000
    assert sys.getrefcount(x) == held
    assert sys.getrefcount(private.address_method()) < method + 100  # others take it, too
    run = None
    assert sys.getrefcount(kept) == before


@needs_compiler
def test_threads_share_a_run(driver: Driver) -> None:
    n = Operand(INT64, "n")
    run = driver.run(*[launch(n, Operand(INT64, "n", k)) for k in range(4)])
    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        work = [
            threading.Thread(target=lambda t=t: [run(t, 1000 * t + k) for k in range(250)])
            for t in range(4)
        ]
        for thread in work:
            thread.start()
        for thread in work:
            thread.join()
    finally:
        sys.setswitchinterval(switch)
    noted = driver.noted
    assert len(noted) == 4000
    for k in range(0, 4000, 4):
        own = noted[k : k + 4]
        number = own[0].args[0]
        assert {note.stream for note in own} == {number // 1000}
        assert [tuple(note.args[:2]) for note in own] == [(number, number + j) for j in range(4)]


def test_the_same_in_python() -> None:
    """What a run does where there is no native launcher: the same launches, wide ones if asked."""
    x, s, n = Operand(TENSOR, "x"), Operand(ADDRESS, "s0", 128), Operand(INT32, "n", 0)
    first = Launch("k0", None, "fused_a", Operand(GRID, "g"), [x, s, n], "wide0")
    run = Run("r0", [first, Launch("k1", None, "fused_b", Operand(GRID, plus=4), [s])])
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


# its build ---------------------------------------------------------------------------------------


@pytest.fixture
def fresh(monkeypatch, tmp_path: Path) -> Path:
    """No extension was begun in this process, and none is kept in the folder."""
    monkeypatch.setattr(native, "_current", None)
    return tmp_path / "cache"


def library(folder: Path) -> Path:
    (found,) = (folder / "native").iterdir()
    return found


@needs_compiler
def test_it_is_built_once(fresh: Path, monkeypatch) -> None:
    assert native.start(str(fresh)).wait().run is not None
    assert native.is_whole(str(library(fresh)))
    monkeypatch.setattr(native, "_current", None)
    monkeypatch.setattr(native, "build", None)
    assert native.start(str(fresh)).wait().run is not None
    assert native.start(str(fresh)) is native.start(str(fresh))


@needs_compiler
@pytest.mark.parametrize("damage", [b"", b"no library", "half", "flip"])
def test_a_damaged_library_is_built_anew(fresh: Path, monkeypatch, damage) -> None:
    native.start(str(fresh)).wait()
    path = library(fresh)
    whole = path.read_bytes()
    damaged = {
        "half": whole[: len(whole) // 2],
        "flip": whole[:1000] + bytes([255 - whole[1000]]) + whole[1001:],
    }.get(damage, damage)
    path.unlink()  # this process has it in memory
    path.write_bytes(damaged)
    monkeypatch.setattr(native, "_current", None)
    assert native.start(str(fresh)).wait().run is not None
    assert path.read_bytes() == whole or native.is_whole(str(path))


@needs_compiler
def test_one_from_another_machine_is_built_anew(fresh: Path, monkeypatch) -> None:
    """Whole, and yet it cannot be loaded here."""
    native.start(str(fresh)).wait()
    path = library(fresh)
    path.unlink()
    path.write_bytes(native._signed(b"\x7fELF of another kind"))
    monkeypatch.setattr(native, "_current", None)
    assert native.start(str(fresh)).wait().run is not None


@pytest.mark.parametrize("why", ["none", "gone", "fails", "headers"])
def test_without_a_compiler_python_launches(fresh: Path, monkeypatch, caplog, why) -> None:
    caplog.set_level("INFO", logger="gems_compile.lowering.native")
    monkeypatch.delenv("CC", raising=False)
    if why == "none":
        monkeypatch.setattr(native.shutil, "which", lambda name: None)
        reason = "there is no C compiler"
    elif why == "gone":
        monkeypatch.setenv("CC", "/nowhere/gcc -m64")
        reason = "the C compiler /nowhere/gcc is not there"
    elif why == "fails":
        monkeypatch.setenv("CC", "/bin/false")
        reason = "/bin/false failed"
    else:
        paths = native.sysconfig.get_paths()
        monkeypatch.setattr(
            native.sysconfig, "get_paths", lambda **_: {**paths, "include": "/nowhere"}
        )
        if not native.shutil.which("gcc"):
            monkeypatch.setenv("CC", "/bin/true")
        reason = "Python's headers are not installed"
    found = native.start(str(fresh)).wait()
    assert found.run is None and reason in found.why
    assert [r.getMessage() for r in caplog.records] == [
        f"kernels are launched from Python: {found.why}"
    ]
    target = SimpleNamespace(name="cuda", backend="cuda")
    assert reason in native.in_use(target, str(fresh))
    run = Run("r0", [launch()])
    assert native.launcher(run, {None: print}, torch.device("cuda", 0)) is None


@needs_compiler
def test_what_the_doctor_says(fresh: Path) -> None:
    cuda = SimpleNamespace(name="cuda", backend="cuda")
    hip = SimpleNamespace(name="hip", backend="hip")
    assert native.in_use(cuda, str(fresh)) == f"native ({library(fresh)})"
    assert native.in_use(hip, None) == "from Python, kernel by kernel (on hip)"
    assert native.in_use(None, None) == "none: no kernel runs on a GPU"


@needs_compiler
def test_a_folder_that_cannot_be_written(fresh: Path) -> None:
    fresh.write_text("a file")
    found = native.start(str(fresh)).wait()
    assert found.run is not None and not found.path.startswith(str(fresh))


BUILD = """
import sys
from gems_compile.lowering import native
found = native.start(sys.argv[1]).wait()
assert found.run is not None, found.why
"""


@needs_compiler
@pytest.mark.slow
def test_processes_build_at_once(fresh: Path) -> None:
    command = [sys.executable, "-c", BUILD, str(fresh)]
    both = [subprocess.Popen(command) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    assert native.is_whole(str(library(fresh)))


def _in_a_child(queue) -> None:
    queue.put(native.start(None).wait().run is not None)


@needs_compiler
def test_a_forked_process_has_it_too() -> None:
    extension()
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=_in_a_child, args=(queue,))
    child.start()
    child.join(60)
    assert queue.get()


# runs in the function ----------------------------------------------------------------------------


def wrapper(fn, *inputs, dynamic: bool = False):
    backend = Gems()
    compiled = torch.compile(fn, backend=backend, dynamic=dynamic, fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), fn(*inputs))
    return backend.reports[-1]


def two_scales(x: torch.Tensor):
    y = (x * 2 + 1).sum(0, keepdim=True)
    z = x.exp().sum(1, keepdim=True)
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

    report = wrapper(fn, rand(700, 900))  # too large for the slab
    one = 700 * 900 * 4
    assert report.launches > 5 and report.peak_bytes < 3 * one + 2**20, report.wrapper


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
    native.start(private_cache()).wait()
    seen: list[tuple[str, bool]] = []
    bound = native.launcher

    def launcher(run, *args):
        found = bound(run, *args)
        seen.append((run.name, found is not None))
        return found

    monkeypatch.setattr(native, "launcher", launcher)
    return seen


def private_cache() -> str | None:
    from gems_compile.config import cache_dir

    return cache_dir()


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
