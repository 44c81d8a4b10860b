"""Products that are kernels of our own: those of one row, which a step of decoding is made of, and
those of one column and one row."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE, gems_only
from test_rewrites import assert_as_accurate
from torch import Tensor

from gems_compile.backend import Gems

pytestmark = gems_only


def alone(x: Tensor, w: Tensor, *_: Tensor) -> Tensor:
    return F.linear(x, w)


def residual(x: Tensor, w: Tensor, _: Tensor, y: Tensor) -> Tensor:
    return F.linear(x, w) + y


def gated(x: Tensor, w: Tensor, v: Tensor, _: Tensor) -> Tensor:
    return F.silu(F.linear(x, w)) * F.linear(x, v)


def normalized(x: Tensor, w: Tensor, v: Tensor, y: Tensor) -> Tensor:
    z = F.linear(x, w) + y
    return F.rms_norm(z, (z.shape[-1],)) * 2


def operands(
    dtype: torch.dtype, rows: int = 1, terms: int = 512, columns: int = 48
) -> list[Tensor]:
    shapes = [(1, rows, terms), (columns, terms), (columns, terms), (1, rows, columns)]
    return [torch.randn(s, device=DEVICE, dtype=dtype) for s in shapes]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("program", "launches"), [(alone, 1), (residual, 1), (gated, 2), (normalized, 2)]
)
def test_no_product_is_left(program, launches, dtype):
    backend, inputs = Gems(), operands(dtype)
    with torch.no_grad():
        got = torch.compile(program, backend=backend, fullgraph=True)(*inputs)
        wanted, exact = program(*inputs), program(*(x.double() for x in inputs))
    (report,) = backend.reports
    assert (report.launches, report.aten_calls) == (launches, 0), report.aten
    assert_as_accurate([got], [wanted], [exact], dtype)
    assert got.stride() == wanted.stride()


@pytest.mark.parametrize(
    "inputs",
    [
        operands(torch.bfloat16, rows=2),
        operands(torch.float32),
        operands(torch.bfloat16, terms=64),
        operands(torch.bfloat16, columns=0),
    ],
    ids=["two rows", "float32", "few terms", "no columns"],
)
def test_what_stays_a_product(inputs):
    backend = Gems()
    with torch.no_grad():
        got = torch.compile(residual, backend=backend, fullgraph=True)(*inputs)
    torch.testing.assert_close(got, residual(*inputs), rtol=2e-2, atol=2e-1)
    assert "aten.mm.default: no kernel is declared for it" in backend.reports[0].aten


def test_rows_of_the_matrix_that_are_no_rows_of_memory():
    """The transpose of what a linear layer has."""
    x, w, *_ = operands(torch.bfloat16)
    w, backend = w.t().contiguous(), Gems()
    with torch.no_grad():
        got = torch.compile(lambda x, w: x[0] @ w * 2, backend=backend, fullgraph=True)(x, w)
    torch.testing.assert_close(got, x[0] @ w * 2, rtol=2e-2, atol=2e-1)
    assert "aten.mm.default: no kernel is declared for it" in backend.reports[0].aten


def test_rotary_embedding_of_products():
    """Queries and keys are rotated as they are without: halves of a product's result are read from
    memory, none is a kernel."""

    def fn(x: Tensor, w: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q = F.linear(x, w).view(4, 16)
        turned = torch.cat((-q[:, 8:], q[:, :8]), 1)
        return q * cos + turned * sin

    backend, (x, w, *_) = Gems(), operands(torch.bfloat16, columns=64)
    cos, sin = torch.randn(2, 1, 16, device=DEVICE).bfloat16()
    with torch.no_grad():
        got = torch.compile(fn, backend=backend, fullgraph=True)(x, w, cos, sin)
        exact = fn(*(t.double() for t in (x, w, cos, sin)))
    (report,) = backend.reports
    assert (report.launches, report.aten_calls) == (2, 0), report.aten
    assert_as_accurate([got], [fn(x, w, cos, sin)], [exact], torch.bfloat16)


def rotations(frequencies: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    angles = (frequencies @ positions).transpose(-1, -2)
    angles = torch.cat((angles, angles), -1)
    return angles.cos(), angles.sin()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("batch", [(), (3,)], ids=str)
def test_sums_of_one_term(batch, dynamic, dtype):
    backend = Gems()
    compiled = torch.compile(rotations, backend=backend, dynamic=dynamic, fullgraph=True)
    for rows, columns in ((6, 33), (9, 17)):
        column = torch.randn(*batch, rows, 1, device=DEVICE, dtype=dtype)
        row = torch.randn(*batch, 1, columns, device=DEVICE, dtype=dtype)
        got = compiled(column, row)
        exact = rotations(column.double(), row.double())
        assert_as_accurate(got, rotations(column, row), exact, dtype)
    report = backend.reports[-1]
    assert (report.launches, report.aten_calls) == (1, 0), report.aten


def test_products_of_one_term_are_rounded_as_eager_rounds_them():
    column, row = torch.randn(70, 1, device=DEVICE), torch.randn(1, 90, device=DEVICE)
    got = torch.compile(lambda a, b: a @ b, backend="gems")(column, row)
    assert torch.equal(got, column @ row) and got.stride() == (90, 1)


@pytest.mark.parametrize(
    ("column", "row"),
    [
        (torch.randn(6, 2), torch.randn(2, 9)),
        (torch.randn(12, 1)[::2], torch.randn(1, 9)),
        (torch.randn(6, 1), torch.randn(1, 18)[:, ::2]),
        (torch.arange(6)[:, None], torch.arange(9)[None]),
    ],
    ids=["two terms", "a column with gaps", "a row with gaps", "integers"],
)
def test_what_stays_a_product_of_matrices(column, row):
    if DEVICE != "cpu" and not column.is_floating_point():
        pytest.skip("eager has no such product")
    backend, args = Gems(), (column.to(DEVICE), row.to(DEVICE))
    if not column.is_contiguous():  # a copy would have no gaps
        args = (args[0].repeat_interleave(2, 0)[::2], args[1])
    if not row.is_contiguous():
        args = (args[0], args[1].repeat_interleave(2, 1)[:, ::2])
    got = torch.compile(lambda a, b: (a @ b) * 2, backend=backend, fullgraph=True)(*args)
    torch.testing.assert_close(got, (args[0] @ args[1]) * 2)
    assert "aten.mm.default: no kernel is declared for it" in backend.reports[0].aten
