"""Mixed programs, sizes and modes for minutes: results stay right, and memory stays flat.

    python -m benchmarks.soak [--seconds 300] [--modes default,reduce-overhead] [--json FILE]

Each turn takes a program, a mode and a size at random, runs it compiled and in eager mode on the
same inputs and state, and compares results, gradients and what was written. Memory is what torch
has allocated and reserved on the device between turns, and the process's own on the host. It is
compared between the second fifth of the time, when every size has been met, and the last.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIZES = (3, 8, 17, 32, 50, 64)
WORST = 1e-3  # ||compiled - eager|| / ||eager||; convolutions may use TF32
MORE_DEVICE, MORE_HOST = 2**20, 48 * 2**20  # bytes that are no growth
SHARE = 1.02


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(64, 256), nn.Linear(256, 64), nn.LayerNorm(64)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.down(F.gelu(self.up(x))))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(64, 192), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 16)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(y.transpose(1, 2).flatten(2))


class Images(nn.Module):
    """With SiLU: a ReLU's gradient jumps, and where the last bit of what it is given decides, all
    of a turn's gradients differ (eager mode's own in float32 from float64: 1 turn of 600)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.silu(self.norm(self.stem(x))).mean((2, 3)))


class Cache(nn.Module):
    """A step of decoding, which writes a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("keys", torch.zeros(2, 64, 32))
        self.register_buffer("place", torch.zeros(1, dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        keys, place = self.get_buffer("keys"), self.get_buffer("place")
        keys.index_copy_(1, place, x.mean(1, keepdim=True).expand(2, 1, 32))
        place.add_(1).remainder_(64)
        return (x[:1] @ keys.transpose(1, 2)).softmax(-1) @ keys


@dataclass(frozen=True)
class Program:
    module: Callable[[], nn.Module]
    shape: Callable[[int], tuple[int, ...]]
    trains: bool


PROGRAMS = {
    "perceptron": Program(Perceptron, lambda n: (n, 64), True),
    "attention": Program(Attention, lambda n: (2, n, 64), True),
    "images": Program(Images, lambda n: (max(2, n // 4), 3, 16, 16), True),
    "cache": Program(Cache, lambda n: (2, n, 32), False),
}


class Subject:
    """One program in one mode, beside a twin that stays in eager mode."""

    def __init__(self, program: Program, mode: str, device: torch.device) -> None:
        self.program, self.device = program, device
        self.module = program.module().to(device)
        self.twin = copy.deepcopy(self.module)
        self.compiled = torch.compile(self.module, backend="gems", mode=mode, dynamic=True)

    def turn(self, size: int) -> float:
        """The largest error of anything that the call makes or writes."""
        x = torch.randn(self.program.shape(size), device=self.device)
        found, wanted = self._run(self.compiled, self.module, x), self._run(self.twin, self.twin, x)
        errors = [
            ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-12)).item()
            for a, b in zip(found, wanted, strict=True)
        ]
        self.twin.load_state_dict(self.module.state_dict())
        return max(errors)

    def _run(self, call: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor) -> list[Tensor]:
        with torch.set_grad_enabled(self.program.trains):
            y = call(x)
        grads: list[Tensor] = []
        if self.program.trains:
            weights = torch.arange(y.numel(), device=y.device).cos().view_as(y)
            grads = list(torch.autograd.grad((y * weights).sum(), list(module.parameters())))
        return [y.detach(), *grads, *(b.detach().clone() for b in module.buffers())]


@dataclass
class Memory:
    """Bytes, by kind; ``at`` is in seconds."""

    at: float
    bytes: dict[str, int] = field(default_factory=dict)


def memory(at: float, device: torch.device) -> Memory:
    gc.collect()
    found = {"host": _resident()}
    if device.type == "cuda":
        torch.cuda.synchronize()
        found["allocated"] = torch.cuda.memory_allocated()
        found["reserved"] = torch.cuda.memory_reserved()
    return Memory(at, found)


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def growth(seen: list[Memory], seconds: float) -> list[str]:
    """What grew from the second fifth of the time to the last, in words."""
    early = [m for m in seen if seconds / 5 <= m.at < 2 * seconds / 5]
    late = [m for m in seen if m.at >= 4 * seconds / 5]
    if not early or not late:
        return ["too few turns to tell whether memory grows"]
    grown = []
    for kind in early[0].bytes:
        before = max(m.bytes[kind] for m in early)
        after = max(m.bytes[kind] for m in late)
        more = MORE_HOST if kind == "host" else MORE_DEVICE
        if after > before * SHARE + more:
            grown.append(f"{kind} memory: {before / 2**20:.1f} -> {after / 2**20:.1f} MiB")
    return grown


def soak(seconds: float, modes: list[str], device: torch.device, seed: int) -> dict[str, Any]:
    """Turns until the time is over; what went wrong is in ``failures``."""
    choose = random.Random(seed)
    torch.manual_seed(seed)
    subjects = {
        (name, mode): Subject(program, mode, device)
        for name, program in PROGRAMS.items()
        for mode in modes
    }
    start, told = time.monotonic(), 0.0
    seen: list[Memory] = []
    failures: list[str] = []
    turns, worst = 0, 0.0
    while (now := time.monotonic() - start) < seconds:
        (name, mode), size = choose.choice(list(subjects)), choose.choice(SIZES)
        error = subjects[name, mode].turn(size)
        turns, worst = turns + 1, max(worst, error)
        if not error <= WORST:  # NaN included
            failures.append(f"{name}, {mode}, size {size}, turn {turns}: error {error:.1e}")
        if now - told >= seconds / 40:
            told = now
            seen.append(memory(now, device))
            sizes = ", ".join(f"{k} {v / 2**20:.1f}" for k, v in seen[-1].bytes.items())
            print(f"{now:6.1f} s  {turns:7d} turns  error {worst:.1e}  MiB: {sizes}", flush=True)
    failures += growth(seen, seconds)
    return {"turns": turns, "worst": worst, "failures": failures, "memory": [vars(m) for m in seen]}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--modes", default="default,reduce-overhead", help="comma list")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=random.randrange(2**31))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    print(f"seed {args.seed}")
    found = soak(args.seconds, args.modes.split(","), torch.device(args.device), args.seed)
    for failure in found["failures"]:
        print(f"FAILED {failure}")
    print(f"{found['turns']} turns, largest error {found['worst']:.1e}")
    if args.json:
        args.json.write_text(json.dumps({**vars(args), "json": str(args.json), **found}, indent=1))
    return bool(found["failures"])


if __name__ == "__main__":
    sys.exit(main())
