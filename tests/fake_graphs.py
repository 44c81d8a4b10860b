"""What stands for torch's CUDA graph trees on a machine without a GPU.

A replay has the graph's own memory: inputs that are not static are copied into it, and results
lie in it until the next replay writes over them.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE, rand
from torch import nn

from gems_compile.backend import Gems
from gems_compile.lowering import capturable, captured

ON_GPU = DEVICE == "cuda"
NEAR = {"rtol": 1e-4, "atol": 1e-4}
gpu_only = pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
cpu_only = pytest.mark.skipif(ON_GPU, reason="looks into what stands for the trees")


class FakeTrees:
    index = 0

    def __init__(self) -> None:
        self.now, self.waits, self.in_capture, self.in_use = 1, [], False, False
        self.graphs: list[FakeGraph] = []

    @property
    def replays(self) -> int:
        return sum(g.replays for g in self.graphs)

    def first(
        self, model: Any, args: list[Any], static: list[int], kind: str, results: int
    ) -> tuple[FakeGraph, list[Any]]:
        self.graphs.append(FakeGraph(model, static, kind, results))
        return self.graphs[-1], self.graphs[-1](args)

    def would_overwrite(self) -> bool:
        return self.in_use

    def holds(self) -> bool:
        return self.in_use

    def capturing(self) -> bool:
        return self.in_capture

    def stream(self) -> int:
        return self.now

    def wait_for(self, stream: int) -> None:
        self.waits.append((self.now, stream))


class FakeGraph:
    """Warmed up by its first call, recorded by the second, replayed from then on."""

    def __init__(self, model: Any, static: list[int], kind: str, count: int) -> None:
        self.model, self.static, self.kind, self.count = model, set(static), kind, count
        self.calls = self.recorded = self.replays = 0
        self.buffers: list[torch.Tensor] = []
        self.results: list[Any] = []
        self.copied: list[int] = []

    def __call__(self, args: list[Any]) -> list[Any]:
        self.calls += 1
        if self.calls == 1:
            return list(self.model(args))
        if not self.recorded or self._moved(args):
            return self._record(args)
        self.replays += 1
        for k in self.copied:
            assert self.buffers[k].shape == args[k].shape, "a graph for other sizes"
            self.buffers[k].copy_(args[k])
        args.clear()
        for kept, fresh in zip(self.results, self.model(list(self.buffers)), strict=True):
            if isinstance(kept, torch.Tensor):
                kept.copy_(fresh)
        return list(self.results)

    def _moved(self, args: list[Any]) -> bool:
        return any(args[k].data_ptr() != self.buffers[k].data_ptr() for k in self.static)

    def _record(self, args: list[Any]) -> list[Any]:
        self.recorded += 1
        assert all(isinstance(a, torch.Tensor) for a in args), "a graph takes tensors"
        self.copied = [k for k in range(len(args)) if k not in self.static]
        self.buffers = [a if k in self.static else a.clone() for k, a in enumerate(args)]
        args.clear()
        given = list(self.buffers)
        self.results = list(self.model(given))
        assert len(self.results) == self.count
        assert not given, "the list is the callee's to clear"
        return list(self.results)


class Counter:
    """How many graphs were replayed."""

    def __init__(self) -> None:
        self.replays = 0


def watched(monkeypatch: pytest.MonkeyPatch):
    """What captures, for a fixture; any stretch is long enough."""
    monkeypatch.setattr(capturable, "REPLAY", 0.0)
    if not ON_GPU:
        fake = FakeTrees()
        monkeypatch.setattr(captured, "machinery", lambda device: (fake, ""))
        yield fake
        return
    counter, replay = Counter(), torch.cuda.CUDAGraph.replay

    def counted(graph):
        counter.replays += 1
        return replay(graph)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", counted)
    with torch.cuda.device(0):
        yield counter


def compiled(fn, dynamic=None, **options):
    backend = Gems(fresh=True)
    made = torch.compile(
        fn, backend=backend, dynamic=dynamic, options={"cudagraphs": True, **options}
    )
    return made, backend


def told(backend: Gems) -> str:
    return "\n".join(line for r in backend.reports for line in r.captures.told())


class MLP(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(16, 32), nn.Linear(32, 16), nn.LayerNorm(16)
        self.dropout = dropout

    def forward(self, x):
        h = F.dropout(F.gelu(self.up(self.norm(x))), self.dropout, self.training)
        return x + self.down(h)


def train_like_default(trees) -> None:
    """Steps of training are those of default mode."""
    model = MLP().to(DEVICE)
    other = copy.deepcopy(model)
    run, _ = compiled(model)
    plain = torch.compile(other, backend=Gems(fresh=True))
    steps = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, other)]
    losses = []
    for _ in range(6):
        x = rand(8, 16)
        pair = []
        for fn, optimizer in zip((run, plain), steps, strict=True):
            loss = fn(x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            pair.append(loss.detach())
        losses.append(pair)
    for found, wanted in losses:
        torch.testing.assert_close(found, wanted, **NEAR)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, **NEAR)
    assert trees.replays >= 6
