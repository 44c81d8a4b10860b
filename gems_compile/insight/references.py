"""What eager PyTorch would run for each launch of a compiled graph: the ATen program as data.

A launch's *reference* computes, from what the kernel reads in memory, what it writes there: the
nodes whose results it stores, and those between them and what it reads (that the kernel computes
some of them for itself does not matter). ``reference_text`` writes it as Python.

A kernel may store what is no node's result: a step inside a composite op, such as the sums of a
mean in two launches. Nothing is said of it alone; it is checked where a node is made from it, in a
launch that has its maker ``along``. A launch that stores nothing else has a ``why_not``.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, Node

from ..lowering.graph import is_tensor, is_view, module_path, source_line, value_of
from ..lowering.group import Group, Plan
from ..lowering.horizontal import Combined
from ..lowering.indexing import Size, is_static, product, size_of
from ..lowering.ir import SizeArg, Value, base_of
from ..lowering.overload import name_of
from ..lowering.source import Source
from ..lowering.translate import Program
from ..lowering.views import Reshape
from .runnable import SMALL
from .summary import is_call, op_name, steps_of

#: what results of these hold by themselves is nobody's business: they are to be added up
PARTS = {"gems.image_weight_parts.default", "gems.depthwise_weight_parts.default"}


class Result(NamedTuple):
    """``node``: whose value the reference's result is; ``value``: where the kernel writes it."""

    node: Node
    value: Value


@dataclass(eq=False)
class Reference:
    """What one launch is checked against.

    reads:    the node of each tensor that the reference takes, and the memory that holds it
    nodes:    what it computes, in the graph's order
    results:  what it returns
    unnamed:  what the kernel stores beside, and why nothing is said of it alone
    elsewhere: those of ``reads`` that the kernel does not read: memory as earlier launches saw it
    along:    earlier launches that make what the kernel reads and no node names
    why_not:  why nothing can be checked; empty where something can
    through:  which launch is checked along with this one
    """

    place: int  # among the calls of a run, as summaries count them
    group: Group
    source: Source
    reads: dict[Node, Value] = field(default_factory=dict)
    nodes: list[Node] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    unnamed: dict[Value, str] = field(default_factory=dict)
    elsewhere: set[Value] = field(default_factory=set)
    along: list[Reference] = field(default_factory=list)
    why_not: str = ""
    through: str = ""

    @property
    def after(self) -> tuple[int, ...]:
        """The places of ``along``."""
        return tuple(r.place for r in self.along)

    @property
    def why_unchecked(self) -> str:
        """``why_not``, and which launch tells of this one nevertheless."""
        if self.why_not and self.through:
            return f"{self.why_not}; checked through {self.through}"
        return self.why_not

    @property
    def name(self) -> str:
        """The kernel's name and key, as files of dumps are named."""
        return f"{self.source.name}_{self.source.key[:8]}"

    @property
    def function(self) -> str:
        """The name of the reference, as a Python function."""
        return f"reference_{self.place}"

    @property
    def loaded(self) -> list[Value]:
        """What the kernel reads (and memory that it overwrites)."""
        return list(dict.fromkeys(w for _, role, w in self.source.params if role == "in"))

    @property
    def stored(self) -> list[Value]:
        """Memory that the kernel writes, new or not."""
        new = [w for _, role, w in self.source.params if role == "out"]
        old = [*self.group.stores.values(), *map(written_by, _scatters(self.group))]
        return list(dict.fromkeys([*new, *old]))

    @property
    def lengths(self) -> list[Size]:
        """How many elements its kernel reduces to one: of each kernel that shares the launch."""
        groups = self.group.groups if isinstance(self.group, Combined) else (self.group,)
        return [product(g.sizes[a] for a in g.reduced) for g in groups]

    def lines(self) -> list[str]:
        """The user's lines and modules of what is checked, each once."""
        found = []
        for node in dict.fromkeys([*(r.node for r in self.results), *reversed(self.nodes)]):
            line, module = source_line(node), module_path(node)
            found.append(f"{line} in {module}" if line and module else line or module)
        return list(dict.fromkeys(filter(None, found)))


def _scatters(group: Group) -> list[Value]:
    return [m for m in group.members if m.kind == "store"]


def written_by(store: Value) -> Value:
    """The memory that a store at computed places goes to."""
    return base_of(store.params[0])


def find_references(
    program: Program, plan: Plan, sources: dict[Group, Source]
) -> dict[Group, Reference]:
    """The reference of every launch, in order."""
    return _Finder(program, plan, sources).run()


class _Missing(Exception):
    """What a reference needs and nobody can tell it."""


class _Finder:
    def __init__(self, program: Program, plan: Plan, sources: dict[Group, Source]) -> None:
        self.program, self.plan, self.sources = program, plan, sources
        self.holder: dict[Value, list[Node]] = {}  # memory -> nodes that it is the value of
        for node in program.of:
            memory = self.memory(node)
            if memory is not None:
                self.holder.setdefault(memory, []).append(node)
        graph: Graph | None = next((node.graph for node in program.of), None)
        self.order = {n: k for k, n in enumerate(graph.nodes)} if graph is not None else {}
        self.called = {s for s in plan.steps if is_call(s, plan)}  # by ATen
        self.maker: dict[Value, Reference] = {}  # of memory, and of what kernels alone know
        self.touched: set[Value] = set()  # memory that launches before saw

    def run(self) -> dict[Group, Reference]:
        found = {}
        for place, step in enumerate(steps_of(self.plan)):
            if isinstance(step, Group):
                found[step] = self.reference(place, step)
        return found

    def memory(self, node: Node) -> Value | None:
        """The memory that holds a node's result as it is, but for axes of size 1."""
        entry = self.program.of.get(node)
        if name_of(node.target) in PARTS:
            return None
        if not isinstance(entry, Value) or not is_tensor(value_of(node)):
            return None
        base = base_of(entry)
        if entry is not base:  # a reduction keeps its axes
            whole = base.kind == "reduce" and base.node is node
            return base if whole and isinstance(entry.params, Reshape) else None
        return written_by(entry) if entry.kind == "store" else entry

    def reference(self, place: int, group: Group) -> Reference:
        made = Reference(place, group, self.sources[group])
        self._choose_results(made)
        try:
            if made.results:
                _Walk(self, made).run()
                self._chain(made)
            else:
                made.why_not = (
                    "; ".join(dict.fromkeys(made.unnamed.values())) or "it stores nothing"
                )
        except _Missing as missing:
            made.why_not = f"its reference needs {missing}"
        self.touched.update(made.loaded, made.stored)
        self.maker.update(dict.fromkeys(made.stored, made))
        return made

    def _choose_results(self, made: Reference) -> None:
        group = made.group
        for out in (w for _, role, w in made.source.params if role == "out"):
            nodes = self.holder.get(out)
            if nodes:
                made.results.append(Result(nodes[0], out))
            else:
                made.unnamed[out] = self.why_unnamed(out)
        for copy, memory in group.stores.items():
            made.results.append(Result(copy.node, memory))
        for store in _scatters(group):
            if store.node is None:
                made.unnamed[store] = self.why_unnamed(store)
            else:
                made.results.append(Result(store.node, written_by(store)))

    def why_unnamed(self, value: Value) -> str:
        """Why nothing is said of a value that no node has."""
        what = str(value.op or value.kind)
        seen, todo = {value}, [value]
        while todo:
            for reader in self.readers.get(todo.pop(0), ()):
                if reader.node is not None:
                    return f"{what} is a step within {op_name(reader.node)}"
                if reader not in seen:
                    seen.add(reader)
                    todo.append(reader)
        return f"{what} is no node's result"

    @functools.cached_property
    def readers(self) -> dict[Value, list[Value]]:
        readers: dict[Value, list[Value]] = {}
        for v in self.program.values:
            for a in v.inputs:
                readers.setdefault(a, []).append(v)
        return readers

    def _chain(self, made: Reference) -> None:
        """What it reads although its reference does not comes from launches that are checked along
        with it."""
        own = set(made.reads.values())
        makers = {self.maker[v] for v in made.loaded if v not in own and v in self.maker}
        makers.discard(made)
        found = {r.place: r for m in makers for r in (*m.along, m)}
        made.along = [found[place] for place in sorted(found)]
        for reference in made.along:
            reference.through = reference.through or made.name


class _Walk:
    """From the results of a launch back to what is in memory."""

    def __init__(self, finder: _Finder, made: Reference) -> None:
        self.finder, self.made = finder, made
        self.of, self.plan = finder.program.of, finder.plan
        self.loaded = set(made.loaded)
        new = {w for _, role, w in made.source.params if role == "out"}
        self.loaded -= new
        self.members = set(made.group.members)

    def run(self) -> None:
        made = self.made
        todo = [result.node for result in made.results]
        forced, found = set(todo), set[Node]()
        while todo:
            node = todo.pop()
            if node in found or node in made.reads:
                continue
            if node not in forced and self.is_given(node):
                continue
            if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
                raise _Missing(f"{node.name}, which draws random numbers")
            if node.target is torch.ops.aten.as_strided.default and reaches_out(node):
                raise _Missing(f"memory around the operand of {node.name}")
            found.add(node)
            if not self.is_constant(node):
                todo.extend(node.all_input_nodes)
        made.nodes = sorted(found, key=self.finder.order.__getitem__)

    def is_given(self, node: Node) -> bool:
        """Whether memory holds a node's result, noted as such; raises where nothing can tell it."""
        memory, entry = self.finder.memory(node), self.of.get(node)
        if memory is not None and memory in self.loaded and self._as_it_is(node):
            self.made.reads[node] = memory
            return True
        if self.is_constant(node) or self.is_computed(node, entry):
            return False
        if memory is not None and (memory in self.finder.touched or node.op == "placeholder"):
            self.made.reads[node] = memory
            if memory not in self.loaded:
                self.made.elsewhere.add(memory)
            return True
        if node.op == "call_function" and (is_view(node) or node not in self.finder.called):
            return False
        if node.op == "call_function" and not node.all_input_nodes:
            return False  # made of numbers
        if node.op == "get_attr" and value_of(node).numel() <= SMALL:
            return False  # written out
        raise _Missing(f"{node.name}, which no kernel before it touches")

    def _as_it_is(self, node: Node) -> bool:
        """Whether memory holds the result before this launch: it may be what the launch stores."""
        entry = self.of[node]
        return not (entry in self.members or entry in self.made.group.stores)

    def is_computed(self, node: Node, entry: Any) -> bool:
        """Whether the kernel computes the node, or sees it in its addresses."""
        if node.op != "call_function":
            return False
        if not isinstance(entry, Value) or entry.kind in ("view", "iota"):
            return node not in self.plan.aten
        return entry in self.members or entry in self.plan.inlined

    def is_constant(self, node: Node) -> bool:
        """Whether a node is a number, or a tensor of one number, whatever its operands are."""
        return is_number(self.of.get(node), node) or filled_with(self.of.get(node)) is not None


def reaches_out(node: Node) -> bool:
    """Whether ``as_strided`` may look at other memory than its operand's elements span."""
    operand, result = value_of(node.all_input_nodes[0]), value_of(node)
    facts = [(t.storage_offset(), *t.shape, *t.stride()) for t in (operand, result)]
    if not is_static(*(size_of(n) for n in (*facts[0], *facts[1]))) or facts[0][0]:
        return True
    last = [t.storage_offset() + sum((n - 1) * s for n, s in _axes(t)) for t in (operand, result)]
    return last[1] > last[0]


def _axes(t: torch.Tensor) -> Iterator[tuple[int, int]]:
    return zip(t.shape, t.stride(), strict=True)


def is_number(entry: Any, node: Node) -> bool:
    return isinstance(entry, (int, SizeArg)) or isinstance(
        value_of(node), (torch.SymInt, torch.SymFloat, torch.SymBool, int, float)
    )


def filled_with(entry: Any) -> Any:
    """The number that fills a constant tensor; None of any other entry."""
    return entry.args[0] if isinstance(entry, Value) and entry.kind == "full" else None


def names_of(references: Collection[Reference]) -> dict[Value, str]:
    """A name for all memory that launches touch: its node's, if it has one."""
    nodes: dict[Value, Node] = {}
    for reference in references:
        for read, value in reference.reads.items():
            nodes.setdefault(value, read)
        for result in reference.results:
            nodes.setdefault(result.value, result.node)
    names: dict[Value, str] = {}
    taken: set[str] = set()
    for reference in references:
        for value in (*reference.loaded, *reference.stored, *reference.reads.values()):
            if value not in names:
                node: Node | None = value.node if value.node is not None else nodes.get(value)
                name = node.name if node is not None else f"step_{len(names)}"
                names[value] = name if name not in taken else f"{name}_{len(names)}"
                taken.add(names[value])
    return names
