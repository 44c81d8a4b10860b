"""Several GPUs in one process: every call runs on its operands' device, whichever is current."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers import gems_only
from torch import Tensor, nn

import gems_compile
from gems_compile.backend import Gems

pytestmark = [
    gems_only,
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
NEAR = {"rtol": 1e-4, "atol": 1e-5}
NARROW = {"rtol": 2e-2, "atol": 2e-2}


class Model(nn.Module):
    """Matrix products, a norm, a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(64), nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


@pytest.fixture(autouse=True)
def _the_first_is_current():
    torch.cuda.set_device(0)
    yield
    assert torch.cuda.current_device() == 0
    torch.cuda.synchronize(0)
    torch.cuda.synchronize(1)


def on(index: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(f"cuda:{index}", dtype)


def trained(run: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor) -> list[Tensor]:
    """The result and all gradients."""
    model.zero_grad()
    y = run(x)
    y.square().mean().backward()
    return [y.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, NEAR), (torch.bfloat16, NARROW)])
def test_a_model_on_the_second(mode: str, dtype: torch.dtype, near: dict[str, float]) -> None:
    """bfloat16's products are launched by ours, and have a workspace on each device."""
    model = Model().to("cuda:1", dtype)
    run = torch.compile(copy.deepcopy(model), backend="gems", mode=mode, fullgraph=True)
    for _ in range(4):  # under CUDA graphs: warmed up, recorded, replayed
        x = on(1, 32, 64, dtype=dtype)
        torch.compiler.cudagraph_mark_step_begin()
        found = trained(run, run, x)
        assert all(t.device.index == 1 for t in found)
        torch.testing.assert_close(found, trained(model, model, x), **near)


def test_one_function_on_both_in_turn() -> None:
    """Kernels are loaded on each device, from one compile of each."""
    backend = Gems()
    run = torch.compile(lambda x, w: F.softmax(x * 2 + w, -1), backend=backend, fullgraph=True)
    for _ in range(3):
        for index in (0, 1):
            x, w = on(index, 33, 70), on(index, 70)
            torch.testing.assert_close(run(x, w), F.softmax(x * 2 + w, -1), **NEAR)
    keys = [{s.key for s in report.sources} for report in backend.reports]
    assert len(keys) == 2 and keys[0] == keys[1]


def test_a_thread_for_each() -> None:
    model = Model().eval()
    models = [copy.deepcopy(model).to(f"cuda:{k}") for k in (0, 1)]
    runs = [torch.compile(m, backend="gems") for m in models]
    inputs = [[on(k, 48, 64) for _ in range(40)] for k in (0, 1)]
    found: list[list[Tensor]] = [[], []]
    failed: list[BaseException] = []

    def work(k: int) -> None:
        try:
            torch.cuda.set_device(1 - k)  # the other's
            with torch.no_grad():
                found[k] = [runs[k](x) for x in inputs[k]]
            assert torch.cuda.current_device() == 1 - k
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(k,)) for k in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed
    with torch.no_grad():
        for k in (0, 1):
            torch.cuda.synchronize(k)
            torch.testing.assert_close(found[k], [models[k](x) for x in inputs[k]], **NEAR)


def test_a_stream_of_the_second() -> None:
    """The stream that is current on the operands' device is the one that kernels go to."""
    run = torch.compile(lambda x: (x * 2).sin() + 1, backend="gems", fullgraph=True)
    x = on(1, 1 << 20)
    run(x)  # compiled
    stream = torch.cuda.Stream(1)
    stream.wait_stream(torch.cuda.default_stream(1))
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # what comes next on this stream must wait
        source = x + 1
        torch.cuda.set_device(0)
        y = run(source)
    stream.synchronize()
    torch.testing.assert_close(y, ((x + 1) * 2).sin() + 1, **NEAR)


def test_a_graph_of_both() -> None:
    """Half of a model on each device: what is not on the graph's first is ATen's."""

    def fn(x: Tensor, w: Tensor) -> Tensor:
        there = torch.relu(x * 3 + 1).to("cuda:1")
        return torch.sigmoid(there + w) * 2

    backend = Gems()
    run = torch.compile(fn, backend=backend, fullgraph=True)
    x, w = on(0, 65, 40), on(1, 40)
    torch.testing.assert_close(run(x, w), fn(x, w), **NEAR)
    x = x.requires_grad_()
    (found,) = torch.autograd.grad(run(x, w).sum(), x)
    (wanted,) = torch.autograd.grad(fn(x, w).sum(), x)
    torch.testing.assert_close(found, wanted, **NEAR)


def test_dropout_draws_from_the_generator_of_its_device() -> None:
    run = torch.compile(lambda x: F.dropout(x, 0.5) * 2, backend="gems", fullgraph=True)
    x = torch.ones(4096, device="cuda:1")
    run(x)
    torch.manual_seed(3)
    here = torch.cuda.get_rng_state(0)
    first, second = run(x), run(x)
    assert torch.equal(here, torch.cuda.get_rng_state(0)), "drawn on another device"
    torch.manual_seed(3)
    assert torch.equal(first, run(x)) and not torch.equal(first, second)


def test_an_optimizer_step_on_the_second() -> None:
    params = [on(1, *shape) for shape in ((64, 64), (64,), (17, 5))]
    mine = [p.clone().requires_grad_() for p in params]
    theirs = [p.clone().requires_grad_() for p in params]
    grads = [torch.randn_like(p) for p in params]
    ours, eager = (torch.optim.AdamW(list(ps), lr=0.1) for ps in (mine, theirs))
    step = torch.compile(ours.step, backend="gems")
    for _ in range(3):
        for ps in (mine, theirs):
            for p, g in zip(ps, grads, strict=True):
                p.grad = g.clone()
        step()
        eager.step()
    torch.testing.assert_close(mine, theirs, **NEAR)


def test_eager_kernels_on_the_second() -> None:
    x = on(1, 4096, 512)
    y = on(0, 4096, 512)
    calls: list[Callable[[Tensor], Tensor]] = [
        lambda t: torch._softmax(t, -1, False),
        F.gelu,
        lambda t: t.sum([0]),
    ]
    served: list[str] = []
    names = ["_softmax", "gelu", "sum.dim_IntList"]
    with gems_compile.use_gems(only=names, record=served.append):
        found = [[call(t) for call in calls] for t in (x, y, x)]
    assert sorted(served) == sorted(names)
    for results, t in zip(found, (x, y, x), strict=True):
        assert all(r.device == t.device for r in results)
        torch.testing.assert_close(results, [call(t) for call in calls], **NEAR)
