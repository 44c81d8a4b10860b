"""The native launcher: its C, against a driver that takes notes."""

from __future__ import annotations

import contextlib
import ctypes
import shutil
import subprocess
import sys
import threading
import tracemalloc
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from helpers import gems_only

from gems_compile.calls import operands
from gems_compile.kernels.dropout import number_drawn
from gems_compile.lowering import native, private
from gems_compile.lowering.runs import ADDRESS, GRID, INT32, INT64, TENSOR, Launch, Operand, Run

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
        ("early", ctypes.c_uint32),
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
        place = torch.device("cuda", device)
        return native.made(extension(), run, kernels, place, kept, self.path)


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
    return Launch("k0", name, grid, list(args))


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
def test_who_waits_is_set_up_early_behind_another_kernel(driver: Driver) -> None:
    """Not the first: what is ahead of it may be anybody's."""
    launches = [replace(launch(grid=k + 1), waits=k != 2) for k in range(4)]
    driver.run(*launches)(5)
    assert [note.early for note in driver.noted] == [0, 1, 0, 1]
    assert [note.grid[0] for note in driver.noted] == [1, 2, 3, 4]
    assert {note.stream for note in driver.noted} == {5}
    driver.library.fail(700, 1)
    with pytest.raises(RuntimeError, match=r"fused failed: CUDA_ERROR_ILLEGAL_ADDRESS.*grid \(2, "):
        driver.run(*launches)(5)


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


@needs_compiler
def test_the_number_of_a_seed() -> None:
    extension()
    quick = native.number_drawn()
    assert quick is not None
    for seed in (0, 1234, 2**63 + 5, 2**64 - 1):
        for offset in (0, 4, 2**34 + 8, 2**63 + 4):
            assert quick(seed, offset) == number_drawn(seed, offset)
    for wrong in ((1,), (1, 2.0), (1, 2, 3)):
        with pytest.raises(TypeError, match="two ints"):
            quick(*wrong)


class Sub(torch.Tensor):
    """Which an op might see through."""


DESCRIBED = {
    "tensors": lambda: (
        torch.randn(3, 5),
        torch.randn(4, 6).t(),
        torch.nn.Parameter(torch.ones(2)),
    ),
    "places": lambda: (torch.randn(9)[1:], torch.randn(9)[4:], torch.empty(0, 3), torch.ones(())),
    "numbers": lambda: (2, True, -0.0, float("nan"), 1j, None, "tanh", torch.float16, slice(3)),
    "lists": lambda: ([torch.ones(2), 3, [0.5, (torch.zeros(1),)]], (), [[]]),
    "a subclass": lambda: (1, torch.ones(2).as_subclass(Sub), 2),
    "a subclass within": lambda: ([torch.ones(2), torch.ones(2).as_subclass(Sub)], 2),
}


@needs_compiler
@pytest.mark.parametrize("name", DESCRIBED)
def test_calls_are_described_as_in_python(name: str) -> None:
    extension()
    describe, values = native.describe(), DESCRIBED[name]()
    for given in (values, list(values), dict(enumerate(values)).values()):
        (parts, tensors), (ours, theirs) = ([], []), ([], [])
        assert describe(given, ours, theirs) == operands.describe(given, parts, tensors)
        assert ours == parts and [*map(type, ours)] == [*map(type, parts)]
        assert [*map(id, theirs)] == [*map(id, tensors)]


@needs_compiler
def test_describing_leaves_nothing_behind() -> None:
    extension()
    describe = native.describe()
    values = (torch.randn(300, 500), 2.5, [70000, torch.randn(300)])
    describe(values, [], [])
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    for _ in range(1000):
        describe(values, [], [])
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert after - before < 2000
    with pytest.raises(TypeError, match="values and two lists"):
        describe(values, [], ())
    with pytest.raises(TypeError, match="values are wanted"):
        describe(3, [], [])
