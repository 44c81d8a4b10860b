"""A program that plans models' graphs as on a GPU, where there is none, and prints as JSON what
became of each: torch traces other graphs for a CUDA device than for a CPU.

It runs with ``pretended_gpu.cpp`` loaded. Nothing is launched, and no kernel is compiled.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from gems_compile import backend
from gems_compile.kernels.target import Target
from gems_compile.lowering.pipeline import Compilation

H100 = Target("nvidia", "cuda", "a GPU", "cuda", 90, 32, 132, shared=227 * 1024)
GPU = torch.device("cuda", 0)


class Planned(Exception):
    """Nothing runs."""


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        sizes = (width * 4, width, 1), (width, width, 3), (width, width * 4, 1)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, k, 1, k // 2, bias=False) for a, b, k in sizes)
        self.norms = nn.ModuleList(nn.BatchNorm2d(b) for _, b, _ in sizes)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for k, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            y = norm(conv(y))
            y = y.relu() if k < 2 else (y + x).relu()
        return y


class ResNet(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width * 4, 7, 2, 3, bias=False)
        self.norm, self.pool = nn.BatchNorm2d(width * 4), nn.MaxPool2d(3, 2, 1)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(4)))
        self.head = nn.Linear(width * 4, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.pool(self.norm(self.stem(x)).relu()))
        return self.head(x.mean((2, 3)))


class Layer(nn.Module):
    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.one, self.two = nn.RMSNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.gate, self.up = (nn.Linear(width, 4 * width, bias=False) for _ in range(2))
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.one(x)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + F.dropout(self.out(y.transpose(1, 2).flatten(2)), 0.1, self.training)
        y = self.two(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Decoder(nn.Module):
    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.words, self.layers = (
            nn.Embedding(1001, width),
            nn.Sequential(*(Layer() for _ in range(3))),
        )
        self.head = nn.Linear(width, 1001, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.words(x)))


def images() -> Tensor:
    return torch.randn(64, 3, 64, 64).bfloat16().to(memory_format=torch.channels_last)


def words() -> Tensor:
    return torch.randint(1001, (4, 128))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], bool]] = {
    "resnet": (ResNet, images, True),
    "resnet, inference": (ResNet, images, False),
    "decoder": (Decoder, words, True),
    "decoder, inference": (Decoder, words, False),
    "decoder, one word": (Decoder, lambda: words()[:1, :1], False),
}
found: list[dict[str, Any]] = []


def on_the_gpu(tensor: Any) -> Any:
    """What stands for a tensor while torch traces, on the GPU."""
    if not isinstance(tensor, Tensor):
        return tensor
    context = torch._guards.TracingContext.get()
    with context.fake_mode:
        made = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=GPU)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(made, requires_grad=tensor.requires_grad)
    return made.requires_grad_(tensor.requires_grad)


def moved(a: Any) -> Any:
    return GPU if isinstance(a, torch.device) else a


def through_aot(self: Any, gm: Any, inputs: Sequence[Any], compiler: Any) -> Any:
    for node in gm.graph.nodes:
        node.args, node.kwargs = tree_map(moved, node.args), tree_map(moved, dict(node.kwargs))
    gm.recompile()
    return whole(self, gm, [on_the_gpu(x) for x in inputs], compiler)


def plan(gm: Any, inputs: Any, options: Any, report: Any, *more: Any) -> Any:
    """In place of a compile: without workers, and without what runs."""
    options = replace(options, target=H100, threads=0, strict=False)
    error = ""
    try:
        Compilation(gm, options, report)
    except Exception as e:
        error = f"{type(e).__name__}: {e}"
    failures = [*report.failures, *([error] if error else [])]
    found.append({"kind": report.kind, "launches": report.launches, "failures": failures})

    def run(args: list[Any]) -> Any:
        raise Planned

    run._boxed_call = True  # type: ignore[attr-defined]
    return run, lambda **kind: ""


whole = backend._Front._through_aot
backend._Front._through_aot = through_aot  # type: ignore[method-assign]
backend._compile_one = plan
backend.current_target = lambda vendor=None: H100


def main() -> None:
    for name, (make, inputs, trains) in MODELS.items():
        found.clear()
        model = make().bfloat16().to(memory_format=torch.channels_last).train(trains)
        torch._dynamo.reset()
        with torch.set_grad_enabled(trains):
            try:
                torch.compile(model, backend="gems", options={"cache": False})(inputs())
            except Exception as e:
                planned = "Planned" in f"{type(e)} {e}"
                error = [] if planned else [f"{type(e).__name__}: {e}"]
        print(json.dumps({"model": name, "graphs": found, "error": error}), flush=True)


if __name__ == "__main__":
    sys.exit(main())
