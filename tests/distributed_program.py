"""One of several processes that train a model together: see ``test_distributed.py``.

``distributed_program.py RANK RANKS FILE``; FILE is where the processes find each other. Prints how
far the parameters are from those that eager PyTorch reached, how many graphs were compiled, and how
many calls of eager mode were ours.
"""

import os
import sys

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # torch._dynamo imports triton, which reads it

import copy
import json
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import gems_compile
from gems_compile.backend import Gems

STEPS = 3


class Model(nn.Module):
    """A megabyte and more to each block, so that its gradients travel in several buckets."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(256), nn.Linear(256, 768), nn.GELU(), nn.Linear(768, 256))
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def train(model: nn.Module, batches: list[Tensor], run: Any = None) -> list[Tensor]:
    """The parameters after some steps of SGD; ``run`` is the model, compiled."""
    call = model if run is None else run
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for x in batches:
        optimizer.zero_grad()
        call(x).square().mean().backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def farthest(found: list[Tensor], wanted: list[Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(found, wanted, strict=True))


def main(rank: int, ranks: int, file: str) -> None:
    gpus = torch.cuda.device_count()
    device = torch.device("cuda", rank % gpus) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
    kind = "nccl" if gpus >= ranks else "gloo"
    dist.init_process_group(kind, init_method=f"file://{file}", rank=rank, world_size=ranks)
    torch.manual_seed(0)
    first = Model().to(device)
    torch.manual_seed(rank + 1)  # each has batches of its own
    batches = [torch.randn(4, 256, device=device) for _ in range(STEPS)]

    def shared(model: nn.Module) -> DistributedDataParallel:
        ids = [device.index] if gpus else None
        return DistributedDataParallel(model, device_ids=ids, bucket_cap_mb=1)

    wanted = train(shared(copy.deepcopy(first)), batches)
    backend = Gems()
    model = shared(copy.deepcopy(first))
    around = train(model, batches, torch.compile(model, backend=backend))
    graphs = len(backend.reports)
    within = train(shared(torch.compile(copy.deepcopy(first), backend=backend)), batches)
    with gems_compile.use_gems(all=True):
        eager = train(shared(copy.deepcopy(first)), batches)
    found = {
        "eager": farthest(eager, wanted),
        "served": sum(row["ours"] for row in gems_compile.eager.stats().values()),
        "around": farthest(around, wanted),
        "within": farthest(within, wanted),
        "alone": farthest(train(copy.deepcopy(first), batches), wanted),
        "graphs": graphs,
        "kernels": sum(report.kernels for report in backend.reports),
    }
    print(json.dumps(found), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
