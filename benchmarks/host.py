"""What the host spends: on a launch, and on a call that launches nothing.

    python -m benchmarks.host [--against inductor,aot_eager] [--json FILE]

Launches: a run of one small kernel again and again, natively and through Python, and the same
launches from C with nothing else around them: what the driver takes. Calls: whole compiled
functions by backend, the best turn of each. Batches fit in the device's queue, and are waited for
between timings. So are calls of eager PyTorch, with our kernels behind it and with ATen's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

BATCH = 512  # launches; the device queues 1024
BATCHES = 15
LENGTHS = (1, 8, 64)
TURNS = 9  # of each backend


def microseconds(launches: int, fn: Callable[..., object], *args: Any) -> float:
    """Of the host a call that makes so many launches, median over batches that the queue holds."""
    times = max(1, BATCH // launches)
    found = []
    for _ in range(BATCHES):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(times):
            fn(*args)
        found.append((time.perf_counter() - start) / times * 1e6)
    return statistics.median(found)


def small(x: torch.Tensor) -> torch.Tensor:
    return (x * 2 + 1).softmax(-1)


def chain(x: torch.Tensor) -> torch.Tensor:
    """Kernels that each need all of what the one before made."""
    for _ in range(8):
        x = torch.softmax(x * 2 + x.sum(0, keepdim=True), -1)
    return x


def launch_costs() -> dict[str, float]:
    """us a launch: of the driver, of native runs, and of the same in Python."""
    from gems_compile.config import cache_dir
    from gems_compile.lowering import native, runs

    native.start(cache_dir()).wait()
    known: list[tuple[runs.Run, Mapping[str, Callable[..., None]]]] = []
    bound = native.launcher

    def noted(
        run: runs.Run, kernels: Mapping[str, Callable[..., None]], device: torch.device
    ) -> Any:
        known.append((run, kernels))
        return bound(run, kernels, device)

    native.launcher = noted
    x = torch.randn(8, 64, device="cuda")
    torch.compile(small, backend="gems")(x)
    native.launcher = bound
    run, kernels = known[-1]
    values = [x if kind == runs.TENSOR else None for kind, _ in run.values]
    assert None not in values and len(run.launches) == 1  # one kernel of tensors
    stream = torch.cuda.current_stream().cuda_stream
    costs = {}
    for length in LENGTHS:
        longer = runs.Run(run.name, run.launches * length)
        call = bound(longer, kernels, x.device)
        assert call is not None, "there is no native launcher: see gems_compile doctor"
        python = runs.in_python([longer], kernels)[run.name]
        for what, fn, args in (
            ("native", call, (stream, *values)),
            ("python", python, (stream, *values)),
            ("driver", call.repeat, (stream, 1)),
        ):
            costs[f"{what}, run of {length}"] = microseconds(length, fn, *args) / length
    return costs


def call_costs(backends: list[str]) -> dict[str, float]:
    """us a call of compiled functions: one that launches nothing, one op, a chain of kernels.

    Backends take turns, for the host's speed changes from one second to the next.
    """
    x = torch.randn(64, 64, device="cuda")
    functions: dict[str, tuple[Callable[..., object], int]] = {
        "view": (lambda x: x.view(-1), 1),
        "add": (lambda x: x + 1, 1),
        "chain": (chain, 32),
    }
    costs: dict[str, float] = {}
    for name, (fn, launches) in functions.items():
        torch._dynamo.reset()
        made = {backend: torch.compile(_copy(fn), backend=backend) for backend in backends}
        found: dict[str, list[float]] = {backend: [] for backend in backends}
        with torch.no_grad():
            for _ in range(TURNS):
                for backend, compiled in made.items():
                    compiled(x)
                    found[backend].append(microseconds(launches, compiled, x))
        costs.update((f"{name}, {backend}", min(times)) for backend, times in found.items())
    return costs


#: calls of eager mode, and the overload that each comes to
EAGER: dict[str, tuple[str, Callable[[torch.Tensor], object]]] = {
    "torch.add(x, y)": ("add.Tensor", lambda x: torch.add(x, x)),
    "torch.add(x, 2)": ("add.Tensor", lambda x: torch.add(x, 2)),
    "torch.relu(x)": ("relu", torch.relu),
    "torch.sum(x, 1)": ("sum.dim_IntList", lambda x: torch.sum(x, 1)),
    "torch.amax(x, 1)": ("amax", lambda x: torch.amax(x, 1)),
    "torch.softmax(x, 1)": ("_softmax", lambda x: torch.softmax(x, 1)),
}


def eager_costs() -> dict[str, float]:
    """us a call of eager PyTorch, ATen's kernel and ours, the best of turns."""
    import gems_compile

    x = torch.randn(64, 64, device="cuda")
    costs: dict[str, float] = {}
    for name, (op, fn) in EAGER.items():
        found: dict[str, list[float]] = {"ATen": [], "gems": []}
        for _ in range(TURNS):
            for side, times in found.items():
                with torch.no_grad(), gems_compile.use_gems(only=[op] if side == "gems" else []):
                    fn(x)
                    times.append(microseconds(1, fn, x))
        costs.update((f"{name}, {side}", min(times)) for side, times in found.items())
    return costs


def _copy(fn: Any) -> Callable[..., object]:
    """A function with code of its own, which Dynamo compiles apart."""
    return types.FunctionType(fn.__code__.replace(), fn.__globals__, fn.__name__)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--against", default="aot_eager,inductor")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    costs = launch_costs()
    for name, cost in costs.items():
        print(f"{cost:8.2f} us a launch   {name}", flush=True)
    calls = eager_costs()
    calls |= call_costs(["gems", *filter(None, options.against.split(","))])
    for name, cost in calls.items():
        print(f"{cost:8.2f} us a call     {name}", flush=True)
    if options.json:
        device = torch.cuda.get_device_name()
        options.json.write_text(json.dumps({"device": device, **costs, **calls}, indent=1))


if __name__ == "__main__":
    main()
