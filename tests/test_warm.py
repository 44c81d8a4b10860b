"""Whole graphs from torch's cache: the same numbers, without tracing or compiling again."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import DEVICE, gems_only, rand
from torch import nn
from torch._dynamo.utils import counters
from warmcheck import results, said

from gems_compile.backend import Gems
from gems_compile.kernels.op import T
from gems_compile.lowering import constants, images, pipeline
from gems_compile.lowering.binaries import Binaries
from gems_compile.lowering.rewrites import TABLE
from gems_compile.lowering.whole_graphs import FROM_CACHE, KEPT
from gems_compile.warm import Graph

pytestmark = [gems_only, pytest.mark.usefixtures("caches")]


def same(
    step: Callable[[Any], Any], make: Callable[[], Any], **compile: Any
) -> tuple[list[Any], list[Any]]:
    """The reports of a cold and a warm run, which must not differ by a bit."""
    cold, first = results(step, make, **compile)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline.Compilation, "__init__", _not_again)
        warm, second = results(step, make, **compile)
    assert len(cold) == len(warm) and all(map(torch.equal, cold, warm))
    assert said(first) == {KEPT} and said(second) == {FROM_CACHE}
    assert [r.kind for r in first] == [r.kind for r in second]
    for one, two in zip(first, second, strict=True):
        for name in (
            "launches",
            "aten_calls",
            "given",
            "nodes",
            "fused",
            "kernels",
            "aten",
            "wrapper",
            "runs",
        ):
            assert getattr(one, name) == getattr(two, name)
    return first, second


def _not_again(*args: Any) -> None:
    raise AssertionError("compiled again")


def gradients(module: nn.Module) -> list[torch.Tensor]:
    return [p.grad.clone() for p in module.parameters()]


class Block(nn.Module):
    def __init__(self, drop: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.norm = nn.Linear(16, 32), nn.BatchNorm1d(32)
        self.drop, self.down = nn.Dropout(drop), nn.Linear(32, 16)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        y = self.drop(torch.nn.functional.gelu(self.norm(self.up(x))))
        return (x + self.down(y)).softmax(-1)


def make_block(drop: float = 0.0) -> nn.Module:
    return Block(drop).to(DEVICE)


def train(module: Any) -> list[torch.Tensor]:
    for step in range(2):
        (module(rand(8, 16)) * (step + 1)).square().sum().backward()
    return [*gradients(module), *module.buffers()]


def test_training():
    _, second = same(train, make_block)
    assert [r.kind for r in second] == ["forward", "backward"]
    assert counters["aot_autograd"]["autograd_cache_hit"] == 1
    assert not set(second[0].seconds) & {"passes", "fuse", "emit"}


def test_dropout():
    same(train, lambda: make_block(0.5))


def test_inference():
    def step(module):
        with torch.no_grad():
            return [module(rand(8, 16)), module(rand(8, 16))]

    same(step, lambda: make_block().eval())


def test_graph_breaks_and_several_graphs():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = make_block(), make_block()

        def forward(self, x):
            y = self.one(x)
            torch._dynamo.graph_break()
            return self.two(y) + y.exp()

    first, _ = same(train, Broken)
    assert len(first) == 4


def test_sizes_that_are_symbols():
    def step(f):
        return [f(rand(n, 33)) for n in (4, 7, 130)]

    def make():
        return lambda x: (x.exp() + 1).softmax(-1) * x.shape[0]

    first, second = same(step, make, dynamic=True)
    assert len(second) == 1
    assert "wide0" in second[0].wrapper  # and what would run beyond 32 bits came along
    saved = second[0].sources[0].widen()
    wide = first[0].sources[0].widen()
    assert (saved.text, saved.key) == (wide.text, wide.key)


def test_training_with_sizes_that_are_symbols():
    def step(module):
        for n in (4, 7):
            module(rand(n, 16)).square().sum().backward()
        return gradients(module)

    same(step, make_block, dynamic=True)


def test_the_range_of_a_size_is_part_of_the_key():
    """The code for a size that stays below a bound may be wrong above it."""

    def run(most):
        torch._dynamo.reset()
        backend = Gems()
        x = rand(8, 16)
        torch._dynamo.mark_dynamic(x, 0, **({} if most is None else {"min": 2, "max": most}))
        torch.compile(lambda x: (x * 2 + 1).exp(), backend=backend)(x)
        return list(backend.reports)

    assert "wide0" not in run(100)[0].wrapper
    bounded, free = run(100), run(None)
    assert (said(bounded), said(free)) == ({FROM_CACHE}, {KEPT})
    assert "wide0" in free[0].wrapper


def test_inputs_are_written():
    def step(f):
        x, y = rand(8, 16), rand(8, 16)
        out = f(x, y)
        return [x, y, out]

    def make():
        def f(x, y):
            x.mul_(2).add_(y)
            y[2:4] = x[:2]
            return x.relu() + y

        return f

    same(step, make)


def test_views_of_inputs_are_views():
    def step(f):
        x = rand(8, 16)
        out = f(x)
        out[1].add_(1)
        return [x, *out]

    same(step, lambda: lambda x: (x * 2, x.t()[3:]))


def test_constants():
    def step(f):
        return [f(rand(3, 4)), f(rand(3, 4))]

    def make():
        def f(x):
            table = torch.tensor([1.5, -2.0, 0.25], device=x.device)
            return (x * table[:, None]).exp() + torch.tensor(3.0, dtype=torch.float64)

        return f

    same(step, make)


def test_other_constants_are_other_graphs():
    def scaled(number):
        def f(x):
            return (x * torch.tensor([number, 2.0], device=x.device)).exp()

        return results(lambda f: f(rand(3, 2)), lambda: f)

    one, _ = scaled(1.0)
    two, second = scaled(3.0)
    assert said(second) == {KEPT} and not torch.equal(one, two)


def test_much_data_is_not_kept(monkeypatch):
    monkeypatch.setattr(constants, "MOST_BYTES", 1000)
    numbers = [float(k) for k in range(300)]
    step = lambda f: [f(rand(300))]  # noqa: E731
    for _ in range(2):
        _, reports = results(step, lambda: lambda x: x * torch.tensor(numbers, device=x.device) + 1)
        (why,) = said(reports)
        assert why.startswith("not kept: it holds a constant tensor of 1200 bytes")


def test_nothing_is_lowered():
    first, _ = same(lambda f: [f(rand(4, 5), rand(5, 6))], lambda: lambda a, b: a @ b)
    assert first[0].launches == 0


def test_convolutions_in_another_layout():
    def make():
        torch.manual_seed(0)
        parts = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)
        return nn.Sequential(*parts).eval().to(DEVICE)

    def step(module):
        with torch.no_grad():
            return [module(rand(2, 3, 9, 9)), module(rand(2, 3, 9, 9))]

    for keep in (False, True):
        options = {"layout": "channels_last", "keep_weights": keep}
        first, second = same(step, make, options=options)
        assert second[0].layout == first[0].layout
        assert ("kept(" in second[0].wrapper) is keep


def test_gradients_of_gradients():
    def step(module):
        x = rand(4, 16).requires_grad_()
        (dx,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
        dx.square().sum().backward()
        return [x.grad, *gradients(module)]

    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3)).to(DEVICE)

    same(step, make)


def test_a_program_that_draws_random_numbers_is_known_as_such():
    """Running it again would draw others, so it has no second gradient: warm as cold."""

    def step(module):
        x = rand(4, 16).requires_grad_()
        (dx,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError):
            dx.square().sum().backward()
        return [dx.detach()]

    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(16, 8), nn.Dropout(0.5), nn.Tanh()).to(DEVICE)

    same(step, make)


def test_backward_twice():
    def step(module):
        loss = module(rand(8, 16)).square().sum()
        loss.backward(retain_graph=True)
        loss.backward()
        return gradients(module)

    same(step, make_block)


def test_threads():
    """torch's settings are a thread's own, so all of these run in threads."""
    x, module = rand(8, 16), make_block().eval()

    def run(many):
        torch._dynamo.reset()
        backend, found = Gems(), []
        compiled = torch.compile(module, backend=backend)
        threads = [threading.Thread(target=lambda: found.append(compiled(x))) for _ in range(many)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found, said(backend.reports)

    (wanted,), cold = run(1)
    found, warm = run(4)
    assert (cold, warm) == ({KEPT}, {FROM_CACHE})
    assert len(found) == 4 and all(torch.equal(one, wanted) for one in found)


@pytest.mark.parametrize("rule", TABLE, ids=lambda rule: rule.name)
def test_rewrites_do_not_stand_in_the_way(rule):
    """They put other calls into Dynamo's graph, which torch's check must let through."""
    given = rule.samples[0].inputs
    dtype = torch.float32 if DEVICE == "cpu" else torch.bfloat16  # float32 attention stays on a GPU
    inputs = [torch.randn(t.shape).to(DEVICE, dtype) if isinstance(t, T) else t for t in given]
    _, reports = results(lambda f: f(*inputs), lambda: rule.samples[0].program)
    assert said(reports) == {KEPT} and reports[0].rewrites.fired


@pytest.mark.skipif(
    not getattr(torch._dynamo.config, "enable_aot_compile", False),
    reason="this torch saves functions of Inductor's alone, if any",
)
@pytest.mark.parametrize("grad", [False, True])
def test_a_function_in_a_file(tmp_path, grad):
    """``aot_compile`` is torch's own file format of what the cache keeps."""
    module = nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3)).to(DEVICE)

    def step(f):
        loss = f(module, rand(8, 16)).square().sum()
        return torch.autograd.grad(loss, list(module.parameters())) if grad else [loss]

    def called(module, x):
        return module(x)

    file = tmp_path / "function"
    with torch.set_grad_enabled(grad), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Graph, "kernels", lambda self: Binaries("its kernels", {}))
        compiled = torch.compile(called, fullgraph=True, backend=Gems())
        compiled = compiled.aot_compile(((module, rand(8, 16)), {}))
        compiled.save_compiled_function(str(file))
        assert b"its kernels" in file.read_bytes()
        torch._dynamo.reset()
        with file.open("rb") as data, pytest.MonkeyPatch.context() as patch:
            patch.setattr(pipeline.Compilation, "__init__", _not_again)
            loaded = torch.compiler.load_compiled_function(data)
            torch.manual_seed(1)
            found = step(loaded)
        torch.manual_seed(1)
        for one, two in zip(found, step(called), strict=True):
            torch.testing.assert_close(one, two)


@pytest.mark.parametrize("dynamic", [False, True])
def test_kernels_written_as_a_whole(dynamic: bool, monkeypatch) -> None:
    """A ResNet's first layers, whose convolution is a kernel of ours."""
    monkeypatch.setattr(images, "were_measured", lambda target: True)
    layout = torch.channels_last

    def make() -> nn.Module:
        torch.manual_seed(0)
        module = nn.Sequential(nn.Conv2d(3, 16, 7, 2, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        return module.to(DEVICE, torch.bfloat16, memory_format=layout)

    def step(module: nn.Module) -> list[torch.Tensor]:
        x = rand(3, 3, 18, 20, dtype=torch.bfloat16).contiguous(memory_format=layout)
        if dynamic:
            torch._dynamo.mark_dynamic(x, 0)
        y = module(x)
        y.float().square().sum().backward()
        return [y, *gradients(module)]

    first, _ = same(step, make)
    names = [source.name for report in first for source in report.sources]
    assert {"image_convolution", "image_weight_parts"} <= set(names)
