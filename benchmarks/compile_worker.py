"""One compile: one model through one backend, in a process of its own; seconds, by stage.

A cold process finds empty caches, a warm one those that a cold one left behind. Compile seconds are
the first call less a steady one; imports and one eager step come before both.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import timing
from benchmarks.worker import build, compiled, graphs, serve, step_mark

STEADY_STEPS = 3
OWN = ("passes", "translate", "fuse", "emit", "wrapper", "bind")  # gems' stages that are Python
GEMS = (*OWN[:-1], "load", "triton", OWN[-1])  # all of gems' stages, as they run
LATE = ("triton", "bind")  # of those, what the first call of a graph waits for

# torch's names of what it times
WHOLE, HANDED = "_compile.compile_inner", "OutputGraph.call_user_compiler"
AOT = "create_aot_dispatcher_function"
INDUCTOR = "compile_fx.<locals>.fw_compiler_base", "compile_fx.<locals>.bw_compiler"


def torch_seconds() -> dict[str, float]:
    """What torch has timed so far, in seconds; empty where this torch keeps no such list."""
    known = getattr(torch._dynamo.utils, "compilation_time_metrics", {})
    return {name: sum(times) for name, times in known.items()}


@contextlib.contextmanager
def collecting() -> Iterator[list[float]]:
    """Seconds of each of Python's garbage collections in a stretch of time.

    They belong to no stage: a full one takes about 0.4 s of a process that holds a traced 16-layer
    Llama, whatever line it stops at.
    """
    found: list[float] = []
    start = 0.0

    def note(phase: str, info: dict[str, int]) -> None:
        nonlocal start
        if phase == "start":
            start = time.perf_counter()
        else:
            found.append(time.perf_counter() - start)

    gc.callbacks.append(note)
    try:
        yield found
    finally:
        gc.callbacks.remove(note)


def stages(spent: dict[str, float], reports: Iterable[Any], backend: str) -> dict[str, float]:
    """Seconds a stage, as far as they are known.

    Dynamo traces and guards; "entry" lies between Dynamo's graph and AOTAutograd (gems: import of
    its ops, rewrites, cache; Inductor: pre-grad passes, cache); AOT traces and partitions;
    "compiler" is the backend's own, of which gems tells the stages. What is compiled when it first
    runs lies outside Dynamo's time: Inductor's backward, and gems' wait for its kernels.
    """
    reports = list(reports)
    found: dict[str, float] = {}
    early = later = None  # the backend's seconds within AOTAutograd's, and after
    if backend == "gems":
        later = sum(r.seconds.get(stage, 0.0) for r in reports for stage in LATE)
        early = sum(sum(r.seconds.values()) for r in reports) - later
    elif backend == "inductor" and AOT in spent:
        early, later = (spent.get(name, 0.0) for name in INDUCTOR)
    if WHOLE in spent and HANDED in spent:
        found["Dynamo"] = spent[WHOLE] - spent[HANDED]
        found["entry"] = spent[HANDED] - spent.get(AOT, 0.0)
    if AOT in spent:
        found["AOT"] = spent[AOT] - (early or 0.0)
    if early is not None and later is not None:
        found["compiler"] = early + later
    for stage in GEMS if backend == "gems" else ():
        found[stage] = sum(r.seconds.get(stage, 0.0) for r in reports)
    return found


def counts(reports: Iterable[Any]) -> dict[str, Any]:
    """Of the graphs gems compiled: nodes as they came (inputs, calls, parts of tuples), calls that
    passes left, distinct kernels, launches, ATen calls, failures, and milliseconds of gems' own
    Python a node and a call."""
    reports = list(reports)
    nodes, calls = (sum(getattr(r, name) for r in reports) for name in ("given", "nodes"))
    own = sum(r.seconds.get(stage, 0.0) for r in reports for stage in OWN)
    return {
        "nodes": nodes,
        "calls": calls,
        "kernels": len({source.key for r in reports for source in r.sources}),
        "launches": sum(r.launches for r in reports),
        "aten_calls": sum(r.aten_calls for r in reports),
        "failures": [text for r in reports for text in r.failures],
        "cache": dict(Counter(r.cache for r in reports)),  # of whole graphs
        "own_ms_a_node": own * 1e3 / nodes if nodes else None,
        "own_ms_a_call": own * 1e3 / calls if calls else None,
    }


def gems_reports() -> list[Any]:
    """What became of each graph gems compiled; that there is none is an error."""
    import gems_compile

    reports = gems_compile.reports()
    if not reports:
        raise RuntimeError("gems compiled no graph: is there a GPU, or TRITON_INTERPRET=1?")
    return list(reports)


def measure(task: dict[str, Any], device: torch.device, row: dict[str, Any]) -> None:
    """Fill ``row`` with one compile; a warm one needs what the cold one leaves in the caches."""
    backend, done = task["backend"], Path(task["caches"]) / "done"
    if task["start"] == "warm" and not done.exists():
        row["status"] = "skipped: the cold compile did not end well"
        return
    mark, case = step_mark(backend), build(task, device, dropout=True)
    case.reset()
    case.step(case.model)
    run = compiled(case.model, backend)

    def step() -> None:
        mark()
        case.step(run)

    case.reset()
    before = torch_seconds()
    with collecting() as pauses:
        first = timing.seconds(step, device)
    spent = {key: value - before.get(key, 0.0) for key, value in torch_seconds().items()}
    name = backend.partition(":")[0]
    reports = gems_reports() if name == "gems" else []
    row.update(graphs(), seconds=stages(spent, reports, name))
    if name == "gems":
        row.update(counts(reports))
    case.reset()
    steady = statistics.median(timing.seconds(step, device) for _ in range(STEADY_STEPS))
    compile_s = max(0.0, first - steady)
    row.update(first_s=first, ms=steady * 1e3, compile_s=compile_s, gc_s=sum(pauses))
    top = ("Dynamo", "entry", "AOT", "compiler")
    row["seconds"]["rest"] = compile_s - sum(row["seconds"].get(stage, 0.0) for stage in top)
    done.parent.mkdir(parents=True, exist_ok=True)
    done.touch()


if __name__ == "__main__":
    serve(measure)
