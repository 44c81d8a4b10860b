"""Convolutions behind eager PyTorch: depthwise ones, those of images, and the library's."""

from __future__ import annotations

import random
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_accurate
from eagercheck import nothing_left, ours, whys  # noqa: F401
from helpers import DEVICE, FLOATS, assert_same_metadata, rand
from machine_code import assembly
from opcheck import FULL, SEED, options
from test_eager_sizes import kernels_of
from test_images import OVERLAP, PATCHES, assert_as_good, made, step
from torch import Tensor, nn

import gems_compile
from gems_compile.calls.convolutions import convolution_graph
from gems_compile.calls.one_call import compile_one
from gems_compile.config import Config
from gems_compile.kernels.target import INTERPRETER, compile_target, current_target
from gems_compile.lowering import depthwise_kernels
from gems_compile.lowering.depthwise import take_depthwise
from gems_compile.lowering.pipeline import compile_graph
from gems_compile.lowering.whole import WHOLE

aten = torch.ops.aten
FORWARD, BACKWARD = "convolution", "convolution_backward"
LAYOUTS = [torch.contiguous_format, torch.channels_last]

#: (images, window, stride, padding, dilation)
DEPTHWISE: dict[str, tuple[tuple[int, ...], tuple[int, int], Any, Any, Any]] = {
    "3x3": ((2, 5, 9, 11), (3, 3), 1, 1, 1),
    "7x7": ((1, 2, 9, 9), (7, 7), 1, 3, 1),
    "strided": ((2, 5, 9, 10), (3, 3), 2, 1, 1),
    "down": ((2, 5, 14, 11), (5, 3), (2, 1), (2, 0), (1, 2)),
    "across": ((2, 5, 14, 11), (5, 3), (1, 2), (2, 0), (2, 1)),
    "no padding": ((1, 3, 8, 7), (3, 5), 1, 0, 1),
    "more padding than window": ((2, 3, 5, 4), (3, 3), 1, 4, 1),
    "larger than the image": ((2, 3, 4, 3), (7, 5), 1, (3, 2), 1),
    "even": ((2, 3, 6, 8), (2, 4), (2, 1), (0, 1), 1),
    "one tap": ((2, 3, 6, 5), (1, 1), 1, 0, 1),
    "one pixel": ((3, 4, 3, 3), (3, 3), 1, 0, 1),
    "one channel": ((2, 1, 6, 5), (3, 3), 1, 1, 1),
    "many channels": ((2, 37, 5, 4), (3, 3), 1, 1, 1),
    "row": ((2, 3, 1, 19), (1, 4), 1, (0, 3), 1),
}


def depthwise(
    kind: str, dtype: torch.dtype, layout: torch.memory_format, bias: bool
) -> tuple[list[Tensor | None], dict[str, Any]]:
    """(images, weight, bias) and how they are convolved."""
    torch.manual_seed(0)
    size, window, *how = DEPTHWISE[kind]
    x = rand(*size, dtype=dtype).contiguous(memory_format=layout)
    weight = rand(size[1], 1, *window, dtype=dtype)
    names = dict(zip(("stride", "padding", "dilation"), how, strict=True), groups=size[1])
    return [x, weight, rand(size[1], dtype=dtype) if bias else None], names


def run(operands: list[Tensor | None], how: dict[str, Any], of_images: bool = True) -> list[Tensor]:
    """The convolution, and the gradients of its operands."""
    leaves = [t if t is None else t.detach().requires_grad_() for t in operands]
    leaves[0].requires_grad_(of_images)
    y = (F.conv1d if leaves[0].ndim == 3 else F.conv2d)(*leaves, **how)
    given = torch.linspace(-1, 1, y.numel(), device=DEVICE).view(y.shape).to(y.dtype)
    wanted = [t for t in leaves if t is not None and t.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, wanted, given)]


def check(
    operands: list[Tensor | None], how: dict[str, Any], of_images: bool = True
) -> list[Tensor]:
    """Ours are as near float64 as ATen's, laid out as those are, and came from kernels."""
    want = run(operands, how, of_images)
    exact = run([t if t is None else t.double() for t in operands], how, of_images)
    before = ours(FORWARD), ours(BACKWARD)
    with gems_compile.use_gems(only=[FORWARD, BACKWARD]):
        got = run(operands, how, of_images)
    assert ours(FORWARD) > before[0], whys(FORWARD)
    assert ours(BACKWARD) > before[1], whys(BACKWARD)
    for k, (a, b, c) in enumerate(zip(got, want, exact, strict=True)):
        assert_same_metadata(a, b, f"result {k}")
        # eager is lucky with few sums of few terms
        assert_accurate(a, b, c, f"result {k}", "tensor", least=4.0)
    return got


def some_of(*choices: Iterable[Any]) -> list[Any]:
    """Combinations, of which a day's seed takes a half."""
    every = [pytest.param(*given, id="-".join(map(str, given))) for given in product(*choices)]
    return every if FULL else random.Random(SEED).sample(every, len(every) // 2)


# depthwise ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "layout", "dtype"), some_of(DEPTHWISE, LAYOUTS, FLOATS))
def test_depthwise(kind: str, layout: torch.memory_format, dtype: torch.dtype) -> None:
    operands, how = depthwise(kind, dtype, layout, bias=dtype != torch.float16)
    check(operands, how)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("down", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", ["3x3", "strided", "down", "across"])
def test_tiles(kind: str, down: int, layout: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a large GPU's kernels, on images that end within one."""

    def tile(self: Any, multiprocessors: int = 0) -> tuple[int, int]:
        step = self.down.stride if self.down.back else 1
        return -(-down // step) * step, 2

    monkeypatch.setattr(depthwise_kernels.Windows, "tile", tile)
    operands, how = depthwise(kind, torch.float32, layout, bias=True)
    check(operands, how)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("how", [(1, 3, 1), (2, 1, 2), (1, 0, 3)])
def test_signals(how: tuple[int, int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    names = dict(zip(("stride", "padding", "dilation"), how, strict=True), groups=5)
    x, weight, bias = (rand(*shape, dtype=dtype) for shape in ((2, 5, 27), (5, 1, 4), (5,)))
    check([x, weight, bias], names)
    check([x.mT.contiguous().mT, weight, None], names)


def test_the_tile_fits_the_machine() -> None:
    """Few images leave lanes small tiles; of many, those that waste least are taken."""
    axis = depthwise_kernels.Axis(7, 1, 3, 1, 56, 56)
    for batch, most in ((1, 4), (64, 8)):
        tile = depthwise_kernels.Windows(batch, 96, axis, axis, False).tile(132)
        assert tile == (most, 2)
    short = depthwise_kernels.Axis(7, 1, 3, 1, 14, 14)
    assert depthwise_kernels.Windows(64, 576, short, short, True).tile(132) == (7, 2)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_kernels(layout: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One forward, and no copy of images anywhere."""
    reports = kernels_of(monkeypatch)
    operands, how = depthwise("3x3", torch.bfloat16, layout, bias=True)
    check(operands, how)
    forward, backward = ([s.name for s in report.sources] for report in reports)
    turned = int(layout == torch.channels_last)  # the weight
    assert forward.count("depthwise_convolution") == 1 and len(forward) == 1 + turned
    assert {"depthwise_convolution", "depthwise_weight_parts"} <= set(backward)
    assert not any(report.aten_calls for report in reports)


def test_gradients_that_nobody_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    reports = kernels_of(monkeypatch)
    operands, how = depthwise("3x3", torch.float32, torch.contiguous_format, bias=False)
    check(operands, how, of_images=False)
    assert "depthwise_convolution" not in [s.name for s in reports[1].sources]


def test_a_stride_that_only_the_gradient_of_images_minds() -> None:
    torch.manual_seed(0)
    x, weight = rand(2, 3, 13, 12), rand(3, 1, 3, 3)
    how = dict(stride=3, padding=1, groups=3)
    check([x, weight, None], how, of_images=False)
    with gems_compile.use_gems(only=[FORWARD, BACKWARD]):
        run([x, weight, None], how)
    assert "a stride above 2" in "".join(whys(BACKWARD))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_operands_with_gaps(layout: Any) -> None:
    operands, how = depthwise("3x3", torch.float32, layout, bias=True)
    x, weight, bias = operands
    wide = torch.full((*x.shape[:3], 2 * x.shape[3]), float("nan"), device=DEVICE)
    wide[..., ::2] = x
    spread = torch.full((*weight.shape, 2), float("nan"), device=DEVICE)
    spread[..., 0] = weight
    check([wide[..., ::2], spread[..., 0], torch.stack([bias, bias], 1)[:, 0]], how)


def test_layouts_that_differ() -> None:
    """Of images and weight, the one that is in channels-last decides, as for cuDNN."""
    operands, how = depthwise("3x3", torch.float32, torch.contiguous_format, bias=True)
    weight = operands[1].to(memory_format=torch.channels_last)
    check([operands[0], weight, operands[2]], how)


def test_a_gradient_that_is_one_number() -> None:
    """``sum`` gives back a gradient that repeats one element."""
    operands, how = depthwise("7x7", torch.float32, torch.channels_last, bias=True)
    leaves = [t.requires_grad_() for t in operands if t is not None]
    want = torch.autograd.grad(F.conv2d(*leaves, **how).sum(), leaves)
    with gems_compile.use_gems(only=[FORWARD, BACKWARD]):
        got = torch.autograd.grad(F.conv2d(*leaves, **how).sum(), leaves)
    assert ours(BACKWARD) == 1, whys(BACKWARD)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_what_is_no_number_stays_where_windows_reach(layout: Any, value: float) -> None:
    """Also in gradients of weights, which sum tiles that end beyond the image: no tap of the first
    row, or column, meets the last two of the image."""
    operands, _ = depthwise("3x3", torch.float32, layout, bias=False)
    how = dict(groups=5)
    x = operands[0][:, :, :7, :7].contiguous(memory_format=layout)
    x[0, 1, 4, 4] = x[1, 2, 5, 0] = x[1, 3, 0, 6] = x[0, 4, 6, 5] = value
    want = run([x, operands[1], None], how)
    with gems_compile.use_gems(only=[FORWARD, BACKWARD]):
        got = run([x, operands[1], None], how)
    assert ours(FORWARD) == ours(BACKWARD) == 1
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a.isfinite(), b.isfinite())
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, equal_nan=True)
    finite = got[2][:, 0].isfinite()
    assert not finite[1].all() and finite[2, 0].all() and finite[3, :, 0].all()
    assert finite[4, 0].all() and not finite[4, 2].all()


def test_places_beyond_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors whose places 32 bits do not count, as far as a small machine can tell."""
    monkeypatch.setattr(depthwise_kernels, "NARROW", 100)
    reports = kernels_of(monkeypatch)
    for layout in LAYOUTS:
        operands, how = depthwise("down", torch.float32, layout, bias=True)
        check(operands, how)
    texts = [s.text for r in reports for s in r.sources if s.name.startswith("depthwise_")]
    assert len(texts) == 6 and all("tl.program_id(0).to(tl.int64)" in text for text in texts)


def test_a_module_trains() -> None:
    """Two depthwise layers in channels-last, under autocast, for a few steps."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.GELU())
    net.append(nn.Conv2d(6, 6, 5, stride=2, padding=2, groups=6)).to(DEVICE)
    net = net.to(memory_format=torch.channels_last)
    x = rand(2, 6, 10, 8).contiguous(memory_format=torch.channels_last)
    start = {name: value.clone() for name, value in net.state_dict().items()}

    def losses() -> list[float]:
        net.load_state_dict(start)
        optimizer, found = torch.optim.SGD(net.parameters(), lr=0.1), []
        for _ in range(4):
            with torch.autocast(DEVICE, torch.bfloat16):
                loss = (net(x).float() - 1).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    want = losses()
    with gems_compile.use_gems(only=[FORWARD, BACKWARD]):
        got = losses()
    assert (ours(FORWARD), ours(BACKWARD)) == (8, 8), whys(FORWARD)
    assert got == pytest.approx(want, rel=1e-2) and got[-1] < got[0]


def test_the_kernel_that_aten_calls_on_a_gpu() -> None:
    """``_conv_depthwise2d``, which a CPU does not have."""
    (x, weight, bias), how = depthwise("across", torch.float32, torch.contiguous_format, True)
    lists = [list(how[name]) for name in ("stride", "padding", "dilation")]
    overload, args = aten._conv_depthwise2d.default, (x, weight, [5, 3], bias, *lists)
    target = current_target()
    variant = compile_one(overload, args, {}, target, Config.from_call())
    assert variant.run is not None, variant.why
    (got,) = variant.run([x, weight, bias])
    want = F.conv2d(x, weight, bias, **how)
    assert_same_metadata(got, want)
    assert_accurate(got, want, F.conv2d(x.double(), weight.double(), bias.double(), **how), "y")
    last = x.contiguous(memory_format=torch.channels_last)
    why = compile_one(overload, (last, *args[1:]), {}, target, Config.from_call()).why
    assert why == "images that are not contiguous"


# images ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "layout"), some_of([*OVERLAP, *PATCHES], LAYOUTS))
def test_images(kind: str, layout: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel of windows that overlap, in either layout; a product of those that do not."""
    module, x = made(kind, torch.bfloat16, layout)
    of_images = kind in PATCHES
    want = step(module, module, x, of_images)
    reports = kernels_of(monkeypatch)
    with gems_compile.use_gems(only=[FORWARD, BACKWARD]):
        got = step(module, module, x, of_images)
    assert (ours(FORWARD), ours(BACKWARD)) == (1, 1), whys(FORWARD) + whys(BACKWARD)
    module.double()
    assert_as_good(got, want, step(module, module, x.double(), of_images))
    names = [s.name for report in reports for s in report.sources]
    assert [n for n in names if n.startswith("image_")] == (
        [] if kind in PATCHES else ["image_convolution", "image_weight_parts"]
    )
    called = {why.partition(":")[0] for report in reports for why in report.aten}
    assert called == ({"aten.mm.default"} if kind in PATCHES else set())


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("kind", ["resnet", "vit"])
def test_biases(kind: str, layout: Any) -> None:
    """Added to the rounded result, as on a GPU; a CPU's eager mode rounds once. So the sign of what
    is nearly 0 may differ, and with it a ReLU's gradient: the convolution alone."""
    module, x = made(kind, torch.float16, layout, bias=True)
    (module, _) = module
    want = step(module, module, x, False)
    with gems_compile.use_gems(only=[FORWARD, BACKWARD]):
        got = step(module, module, x, False)
    assert (ours(FORWARD), ours(BACKWARD)) == (1, 1), whys(FORWARD) + whys(BACKWARD)
    module.double()
    assert_as_good(got, want, step(module, module, x.double(), False), 1.5)


# what stays the library's ------------------------------------------------------------------------

NEITHER = "nor is it one of images of up to 4 channels in 16 bits"
#: (images, weight, how, why)
LIBRARYS: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any], str]] = {
    "many channels": ((2, 8, 6, 6), (4, 8, 3, 3), {}, NEITHER),
    "float32": ((2, 3, 6, 6), (4, 3, 3, 3), {}, NEITHER),
    "groups": ((2, 8, 6, 6), (8, 4, 3, 3), {"groups": 2}, "it is not depthwise"),
    "two of a channel": ((2, 4, 6, 6), (8, 1, 3, 3), {"groups": 4}, "it is not depthwise"),
    "large": ((1, 3, 9, 9), (3, 1, 8, 8), {"groups": 3, "padding": 4}, "at most 49"),
    "float64": ((2, 4, 6, 6), (4, 1, 3, 3), {"groups": 4}, "of torch.float64"),
    "one dim": ((2, 4, 9), (4, 4, 3), {}, NEITHER),
    "three dims": ((2, 4, 5, 5, 5), (4, 1, 3, 3, 3), {"groups": 4}, "no convolution in one dim or"),
}


@pytest.mark.parametrize("kind", LIBRARYS)
def test_library_s(kind: str) -> None:
    size, window, how, why = LIBRARYS[kind]
    dtype = torch.float64 if kind == "float64" else torch.float32
    if kind == "many channels":
        dtype = torch.bfloat16
    x, weight = rand(*size, dtype=dtype, grad=True), rand(*window, dtype=dtype, grad=True)
    convolve = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[x.ndim]

    def both() -> tuple[Tensor, ...]:
        y = convolve(x, weight, **how)
        return y, *torch.autograd.grad(y, [x, weight], torch.ones_like(y))

    want = both()
    with gems_compile.use_gems(only=[FORWARD, BACKWARD]):
        got = both()
    assert not ours(FORWARD) and not ours(BACKWARD)
    assert why in "".join(whys(FORWARD)) and why in "".join(whys(BACKWARD))
    for a, b in zip(got, want, strict=True):
        assert_same_metadata(a, b)
        torch.testing.assert_close(a, b)


def test_transposed() -> None:
    x, weight = rand(2, 4, 6, 6), rand(4, 1, 3, 3)
    want = F.conv_transpose2d(x, weight, groups=4)
    with gems_compile.use_gems(only=[FORWARD]):
        got = F.conv_transpose2d(x, weight, groups=4)
    assert not ours(FORWARD) and "it is not depthwise" in "".join(whys(FORWARD))
    torch.testing.assert_close(got, want)


def test_a_compiled_graph_keeps_its_convolutions() -> None:
    """Under ``torch.compile`` depthwise ones are the library's, as before."""
    operands, how = depthwise("3x3", torch.float32, torch.contiguous_format, bias=True)
    backend = gems_compile.backend.Gems()
    torch.compile(lambda *t: F.conv2d(*t, **how), backend=backend)(*operands)
    assert any(op.startswith("aten.convolution") for r in backend.reports for op in r.aten)


# machine code ------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_machine_code(layout: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a large GPU, of 3 x 3 taps: each element of a tile's windows is read once, results are
    stored in pairs, and multiplications are added in one instruction."""
    target, seen = compile_target("nvidia", 90), []
    for name, kernel in list(WHOLE.items()):
        noted = lambda v, t, w=kernel.write: seen.append(w(v, target)) or w(v, t)  # noqa: E731
        monkeypatch.setitem(WHOLE, name, kernel._replace(write=noted))
    x = torch.empty(64, 32, 56, 56, dtype=torch.bfloat16, device=DEVICE)
    x = x.contiguous(memory_format=layout)
    weight = torch.empty(32, 1, 3, 3, dtype=torch.bfloat16, device=DEVICE)
    how = [1, 1], [1, 1], [1, 1], False, [0, 0], 32
    args = (x, x, weight, None, *how, [True, True, False])
    graph, *_ = convolution_graph(aten.convolution_backward.default, args, {}, INTERPRETER)
    assert not take_depthwise(graph, 132)  # it was taken already
    compile_graph(graph, [], options())
    assert [source.name for source in seen] == ["depthwise_convolution", "depthwise_weight_parts"]
    for source, stores in zip(seen, (8 if layout is LAYOUTS[0] else 16, 9), strict=True):
        source.meta.update(exact=True, unaligned=[])
        text = assembly(source, tmp_path)
        assert text.count("fma.rn.f32") == 9 * 16
        assert "mul.f32" not in text and "mul.rn.f32" not in text
        assert text.count("st.global") == stores and source.waits
        del source.meta["lanes"]  # Triton finds no layouts better than those it had at first
        assert instructions(assembly(source, tmp_path)) == instructions(text)


def instructions(text: str) -> list[str]:
    """Lines of a program for a GPU that do not tell where they come from."""
    return [line for line in text.splitlines() if not line.strip().startswith(("//", ".loc", ".f"))]
