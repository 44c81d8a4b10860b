"""Convolutions of one tap, in channels-last, are matrix products; so are gradients of those that
stride."""

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


class Shortcut(nn.Module):
    """A block whose shortcut strides, behind a batch norm."""

    def __init__(self, stride: int | tuple[int, int]) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(16)
        self.deep = nn.Conv2d(16, 32, 3, stride=stride, padding=1, bias=False)
        self.shortcut = nn.Conv2d(16, 32, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(x))
        return self.deep(x) * 2 + self.shortcut(x)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    ("stride", "size"), [(2, (6, 8)), (2, (7, 9)), (3, (8, 7)), ((1, 2), (5, 6)), ((3, 1), (4, 3))]
)
def test_gradients_of_what_strides(stride, size, dynamic):
    """A product, whose pixels the kernel that adds it up reads between zeros."""
    torch.manual_seed(0)
    module = Shortcut(stride).to(DEVICE, torch.bfloat16, memory_format=torch.channels_last)
    x = torch.randn(4, 16, *size, device=DEVICE, dtype=torch.bfloat16)
    x = x.contiguous(memory_format=torch.channels_last)
    backend = Gems()
    compiled = torch.compile(module, backend=backend, dynamic=dynamic)

    def step(program, x: Tensor) -> list[Tensor]:
        if dynamic:
            torch._dynamo.mark_static(x, [2, 3])
        y = program(x.requires_grad_())
        weights = torch.linspace(-1, 1, y.numel(), device=DEVICE).view(y.shape)
        wanted = [x, *module.parameters()]
        return list(torch.autograd.grad((y.double() * weights).sum(), wanted))

    got, wanted = step(compiled, x.clone()), step(module, x.clone())
    module.double()
    for a, b, best in zip(got, wanted, step(module, x.double()), strict=True):
        assert a.stride() == b.stride()
        assert error(a, best) <= 1.5 * error(b, best) + 2e-3
    backward = backend.reports[-1]
    assert (called(backend, "mm"), called(backend, "convolution_backward")) == (1, 2)
    assert not any("constant_pad" in op or "slice" in op for op in backward.aten)


def test_zeros_between_windows_are_zeros():
    """A gradient that is no number stays at its pixel. (cuDNN multiplies the zeros beside it.)"""
    torch.manual_seed(0)
    module = nn.Conv2d(8, 16, 1, stride=2, bias=False)
    module = module.to(DEVICE, torch.bfloat16, memory_format=torch.channels_last)
    x = torch.randn(2, 8, 5, 6, device=DEVICE, dtype=torch.bfloat16)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    backend = Gems()
    y = torch.compile(lambda x: module(x * 2), backend=backend)(x)
    weights = torch.ones_like(y)
    weights[0, 0, 0, 0] = float("inf")
    (got,) = torch.autograd.grad(y, x, weights)
    assert called(backend, "mm") == 1
    between = torch.ones(5, 6, dtype=torch.bool, device=DEVICE)
    between[::2, ::2] = False
    assert bool((got[:, :, between] == 0).all())
    assert not got[0, :, 0, 0].isfinite().any()
    pixels = got[:, :, ~between].double()
    wanted = 2 * module.weight[:, :, 0, 0].double().sum(0)
    torch.testing.assert_close(pixels[1], wanted[:, None].expand(8, 9), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(pixels[0, :, 1:], wanted[:, None].expand(8, 8), rtol=1e-2, atol=1e-2)
