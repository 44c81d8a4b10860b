"""A compile's ``Report`` as plain data: what became of each node, each call and each edge, and why.

``dump``, ``explain`` and ``demo`` print what stands here; nothing in it refers to a graph, so it
can be kept, compared and written as JSON.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from torch.fx import Graph, Node

from ..lowering.graph import module_path, source_line
from ..lowering.group import Group, Plan
from ..lowering.horizontal import Combined
from ..lowering.ir import Value
from ..lowering.render import kernel_name
from ..lowering.report import Report
from ..lowering.source import Source
from ..lowering.symbols import hints_of
from . import traffic
from .flow import read_by
from .rewritten import NearMiss, Rewritten, fired, missed
from .typed import describe, typed

T = TypeVar("T")

FUSED, ATEN, FREE = "fused", "aten", "free"
UNDECLARED = "no kernel is declared for it"
# What is left to ATen on purpose, in words; the compiler itself only knows that it has no kernel.
ON_PURPOSE = {
    **dict.fromkeys(
        ("mm", "bmm", "addmm", "baddbmm"), "matrix products are left to the vendor's library"
    ),
    **dict.fromkeys(
        ("convolution", "convolution_backward"), "convolutions are left to the vendor's library"
    ),
    **dict.fromkeys(("detach", "alias"), "a new tensor object for the same memory; moves no data"),
    **dict.fromkeys(
        (
            f"_scaled_dot_product_{kind}{which}"
            for kind in (
                "flash_attention",
                "efficient_attention",
                "cudnn_attention",
                "flash_attention_for_cpu",
            )
            for which in ("", "_backward")
        ),
        "attention is left to torch's own kernels",
    ),
    "embedding_dense_backward": "adds rows that repeat; ATen's kernel sorts them",
}


@dataclass(frozen=True)
class NodeFact:
    """One node of the graph after the passes. ``fate`` is fused, aten or free (needs no call)."""

    name: str
    op: str
    result: str
    fate: str
    detail: str  # the kernel's name, or the reason
    line: str
    module: str
    inputs: tuple[str, ...] = ()  # names of nodes, and of the graph's inputs
    steps: tuple[int, ...] = ()  # places among the graph's calls of those that compute it


@dataclass(frozen=True)
class Call:
    """One step of the compiled function: a kernel launch or an ATen call, in order.

    ``eager``: the bytes that ATen's ops for the same nodes read and write, one after the other.
    """

    kind: str  # "kernel" or "aten"
    name: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    detail: str  # of a kernel, its key; of an ATen call, the reason
    ops: tuple[str, ...]
    lines: tuple[str, ...]
    modules: tuple[str, ...]
    parts: tuple[int, ...] = ()  # elements of each, for kernels alike that are one launch
    read: int = 0  # bytes
    written: int = 0
    eager: int = 0
    inputs: tuple[int, ...] = ()  # places of the earlier calls whose results it reads

    @property
    def saved(self) -> int:
        """Bytes that eager PyTorch moves beyond ours."""
        return self.eager - self.read - self.written


@dataclass(frozen=True)
class Edge:
    """A value that went through memory although both its ends are in kernels."""

    producer: str
    consumer: str
    reason: str
    line: str
    module: str
    bytes: int = field(default=0, compare=False)  # of the value
    nodes: tuple[str, ...] = field(default=(), compare=False)  # that both ends are of


@dataclass(frozen=True)
class GraphSummary:
    graph: int
    kind: str  # forward, backward or inference
    nodes: tuple[NodeFact, ...] = ()  # parts of tuples are not counted
    calls: tuple[Call, ...] = ()
    unfused: tuple[Edge, ...] = ()
    rewritten: tuple[Rewritten, ...] = ()
    near_misses: tuple[NearMiss, ...] = ()
    failures: tuple[str, ...] = ()
    layout: str = ""  # which one convolutions have, and why; empty where there are none
    cache: str = ""  # of whole graphs: whether it came from there, went there, or why neither
    captures: tuple[str, ...] = ()  # what CUDA graphs hold, what they do not, and why
    tuned: tuple[str, ...] = ()  # the tiles of kernels that were measured
    kernels: int = 0
    inputs: dict[str, str] = field(default_factory=dict)  # name -> type
    outputs: tuple[str, ...] = ()  # names of nodes, or of inputs
    sources: dict[str, str] = field(default_factory=dict)  # kernel's name and key -> its text
    seconds: dict[str, float] = field(default_factory=dict)
    counted: dict[str, int] = field(default_factory=dict)  # of a graph whose nodes are not known

    @property
    def title(self) -> str:
        return f"graph {self.graph} {self.kind}"

    def count(self, fate: str) -> int:
        return sum(n.fate == fate for n in self.nodes)

    @property
    def launches(self) -> int:
        return sum(c.kind == "kernel" for c in self.calls)

    @property
    def aten_calls(self) -> int:
        return sum(c.kind == "aten" for c in self.calls)

    def numbers(self) -> dict[str, int | float]:
        """The columns of the table, by name."""
        return {
            "nodes": len(self.nodes),
            "fused": self.count(FUSED),
            "free": self.count(FREE),
            "rewritten": len(self.rewritten),
            "aten_calls": self.aten_calls,
            "kernels": self.kernels,
            "launches": self.launches,
            "unfused": len(self.unfused),
            "failures": len(self.failures),
            "seconds": round(sum(self.seconds.values()), 4),
            **self.counted,
        }

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        return {"graph": self.graph, "kind": self.kind, "numbers": self.numbers(), **asdict(self)}


def summarize(report: Report) -> GraphSummary:
    """The report of one graph as plain data."""
    head = {
        "graph": report.graph,
        "kind": report.kind,
        "failures": tuple(report.failures),
        "layout": report.layout.reason,
        "cache": report.cache,
        "captures": () if report.captures is None else tuple(report.captures.told()),
        "tuned": tuple(map(str, report.tuned)),
        "kernels": len(report.sources),
        "sources": {f"{s.name}_{s.key[:8]}": s.commented for s in report.sources},
        "seconds": dict(report.seconds),
        **_rewrites(report),
    }
    plan = report.plan
    if plan is None:  # the whole graph runs as ATen, or came from the cache
        names = ("nodes", "fused", "aten_calls", "launches")
        counted = {name: getattr(report, name) for name in names}
        return GraphSummary(**head, counted=counted)
    origins, graph = _origins(plan), _graph_of(plan)
    again = _recomputed(plan, origins)
    sizes = hints_of(graph) if graph is not None else {}
    return GraphSummary(
        **head,
        nodes=tuple(_node_facts(plan, graph, origins, again)),
        calls=tuple(_calls(plan, report.source_of, origins, again, sizes)),
        unfused=tuple(_unfused(plan, origins, sizes)),
        **(_ends(graph) if graph is not None else {}),
    )


def _graph_of(plan: Plan) -> Graph | None:
    nodes = (*(n for g in plan.groups for n in g.nodes), *plan.steps)
    return next((n.graph for n in nodes if isinstance(n, Node)), None)


def _ends(graph: Graph) -> dict[str, Any]:
    """What the graph takes and returns."""
    inputs = {n.name: describe(n.meta.get("val")) for n in graph.find_nodes(op="placeholder")}
    (output,) = graph.find_nodes(op="output")
    return {"inputs": inputs, "outputs": tuple(_op(n).name for n in output.all_input_nodes)}


def _rewrites(report: Report) -> dict[str, Any]:
    """A rewrite acts on Dynamo's graph, before it is parted: its forward graph tells of it."""
    log = report.rewrites
    if log is None or report.kind == "backward":
        return {}
    return {"rewritten": fired(log), "near_misses": missed(log)}


# nodes -------------------------------------------------------------------------------------------

Origins = dict[Value, Node]
Recomputed = dict[Group, list[Node]]


def _origins(plan: Plan) -> Origins:
    """Which node each value comes from: its own, or the composite op's that it is a step of.

    A step has no node, and nothing but its own op reads it, so its reader's node is the answer.
    """
    origins: Origins = {}
    stack = [m for group in plan.groups for m in group.members if m.node is not None]
    stack.extend(v for v in plan.inlined if v.node is not None)
    origins.update((v, v.node) for v in stack)
    while stack:
        value = stack.pop()
        for source in value.inputs:
            if source.node is None and source not in origins:
                origins[source] = origins[value]
                stack.append(source)
    return origins


def _nodes_of(group: Group, origins: Origins) -> list[Node]:
    return list(dict.fromkeys(origins[m] for m in group.members if m in origins))


def op_name(node: Node) -> str:
    """``aten.mm.default`` as ``mm``; another overload keeps its name: ``sum.dim_IntList``."""
    target = _op(node).target
    name = str(target) if hasattr(target, "_schema") else getattr(target, "__name__", str(target))
    return name.removeprefix("aten.").removesuffix(".default")


def _op(node: Node) -> Node:
    """The node itself; for a part of a tuple, the op whose result the tuple is."""
    while node.target is operator.getitem and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def reason_for(node: Node, plan: Plan) -> str:
    """Why ATen runs this node."""
    reason = plan.aten.get(node)
    if reason is None:  # the compiler did not have to refuse it
        is_tensor = hasattr(node.meta.get("val"), "shape")
        return "a view of memory that is no kernel's" if is_tensor else "a size"
    if reason == UNDECLARED:
        return ON_PURPOSE.get(getattr(node.target, "_opname", ""), reason)
    return reason.removeprefix("alone: ")


def is_call(step: Any, plan: Plan) -> bool:
    """Whether a step of a plan is an ATen call, not a constant or a part of a tuple."""
    return (
        isinstance(step, Node)
        and step not in plan.drawn
        and step.op == "call_function"
        and step.target is not operator.getitem
    )


def _recomputed(plan: Plan, origins: Origins) -> Recomputed:
    """Ops that kernels which read them compute again, each kernel for itself."""
    found: dict[Group, list[Node]] = {}
    for group in plan.groups:
        nodes: dict[Node, None] = {}
        todo, seen = list(group.members), set(group.members)
        while todo:
            for source in todo.pop().inputs:
                if source in plan.inlined and source not in seen:
                    seen.add(source)
                    todo.append(source)
                    if source.computes and source in origins:
                        nodes[_op(origins[source])] = None
        found[group] = list(nodes)
    return found


def steps_of(plan: Plan) -> list[Any]:
    """Groups and nodes that a run calls, in order: the graph's calls."""
    return [s for s in plan.steps if isinstance(s, Group) or is_call(s, plan)]


def _node_facts(
    plan: Plan, graph: Graph | None, origins: Origins, again: Recomputed
) -> Iterable[NodeFact]:
    homes: dict[Node, dict[str, None]] = {}
    places: dict[Node, list[int]] = {}
    for place, step in enumerate(steps_of(plan)):
        own = [step] if isinstance(step, Node) else [*map(_op, _nodes_of(step, origins))]
        for node in (*own, *again.get(step, ())):
            places.setdefault(node, []).append(place)
    for group in plan.groups:
        for node in _nodes_of(group, origins):
            homes.setdefault(_op(node), {})[kernel_name(group.members)] = None
    recomputed = {node for nodes in again.values() for node in nodes}
    called = {step for step in plan.steps if is_call(step, plan)}
    for node in graph.nodes if graph is not None else ():
        if node.op != "call_function" or node.target is operator.getitem:
            continue
        if node in called:
            fate, detail = ATEN, reason_for(node, plan)
        elif node in homes:
            fate, detail = FUSED, " and ".join(homes[node])
        elif node in recomputed:
            fate, detail = FUSED, "the kernels that read it, which recompute it"
        else:
            fate, detail = FREE, _why_free(node, plan)
        yield NodeFact(
            node.name,
            op_name(node),
            describe(node.meta.get("val")),
            fate,
            detail,
            source_line(node),
            module_path(node),
            _distinct(_op(n).name for n in node.all_input_nodes),
            tuple(dict.fromkeys(places.get(node, ()))),
        )


def _why_free(node: Node, plan: Plan) -> str:
    if node in plan.drawn:
        return "a random seed: drawn by the CPU, and an argument of the kernels that read it"
    if isinstance(node.meta.get("val"), (tuple, list)) or hasattr(node.meta.get("val"), "shape"):
        return "a view: part of its readers' addresses"
    return "a size: computed in Python"


# calls -------------------------------------------------------------------------------------------


def _calls(
    plan: Plan,
    source_of: dict[Group, Source],
    origins: Origins,
    again: Recomputed,
    sizes: Mapping[Any, int],
) -> Iterable[Call]:
    known: set[Node] = set()
    steps = steps_of(plan)
    for step, inputs in zip(steps, read_by(steps, source_of), strict=True):
        if isinstance(step, Group):
            # what several kernels compute eager computes once: the first of them saves it
            others = [node for node in again.get(step, ()) if node not in known]
            known.update(others)
            yield _launch(step, source_of[step], origins, others, sizes, inputs)
        else:
            reads = tuple(describe(n.meta.get("val")) for n in step.all_input_nodes)
            read, written = traffic.of_node(step)
            yield Call(
                "aten",
                op_name(step),
                reads,
                (describe(step.meta.get("val")),),
                reason_for(step, plan),
                (op_name(step),),
                _distinct([source_line(step)]),
                _distinct([module_path(step)]),
                read=read,
                written=written,
                eager=read + written,
                inputs=inputs,
            )


def _launch(
    group: Group,
    source: Source,
    origins: Origins,
    others: Sequence[Node],
    sizes: Mapping[Any, int],
    places: tuple[int, ...],
) -> Call:
    """``others``: nodes whose eager bytes count here, though other kernels compute them, too."""
    inputs = [v for _, role, v in source.params if role == "in"]
    outputs = [v for _, role, v in source.params if role == "out"]
    outputs += group.stores.values()
    reads, writes = (tuple(typed(v.dtype, v.shape) for v in vs) for vs in (inputs, outputs))
    parts = group.groups if isinstance(group, Combined) else ()
    nodes = _nodes_of(group, origins)
    return Call(
        "kernel",
        source.name,
        reads,
        writes,
        source.key[:8],
        _distinct(map(op_name, nodes)),
        _distinct(map(source_line, nodes)),
        _distinct(map(module_path, nodes)),
        tuple(part.numel(part.domain) for part in parts),
        traffic.read_by(group.members, inputs, group.stored, sizes),
        traffic.of_values(outputs, sizes),
        sum(sum(traffic.of_node(n)) for n in dict.fromkeys([*map(_op, nodes), *others])),
        places,
    )


def _distinct(texts: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(t for t in texts if t))


# edges -------------------------------------------------------------------------------------------


def _unfused(plan: Plan, origins: Origins, sizes: Mapping[Any, int]) -> Iterable[Edge]:
    """The refusals that still hold at the end: both ends in kernels, not in the same one."""
    home = {m: g for g in plan.groups for m in g.members}
    seen: set[tuple[Value, Value]] = set()
    for producer, consumer, why in plan.unfused:
        ends = home.get(producer), home.get(consumer)
        if None in ends or ends[0] is ends[1] or (producer, consumer) in seen:
            continue
        seen.add((producer, consumer))
        node = origins.get(consumer) or origins.get(producer)
        where = (source_line(node), module_path(node)) if node is not None else ("", "")
        yield Edge(
            _value_name(producer, origins),
            _value_name(consumer, origins),
            why,
            *where,
            traffic.of_values([producer], sizes),
            tuple(_op(origins[v]).name for v in (producer, consumer) if v in origins),
        )


def _value_name(value: Value, origins: Origins) -> str:
    """The op; of a step inside a composite op, both: ``nll_loss_forward.where``."""
    if value.node is not None:
        return op_name(value.node)
    step = str(value.op or value.kind)
    return f"{op_name(origins[value])}.{step}" if value in origins else step


# groups of equal things --------------------------------------------------------------------------


def counted(keys: Iterable[Any]) -> list[tuple[Any, int]]:
    """Equal keys with how often each occurs, in the order of their first."""
    return list(Counter(keys).items())


def grouped(items: Iterable[T], key: Callable[[T], Any]) -> list[list[T]]:
    """Items of equal keys together, in the order of their first."""
    groups: dict[Any, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())
