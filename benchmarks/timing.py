"""Steady-state time of a step: wall clock per step over batches that end in one synchronise.

Wall clock, not device events: a step whose host work outlasts its kernels is as slow as the user
sees it. One synchronise per batch, not per step, lets the host run ahead as it does in use.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

WARM_UP_STEPS = 3  # CUDA graph trees warm up, record, then replay
MIN_STEPS = 20
BATCH_SECONDS = 0.03  # a synchronise costs about 10 us: 0.03 % of a batch


@dataclass(frozen=True)
class Timing:
    """Milliseconds per step: median and fastest batch, and how many steps were timed."""

    median_ms: float
    best_ms: float
    steps: int


def synchronize(device: torch.device | str) -> None:
    """Wait for the device; nothing to wait for on a CPU."""
    device = torch.device(device)
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def seconds(fn: Callable[[], object], device: torch.device | str, steps: int = 1) -> float:
    """Seconds per call over ``steps`` calls that end in one synchronise."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(steps):
        fn()
    synchronize(device)
    return (time.perf_counter() - start) / steps


def side_by_side(
    fns: Mapping[str, Callable[[], object]],
    device: torch.device | str,
    min_seconds: float = 1.0,
    max_iters: int = 10_000,
    prepare: Callable[[], object] = lambda: None,
    max_batch: int = 64,
) -> dict[str, Timing]:
    """Time several steps in turns, a batch of each, so that drift of clocks meets all alike.

    ``prepare`` runs untimed before each batch, and a batch has at most ``max_batch`` steps: a KV
    cache is wound back there. Each fn gets ``MIN_STEPS`` steps and ``min_seconds``; a fn so slow
    that its minimum would take four times ``min_seconds`` stops there.
    """
    sizes = {}
    for name, fn in fns.items():
        prepare()
        once = min(seconds(fn, device) for _ in range(min(WARM_UP_STEPS, max_batch)))
        slow = once > min_seconds / 4
        batch = 1 if slow else max(2, math.ceil(BATCH_SECONDS / max(once, 1e-9)))
        sizes[name] = min(batch, max_batch, max_iters)
    batches: dict[str, list[float]] = {name: [] for name in fns}
    running = set(fns)
    while running:
        for name in sorted(running):
            prepare()
            size, times = sizes[name], batches[name]
            times.append(seconds(fns[name], device, size))
            spent, steps = sum(times) * size, len(times) * size
            enough = spent >= min_seconds and steps >= MIN_STEPS
            if enough or spent >= 4 * min_seconds or steps >= max_iters:
                running.discard(name)
    return {
        name: Timing(
            median_ms=statistics.median(times) * 1e3,
            best_ms=min(times) * 1e3,
            steps=len(times) * sizes[name],
        )
        for name, times in batches.items()
    }


def measure(fn: Callable[[], object], device: torch.device | str, **options: object) -> Timing:
    """``side_by_side`` of one fn, with the same options."""
    return side_by_side({"": fn}, device, **options)[""]  # type: ignore[arg-type]


def median_ms(
    fn: Callable[[], object],
    device: torch.device | str,
    min_seconds: float = 1.0,
    max_iters: int = 10_000,
) -> float:
    """Median milliseconds per call of ``fn`` after a warm-up."""
    return measure(fn, device, min_seconds=min_seconds, max_iters=max_iters).median_ms
