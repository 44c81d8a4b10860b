"""Small tensors that forward saves for backward lie in one."""

from __future__ import annotations

import copy
import re

import fake_graphs
import pytest
import torch
from helpers import DEVICE, gems_only
from torch import Tensor, fx, nn
from torch.autograd.graph import saved_tensors_hooks

from gems_compile.backend import Gems
from gems_compile.kernels.packed import ALIGNMENT, offsets
from gems_compile.lowering import packed
from gems_compile.lowering.ir import Declined
from gems_compile.lowering.translate import Translator

pytestmark = gems_only


class Gate(nn.Module):
    """y = x + SiLU(layer norm(x)), which is one kernel each way."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + nn.functional.silu(self.norm(x))


class Rows(nn.Module):
    """SiLU(batch norm(x))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.silu(self.norm(x))


def conv(width: int) -> nn.Module:
    layers = nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
    return nn.Sequential(*layers)


def compiled(model: nn.Module) -> tuple[nn.Module, Gems]:
    backend = Gems()
    return torch.compile(model, backend=backend), backend


def grads(model: nn.Module, x: Tensor, run: nn.Module | None = None) -> list[Tensor]:
    """The result, and the gradients of all parameters and of the input."""
    x = x.detach().requires_grad_()
    y = (model if run is None else run)(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *model.parameters()])]


def check(model: nn.Module, x: Tensor, calls: int = 2) -> Gems:
    """Against float64, in several calls: nothing of an earlier one may be left."""
    exact = copy.deepcopy(model).double()
    run, backend = compiled(model)
    for _ in range(calls):
        x = torch.randn_like(x)
        got, wanted = grads(model, x, run), grads(exact, x.double())
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-3)
    for a, b in zip(model.buffers(), exact.buffers(), strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-4, atol=1e-5)
    return backend


def results(text: str) -> list[str]:
    """What the function returns."""
    return re.findall(r"return \((.*)\)", text)[-1].rstrip(", ").split(", ")


def packed_bytes(text: str) -> int:
    (size,) = re.findall(r"^ *p\d+ = empty\(\((\d+),\)", text, re.M)
    return int(size)


def wrappers(backend: Gems) -> tuple[str, str]:
    forward, backward = (r.wrapper for r in backend.reports)
    return forward, backward


def test_where_parts_lie():
    parts = [torch.empty(n, dtype=torch.uint8) for n in (4, ALIGNMENT, ALIGNMENT + 1)]
    assert offsets(parts) == [0, 128, 256, 512]


def test_ops_of_the_pack():
    parts = [torch.randn(3, 5), torch.arange(7), torch.randn(2).bfloat16(), torch.tensor(True)]
    whole = torch.ops.gems.packed(parts)
    places = offsets(parts)
    assert whole.dtype == torch.uint8 and whole.shape == (places[-1],)
    for part, place in zip(parts, places, strict=False):
        args = whole, place, list(part.shape), part.dtype
        torch.testing.assert_close(torch.ops.gems.unpacked(*args), part, rtol=0, atol=0)
    torch.library.opcheck(torch.ops.gems.packed.default, (parts,))
    torch.library.opcheck(torch.ops.gems.unpacked.default, (whole, 0, [3, 5], torch.float32))


def test_layer_norms():
    """Kernels write and read the parts in place: no copies, no views."""
    backend = check(nn.Sequential(*(Gate(24) for _ in range(6))).to(DEVICE), rand(5, 24))
    forward, backward = wrappers(backend)
    assert [r.aten_calls for r in backend.reports] == [0, 0]
    assert len(re.findall(r"^ *p\d+ = empty", forward, re.M)) == 1
    assert ".view(" not in forward + backward
    # one result, the input or what stands for it, six weights and biases, and the pack
    assert len(results(forward)) <= 1 + 6 + 12 + 1
    assert not any("packed" in why for r in backend.reports for why in r.aten)


def test_layers_that_are_alike_share_kernels():
    model = nn.Sequential(*(Gate(24) for _ in range(6))).to(DEVICE)
    backend = check(model, rand(5, 24))
    assert all(len(r.sources) <= 4 for r in backend.reports), [r.kernels for r in backend.reports]


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_batch_norms(layout):
    """Of each: its input, its result, and two vectors in the pack; no running statistics."""
    model = nn.Sequential(*(conv(8) for _ in range(4))).to(DEVICE).to(memory_format=layout)
    backend = check(model, rand(3, 8, 6, 7).contiguous(memory_format=layout))
    forward, backward = wrappers(backend)
    assert len(re.findall(r"^ *p\d+ = empty\(\(1024,\)", forward, re.M)) == 1  # 8 lines of memory
    vectors = [t for t in re.findall(r"(b\d+) = empty\(\(8,\)", forward) if t in results(forward)]
    assert not vectors
    assert ".view(" not in forward + backward


@pytest.mark.parametrize("name", ["native_layer_norm", "native_layer_norm_backward"])
def test_what_aten_computes_is_copied_and_what_it_reads_is_viewed(name, monkeypatch):
    lower = Translator._lower

    def declined(self, node, val):
        if getattr(node.target, "_opname", "") == name:
            raise Declined("the test says so")
        return lower(self, node, val)

    monkeypatch.setattr(Translator, "_lower", declined)
    backend = check(nn.Sequential(*(Gate(24) for _ in range(6))).to(DEVICE), rand(5, 24))
    forward, backward = wrappers(backend)
    reader = backward if name.endswith("backward") else forward
    assert reader.count(".view(") >= 2 * 12  # a dtype and a shape for each
    assert (forward + backward).count(".view(") == reader.count(".view(")


def test_few_are_left_alone():
    forward, _ = wrappers(check(Gate(24).to(DEVICE), rand(5, 24)))
    assert not re.search(r"^ *p\d+ = ", forward, re.M)


def test_large_ones_are_left_alone(monkeypatch):
    monkeypatch.setattr(packed, "MOST_BYTES", 16)
    forward, _ = wrappers(
        check(nn.Sequential(*(Gate(24) for _ in range(6))).to(DEVICE), rand(5, 24))
    )
    assert not re.search(r"^ *p\d+ = ", forward, re.M)


def test_sizes_that_vary():
    """Statistics of a varying number of rows are no parts; others of the graph are."""
    model = nn.Sequential(*(Gate(24) for _ in range(6)), *(Rows(24) for _ in range(3)))
    model = model.to(DEVICE)
    exact, backend = copy.deepcopy(model).double(), Gems()
    run = torch.compile(model, backend=backend, dynamic=True)
    for rows in (5, 9, 2):
        x = rand(rows, 24)
        for a, b in zip(grads(model, x, run), grads(exact, x.double()), strict=True):
            torch.testing.assert_close(a.double(), b, rtol=2e-3, atol=2e-3)
    assert len(backend.reports) == 2


def test_hooks_see_the_pack():
    """A hook that moves what is saved elsewhere, as offloading does, gives it back elsewhere."""
    model = nn.Sequential(*(Gate(24) for _ in range(6))).to(DEVICE)
    exact, (run, _) = copy.deepcopy(model).double(), compiled(model)
    seen: list[torch.dtype] = []

    def away(t: Tensor) -> Tensor:
        seen.append(t.dtype)
        return t.cpu().clone()

    def back(t: Tensor) -> Tensor:
        if t.dtype != torch.uint8:
            return t.to(DEVICE)
        room = torch.empty(t.nbytes + 3, dtype=torch.uint8, device=DEVICE)
        return room[3:].copy_(t)  # off the 16-byte boundary

    x = rand(5, 24)
    with saved_tensors_hooks(away, back):
        got = grads(model, x, run)
    for a, b in zip(got, grads(exact, x.double()), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-3)
    assert seen.count(torch.uint8) == 1


def test_a_second_backward_reads_the_pack_again():
    model = nn.Sequential(*(Gate(24) for _ in range(6))).to(DEVICE)
    (run, _), x = compiled(model), rand(5, 24).requires_grad_()
    loss = run(x).square().sum()
    first = torch.autograd.grad(loss, [x, *model.parameters()], retain_graph=True)
    second = torch.autograd.grad(loss, [x, *model.parameters()])
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    wanted = torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()])
    torch.testing.assert_close(first, wanted, rtol=1e-3, atol=1e-3)


def test_a_graph_that_runs_as_aten(monkeypatch):
    """The ops of the pack are torch's, too."""
    monkeypatch.setenv("GEMS_STRICT", "0")
    monkeypatch.setattr("gems_compile.backend.Compilation", lambda *a, **k: 1 / 0)
    seen: list[str] = []
    interpreted = fx.Interpreter.call_function

    def noted(self, target, *args):
        seen.append(str(target))
        return interpreted(self, target, *args)

    monkeypatch.setattr(fx.Interpreter, "call_function", noted)
    check(nn.Sequential(*(Gate(24) for _ in range(6))).to(DEVICE), rand(5, 24))
    assert {"gems.packed.default", "gems.unpacked.default"} <= set(seen)


def test_checkpoints():
    """What a checkpoint computes again is not saved, packed or not."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Sequential(*(Gate(24) for _ in range(5)))
            self.second = nn.Sequential(*(Gate(24) for _ in range(5)))

        def forward(self, x: Tensor) -> Tensor:
            x = torch.utils.checkpoint.checkpoint(self.first, x, use_reentrant=False)
            return self.second(x)

    forward, _ = wrappers(check(Twice().to(DEVICE), rand(5, 24)))
    alone, _ = wrappers(check(nn.Sequential(*(Gate(24) for _ in range(5))).to(DEVICE), rand(5, 24)))
    assert packed_bytes(forward) == packed_bytes(alone)


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE)


# CUDA graphs --------------------------------------------------------------------------------------


class Apart(nn.Module):
    """Norms on both sides of what no graph can hold."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.before = nn.Sequential(*(Gate(width) for _ in range(5)))
        self.after = nn.Sequential(*(Gate(width) for _ in range(5)))
        self.matrix = nn.Parameter(torch.eye(width) + 0.1 * torch.rand(width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        return self.after(x @ torch.linalg.inv(self.matrix * (1 + x.square().mean())))


@pytest.mark.parametrize("between", [False, True], ids=["one graph", "several"])
def test_replays(trees, between):
    """What is written in another graph than the pack is copied."""
    torch.manual_seed(0)
    layers = nn.Sequential(*(Gate(24) for _ in range(10)))
    model = (Apart(24) if between else layers).to(DEVICE)
    run, backend = fake_graphs.compiled(model)
    for _ in range(6):
        x = rand(5, 24)
        for a, b in zip(grads(model, x, run), grads(model, x), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    forward, _ = wrappers(backend)
    assert len(re.findall(r"^ *p\d+ = empty", forward, re.M)) == 1
    if not (between and fake_graphs.ON_GPU):  # where a graph must be worth a replay
        assert len(forward.split("def part")) == (3 if between else 2)
        copied = forward.count(".view(") // 2
        assert copied >= 15 if between else not copied
