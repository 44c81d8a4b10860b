"""Products with odd rows are written and read padded; numbers and layouts are eager's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE, gems_only
from torch import Tensor, nn

import gems_compile
from gems_compile.kernels.product import padded
from gems_compile.lowering import products as lowering

pytestmark = gems_only
ODD = 53


@pytest.fixture(autouse=True)
def _small_products_too(monkeypatch: Any) -> None:
    monkeypatch.setattr(lowering, "LEAST", 1)


class Head(nn.Module):
    """A language model without layers."""

    def __init__(self, vocabulary: int, bias: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, 16)
        self.head = nn.Linear(16, vocabulary, bias=bias)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.head(F.gelu(self.embedding(ids)))
        loss = F.cross_entropy(logits.flatten(0, 1).float(), ids.flatten())
        return loss, logits


def products(kind: str) -> list[Any]:
    """The layouts of what the products of the last graph of this kind read and wrote."""
    report = [r for r in gems_compile.reports() if r.kind == kind][-1]
    nodes = [n for n in report.plan.aten if "product" in str(n.target) or ".mm." in str(n.target)]
    values = [v.meta["val"] for n in nodes for v in (n, *n.all_input_nodes)]
    return [v for v in values if ODD in v.shape and v.ndim == 2]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_and_their_gradient_have_padded_rows(bias: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Head(ODD, bias).to(DEVICE, dtype)
    ids = torch.randint(0, ODD, (4, 8), device=DEVICE)
    results = []
    for run in (model, torch.compile(model, backend="gems")):
        model.zero_grad()
        loss, logits = run(ids)
        loss.backward()
        results.append([loss, logits, *(p.grad for p in model.parameters())])
    tight = dict(atol=1e-5, rtol=2 * torch.finfo(dtype).eps)
    for found, wanted in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found, wanted, **tight)
        assert found.stride() == wanted.stride()
    # an addend would be rounded twice: its product stays as it is
    assert ("gems.product.default" in str(gems_compile.reports()[-2].aten)) is not bias
    # the weight is [53, 16]: its rows are aligned as they are
    odd = [v.stride() for v in products("backward") if v.shape[0] * v.shape[1] == 32 * ODD]
    assert sorted(odd) == [(1, 56), (56, 1)]


def test_inference_and_a_batch_that_varies() -> None:
    torch.manual_seed(0)
    model = Head(ODD, False).to(DEVICE, torch.bfloat16).eval()
    compiled = torch.compile(model, backend="gems", dynamic=True)
    with torch.no_grad():
        for batch in (4, 7, 2):
            ids = torch.randint(0, ODD, (batch, 8), device=DEVICE)
            found, wanted = compiled(ids)[1], model(ids)[1]
            torch.testing.assert_close(found, wanted, atol=1e-2, rtol=1e-2)
            assert found.is_contiguous()
    assert len(gems_compile.reports()) == 1
    assert "gems.product.default" in str(gems_compile.reports()[-1].aten)


def _tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def _two_leave(a: Tensor, b: Tensor) -> Any:
    c = a @ b
    return c, c.t(), c.exp()


def _flattened(a: Tensor, b: Tensor) -> Any:
    return (a @ b).view(-1).exp()


def _written(a: Tensor, b: Tensor) -> Any:
    c = a @ b
    c[:, :3].relu_()
    return c * 2, c.mean()


@pytest.mark.parametrize("fn", [_two_leave, _flattened, _written])
def test_whatever_shares_the_memory(fn: Callable[..., Any]) -> None:
    """Views that padded rows do not have, results that share memory: as in eager mode."""
    torch.manual_seed(0)
    a = torch.randn(24, 16, device=DEVICE).bfloat16()
    b = torch.randn(16, ODD, device=DEVICE).bfloat16()
    found, wanted = torch.compile(fn, backend="gems")(a, b), fn(a, b)
    for x, y in zip(*map(_tensors, (found, wanted)), strict=True):
        torch.testing.assert_close(x, y, atol=2e-2, rtol=2e-2)
        assert x.stride() == y.stride()
    if fn is _two_leave:
        assert found[0].data_ptr() == found[1].data_ptr()


@pytest.mark.parametrize(("size", "dtype"), [(56, torch.bfloat16), (ODD, torch.float32)])
def test_aligned_rows_and_wide_numbers_are_left(size: int, dtype: torch.dtype) -> None:
    a, b = (torch.randn(s, device=DEVICE, dtype=dtype) for s in ((24, 16), (16, size)))
    torch.compile(lambda a, b: (a @ b).exp(), backend="gems")(a, b)
    assert "gems.product" not in str(gems_compile.reports()[-1].aten)


def test_small_products_are_left(monkeypatch: Any) -> None:
    monkeypatch.setattr(lowering, "LEAST", 24 * 16 * ODD + 1)
    a = torch.randn(24, 16, device=DEVICE).bfloat16()
    b = torch.randn(16, ODD, device=DEVICE).bfloat16()
    torch.compile(lambda a, b: (a @ b).exp(), backend="gems")(a, b)
    assert "gems.product" not in str(gems_compile.reports()[-1].aten)


@pytest.mark.parametrize("transposed", ["", "a", "b", "ab"])
@pytest.mark.parametrize(
    "size", [(24, 16, 53), (53, 16, 24), (24, 1029, 16), (35, 521, 13), (3, 5, 1)]
)
def test_a_product_without_its_odd_ends(size: Any, transposed: str) -> None:
    """Rounded once."""
    rows, terms, columns = size
    a, b = (torch.randn(s, device=DEVICE).bfloat16() for s in ((rows, terms), (terms, columns)))
    a = a.t().contiguous().t() if "a" in transposed else a
    b = b.t().contiguous().t() if "b" in transposed else b
    found = torch.ops.gems.product(a, b, padded(columns, 2))
    assert found.stride() == (padded(columns, 2), 1)
    wanted = a.double() @ b.double()
    torch.testing.assert_close(found.double(), wanted, atol=1e-4, rtol=2**-8)


def test_long_rows_are_padded_to_cache_lines() -> None:
    assert padded(50257, 2) == 50304
    assert padded(53, 2) == 56
    assert padded(56, 2) == 56


def _side_by_side(x: Tensor, v: Tensor, w: Tensor) -> Any:
    return torch.cat([x @ v, x @ w], -1)


def _in_three_dims(x: Tensor, v: Tensor, w: Tensor) -> Any:
    x = x.view(3, -1, 16)
    return torch.cat([F.linear(x, v.t()), F.linear(x, w.t())], 2)


def _one_over_the_other(x: Tensor, v: Tensor, w: Tensor) -> Any:
    return torch.cat([x @ w, x.exp() @ w, (x * 2) @ w])


def _stacked(x: Tensor, v: Tensor, w: Tensor) -> Any:
    return torch.stack([x @ v, x.exp() @ v]), torch.stack([x @ w, x.exp() @ w], 1)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    ("fn", "calls", "launches"),
    [
        (_side_by_side, 1, 0),
        (_in_three_dims, 1, 0),
        (_one_over_the_other, 1, 1),  # exp(x) and x * 2
        (_stacked, 3, 0),  # exp(x) is ATen's
    ],
)
def test_products_write_their_parts(
    fn: Callable[..., Any], calls: int, launches: int, dynamic: bool
) -> None:
    """Of a concatenation that ATen or the caller reads: no kernel copies what they are."""
    torch.manual_seed(0)
    v, w = (torch.randn(16, n, device=DEVICE).bfloat16() for n in (16, 24))
    compiled = torch.compile(fn, backend="gems")
    for rows in (12, 24) if dynamic else (12,):
        x = torch.randn(rows, 16, device=DEVICE).bfloat16()
        if dynamic:
            torch._dynamo.mark_dynamic(x, 0)
        found, wanted = compiled(x, v, w), fn(x, v, w)
        for a, b in zip(*map(_tensors, (found, wanted)), strict=True):
            torch.testing.assert_close(a, b, atol=1e-2, rtol=1e-2)
            assert a.stride() == b.stride()
    report = gems_compile.reports()[-1]
    assert report.launches == launches, report.wrapper
    assert report.aten_calls == calls, report.aten


def _read_by_a_kernel(x: Tensor, v: Tensor, w: Tensor) -> Any:
    return torch.cat([x @ v, x @ w], -1).exp()


def _part_read_elsewhere(x: Tensor, v: Tensor, w: Tensor) -> Any:
    part = x @ v
    return torch.cat([part, x @ w], -1), part.sum()


def _operand_written(x: Tensor, v: Tensor, w: Tensor) -> Any:
    part = x @ v
    v.zero_()
    return torch.cat([part, x @ w], -1)


def _mixed(x: Tensor, v: Tensor, w: Tensor) -> Any:
    return torch.cat([x @ v, x], -1)


def _blocks_of_rows(x: Tensor, v: Tensor, w: Tensor) -> Any:
    return torch.cat([(x @ w).view(3, 4, 24), (x.exp() @ w).view(3, 4, 24)], 1)


@pytest.mark.parametrize(
    "fn", [_read_by_a_kernel, _part_read_elsewhere, _operand_written, _mixed, _blocks_of_rows]
)
def test_what_stays_a_concatenation(fn: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    x, v, w = (torch.randn(s, device=DEVICE).bfloat16() for s in ((12, 16), (16, 16), (16, 24)))
    found, wanted = torch.compile(fn, backend="gems")(x, v.clone(), w), fn(x, v.clone(), w)
    for a, b in zip(*map(_tensors, (found, wanted)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-2, rtol=1e-2)
    assert "joined_products" not in str(gems_compile.reports()[-1].aten)
