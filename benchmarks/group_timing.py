"""Device time of a call: that of a CUDA graph, so no host work is in it.

One graph holds a few calls, another the same without them; a call's time is the difference of the
two replays, over the calls. Before and after each call, in both graphs, twice the L2 cache is read.
So a call finds its inputs in memory, as in a model whose other layers have run in between, and what
it leaves in the cache to be written back is charged to it: reading leaves nothing of its own.
Rotating the inputs instead would need as many copies of all that a call touches, what backward
saved included, as fill the cache twice, and large inputs would still meet the tail of the last
call.

A call that draws random numbers is timed in the stream's queue instead (``queued_us``), with the
same differences: a graph draws otherwise, from a generator's state on the device.

Where capture fails, the times of the kernels from torch.profiler are added up ("profiler"). On a
CPU it is wall clock ("wall").
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from itertools import pairwise

import torch

from benchmarks import timing
from benchmarks.table import Row

MAX_CALLS, GRAPH_SECONDS = 10, 0.004  # in one graph
MIN_REPLAYS, PROFILED = 7, 5
MOST_AHEAD = 2**10  # calls that keep the GPU busy


#: ATen's own kernel, whoever replaces it while something is timed
_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
_SUM = (
    torch.library.get_kernel("aten::sum.dim_IntList", "CUDA") if torch.cuda.is_available() else None
)


class Flush:
    """Reads twice the L2 cache's size, by a kernel of ATen's: sums of rows. A sum of all clears a
    counter first, for which what came before it in a graph took 1.5 us longer (H200)."""

    ROW = 8192

    def __init__(self, device: torch.device) -> None:
        size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
        self.buffer = torch.ones(-(-size // (4 * self.ROW)), self.ROW, device=device)

    def __call__(self) -> None:
        assert _SUM is not None, "there was no GPU when this was imported"
        _SUM.call_boxed(_KEYS, self.buffer, [1])


def captured(*bodies: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """A CUDA graph, with a memory pool of its own, of the bodies in turn.

    Captured on the current stream, on which autograd also runs the backward of what ran there.
    """
    graph = torch.cuda.CUDAGraph()
    here = torch.cuda.current_stream()
    with torch.cuda.graph(graph, stream=here, capture_error_mode="thread_local"):
        for body in bodies:
            body()
    return graph


def elapsed_ms(*bodies: Callable[[], object]) -> list[float]:
    """Milliseconds between device events around each."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(bodies) + 1)]
    marks[0].record()
    for body, mark in zip(bodies, marks[1:], strict=True):
        body()
        mark.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in pairwise(marks)]


def graph_us(run: Callable[[], object], flush: Flush, seconds: float) -> Row:
    """Microseconds of a call within a CUDA graph, inputs in memory; see above."""
    (once,) = elapsed_ms(run)
    calls = max(1, min(MAX_CALLS, int(GRAPH_SECONDS * 1e3 / once)))
    bodies: list[Callable[[], object]] = [flush, run]
    full, bare = captured(*bodies * calls, flush), captured(*[flush] * (calls + 1))
    elapsed_ms(full.replay, bare.replay)
    times: list[float] = []
    spent = 0.0
    while spent < seconds * 1e3 or len(times) < MIN_REPLAYS:
        both, rest = elapsed_ms(full.replay, bare.replay)
        times.append((both - rest) / calls * 1e3)
        spent += both + rest
        if spent > 4e3 * seconds:
            break
    return _row(times, calls)


def _row(times: list[float], calls: int) -> Row:
    us = statistics.median(times)
    if us <= 0:
        raise RuntimeError(
            "the GPU is busy with another program: no difference of times is a call's"
        )
    return {"us": us, "best_us": min(times), "calls": len(times) * calls}


def queued_us(run: Callable[[], object], flush: Flush, seconds: float) -> Row:
    """The same where the calls wait in the stream's queue, behind others that keep it busy."""
    (once,) = elapsed_ms(run)
    calls = max(1, min(MAX_CALLS, int(GRAPH_SECONDS * 1e3 / once)))
    bodies: list[Callable[[], object]] = [flush, run]
    times: list[float] = []
    spent, ahead = 0.0, 1
    while spent < seconds * 1e3 or len(times) < MIN_REPLAYS:
        both, ahead = queued_ms([*bodies * calls, flush], flush, ahead)
        rest, ahead = queued_ms([flush] * (calls + 1), flush, ahead)
        times.append((both - rest) / calls * 1e3)
        spent += both + rest
        if spent > 4e3 * seconds:
            break
    return _row(times, calls)


def queued_ms(bodies: list[Callable[[], object]], flush: Flush, ahead: int) -> tuple[float, int]:
    """Milliseconds of the bodies in turn, all in the queue before the first of them begins; how
    many calls of ``flush`` ahead of them that took, at least ``ahead``."""
    while ahead <= MOST_AHEAD:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(ahead):
            flush()
        begin.record()
        for body in bodies:
            body()
        end.record()
        in_time = not begin.query()
        torch.cuda.synchronize()
        if in_time:
            return begin.elapsed_time(end), ahead
        ahead *= 2
    raise RuntimeError("the CPU is slower than the GPU, whatever the GPU does before")


def profiled_us(run: Callable[[], object], flush: Flush) -> Row:
    """Microseconds of a call's kernels, copies and fills, added up."""
    times = []
    for _ in range(PROFILED):
        flush()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
            run()
            torch.cuda.synchronize()
        times.append(sum(event.self_device_time_total for event in seen.key_averages()))
    return {"us": statistics.median(times), "best_us": min(times), "calls": PROFILED}


def timed(
    run: Callable[[], object], device: torch.device, seconds: float, random: bool = False
) -> Row:
    """Microseconds a call and how they were found; ``random``: it draws random numbers."""
    if device.type != "cuda":
        found = timing.measure(run, device, min_seconds=seconds)
        best = {"best_us": found.best_ms * 1e3, "calls": found.steps}
        return {"us": found.median_ms * 1e3, **best, "how": "wall"}
    flush = Flush(device)
    for _ in range(timing.WARM_UP_STEPS):
        run()
    try:
        if random:
            return {**queued_us(run, flush, seconds), "how": "queue"}
        return {**graph_us(run, flush, seconds), "how": "graph"}
    except Exception as error:
        torch.cuda.synchronize()  # raises where the device is lost
        captured(flush)  # else the device's generator counts for the capture that failed
        return {**profiled_us(run, flush), "how": "profiler", "not_captured": str(error)[:300]}
