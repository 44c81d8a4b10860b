"""Max pooling: values, places within windows, gradients, and what training saves for them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE, gems_only
from torch import Tensor, nn

from gems_compile.backend import Gems

pytestmark = gems_only
KINDS = {
    "resnet": dict(kernel_size=3, stride=2, padding=1),
    "vgg": dict(kernel_size=2),
    "uneven": dict(kernel_size=(3, 2), stride=(1, 2), padding=(1, 0)),
    "ceil": dict(kernel_size=(2, 3), stride=(3, 1), padding=1, ceil_mode=True),
    "apart": dict(kernel_size=2, stride=3),
}


def images(kind: str, channels_last: bool, grad: bool = True) -> Tensor:
    """Small whole numbers, so that windows have several equal maxima; and what is no number."""
    x = torch.randint(-2, 3, (2, 4, 9, 8), device=DEVICE).float()
    if kind == "odd":
        x[x < 1] = float("-inf")
        x[0, 0, 3, 3] = float("nan")
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    return x.requires_grad_(grad)


def compare(program, x: Tensor, backend: Gems) -> None:
    other = x.detach().clone(memory_format=torch.preserve_format).requires_grad_(x.requires_grad)
    got, wanted = torch.compile(program, backend=backend, fullgraph=True)(x), program(other)
    torch.testing.assert_close(got, wanted, equal_nan=True)
    assert got.stride() == wanted.stride()
    if x.requires_grad:
        weights = torch.arange(got.numel(), device=DEVICE).sin().view_as(got)
        found, right = (
            torch.autograd.grad((y * weights).sum(), z)[0] for y, z in ((got, x), (wanted, other))
        )
        assert found.stride() == right.stride()
        if other.is_cuda and other.is_contiguous(memory_format=torch.channels_last):
            # ATen's kernel gives the gradient of a window of -inf alone to the image's first pixel
            other = other.detach().contiguous().requires_grad_()
            (right,) = torch.autograd.grad((program(other) * weights).sum(), other)
        torch.testing.assert_close(found, right, equal_nan=True)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("values", ["ties", "odd"])
@pytest.mark.parametrize("kind", KINDS)
def test_as_in_eager_mode(kind, values, channels_last):
    backend = Gems()
    compare(lambda x: F.max_pool2d(x, **KINDS[kind]), images(values, channels_last), backend)
    assert not any("max_pool" in key for report in backend.reports for key in report.aten)


@pytest.mark.parametrize("kind", KINDS)
def test_inference_makes_no_places(kind):
    backend = Gems()
    x = images("ties", False, grad=False)
    compare(lambda x: F.max_pool2d(x, **KINDS[kind]).relu(), x, backend)
    (report,) = backend.reports
    assert (report.launches, report.aten_calls) == (1, 0)
    assert not any(
        v.dtype == "int8"
        for source in report.sources
        for _, _, v in source.params
        if hasattr(v, "dtype")
    )


@pytest.mark.parametrize("cheap", [True, False])
@pytest.mark.parametrize("grad", [False, True])
def test_what_is_pooled_is_not_padded_in_memory(grad, cheap):
    """A ResNet's stem: recomputed for each window that it lies in, or stored, and that once."""
    scale, shift = torch.randint(1, 5, (2, 4, 1, 1), device=DEVICE).float()

    def stem(x: Tensor) -> Tensor:
        y = torch.relu(x * scale + shift) if cheap else (x * scale).tanh().exp() + shift
        return F.max_pool2d(y, **KINDS["resnet"])

    backend = Gems()
    compare(stem, images("ties", True, grad), backend)
    sources = backend.reports[0].sources
    sizes = [v.shape[-2:] for s in sources for _, role, v in s.params if role == "out"]
    assert sorted(sizes) == [(5, 4)] * (1 + grad) + [(9, 8)] * (not cheap)


def test_what_training_saves():
    """A byte a window; the tensor that was pooled only where something else asks for it."""
    backend = Gems()
    compiled = torch.compile(lambda x: F.max_pool2d(x * 2, 3, 2, 1), backend=backend)
    x = images("ties", False)
    y = compiled(x)
    saved = [t for t in y.grad_fn.saved_tensors if isinstance(t, Tensor)]
    assert {t.dtype for t in saved} == {torch.int8} and sum(map(Tensor.numel, saved)) == y.numel()


def test_half_precision_adds_in_float32():
    x = images("ties", True).detach().bfloat16().requires_grad_()
    y = torch.compile(lambda x: F.max_pool2d(x, 3, 1, 1), backend="gems")(x)
    weights = torch.arange(y.numel(), device=DEVICE).sin().view_as(y).bfloat16()
    (got,) = torch.autograd.grad(y, x, weights)
    exact = x.detach().double().requires_grad_()
    (right,) = torch.autograd.grad(F.max_pool2d(exact, 3, 1, 1), exact, weights.double())
    assert torch.equal(got, right.bfloat16())


@pytest.mark.parametrize(
    "program",
    [
        lambda x: F.max_pool2d(x, 3, 2, return_indices=True)[1],
        lambda x: F.max_pool2d(x, 3, 2, return_indices=True),
        lambda x: F.max_pool2d(x, 5, 2),
        lambda x: F.max_pool2d(x, 2, dilation=2),
    ],
    ids=["indices", "both", "many elements", "gaps"],
)
def test_what_stays_atens(program):
    backend, x = Gems(), images("ties", False, grad=False)
    got = torch.compile(program, backend=backend, fullgraph=True)(x)
    torch.testing.assert_close(got, program(x))
    assert any("max_pool2d_with_indices" in key for key in backend.reports[0].aten)


def test_a_network():
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.Conv2d(8, 4, 3)
    ).to(DEVICE)
    backend, x = Gems(), images("ties", True)
    compiled = torch.compile(module, backend=backend)
    for net in (compiled, module):
        module.zero_grad()
        net(x).square().mean().backward()
        grads = [p.grad.clone() for p in module.parameters()]
        if net is compiled:
            got = grads
    for a, b in zip(got, grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_batches_of_every_size():
    backend = Gems()
    compiled = torch.compile(lambda x: F.max_pool2d(x, 3, 2, 1) * 2, backend=backend)
    for batch in (2, 3, 5):
        x = torch.randn(batch, 4, 9, 8, device=DEVICE)
        torch._dynamo.mark_dynamic(x, 0)
        torch.testing.assert_close(compiled(x), F.max_pool2d(x, 3, 2, 1) * 2)
    assert len(backend.reports) == 1
