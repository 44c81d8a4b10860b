"""Convolutions of one tap, in channels-last, are matrix products."""

from __future__ import annotations

import pytest
import torch
from helpers import DEVICE, gems_only
from torch import Tensor, nn

from gems_compile.backend import Gems
from gems_compile.lowering import pointwise_convolutions

pytestmark = gems_only


@pytest.fixture(autouse=True)
def everywhere(monkeypatch):
    monkeypatch.setattr(pointwise_convolutions, "DEVICES", {"cpu", "cuda"})


class Bottleneck(nn.Module):
    """Two convolutions of one tap around one of nine, and a shortcut that strides."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.narrow = nn.Conv2d(16, 8, 1, bias=bias)
        self.deep = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.wide = nn.Conv2d(8, 32, 1, bias=bias)
        self.shortcut = nn.Conv2d(16, 32, 1, stride=1, bias=False)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm(self.narrow(x)))
        y = self.wide(torch.relu(self.deep(y)))
        return torch.relu(y + self.shortcut(x)) * 2


def made(bias: bool = False, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    torch.manual_seed(0)
    return Bottleneck(bias).to(DEVICE, dtype, memory_format=torch.channels_last)


def images(batch: int = 3, dtype: torch.dtype = torch.bfloat16, grad: bool = False) -> Tensor:
    x = torch.randn(batch, 16, 6, 5, device=DEVICE, dtype=dtype)
    return x.contiguous(memory_format=torch.channels_last).requires_grad_(grad)


def called(backend: Gems, op: str) -> int:
    """How many calls of an ATen op the functions make; of products, also those of cuBLAS."""
    runs = [run for report in backend.reports for run in report.runs]
    natively = sum(launch.name == op for run in runs for launch in run.launches)
    return natively + sum(
        report.wrapper.count(f"{name}(")
        for report in backend.reports
        for name, what in report.constants.items()
        if what.startswith(f"aten.{op}.")
    )


def error(got: Tensor, exact: Tensor) -> float:
    return ((got.double() - exact).norm() / exact.norm()).item()


def test_inference():
    backend, module, x = Gems(), made().eval(), images()
    with torch.no_grad():
        got, wanted = torch.compile(module, backend=backend)(x), module(x)
        exact = made(dtype=torch.bfloat16).eval().double()(x.double())
    assert (called(backend, "mm"), called(backend, "convolution")) == (3, 1)
    assert got.stride() == wanted.stride()
    assert error(got, exact) <= 1.2 * error(wanted, exact)


@pytest.mark.parametrize("of_input", [False, True])
def test_training(of_input):
    backend, module, plain = Gems(), made(), made()
    exact = made().double()
    seen = []
    for one, dtype in (
        (torch.compile(module, backend=backend), torch.bfloat16),
        (plain, torch.bfloat16),
        (exact, torch.float64),
    ):
        torch.manual_seed(1)
        x = images().to(dtype).detach().requires_grad_(of_input)
        one(x).square().sum().backward()
        owner = {0: module, 1: plain, 2: exact}[len(seen)]
        grads = [p.grad for p in owner.parameters()] + ([x.grad] if of_input else [])
        seen.append(grads)
    products = 2 * 3 + (3 if of_input else 1)
    assert called(backend, "mm") == products, backend.reports[-1].wrapper
    assert called(backend, "convolution") == called(backend, "convolution_backward") == 1
    for got, wanted, best in zip(*seen, strict=True):
        assert got.stride() == wanted.stride()
        assert error(got, best) <= 1.2 * error(wanted, best) + 1e-3


def test_batches_of_every_size():
    backend, module = Gems(), made().eval()
    compiled = torch.compile(module, backend=backend, dynamic=True)
    with torch.no_grad():
        for batch in (3, 5, 7):
            x = images(batch)
            torch.testing.assert_close(compiled(x), module(x), rtol=2e-2, atol=2e-2)
    assert len(backend.reports) == 1 and called(backend, "mm") == 3


@pytest.mark.parametrize(
    ("change", "products"),
    [
        ("contiguous", 0),  # pixels of a channel lie together
        ("float32", 0),
        ("strided", 2),
        ("padded", 2),
        ("grouped", 2),
    ],
)
def test_what_stays_a_convolution(change, products):
    module, x = made().eval(), images()
    if change == "contiguous":
        module, x = made().eval().to(memory_format=torch.contiguous_format), x.contiguous()
    elif change == "float32":
        module, x = module.float(), x.float()
    elif change == "strided":
        module.narrow.stride = module.shortcut.stride = (2, 2)
        products = 1
    elif change == "padded":
        module.narrow.padding = module.shortcut.padding = (1, 1)
        products = 1
    else:
        module.shortcut = nn.Conv2d(16, 32, 1, groups=2, bias=False)
        module.to(DEVICE, torch.bfloat16, memory_format=torch.channels_last).eval()
    backend = Gems()
    with torch.no_grad():
        got = torch.compile(module, backend=backend, options={"layout": "keep"})(x)
    torch.testing.assert_close(got, module(x), rtol=2e-2, atol=2e-2)
    assert called(backend, "mm") == products
    assert called(backend, "convolution") == 4 - products


def test_images_of_one_pixel_and_none():
    for shape in ((2, 16, 1, 1), (0, 16, 4, 4), (1, 16, 3, 1)):
        torch._dynamo.reset()
        module, backend = made().eval(), Gems()
        x = torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)
        x = x.contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            got, wanted = torch.compile(module, backend=backend)(x), module(x)
        torch.testing.assert_close(got, wanted, rtol=2e-2, atol=2e-2)
