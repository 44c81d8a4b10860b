"""Convolutions of images: patches as matrix products, windows as kernels of our own."""

from __future__ import annotations

import pytest
import torch
from helpers import DEVICE, gems_only
from machine_code import assembly
from opcheck import trace
from torch import Tensor, nn

from gems_compile.backend import Gems
from gems_compile.kernels.target import compile_target
from gems_compile.lowering import image_kernels, images
from gems_compile.lowering.convolutions import were_measured
from gems_compile.lowering.whole import WHOLE

pytestmark = gems_only
BFLOAT16, HALF = torch.bfloat16, torch.float16


@pytest.fixture(autouse=True)
def everywhere(monkeypatch):
    monkeypatch.setattr(images, "were_measured", lambda target: True)


#: (channels read, channels written, how, image)
OVERLAP = {
    "resnet": (3, 64, dict(kernel_size=7, stride=2, padding=3), (20, 18)),
    "vgg": (3, 16, dict(kernel_size=3, padding=1), (9, 9)),
    "efficientnet": (3, 40, dict(kernel_size=3, stride=2, padding=1), (12, 11)),
    "latent": (4, 160, dict(kernel_size=3, padding=1), (8, 8)),
    "grey": (1, 8, dict(kernel_size=5, stride=(1, 3), padding=(0, 2)), (11, 9)),
    "inception": (2, 24, dict(kernel_size=3, stride=2), (10, 13)),
    "gaps": (3, 16, dict(kernel_size=2, stride=3), (10, 12)),
    "tall": (3, 16, dict(kernel_size=(9, 1), padding=(4, 0)), (9, 5)),
}
PATCHES = {
    "vit": (3, 48, dict(kernel_size=8, stride=8), (24, 16)),
    "convnext": (3, 24, dict(kernel_size=4, stride=4), (16, 12)),
    "edges": (4, 16, dict(kernel_size=(3, 5), stride=(3, 5)), (11, 13)),
    "one": (1, 16, dict(kernel_size=4, stride=4), (4, 4)),
}


def made(
    kind: str, dtype: torch.dtype, layout: torch.memory_format, bias: bool = False
) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    read, written, how, size = {**OVERLAP, **PATCHES}[kind]
    conv = nn.Conv2d(read, written, bias=bias, **how)
    module = nn.Sequential(conv, nn.ReLU())
    x = torch.randn(3, read, *size, device=DEVICE, dtype=dtype)
    module = module.to(DEVICE, dtype).to(memory_format=layout)
    return module, x.contiguous(memory_format=layout)


def step(program, module: nn.Module, x: Tensor, of_images: bool) -> list[Tensor]:
    """The result, and gradients of all that asks for one."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_(of_images)
    y = program(x)
    weights = torch.linspace(-1, 1, y.numel(), device=DEVICE, dtype=torch.float64).view(y.shape)
    wanted = [*module.parameters(), *([x] if of_images else [])]
    return [y, *torch.autograd.grad((y.double() * weights).sum(), wanted)]


def error(got: Tensor, exact: Tensor) -> float:
    return ((got.double() - exact).norm() / exact.norm()).item()


def assert_as_good(
    got: list[Tensor], wanted: list[Tensor], exact: list[Tensor], most: float = 1.2
) -> None:
    for a, b, c in zip(got, wanted, exact, strict=True):
        strides = zip(a.shape, a.stride(), b.stride(), strict=True)
        assert a.dtype == b.dtype and all(n == 1 or s == t for n, s, t in strides)
        assert error(a, c) <= most * error(b, c) + 1e-6


def whole_kernels(backend: Gems) -> list[str]:
    names = [source.name for report in backend.reports for source in report.sources]
    return [name for name in names if name.startswith("image_")]


@pytest.mark.parametrize("dtype", [BFLOAT16, HALF], ids=str)
@pytest.mark.parametrize("kind", OVERLAP)
def test_windows_that_overlap(kind, dtype):
    module, x = made(kind, dtype, torch.channels_last)
    backend = Gems()
    got = step(torch.compile(module, backend=backend, fullgraph=True), module, x, False)
    wanted = step(module, module, x, False)
    module.double()
    exact = step(module, module, x.double(), False)
    assert whole_kernels(backend) == ["image_convolution", "image_weight_parts"]
    left = {op.split(":")[0] for report in backend.reports for op in report.aten}
    assert left <= {"aten.relu.default", "aten.clone.default"}
    assert_as_good(got, wanted, exact)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("of_images", [False, True])
@pytest.mark.parametrize("kind", PATCHES)
def test_windows_side_by_side(kind, of_images, layout):
    module, x = made(kind, BFLOAT16, layout)
    backend = Gems()
    got = step(torch.compile(module, backend=backend, fullgraph=True), module, x, of_images)
    wanted = step(module, module, x, of_images)
    module.double()
    exact = step(module, module, x.double(), of_images)
    assert not any("convolution" in op for report in backend.reports for op in report.aten)
    assert_as_good(got, wanted, exact)


@pytest.mark.parametrize("kind", ["resnet", "vit", "convnext"])
def test_biases(kind):
    """Added to the rounded result, as on a GPU; a CPU's eager mode rounds once."""
    layout = torch.contiguous_format if kind == "vit" else torch.channels_last
    module, x = made(kind, BFLOAT16, layout, bias=True)
    backend = Gems()
    got = step(torch.compile(module, backend=backend, fullgraph=True), module, x, False)
    wanted = step(module, module, x, False)
    module.double()
    assert_as_good(got, wanted, step(module, module, x.double(), False), 1.5)
    assert not any("convolution" in op for report in backend.reports for op in report.aten)


def test_gradients_of_images_are_the_library_s():
    module, x = made("resnet", BFLOAT16, torch.channels_last)
    backend = Gems()
    got = step(torch.compile(module, backend=backend), module, x, True)
    for a, b in zip(got, step(module, module, x, True), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)
    assert whole_kernels(backend) == ["image_convolution"]


@pytest.mark.parametrize("kind", ["resnet", "convnext"])
def test_batches_of_every_size(kind):
    module, _ = made(kind, BFLOAT16, torch.channels_last)
    backend = Gems()
    compiled = torch.compile(module, backend=backend, dynamic=True)

    def of_one_size(x: Tensor) -> Tensor:
        torch._dynamo.mark_static(x, [2, 3])
        return compiled(x)

    for batch in (2, 5, 9):
        x = torch.randn(batch, 3, 20, 24, device=DEVICE, dtype=BFLOAT16)
        x = x.contiguous(memory_format=torch.channels_last)
        got, wanted = step(of_one_size, module, x, False), step(module, module, x, False)
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)
    assert not any("convolution" in op for report in backend.reports for op in report.aten)
    assert len(backend.reports) == 2


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_what_is_no_number_stays_where_windows_reach(value):
    """What a row of a window holds beyond its last tap is not multiplied by zero."""
    for kind in ("resnet", "vgg", "tall"):
        torch._dynamo.reset()
        module, x = made(kind, BFLOAT16, torch.channels_last)
        x[1, 0, 4, 4] = value
        x[2, :, -1, -1] = value
        got = step(torch.compile(module, backend="gems"), module, x, False)
        module.double()
        for a, b in zip(got, step(module, module, x.double(), False), strict=True):
            finite = b.isfinite()
            assert torch.equal(a.isfinite(), finite) and not finite.all()
            assert error(a[finite], b[finite]) < 1e-2


def test_poisoned_memory_beside_the_images():
    """Images and gradients that are parts of something larger, with what is no number around."""
    module, x = made("resnet", BFLOAT16, torch.channels_last)
    whole = torch.full((5, 20, 18, 3), float("nan"), device=DEVICE, dtype=BFLOAT16)
    part = whole[1:4].permute(0, 3, 1, 2)
    part.copy_(x)
    compiled = torch.compile(module, backend="gems")
    for a, b in zip(
        step(lambda _: compiled(part), module, x, False),
        step(module, module, x, False),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    "change",
    ["float32", "many channels", "groups", "dilation", "large window", "contiguous", "one tap"],
)
def test_what_stays_a_convolution(change):
    how, read, dtype = dict(kernel_size=3, padding=1), 3, BFLOAT16
    layout = torch.channels_last
    if change == "float32":
        dtype = torch.float32
    elif change == "many channels":
        read = 8
    elif change == "groups":
        how["groups"] = 3
    elif change == "dilation":
        how["dilation"] = 2
    elif change == "large window":
        how.update(kernel_size=11, padding=5)
    elif change == "contiguous":
        layout = torch.contiguous_format
    elif change == "one tap":
        how.update(kernel_size=1, padding=0)
    torch.manual_seed(0)
    module = nn.Conv2d(read, 6, bias=False, **how).to(DEVICE, dtype).to(memory_format=layout)
    x = torch.randn(2, read, 13, 12, device=DEVICE, dtype=dtype).contiguous(memory_format=layout)
    backend = Gems()
    with torch.no_grad():
        got = torch.compile(module, backend=backend, options={"layout": "keep"})(x)
        torch.testing.assert_close(got, module(x), rtol=2e-2, atol=2e-2)
    assert whole_kernels(backend) == []


@pytest.mark.parametrize(
    ("target", "measured"),
    [(("nvidia", 90), True), (("nvidia", 75), False), (("amd", "gfx942"), False)],
)
def test_targets_that_were_measured(target, measured, monkeypatch):
    """Elsewhere the library's convolutions stay."""
    monkeypatch.setattr(images, "were_measured", were_measured)
    conv = nn.Conv2d(3, 8, 4, stride=4, bias=False).to(BFLOAT16)
    graph = trace(
        lambda x, w: torch.ops.aten.convolution.default(
            x, w, None, [4, 4], [0, 0], [1, 1], False, [0, 0], 1
        ),
        torch.empty(2, 3, 8, 8, dtype=BFLOAT16),
        conv.weight.detach(),
    )
    assert images.take_images(graph, compile_target(*target)) == measured


def test_images_that_already_have_their_frame():
    """Four channels, no padding, whole lines: nothing is copied."""
    torch.manual_seed(0)
    module = nn.Conv2d(4, 16, 4, stride=2, bias=False).to(DEVICE, BFLOAT16)
    module = module.to(memory_format=torch.channels_last)
    x = torch.randn(2, 4, 10, 12, device=DEVICE, dtype=BFLOAT16)
    x = x.contiguous(memory_format=torch.channels_last)
    backend = Gems()
    with torch.no_grad():
        got = torch.compile(module, backend=backend)(x)
        torch.testing.assert_close(got, module(x), rtol=2e-2, atol=2e-2)
    assert [s.name for s in backend.reports[0].sources] == ["image_convolution"]
    assert (backend.reports[0].launches, backend.reports[0].aten_calls) == (1, 0)


def test_places_beyond_32_bits(monkeypatch):
    """Tensors whose places 32 bits do not count, as far as a small machine can tell."""
    monkeypatch.setattr(image_kernels, "NARROW", 100)
    module, x = made("resnet", BFLOAT16, torch.channels_last)
    backend = Gems()
    got = step(torch.compile(module, backend=backend), module, x, False)
    for a, b in zip(got, step(module, module, x, False), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)
    texts = [s.text for r in backend.reports for s in r.sources if s.name.startswith("image_")]
    assert len(texts) == 2 and all("tl.program_id(0).to(tl.int64)" in text for text in texts)


def test_a_kernel_that_fails(monkeypatch):
    """The op runs as ATen, with a warning, and gives the same numbers."""

    def fail(value, target):
        raise RuntimeError("no such instruction")

    monkeypatch.setenv("GEMS_STRICT", "0")
    for name, kernel in list(WHOLE.items()):
        monkeypatch.setitem(WHOLE, name, kernel._replace(write=fail))
    module, x = made("resnet", BFLOAT16, torch.channels_last)
    backend = Gems()
    got = step(torch.compile(module, backend=backend), module, x, False)
    for a, b in zip(got, step(module, module, x, False), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)
    failures = [why for report in backend.reports for why in report.failures]
    assert len(failures) == 2 and all("no such instruction" in why for why in failures)


@pytest.mark.parametrize("arch", [80, 86, 90])
def test_machine_code(arch, tmp_path, monkeypatch):
    """Both kernels are made of matrix instructions, and fit on every target."""
    module, x = made("resnet", BFLOAT16, torch.channels_last)
    target = compile_target("nvidia", arch)
    seen = []
    for name, kernel in list(WHOLE.items()):
        noted = lambda v, t, w=kernel.write: seen.append((w, v)) or w(v, t)  # noqa: E731
        monkeypatch.setitem(WHOLE, name, kernel._replace(write=noted))
    backend = Gems()
    step(torch.compile(module, backend=backend), module, x, False)
    for write, value in seen:
        source = write(value, target)
        source.meta.update(exact=False, unaligned=[])
        text = assembly(source, tmp_path, arch=arch)
        assert "mma" in text and source.waits == (arch >= 90)
