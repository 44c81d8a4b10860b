"""``explain(fn, *args)``: what fuses, what is rewritten, what runs as ATen, and why."""

from __future__ import annotations

import contextlib
import itertools
import json
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from . import page
from .backend import Gems
from .config import vendor
from .dynamo import Recompile, Watch
from .insight.summary import ATEN, FREE, GraphSummary, summarize
from .kernels.target import current_target
from .lowering.copies import once
from .lowering.whole_graphs import NOT_KEPT
from .tables import Table, as_text

if TYPE_CHECKING:
    from .commands.script import Kept

MOST_ROWS = 25  # of one table; the data has all of them

_calls = itertools.count()


def explain(fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Explanation:
    """Compile ``fn(*args, **kwargs)`` afresh, run it once, and say what became of it.

    Where a result requires grad, a backward from random cotangents runs as well, so that its graph
    is compiled. The tensors given are copied, no ``.grad`` is touched, and random state and a
    module's buffers are put back; code that was compiled before stays compiled, and no graph comes
    from the cache of whole graphs or goes there. Other effects of
    ``fn`` (an optimizer step inside it) happen. Settings come from the ``GEMS_*`` variables.
    """
    fn = _without_compile(fn)
    backend, watch = Gems(fresh=True), Watch()
    compiled = torch.compile(_fresh_function(), backend=backend)
    args, kwargs = tree_map(_copy, (args, kwargs))
    with _put_back(fn), watch:
        outputs = compiled(fn, args, kwargs)
        _backward(outputs)
    return Explanation.of(backend, _name_of(fn), watch)


def _fresh_function() -> Callable[..., Any]:
    """A function with a code object of its own, so that nothing compiled earlier is looked up."""

    def explained(fn: Any, args: Any, kwargs: Any) -> Any:
        return fn(*args, **kwargs)

    name = f"explained_{next(_calls)}"  # torch remembers by name which sizes were dynamic
    explained.__code__ = explained.__code__.replace(co_name=name)
    return explained


def _without_compile(fn: Any) -> Any:
    """What ``torch.compile`` was given."""
    fn = getattr(fn, "_orig_mod", fn)
    return getattr(fn, "_torchdynamo_orig_callable", fn)


def _name_of(fn: Any) -> str:
    return getattr(fn, "__name__", "") or type(fn).__name__


def _copy(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    return leaf.detach().clone().requires_grad_(leaf.requires_grad)


@contextlib.contextmanager
def _put_back(fn: Any) -> Iterator[None]:
    """Restore the random state, and the buffers of a module."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    buffers = list(fn.buffers()) if isinstance(fn, nn.Module) else []
    saved = [b.detach().clone() for b in buffers]
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, old in zip(buffers, saved, strict=True):
                    once(buffer).copy_(once(old, buffer.stride()))


def _backward(outputs: Any) -> None:
    """Gradients of every leaf, returned and dropped: nothing is added to ``.grad``."""
    roots = [t for t in tree_leaves(outputs) if isinstance(t, Tensor) and t.grad_fn is not None]
    leaves = _leaves(t.grad_fn for t in roots)
    if roots and leaves:
        cotangents = [torch.randn_like(t) for t in roots]
        torch.autograd.grad(roots, leaves, cotangents, allow_unused=True)


def _leaves(start: Iterable[Any]) -> list[Tensor]:
    """The tensors whose ``.grad`` a backward would fill."""
    found: list[Tensor] = []
    seen, stack = set(), list(start)
    while stack:
        function = stack.pop()
        if function is None or function in seen:
            continue
        seen.add(function)
        if hasattr(function, "variable"):
            found.append(function.variable)
        stack.extend(f for f, _ in function.next_functions)
    return found


# the answer --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Explanation:
    """Print it, or take it as data: ``graphs``, ``to_dict()``, ``to_json()``, ``why("norm")``."""

    name: str
    target: str
    graphs: tuple[GraphSummary, ...]
    seconds: dict[str, float] = field(default_factory=dict)
    breaks: dict[str, int] = field(default_factory=dict)  # why -> how often
    break_lines: dict[str, tuple[str, ...]] = field(default_factory=dict)
    recompiles: tuple[Recompile, ...] = ()
    gave_up: int = 0  # functions that Dynamo compiles no more: they were compiled too often

    @classmethod
    def of(cls, backend: Gems | Kept, name: str, watch: Watch | None = None) -> Explanation:
        """What the compiles through ``backend`` did."""
        target = current_target(vendor())
        graphs = tuple(map(summarize, backend.reports))
        ours = sum(sum(g.seconds.values()) for g in graphs if g.kind != "backward")
        return cls(
            name,
            "none" if target is None else target.label,
            graphs,
            watch.seconds(ours) if watch else {},
            watch.breaks if watch else {},
            watch.lines if watch else {},
            tuple(backend.recompiles),
            watch.gave_up if watch else 0,
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "target": self.target,
            "seconds": self.seconds,
            "graph_breaks": self.breaks,
            "graph_break_lines": {why: list(lines) for why, lines in self.break_lines.items()},
            "recompiles": [r.to_dict() for r in self.recompiles],
            "gave_up": self.gave_up,
            "graphs": [g.to_dict() for g in self.graphs],
        }

    def to_json(self, indent: int | None = 1) -> str:
        return json.dumps(self.to_dict(), indent=indent)

    def to_html(self, path: str | Path, times: Mapping[str, Sequence[float]] | None = None) -> None:
        """Write one HTML file that shows it: the graphs, each kernel, what was saved and what not.

        ``times``: graph's title ("graph 0 forward") -> microseconds of each of its calls, in order.
        """
        page.write(self.to_dict(), path, times)

    def why(self, text: str) -> list[str]:
        """Every fact about a node, edge, rewrite or break that holds ``text``: a module's path, an
        op's name, a line."""
        wanted = text.lower()
        return [fact for fact in _facts(self) if wanted in fact.lower()]

    def blocks(self) -> list[Table | str]:
        """Its tables and paragraphs, in order."""
        if not self.graphs:
            return [self._nothing()]
        parts: list[Table | str] = [
            f"{self.name}, compiled by gems (target: {self.target})",
            _counts(self.graphs),
            *_rewrites(self.graphs),
            *_aten(self.graphs),
            *_layouts(self.graphs),
            *_unfused(self.graphs),
            *_captures(self.graphs),
            *_tuned(self.graphs),
            *_failures(self.graphs),
            *_not_kept(self.graphs),
            *_breaks(self.breaks, self.break_lines),
            *_recompiles(self.recompiles),
            _gave_up(self.gave_up),
            self._time(),
        ]
        return [p for p in parts if p]

    def _nothing(self) -> str:
        if self.target == "none":
            return (
                f"{self.name}: nothing was compiled. There is no GPU, and Triton's interpreter "
                "was not asked for (TRITON_INTERPRET=1): everything runs as ATen."
            )
        return f"{self.name}: Dynamo found no graph in it to compile."

    def _time(self) -> str:
        stages = dict(self.seconds)
        ours: Counter[str] = Counter()
        for graph in self.graphs:
            ours.update(graph.seconds)
        stages["gems"] = sum(ours.values())
        parts = ", ".join(f"{name} {s:.2f}" for name, s in stages.items())
        detail = ", ".join(f"{name} {s:.3f}" for name, s in ours.items())
        return f"Compile seconds: {parts} ({detail})"

    def __str__(self) -> str:
        return as_text(self.blocks())

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.text import Text

        texts = [Text(b) if isinstance(b, str) else b for b in self.blocks()]
        return Group(*(part for block in texts for part in (block, Text())))


def _counts(graphs: Sequence[GraphSummary]) -> Table:
    columns = (
        "graph",
        "nodes",
        "fused",
        "views",
        "ATen",
        "rewrites",
        "kernels",
        "launches",
        "seconds",
    )
    names = ("nodes", "fused", "free", "aten_calls", "rewritten", "kernels", "launches", "seconds")
    table = Table("", columns)
    for graph in graphs:
        numbers = graph.numbers()
        table.rows.append((f"{graph.graph} {graph.kind}", *(numbers[n] for n in names)))
    return table


def _rewrites(graphs: Sequence[GraphSummary]) -> Iterator[Table]:
    """A rewrite acts on what Dynamo traced, before there is a backward."""
    fired = [
        (g.kind, r, f"{r.rule}, {r.nodes_before} nodes -> {r.nodes_after}: {r.because}")
        for g in graphs
        for r in g.rewritten
    ]
    yield from _grouped("Rewritten", fired)
    missed = [(g.kind, m, f"{m.rule}: {m.reason}") for g in graphs for m in g.near_misses]
    yield from _grouped("Nearly rewritten, but", missed)


def _aten(graphs: Sequence[GraphSummary]) -> Iterator[Table]:
    calls = [(g.kind, n, f"{n.op}: {n.detail}") for g in graphs for n in g.nodes if n.fate == ATEN]
    yield from _grouped("Runs as ATen", calls)


def _layouts(graphs: Sequence[GraphSummary]) -> Iterator[Table]:
    rows: list[Sequence[Any]] = [(f"{g.graph} {g.kind}", g.layout) for g in graphs if g.layout]
    if rows:
        yield Table("The layout of convolutions", ("graph", "layout"), rows)


def _unfused(graphs: Sequence[GraphSummary]) -> Iterator[Table]:
    edges = [
        (g.kind, e, f"{e.producer} -> {e.consumer}: {e.reason}") for g in graphs for e in g.unfused
    ]
    yield from _grouped("Goes through memory, though both ends are in kernels", edges)


def _failures(graphs: Sequence[GraphSummary]) -> Iterator[Table]:
    rows: list[Sequence[Any]] = [
        (f"{g.graph} {g.kind}", text) for g in graphs for text in g.failures
    ]
    if rows:
        yield Table("Failed to compile, and runs as ATen", ("graph", "failure"), rows)


def _captures(graphs: Sequence[GraphSummary]) -> Iterator[Table]:
    told = Counter((f"{g.graph} {g.kind}", line) for g in graphs for line in g.captures)
    rows: list[Sequence[Any]] = [(*what, times) for what, times in told.items()]
    if rows:
        yield Table("CUDA graphs", ("graph", "", "times"), rows)


def _tuned(graphs: Sequence[GraphSummary]) -> Iterator[Table]:
    """The tiles of kernels that were measured."""
    rows: list[Sequence[Any]] = [(f"{g.graph} {g.kind}", text) for g in graphs for text in g.tuned]
    if rows:
        yield Table("Tiles of kernels, measured", ("graph", "kernel: tile, time"), rows)


def _not_kept(graphs: Sequence[GraphSummary]) -> Iterator[Table]:
    """The graphs that no later process finds in the cache, and why."""
    rows: list[Sequence[Any]] = [
        (f"{g.graph} {g.kind}", textwrap.shorten(g.cache.removeprefix(NOT_KEPT), 300))
        for g in graphs
        if g.cache.startswith(NOT_KEPT)
    ]
    if rows:
        yield Table("Compiled anew by every process", ("graph", "because"), rows)


def _breaks(breaks: dict[str, int], lines: dict[str, tuple[str, ...]]) -> Iterator[Table]:
    if breaks:
        rows: list[Sequence[Any]] = [
            (times, f"{textwrap.shorten(why, 300)}\n{_where(lines.get(why, ()))}".rstrip())
            for why, times in breaks.items()
        ]
        yield Table("Graph breaks: Dynamo cut the program here", ("times", "because"), rows)


def _recompiles(recompiles: Iterable[Recompile]) -> Iterator[Table]:
    rows: list[Sequence[Any]] = [(r.graph, f"{r}\n{r.line}".rstrip()) for r in recompiles]
    if rows:
        yield Table("Compiled again: the program had changed", ("graph", ""), rows)


def _gave_up(functions: int) -> str:
    if not functions:
        return ""
    return (
        f"{counted_as(functions, 'function')} had been compiled too often, and Dynamo left further "
        "calls uncompiled: see torch._dynamo.config.recompile_limit."
    )


def counted_as(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def _grouped(title: str, found: Iterable[tuple[str, Any, str]]) -> Iterator[Table]:
    """(kind of graph, fact, what and why): what is equal as one row, with how often each kind of
    graph has it; below it the first line it came from and how many more lines there are."""
    found = list(found)
    kinds = list(dict.fromkeys(kind for kind, _, _ in found))
    times = Counter((what, kind) for kind, _, what in found)
    lines: dict[str, list[str]] = {}
    for _, fact, what in found:
        lines.setdefault(what, []).append(fact.line)
    rows: list[Sequence[Any]] = [
        (*(times[what, kind] or "" for kind in kinds), f"{what}\n{_where(lines[what])}".rstrip())
        for what in sorted(lines, key=lambda w: -len(lines[w]))
    ]
    if len(rows) > MOST_ROWS:
        title += f" (the {MOST_ROWS} most frequent of {len(rows)}; to_dict() has all)"
    if rows:
        yield Table(title, (*kinds, ""), rows[:MOST_ROWS])


def _where(lines: Iterable[str]) -> str:
    distinct = list(dict.fromkeys(line for line in lines if line))
    place, _, code = distinct[0].partition("  ") if distinct else ("", "", "")
    more = f" and {len(distinct) - 1} more" if len(distinct) > 1 else ""
    return f"{place}{more}  {code}".strip()


def _facts(explanation: Explanation) -> Iterator[str]:
    for graph in explanation.graphs:
        head = graph.title
        for n in graph.nodes:
            fate = {ATEN: "runs as ATen: ", FREE: ""}.get(n.fate, "fused in ")
            yield _fact(head, f"{n.op} {n.result} ({n.name})", f"{fate}{n.detail}", n)
        for e in graph.unfused:
            yield _fact(head, f"{e.producer} -> {e.consumer}", f"not fused: {e.reason}", e)
        for r in graph.rewritten:
            what = f"rewritten, {r.nodes_before} nodes -> {r.nodes_after}: {r.because}"
            yield _fact(head, r.rule, what, r)
        for m in graph.near_misses:
            yield _fact(head, m.rule, f"not rewritten at {m.node}: {m.reason}", m)
        if graph.layout:
            yield f"{head}: convolutions: {graph.layout}"
        for text in graph.failures:
            yield f"{head}: failed to compile: {text}"
        for text in (*graph.captures, *graph.tuned):
            yield f"{head}: {text}"
        if graph.cache:
            yield f"{head}: cache: {graph.cache}"
    for why, times in explanation.breaks.items():
        where = "".join(f"    {line}" for line in explanation.break_lines.get(why, ()))
        yield f"graph break, {times} times: {' '.join(why.split())}{where}"
    for again in explanation.recompiles:
        yield f"graph {again.graph}: {again}    {again.line}"


def _fact(head: str, what: str, fate: str, at: Any) -> str:
    place = "  ".join(p for p in (at.line, f"in {at.module}" if at.module else "") if p)
    return f"{head}: {what}: {fate}" + (f"    {place}" if place else "")
