"""What stands for torch's CUDA graph trees on a machine without a GPU.

A replay has the graph's own memory: inputs that are not static are copied into it, and results
lie in it until the next replay writes over them.
"""

from __future__ import annotations

from typing import Any

import torch


class FakeTrees:
    index = 0

    def __init__(self) -> None:
        self.now, self.waits, self.in_capture, self.in_use = 1, [], False, False
        self.graphs: list[FakeGraph] = []

    @property
    def replays(self) -> int:
        return sum(g.replays for g in self.graphs)

    def wrap(
        self, model: Any, example: list[Any], static: list[int], kind: str, results: int
    ) -> FakeGraph:
        self.graphs.append(FakeGraph(model, static, kind, results))
        return self.graphs[-1]

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
