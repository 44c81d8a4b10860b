"""Matrix products in runs: what cuBLAS is asked for, and that results are those of ``torch.mm``."""

from __future__ import annotations

import ctypes
import json
import subprocess
import threading
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE, gems_only
from test_native import Driver, Noted, extension, launch, needs_compiler
from torch import Tensor, nn

from gems_compile.backend import Gems
from gems_compile.lowering import cublas, matrix_products, native, private, saved
from gems_compile.lowering.cublas import Problem, leading
from gems_compile.lowering.runs import GRID, TENSOR, Multiply, Operand, Run

pytestmark = gems_only
HERE = Path(__file__).parent
needs_gpu = pytest.mark.skipif(DEVICE != "cuda", reason="cuBLAS is on GPUs alone")


# what cuBLAS is asked for -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("matrix", "found"),
    [
        ((5, 3, (3, 1)), (0, 3)),
        ((5, 3, (8, 1)), (0, 8)),
        ((5, 3, (1, 5)), (1, 5)),
        ((5, 3, (1, 9)), (1, 9)),
        ((5, 1, (1, 1)), (0, 1)),
        ((1, 5, (2, 1)), (0, 5)),
        ((1, 5, (1, 7)), (1, 7)),
        ((5, 1, (1, 2)), (0, 1)),
        ((5, 1, (3, 1)), (0, 3)),
        ((5, 1, (3, 3)), None),
        ((5, 3, (2, 1)), None),  # rows overlap
        ((5, 3, (0, 1)), None),
        ((5, 3, (6, 2)), None),
        ((5, 3, (1, 2)), None),
    ],
)
def test_leading_dimensions(matrix, found) -> None:
    assert leading(*matrix) == found


class Layout(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_int64) for name in ("type", "rows", "columns", "ld"))


class Multiplied(ctypes.Structure):
    _fields_ = (
        ("launched_before", ctypes.c_int64),
        ("turned", ctypes.c_int64 * 2),
        *((name, Layout) for name in "abd"),
        *((f"to_{name}", ctypes.c_uint64) for name in "abd"),
        *((name, ctypes.c_uint64) for name in ("algorithm", "workspace", "bytes", "stream")),
    )


def spelled(layout: Layout) -> tuple[int, ...]:
    return layout.type, layout.rows, layout.columns, layout.ld


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Driver:
    path = str(tmp_path_factory.mktemp("blas") / "blas.so")
    sources = [HERE / "native_driver.c", HERE / "native_blas.c"]
    subprocess.run([*native.find_compiler(), "-shared", "-fPIC", *sources, "-o", path], check=True)
    library = ctypes.CDLL(path)
    library.launched.restype = ctypes.POINTER(Noted)
    library.product.restype = ctypes.POINTER(Multiplied)
    return Driver(path, library)


@pytest.fixture
def driver(built: Driver) -> Driver:
    built.library.forget()
    built.library.forget_blas()
    return built


def multiply(problem: Problem, *places: Operand) -> Multiply:
    return Multiply("m0", "mm", Operand(GRID, plus=1), list(places), problem=problem)


def made(driver: Driver, *launches, number: int = 1):
    extension()
    blas = native._current.open_blas(driver.path, 10**8)
    driver.library.takes(number, b"q")
    kernels = [private.Loaded(number, 128, 0, 0)] * sum(
        not isinstance(x, Multiply) for x in launches
    )
    run = Run("r0", list(launches))
    return native.made(extension(), run, kernels, torch.device("cpu"), (), driver.path, blas)


A, B, C = (Operand(TENSOR, name) for name in "abc")


@needs_compiler
def test_products_among_kernels(driver: Driver) -> None:
    """Row-major (7, 5) @ (5, 3) is asked for as its transpose, after the kernel before it."""
    plain = Problem("bfloat16", 7, 5, 3, (5, 1), (3, 1))
    turned = Problem("float16", 7, 5, 3, (1, 9), (1, 8))
    shifted = Operand(TENSOR, "b", 64)
    run = made(
        driver, launch(A), multiply(plain, A, B, C), launch(A), multiply(turned, A, shifted, C)
    )
    a, b, c = (torch.zeros(512, dtype=torch.bfloat16)[k:] for k in (0, 0, 0))
    run(99, a, b, c)
    first, second = (driver.library.product(k).contents for k in range(driver.library.products()))
    assert (first.launched_before, second.launched_before) == (1, 2)
    assert list(map(spelled, (first.a, first.b, first.d))) == [
        (14, 3, 5, 3),
        (14, 5, 7, 5),
        (14, 3, 7, 3),
    ]
    assert list(map(spelled, (second.a, second.b, second.d))) == [
        (2, 5, 3, 8),
        (2, 7, 5, 9),
        (2, 3, 7, 3),
    ]
    assert [*first.turned, *second.turned] == [0, 0, 1, 1]
    assert (first.to_a, first.to_b, first.to_d) == (b.data_ptr(), a.data_ptr(), c.data_ptr())
    assert second.to_a == b.data_ptr() + 64
    for one in (first, second):
        assert (one.bytes, one.stream) == (7000, 99)
    assert first.workspace == second.workspace != 0


@needs_compiler
@pytest.mark.parametrize("behind", [2, 8, 16, 128, 256])
def test_algorithms_follow_what_addresses_are_multiples_of(driver: Driver, behind) -> None:
    run = made(driver, multiply(Problem("float16", 2, 2, 2, (2, 1), (2, 1)), A, B, C))
    start = torch.zeros(2048, dtype=torch.uint8)
    aligned = start[-start.data_ptr() % 256 :]
    for at in (0, behind, 0, behind):
        run(0, aligned, aligned[at:], aligned)
    found = [driver.library.product(k).contents.algorithm for k in range(4)]
    other = behind << 20 | 256 << 10 | 256  # cuBLAS's A is the right factor
    every = 256 << 20 | 256 << 10 | 256
    assert found == [every, other, every, other]
    assert driver.library.asked() == (1 if behind == 256 else 2)  # once for each


@needs_compiler
def test_many_alignments(driver: Driver) -> None:
    """More than are kept: the one that was chosen first goes, and is chosen again."""
    run = made(driver, multiply(Problem("float16", 2, 2, 2, (2, 1), (2, 1)), A, B, C))
    start = torch.zeros(2048, dtype=torch.uint8)
    aligned = start[-start.data_ptr() % 256 :]
    places = [0, 2, 4, 8, 16, 0, 16]
    for at in places:
        run(0, aligned[at:], aligned, aligned)
    found = [driver.library.product(k).contents.algorithm >> 10 & 1023 for k in range(7)]
    assert found == [at or 256 for at in places] and driver.library.asked() == 6


@needs_compiler
def test_the_largest_workspace_is_for_all(driver: Driver) -> None:
    """Odd places may want a larger one, which is found out when they come."""
    problem = Problem("float16", 2, 2, 2, (2, 1), (2, 1))
    run = made(driver, multiply(problem, A, B, C), multiply(problem, A, C, C))
    start = torch.zeros(2048, dtype=torch.uint8)
    aligned = start[-start.data_ptr() % 256 :]
    run(0, aligned, aligned[2:], aligned)
    run.repeat(0, 1)
    run(0, aligned, aligned, aligned)
    found = [driver.library.product(k).contents for k in range(6)]
    assert [x.bytes for x in found] == [6000, 2000, 6000, 2000, 2000, 2000]
    for one, other in zip(found[::2], found[1::2], strict=True):
        assert one.workspace == other.workspace != 0


@needs_compiler
def test_what_cublas_refuses(driver: Driver) -> None:
    problem = Problem("float16", 2, 2, 2, (2, 1), (2, 1))
    before = driver.library.living()
    with pytest.raises(OSError, match="no algorithm"):  # it wants more memory than it gets
        made(driver, multiply(problem._replace(rows=10**6), A, B, C))
    assert driver.library.living() == before
    run = made(driver, multiply(problem, A, B, C))
    assert driver.library.living() > before
    driver.library.fail_blas(13)
    x = torch.zeros(8)
    with pytest.raises(RuntimeError, match="mm failed: cublasLtMatmul returned 13"):
        run(0, x, x, x)
    driver.library.forget_blas()
    run(0, x, x, x)
    del run
    assert driver.library.living() == before
    with pytest.raises(OSError, match="no cublasLtCreate"):
        native._current.open_blas("libm.so.6", 0)


def test_it_survives_json() -> None:
    product = multiply(Problem("float16", 2, 3, 4, (3, 1), (1, 3)), A, Operand(TENSOR, "b", 6), C)
    kernel = launch(A)
    told = json.loads(json.dumps([asdict(product), asdict(kernel)]))
    assert [saved._launch(one) for one in told] == [product, kernel]


# graphs ------------------------------------------------------------------------------------------


@pytest.fixture
def everywhere(monkeypatch):
    """As on a GPU, on a CPU too, where runs are Python."""
    if DEVICE == "cpu":
        monkeypatch.setattr(matrix_products.cublas, "why_not", lambda device: None)


def products(backend: Gems) -> list[Problem]:
    runs = [run for report in backend.reports for run in report.runs]
    return [x.problem for run in runs for x in run.launches if isinstance(x, Multiply)]


def halves(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_layouts(dtype) -> None:
    """Factors that are transposed, parts of others, at odd places, or computed by a kernel."""

    def fn(x, w, wide):
        y = torch.relu(x) @ w.t()
        z = wide[3:13, 8:24] @ w
        return (y + 1) @ z.t(), x.t() @ x, wide[:, 1:17] @ w.t() * 2, y[2:].t() @ y[2:]

    backend = Gems()
    args = halves(10, 16, dtype=dtype), halves(16, 16, dtype=dtype), halves(20, 40, dtype=dtype)
    got, wanted = torch.compile(fn, backend=backend, fullgraph=True)(*args), fn(*args)
    assert len(products(backend)) == 6
    for one, other in zip(got, wanted, strict=True):
        assert one.stride() == other.stride()
        torch.testing.assert_close(one, other, rtol=0.02, atol=0.02)
    assert torch.equal(got[1], wanted[1])


@pytest.mark.usefixtures("everywhere")
def test_training() -> None:
    """Two linear layers, whose products are launched together with kernels."""

    def fn(x, v, w):
        return F.silu((torch.relu(x @ v) * 2) @ w).sum()

    backend = Gems()
    args = [halves(12, 16).requires_grad_(), halves(16, 32).requires_grad_()]
    args.append(halves(32, 8).requires_grad_())
    torch.compile(fn, backend=backend, fullgraph=True)(*args).backward()
    got = [x.grad for x in args]
    for x in args:
        x.grad = None
    fn(*args).backward()
    for one, x in zip(got, args, strict=True):
        torch.testing.assert_close(one, x.grad, rtol=0.05, atol=0.1)
    assert len(products(backend)) == 6
    kinds = [{isinstance(x, Multiply) for x in run.launches} for run in backend.reports[0].runs]
    assert {True, False} in kinds


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("kind", ["float32", "empty", "dynamic", "expanded", "strided"])
def test_what_stays_atens(kind) -> None:
    def fn(x, y):
        return torch.mm(x, y) + 1

    x, y = halves(6, 8), halves(8, 4)
    if kind == "float32":
        x, y = x.float(), y.float()
    elif kind == "empty":
        x = x[:0]
    elif kind == "expanded":
        x = x[:1].expand(6, 8)
    elif kind == "strided":
        x = halves(6, 16)[:, ::2]
    backend = Gems()
    compiled = torch.compile(fn, backend=backend, fullgraph=True, dynamic=kind == "dynamic")
    torch.testing.assert_close(compiled(x, y), fn(x, y), rtol=0.02, atol=0.02)
    assert not products(backend)


@needs_gpu
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("allow_bf16_reduced_precision_reduction", False),
        ("allow_fp16_reduced_precision_reduction", False),
        ("allow_fp16_accumulation", True),
    ],
)
def test_settings_that_products_depend_on(monkeypatch, name, value) -> None:
    assert cublas.why_not(torch.device("cuda")) is None
    monkeypatch.setattr(torch.backends.cuda.matmul, name, value)
    assert name in (cublas.why_not(torch.device("cuda")) or "")
    backend = Gems()
    x = halves(64, 64)
    compiled = torch.compile(lambda x: x @ x + 1, backend=backend)
    assert torch.equal(compiled(x), x @ x + 1) and not products(backend)


@pytest.mark.usefixtures("everywhere")
def test_a_product_without_memory() -> None:
    """On another device than the graph's kernels."""
    x, m = halves(16, 16), torch.empty(16, 16, device="meta", dtype=torch.bfloat16)
    backend = Gems()
    got, other = torch.compile(lambda x, m: (x @ x + 1, m @ m), backend=backend)(x, m)
    torch.testing.assert_close(got, x @ x + 1, rtol=0.02, atol=0.02)
    assert other.device.type == "meta" and len(products(backend)) == 1


@needs_gpu
def test_a_product_on_the_cpu() -> None:
    """In a graph of a GPU's."""
    x, y = halves(64, 64), halves(64, 64).cpu()
    backend = Gems()
    compiled = torch.compile(lambda x, y: (x @ x + 1, y @ y), backend=backend, fullgraph=True)
    for got, wanted in zip(compiled(x, y), (x @ x + 1, y @ y), strict=True):
        assert got.device == wanted.device and torch.equal(got, wanted)
    assert len(products(backend)) == 1


def test_the_workspace_is_torchs(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:2:16:8")
    given = cublas.most_workspace(0)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    assert given == cublas.most_workspace(0) == 8519680
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert cublas.most_workspace(0) == 2**25


SIZES = [(17, 2048, 512), (2, 3, 5), (333, 77, 129), (4096, 768, 64), (64, 50176, 128)]


def factors_in_every_order(x: Tensor, y: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    return x @ y, g @ y.t(), x.t() @ g


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sizes", SIZES)
def test_the_bits_of_aten(sizes, dtype) -> None:
    rows, inner, columns = sizes
    backend, shapes = Gems(), [(rows, inner), (inner, columns), (rows, columns)]
    args = [halves(*shape, dtype=dtype) for shape in shapes]
    compiled = torch.compile(factors_in_every_order, backend=backend, fullgraph=True)
    for _ in range(2):
        pairs = zip(compiled(*args), factors_in_every_order(*args), strict=True)
        assert [torch.equal(got, wanted) for got, wanted in pairs] == [True] * 3
    assert len(products(backend)) == 3


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("at", [1, 2, 4, 8, 64])
def test_a_factor_off_the_boundary(sizes, dtype, at) -> None:
    """It lies ``at`` elements behind an aligned place."""
    rows, inner, columns = sizes
    backend = Gems()
    x, spare = halves(rows, inner, dtype=dtype), halves(inner * columns + at, dtype=dtype)
    y, g = spare[at:].view(inner, columns), halves(rows, columns, dtype=dtype)
    compiled = torch.compile(factors_in_every_order, backend=backend, fullgraph=True)
    for _ in range(2):
        pairs = zip(compiled(x, y, g), factors_in_every_order(x, y, g), strict=True)
        assert [torch.equal(got, wanted) for got, wanted in pairs] == [True] * 3
    assert len(products(backend)) == 3


def peak_of_a_step(layers: int = 8) -> tuple[int, int]:
    """Bytes of a training step of linear layers, whose backward holds much that forward saved; and
    how many of its products cuBLAS is called for."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(512, 512, bias=False) for _ in range(layers)))
    model.to(DEVICE, torch.bfloat16)

    def loss(x: Tensor) -> Tensor:
        for linear in model:
            x = F.silu(linear(x)) * x
        return x.float().square().mean()

    backend, x = Gems(), halves(16384, 512)
    compiled = torch.compile(loss, backend=backend, fullgraph=True)
    for _ in range(3):
        torch.cuda.reset_peak_memory_stats()
        model.zero_grad()
        compiled(x).backward()
    return torch.cuda.max_memory_allocated(), len(products(backend))


@needs_gpu
def test_memory_does_not_rise(monkeypatch) -> None:
    """What dies in a run lives to its end, also what forward saved: runs are parted for it."""
    native, many = peak_of_a_step()
    torch._dynamo.reset()
    monkeypatch.setattr(matrix_products.cublas, "why_not", lambda device: "a test asks for ATen")
    atens, none = peak_of_a_step()
    assert (many, none) == (3 * 8 - 1, 0)
    assert native <= atens + cublas.most_workspace(0)


@needs_gpu
def test_under_graphs_streams_and_threads() -> None:
    """What a user captures, and calls from several threads on streams of their own: every call has
    a workspace of its own."""
    x, w = halves(64, 50176), halves(50176, 128)  # split along the inner size
    compiled = torch.compile(lambda x, w: (x * 2) @ w, backend="gems", fullgraph=True)
    wanted = (x * 2) @ w
    assert torch.equal(compiled(x, w), wanted)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = compiled(x, w)
    captured.zero_()
    graph.replay()
    assert torch.equal(captured, wanted)
    bad: list[int] = []

    def work() -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.default_stream())
        with torch.cuda.stream(stream):
            got = [compiled(x, w) for _ in range(30)]
            bad.extend(k for k, one in enumerate(got) if not torch.equal(one, wanted))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not bad
