"""Grouped-query attention: keys and values that are not repeated for every query head."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE, gems_only
from test_rewrites import assert_as_accurate
from torch import Tensor

from gems_compile.backend import Gems
from gems_compile.lowering import grouped

pytestmark = gems_only
DTYPE = torch.float32 if DEVICE == "cpu" else torch.bfloat16
HEADS, GROUPS = 4, 2


@pytest.fixture(autouse=True)
def fast_kernels(monkeypatch):
    """What a GPU says of 16-bit operands; only there can torch be asked."""
    if DEVICE == "cpu":
        monkeypatch.setattr(grouped, "_has_kernel", lambda **values: True)


def repeated(x: Tensor, times: int = HEADS // GROUPS) -> Tensor:
    """As transformers writes it."""
    batch, heads, length, width = x.shape
    x = x[:, :, None, :, :].expand(batch, heads, times, length, width)
    return x.reshape(batch, heads * times, length, width)


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, repeated(k), repeated(v), is_causal=True) * 2


def projected(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Keys and values as views with the lengths ahead of the heads, and a scale."""
    k, v = ((x * 2).transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
    k, v = (x.unsqueeze(2).expand(-1, -1, HEADS // GROUPS, -1, -1).flatten(1, 2) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=0.3)


def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = (q[:, :1, :, :1] * 0 + k[:, :1, :, 0].unsqueeze(2) > -1.0).contiguous()
    return F.scaled_dot_product_attention(q, repeated(k), repeated(v), attn_mask=mask)


def operands(length: int = 16, grad: bool = False) -> list[Tensor]:
    shapes = [(2, heads, length, 16) for heads in (HEADS, GROUPS, GROUPS)]
    return [torch.randn(s, device=DEVICE, dtype=DTYPE, requires_grad=grad) for s in shapes]


def fired(backend: Gems) -> list[str]:
    return [found.rule for found in backend.reports[0].rewrites.fired]


def copies(backend: Gems) -> list[str]:
    return [key for report in backend.reports for key in report.aten if "clone" in key]


@pytest.mark.parametrize("program", [plain, projected, masked])
@pytest.mark.parametrize("grad", [False, True])
def test_keys_are_not_repeated(program, grad):
    backend, inputs = Gems(), operands(grad=grad)
    compiled = torch.compile(program, backend=backend, fullgraph=True)
    exact = [x.detach().double().requires_grad_(grad) for x in inputs]
    got, wanted, best = compiled(*inputs), program(*inputs), program(*exact)
    if grad:
        got, wanted = ([y, *torch.autograd.grad(y.square().sum(), inputs)] for y in (got, wanted))
        best = [best, *torch.autograd.grad(best.square().sum(), exact)]
    else:
        got, wanted, best = [got], [wanted], [best]
    assert fired(backend) == ["grouped_query"] and not copies(backend)
    assert_as_accurate(got, wanted, best, DTYPE)


def test_every_length_by_one_graph():
    backend = Gems()
    compiled = torch.compile(plain, backend=backend, fullgraph=True, dynamic=True)
    for length in (12, 24, 40):
        inputs = operands(length)
        torch.testing.assert_close(compiled(*inputs), plain(*inputs), rtol=2e-2, atol=2e-2)
    assert len(backend.reports) == 1 and fired(backend) == ["grouped_query"]


def test_within_a_checkpoint():
    backend, inputs = Gems(), operands(grad=True)

    def program(*inputs: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(plain, *inputs, use_reentrant=False)

    got = torch.compile(program, backend=backend, fullgraph=True)(*inputs)
    torch.testing.assert_close(got, plain(*inputs), rtol=2e-2, atol=2e-2)
    assert fired(backend) == ["grouped_query"]


def other_dim(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (x[:, None].expand(-1, HEADS // GROUPS, -1, -1, -1).reshape(q.shape) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v)


def a_part(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (x[:, 1:][:, :, None].expand(-1, -1, HEADS, -1, -1).reshape(q.shape) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v)


def values_alone(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, torch.cat((k, k), 1), repeated(v))


@pytest.mark.parametrize(
    ("program", "fires"), [(other_dim, []), (a_part, ["grouped_query"]), (values_alone, [])]
)
def test_what_is_no_repeat_of_heads(program, fires):
    backend, inputs = Gems(), operands()
    got = torch.compile(program, backend=backend, fullgraph=True)(*inputs)
    torch.testing.assert_close(got, program(*inputs), rtol=2e-2, atol=2e-2)
    assert fired(backend) == fires


def test_a_copy_from_before_a_write_stays():
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = k + 1, v + 1
        keys, values = repeated(k), repeated(v)
        k.mul_(3)
        return F.scaled_dot_product_attention(q, keys, values) + k.sum()

    backend, inputs = Gems(), operands()
    got = torch.compile(program, backend=backend, fullgraph=True)(*inputs)
    torch.testing.assert_close(got, program(*inputs), rtol=2e-2, atol=2e-2)
    (miss,) = backend.reports[0].rewrites.near_misses
    assert "written between" in miss.reason and "scaled_dot_product" in miss.source


def test_without_a_kernel_the_copies_stay(monkeypatch):
    monkeypatch.setattr(grouped, "_has_kernel", lambda **values: False)
    backend, inputs = Gems(), operands()
    got = torch.compile(plain, backend=backend, fullgraph=True)(*inputs)
    torch.testing.assert_close(got, plain(*inputs), rtol=2e-2, atol=2e-2)
    (miss,) = backend.reports[0].rewrites.near_misses
    assert miss.reason == "torch has no kernel for groups of such operands"


def test_a_cache_that_is_written_first():
    def program(q: Tensor, k: Tensor, v: Tensor, at: Tensor, new: Tensor) -> Tensor:
        k.index_copy_(2, at, new)
        return F.scaled_dot_product_attention(q, repeated(k), repeated(v))

    backend, inputs = Gems(), operands()
    new = torch.randn(2, GROUPS, 1, 16, device=DEVICE, dtype=DTYPE)
    inputs = [*inputs, torch.tensor([3], device=DEVICE), new]
    wanted = program(*(x.clone() for x in inputs))
    got = torch.compile(program, backend=backend, fullgraph=True)(*inputs)
    torch.testing.assert_close(got, wanted, rtol=2e-2, atol=2e-2)
    assert fired(backend) == ["grouped_query"]


@pytest.mark.skipif(DEVICE == "cpu", reason="what torch chooses on a GPU")
def test_what_torch_chooses():
    for dtype, fires in ((torch.bfloat16, ["grouped_query"]), (torch.float32, [])):
        torch._dynamo.reset()
        backend, inputs = Gems(), [x.to(dtype) for x in operands()]
        torch.compile(plain, backend=backend, fullgraph=True)(*inputs)
        assert fired(backend) == fires
