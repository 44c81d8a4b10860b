"""Products of one row, which a step of decoding is made of, are reductions of our own."""

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
