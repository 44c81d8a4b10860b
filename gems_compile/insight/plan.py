"""``plan.txt``: what one call of a graph runs, in order, and the bytes that each step moves."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from ..lowering.whole_graphs import FROM_CACHE
from .layers import Stretch, stretches
from .summary import Call, Edge, GraphSummary, counted

#: steps that equal layers must save for being shown once
FEW = 3


def plan_text(summary: GraphSummary) -> str:
    """What one call runs, in order, equal layers once; then what could have fused and did not."""
    n = summary.numbers()
    calls = summary.calls
    free = "" if summary.counted else f", {n['free']} need no call (views, sizes)"
    lines = [
        f"{summary.title}: {n['nodes']} nodes -> {n['launches']} launches of {n['kernels']} "
        f"kernels and {n['aten_calls']} ATen calls",
        f"{n['fused']} nodes are fused{free}",
    ]
    if calls:
        lines.append(f"all steps: {_moved(calls)}")
    if summary.cache == FROM_CACHE:
        lines.append("The cache of whole graphs has counts alone; GEMS_CACHE=0 compiles and tells.")
    lines += ["", *(f"failed     {text}" for text in summary.failures)]
    for stretch in stretches([_key(call) for call in calls]):
        lines += _stretch_lines(stretch, calls)
    if summary.unfused:
        lines += ["", "Not fused, though both ends are in kernels:"]
    for edge, count in counted(summary.unfused):
        lines += _edge_lines(edge, count)
    return re.sub("\n{3,}", "\n\n", "\n".join(lines).rstrip()) + "\n"


def _key(call: Call) -> tuple[object, ...]:
    """What steps of equal layers have in common; their modules differ."""
    bytes_moved = (call.read, call.written, call.eager)
    return (call.kind, call.name, call.detail, call.reads, call.writes, *bytes_moved)


def _stretch_lines(stretch: Stretch, calls: tuple[Call, ...]) -> list[str]:
    start, length, times = stretch.start, stretch.length, stretch.times
    block, last = range(start, start + length), start + length * times - 1
    if length * (times - 1) < FEW:
        return [line for k in range(start, last + 1) for line in call_lines(k, [calls[k]])]
    whole = calls[start : last + 1]
    what = f"step {start}" if length == 1 else f"steps {start} to {start + length - 1}"
    lines = ["", f"x{times}  {what}, and so on to step {last}: {_moved(whole)}"]
    for k in block:
        lines += call_lines(k, calls[k : last + 1 : length])
    return [*lines, f"x{times}  end", ""]


def call_lines(place: int, alike: Sequence[Call]) -> list[str]:
    """A step, and the lines and modules of all that are ``alike``."""
    call = alike[0]
    modules = [module for other in alike for module in other.modules]
    lines = dict.fromkeys(line for other in alike for line in other.lines)
    types = f"({', '.join(call.reads)}) -> {', '.join(call.writes)}"
    if call.kind == "kernel":
        head = f"{place:4} kernel {call.name}_{call.detail} {types}"
        more = [f"fuses {' '.join(call.ops)}"]
        if call.parts:
            numbers = ", ".join(map(str, call.parts))
            more.append(f"{len(call.parts)} parts of {numbers} elements, in one launch")
    else:
        head = f"{place:4} aten   {call.name} {types}"
        more = [f"because {call.detail}"]
    return [
        f"{head}  [{_moved([call])}]",
        *indented(*more, *lines, in_modules(modules), by=12),
    ]


def _moved(calls: Iterable[Call]) -> str:
    """``reads 1.5 MB, writes 512 B, saves 2.1 MB``"""
    calls = list(calls)
    read, written, saved = (sum(getattr(c, n) for c in calls) for n in ("read", "written", "saved"))
    return f"reads {in_bytes(read)}, writes {in_bytes(written)}, saves {in_bytes(saved)}"


def in_bytes(count: int) -> str:
    """``512 B``, ``1.5 KB``, ``12.3 MB``: of 1024 each."""
    size = float(abs(count))
    sign = "-" if count < 0 else ""
    if size < 1024:
        return f"{count} B"
    for unit in ("KB", "MB", "GB"):
        size /= 1024
        if size < 1024:
            return f"{sign}{size:.1f} {unit}"
    return f"{sign}{size / 1024:.1f} TB"


def in_modules(modules: Iterable[str]) -> str:
    """``in a, b, c, d ...``, of many."""
    names = list(dict.fromkeys(modules))
    return module(", ".join(names[:4]) + (" ..." if len(names) > 4 else ""))


def _edge_lines(edge: Edge, count: int) -> list[str]:
    head = f"{edge.producer} -> {edge.consumer}{times(count)}: {edge.reason}"
    return [f"     {head}", *indented(edge.line, module(edge.module), by=12)]


def times(count: int) -> str:
    return f" x{count}" if count > 1 else ""


def module(path: str) -> str:
    return f"in {path}" if path else ""


def indented(*texts: str, by: int = 4) -> list[str]:
    return [" " * by + text for text in texts if text]
