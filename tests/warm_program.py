"""A program that compiles a small Llama and prints, as JSON, what came of it; see
``test_warm_processes.py``. Arguments: train, infer or nothing; then artifacts to load, to save."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import torch
from torch import nn
from torch._dynamo.utils import compilation_time_metrics, counters

import gems_compile

#: what is loaded when a graph is compiled: torch's table of decompositions, our declarations
LATE = {"torch._inductor.decomposition", "gems_compile.kernels.scan"}
#: what is never loaded, for it takes half a second
INDUCTOR = {"torch._inductor.lowering", "torch._inductor.pattern_matcher"}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.after = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.gate, self.up, self.down = (nn.Linear(width, width) for _ in range(3))
        angles = torch.outer(torch.arange(8.0), 0.1 ** torch.arange(width // heads // 2))
        self.register_buffer("angles", torch.cat((angles, angles), -1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        parts = self.qkv(self.norm(x)).view(batch, length, 3, self.heads, -1)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        q, k = (t * self.angles.cos() + _turned(t) * self.angles.sin() for t in (q, k))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(batch, length, width))
        h = self.after(x)
        return x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))


def _turned(t: torch.Tensor) -> torch.Tensor:
    a, b = t.chunk(2, -1)
    return torch.cat((-b, a), -1)


def build() -> nn.Module:
    torch.manual_seed(0)
    layers = [Layer(16, 2) for _ in range(2)]
    ends = nn.Embedding(11, 16), nn.RMSNorm(16), nn.Linear(16, 11)
    return nn.Sequential(ends[0], *layers, *ends[1:]).to(DEVICE)


def step(model: nn.Module, train: bool) -> list[torch.Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(0, 11, (2, 8)).to(DEVICE)
    if not train:
        with torch.no_grad():
            return [model(ids)]
    loss = nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


def main(kind: str, load: str = "", save: str = "") -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    if load:
        torch.compiler.load_cache_artifacts(Path(load).read_bytes())
    model = build()
    found = step(torch.compile(model, backend="gems"), kind == "train")
    if save:
        artifacts = torch.compiler.save_cache_artifacts()
        assert artifacts is not None
        Path(save).write_bytes(artifacts[0])
    digest = hashlib.sha256(b"".join(t.cpu().numpy().tobytes() for t in found))
    reports = gems_compile.reports()
    told = {
        "digest": digest.hexdigest(),
        "cache": sorted({report.cache for report in reports}),
        "stages": sorted({stage for report in reports for stage in report.seconds}),
        "torch": sorted(name for name in compilation_time_metrics if "aot" in name),
        "counters": dict(counters["aot_autograd"]),
        "loaded": sorted(LATE & set(sys.modules)),
        "inductor": sorted(INDUCTOR & set(sys.modules)),
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main(*sys.argv[1:])
