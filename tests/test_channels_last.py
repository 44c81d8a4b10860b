"""Convolutions in channels-last: numbers and strides are eager's, and the graphs are as decided."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE, check, gems_only, no_new_graph, rand
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import gems_compile
from gems_compile.kernels.target import INTERPRETER, Target
from gems_compile.lowering import kept
from gems_compile.lowering.channels_last import Decision, lay_out_convolutions
from gems_compile.lowering.convolutions import convolution_of
from gems_compile.lowering.strides import is_channels_last

pytestmark = gems_only
aten = torch.ops.aten
H100 = Target("nvidia", "cuda", "CUDA", "cuda", 90, 32, 132)
FORCED = {"layout": "channels_last", "strict": True}
KEEPING = {**FORCED, "keep_weights": True}
NEAR = {"rtol": 1e-4, "atol": 1e-4}


class Residual(nn.Module):
    """Batch norms, pooling, a depthwise convolution, a head: all that a residual network has."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.deep = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False)
        self.wide, self.head = nn.Conv2d(16, 24, 3, stride=2), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = F.max_pool2d(torch.relu(self.norm(self.stem(x))), 2)
        y = self.wide(y + torch.relu(self.deep(y)))
        return self.head(y.mean((2, 3))), y


class Block(nn.Module):
    """A ConvNeXt block: layer norm and linear layers between two permutations."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 2, stride=2)
        self.deep, self.norm = nn.Conv2d(16, 16, 7, padding=3, groups=16), nn.LayerNorm(16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm(self.deep(x).permute(0, 2, 3, 1))
        return x + self.down(F.gelu(self.up(y))).permute(0, 3, 1, 2)


class Flat(nn.Module):
    """A view that channels-last does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8 * 36, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.conv(x)).view(x.shape[0], -1))


class Grouped(nn.Module):
    """A group norm, which ATen computes of contiguous memory; results that are views of one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.second(F.silu(self.norm(self.first(x))))
        return y, y.transpose(1, 2)


class UNet(nn.Module):
    """Up and down again, with a skip."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 8, 2, stride=2), nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.last = nn.Conv2d(7, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.leaky_relu(self.up(F.gelu(self.down(x))), 0.1)
        y = self.last(torch.cat([y, x], 1))
        return F.interpolate(F.avg_pool2d(y, 2), scale_factor=2, mode="nearest").softmax(1)


MODELS: dict[str, Callable[[], nn.Module]] = {
    m.__name__: m for m in (Residual, Block, Flat, Grouped, UNet)
}


def made(name: str, training: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]().to(DEVICE).train(training)


def layouts(kind: str) -> list[bool]:
    """Of what the convolutions of the latest graph of this kind read: whether it is NHWC."""
    report = [r for r in gems_compile.reports() if r.kind == kind][-1]
    assert not report.failures
    convs = [c for c in map(convolution_of, report.plan.aten) if c is not None]
    return [is_channels_last(n.meta["val"]) for c in convs for n in (*c.images, c.weight)]


@pytest.mark.parametrize("name", MODELS)
def test_training(name: str) -> None:
    check(made(name), rand(2, 3, 8, 8, grad=True), options=FORCED, **NEAR)
    assert layouts("forward") and all(layouts("forward"))
    assert layouts("backward") and all(layouts("backward"))


@pytest.mark.parametrize("name", MODELS)
def test_inference(name: str) -> None:
    with torch.no_grad():
        check(made(name, False), rand(2, 3, 8, 8), options=FORCED, **NEAR)
    assert layouts("inference") and all(layouts("inference"))


@pytest.mark.parametrize("name", ["Residual", "Block"])
def test_bfloat16(name: str) -> None:
    model = made(name).to(torch.bfloat16)
    close = {"rtol": 0.1, "atol": 0.1}
    check(model, rand(2, 3, 8, 8, dtype=torch.bfloat16, grad=True), options=FORCED, **close)


def test_conversions_are_few() -> None:
    """An image in, features out; two weights and their gradients, as a depthwise one has no other
    layout; and all of those are two launches."""
    model = torch.compile(made("Residual"), backend="gems", options=FORCED)
    logits, features = model(rand(2, 3, 16, 16))
    (logits.sum() + features.sin().sum()).backward()
    forward, backward = gems_compile.reports()[-2:]
    assert (forward.layout.convolutions, forward.layout.copies, forward.layout.weights) == (6, 3, 4)
    copies = [
        s for r in (forward, backward) for s in r.sources if s.name.startswith("fused_copy_x")
    ]
    assert [s.name for s in copies] == ["fused_copy_x3", "fused_copy_x2"]
    clones = [n for r in (forward, backward) for n in r.plan.aten if n.target is aten.clone.default]
    assert not clones  # the features leave as a kernel adds their bias


class Wide(nn.Module):
    """A product that holds more than all else, before or between two convolutions."""

    def __init__(self, between: bool) -> None:
        super().__init__()
        self.between = between
        self.first, self.second = (nn.Conv2d(64, 64, 3, padding=1, bias=False) for _ in range(2))

    def forward(self, x: Tensor, a: Tensor) -> Tensor:
        if self.between:
            y = self.first(x)
            return self.second(y * (a @ a).mean())
        return self.second(torch.relu(self.first(x * (a @ a).mean())))


@pytest.mark.parametrize("between", [False, True])
def test_weights_are_converted_when_memory_is_there(between: bool) -> None:
    """As the first is read, and all that may be held from then on in the same launch."""
    torch.manual_seed(0)
    args = rand(1, 64, 8, 8).to(memory_format=torch.channels_last), rand(512, 512)
    with torch.no_grad():
        check(Wide(between).to(DEVICE), *args, options=FORCED, **NEAR)
    report = gems_compile.reports()[-1]
    assert report.layout.weights == 2
    lines = report.wrapper.splitlines()
    product = next(n for n, c in report.constants.items() if "mm" in c)
    (held,) = (k for k, line in enumerate(lines) if f" {product}(" in line)
    copies = [k for k, line in enumerate(lines) if "fused_copy" in line or "memory_format=" in line]
    assert [k > held for k in copies] == ([False, True] if between else [True])
    assert "fused_copy_x2" in report.wrapper or between


def test_program_keeps_its_layout() -> None:
    with torch.no_grad():
        check(made("Residual", False), rand(2, 3, 8, 8), options={"layout": "keep"}, **NEAR)
    assert not any(layouts("inference")[:2])


def test_backward_twice() -> None:
    model = made("Residual")
    compiled = torch.compile(model, backend="gems", options=FORCED)
    x = rand(2, 3, 8, 8, grad=True)
    logits, _ = compiled(x)
    first = torch.autograd.grad(logits.sum(), [x, *model.stem.parameters()], retain_graph=True)
    second = torch.autograd.grad(logits.sum(), [x, *model.stem.parameters()])
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b)


def test_sizes_that_vary() -> None:
    model = made("Residual")
    compiled = torch.compile(model, backend="gems", options=FORCED, dynamic=True)
    reference = copy.deepcopy(model)

    def run(n: int, side: int) -> None:
        x = rand(n, 3, side, side + 4)
        for a, b in zip(compiled(x), reference(x), strict=True):
            torch.testing.assert_close(a, b, **NEAR)
            assert a.stride() == b.stride()
            a.sum().backward(retain_graph=True)

    run(4, 16)
    assert all(layouts("forward"))
    with no_new_graph():
        run(5, 24)


def test_random_numbers_follow_eagers_memory() -> None:
    conv = nn.Conv2d(3, 4, 3, padding=1).to(DEVICE)

    def fn(x: Tensor) -> Tensor:
        return F.dropout(conv(x), 0.5)

    x = rand(2, 3, 6, 6)
    torch.manual_seed(3)
    expected = fn(x)
    torch.manual_seed(3)
    options = {**FORCED, "rng": "eager"}
    torch.testing.assert_close(torch.compile(fn, backend="gems", options=options)(x), expected)


# ------------------------------------------------------------------------------- what is decided


def conv(x: Tensor, w: Tensor, stride: int = 1, groups: int = 1) -> Tensor:
    pad = [w.shape[2] // 2] * 2
    return aten.convolution(x, w, None, [stride] * 2, pad, [1, 1], False, [0, 0], groups)


def images(n: int, c: int, side: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(n, c, side, side, dtype=dtype)


def weights(o: int, i: int, k: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(o, i, k, k, dtype=dtype)


def decide(fn: Callable[..., Any], *args: Tensor, target: Any = H100) -> Decision:
    return lay_out_convolutions(make_fx(fn, tracing_mode="fake")(*args), target)


def two(x: Tensor, w: Tensor) -> Tensor:
    return conv(torch.relu(conv(x, w)), w).relu().mean((2, 3))


def test_it_gains() -> None:
    found = decide(two, images(64, 64, 56), weights(64, 64, 3))
    assert found.convolutions == 2 and "77 MB for conversions" in found.reason


def test_results_that_leave_cost() -> None:
    """One convolution, whose input and result are converted, gains nothing."""
    found = decide(lambda x, w: conv(x, w), images(64, 64, 56), weights(64, 64, 3))
    assert found == Decision("layouts kept: 103 MB less for convolutions, 154 MB for conversions")


def test_matrix_products_gain_nothing() -> None:
    found = decide(two, images(64, 64, 56), weights(64, 64, 1))
    assert found.convolutions == 0 and found.reason.startswith("layouts kept: 0 MB less")


def test_groups() -> None:
    def grouped(x: Tensor, w: Tensor) -> Tensor:
        groups = x.shape[1] // w.shape[1]
        return conv(conv(x, w, groups=groups).relu(), w, groups=groups).sum((2, 3))

    assert decide(grouped, images(64, 240, 28), weights(240, 24, 3)).reason == (
        "layouts kept: groups of 24 channels are slower"
    )
    assert decide(grouped, images(64, 256, 28), weights(256, 32, 3)).convolutions == 2
    assert decide(grouped, images(64, 96, 56), weights(96, 1, 7)).convolutions == 2


def test_depthwise_gradients_in_float32() -> None:
    def gradients(x: Tensor, w: Tensor) -> Any:
        y = conv(x, w, groups=96)
        how = [1, 1], [3, 3], [1, 1], False, [0, 0], 96, [True, True, False]
        return [g.sum() for g in aten.convolution_backward(y, x, w, None, *how)[:2]]

    wide = images(8, 96, 56, torch.float32), weights(96, 1, 7, torch.float32)
    narrow = images(8, 96, 56), weights(96, 1, 7)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
        assert "depthwise float32" in decide(gradients, *wide).reason
    assert decide(gradients, *narrow).convolutions == 2


def test_products_in_float32() -> None:
    args = images(64, 64, 56, torch.float32), weights(64, 64, 3, torch.float32)
    assert decide(two, *args).convolutions == 0
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
        assert decide(two, *args).convolutions == 2


def test_channels_last_already() -> None:
    x = images(64, 64, 56).contiguous(memory_format=torch.channels_last)
    found = decide(two, x, weights(64, 64, 3))
    assert found == Decision("channels-last already", weights=1)


def test_other_targets() -> None:
    args = images(64, 64, 56), weights(64, 64, 3)
    assert "nothing was measured" in decide(two, *args, target=INTERPRETER).reason
    old = Target("nvidia", "cuda", "CUDA", "cuda", 75, 32, 40)
    assert decide(two, *args, target=old).convolutions == 0


def test_explain_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GEMS_LAYOUT", "channels_last")
    told = gems_compile.explain(made("Residual"), rand(2, 3, 8, 8))
    assert "channels-last: 0 MB less for convolutions" in str(told)
    assert len(told.why("convolutions: channels-last")) == 2


# ------------------------------------------------------------------------------- kept weights


class Counted:
    """How often a weight was converted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, made = 0, kept._Kept

        def counted(*args: Any) -> Any:
            self.count += 1
            return made(*args)

        monkeypatch.setattr(kept, "_Kept", counted)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    return Counted(monkeypatch)


@torch.no_grad()
def test_weights_are_converted_once(counted: Counted) -> None:
    model = made("Residual", False)
    compiled = torch.compile(model, backend="gems", options=KEEPING)
    x = rand(2, 3, 8, 8)

    def agree() -> int:
        """How many conversions the call took, whose result is eager's."""
        before = counted.count
        for a, b in zip(compiled(x), model(x), strict=True):
            torch.testing.assert_close(a, b, **NEAR)
        return counted.count - before

    assert agree() == 2
    assert agree() == 0
    model.wide.weight.mul_(2)
    assert agree() == 1
    model.load_state_dict({k: v + 1 for k, v in model.state_dict().items()})
    assert agree() == 2
    model.stem.weight.data = rand(16, 3, 3, 3)
    assert agree() == 1
    model.stem.weight.data = rand(16, 3, 3, 3)  # its memory may be what was just freed
    model.stem.weight.data = rand(16, 3, 3, 3)
    assert agree() == 1
    model.wide.weight = nn.Parameter(rand(24, 16, 3, 3))
    assert agree() == 1
    assert agree() == 0


@torch.no_grad()
def test_graphs_share_kept_weights(counted: Counted) -> None:
    model = made("Residual", False)
    for n in (2, 3):
        torch.compile(model, backend="gems", options=KEEPING, dynamic=False)(rand(n, 3, 8, 8))
    assert counted.count == 2


@torch.no_grad()
def test_kept_weights_die_with_the_model() -> None:
    before = len(kept._kept)
    model = made("Residual", False)
    torch.compile(model, backend="gems", options=KEEPING)(rand(2, 3, 8, 8))
    assert len(kept._kept) == before + 2
    del model
    torch._dynamo.reset()
    gc.collect()
    assert len(kept._kept) <= before


@torch.inference_mode()
def test_weights_without_a_count_of_writes(counted: Counted) -> None:
    model = made("Residual", False)
    compiled = torch.compile(model, backend="gems", options=KEEPING)
    x = rand(2, 3, 8, 8)
    for _ in range(2):
        model.wide.weight.mul_(2)
        for a, b in zip(compiled(x), model(x), strict=True):
            torch.testing.assert_close(a, b, **NEAR)
    assert counted.count == 0


@torch.no_grad()
def test_weights_that_are_not_kept(counted: Counted) -> None:
    model = made("Residual", False)
    options = {**KEEPING, "keep_weights": False}
    compiled = torch.compile(model, backend="gems", options=options)
    x = rand(2, 3, 8, 8)
    for _ in range(2):
        model.wide.weight.data.mul_(2)  # which torch does not count as a write
        for a, b in zip(compiled(x), model(x), strict=True):
            torch.testing.assert_close(a, b, **NEAR)
    assert counted.count == 0


# ------------------------------------------------------------------------------- biases


def convolutions(kind: str) -> list[Any]:
    report = [r for r in gems_compile.reports() if r.kind == kind][-1]
    return [c.node for c in map(convolution_of, report.plan.aten) if c is not None]


def test_biases_are_added_by_kernels() -> None:
    check(made("Block"), rand(2, 3, 8, 8, grad=True), options=KEEPING, **NEAR)
    # the stem's result is read by a convolution too, and its bias would be a call of its own
    assert [c.args[2] is None for c in convolutions("forward")] == [False, True]
    assert not any(c.args[-1][2] for c in convolutions("backward"))


@torch.no_grad()
def test_biases_stay_where_no_kernel_reads() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3)).to(DEVICE)
    check(model, rand(2, 3, 12, 12), options=KEEPING, **NEAR)
    # the first is read by ATen's pooling, the second by what restores the layout of the result
    assert [c.args[2] is None for c in convolutions("inference")] == [False, True]


@torch.no_grad()
def test_a_depthwise_kernel_of_atens_rounds_once() -> None:
    conv = nn.Conv2d(4, 4, 3, groups=4).to(DEVICE)
    options = {"layout": "channels_last"}
    fn = torch.compile(lambda x: conv(x).relu(), backend="gems", options=options)
    x = rand(2, 4, 8, 8)
    torch.testing.assert_close(fn(x), conv(x).relu(), **NEAR)
    assert [c.args[2] is None for c in convolutions("inference")] == [True]
