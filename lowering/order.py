"""In what order the parts of a plan run, and which ATen calls are made together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from .flow import flatten
from .graph import is_view
from .group import Group
from .ir import SizeArg, Value, base_of
from .translate import Program

aten = torch.ops.aten


def schedule(
    gm: GraphModule,
    program: Program,
    groups: Sequence[Group],
    home: dict[Value, Group],
    sources_of: Callable[[Value], Sequence[Value]],
) -> list[Any]:
    """Groups and ATen nodes in an order that respects every dependence, close to the graph's."""
    return _Scheduler(program, groups, home, sources_of).run(gm)


def needs_of(
    program: Program,
    groups: Sequence[Group],
    home: dict[Value, Group],
    sources_of: Callable[[Value], Sequence[Value]],
) -> Callable[[Any], Sequence[Any]]:
    """What a group or a node needs: groups, nodes, and Values that nobody stores."""
    return _Scheduler(program, groups, home, sources_of).needs


class _Scheduler:
    """Visits what a thing needs before the thing itself, without recursion."""

    def __init__(
        self,
        program: Program,
        groups: Sequence[Group],
        home: dict[Value, Group],
        sources_of: Callable[[Value], Sequence[Value]],
    ) -> None:
        self.program, self.home, self.sources_of = program, home, sources_of
        self.live = set(groups)
        self.order: list[Any] = []
        self.begun: set[Any] = set()  # visited, or what is visited waits for it

    def run(self, gm: GraphModule) -> list[Any]:
        self.begun.update(gm.graph.find_nodes(op="placeholder"))  # they are there
        for node in gm.graph.nodes:
            if node.op in ("placeholder", "output"):
                continue
            entry = self.program.of.get(node)
            if (
                node in self.program.aten
                or node.op == "get_attr"
                or (isinstance(entry, Value) and entry.kind == "buffer" and entry.node is node)
            ):
                self.visit(node)
            else:
                self.visit_memory_of(entry, Group)
        (out,) = (n for n in gm.graph.nodes if n.op == "output")
        for node in out.all_input_nodes:
            self.visit_memory_of(self.program.of.get(node), (Group, Node))
        return self.order

    def visit_memory_of(self, entry: Any, kinds: Any) -> None:
        """Visit what makes the memory of a node's Values, if it is of these kinds."""
        for value in flatten(entry):
            thing = self.unit(base_of(value))
            if isinstance(thing, kinds):
                self.visit(thing)

    def visit(self, start: Any) -> None:
        if start in self.begun:
            return
        self.begun.add(start)
        stack = [(start, iter(self.needs(start)))]
        while stack:
            thing, rest = stack[-1]
            for need in rest:
                if need not in self.begun:
                    self.begun.add(need)
                    stack.append((need, iter(self.needs(need))))
                    break
            else:
                stack.pop()
                if isinstance(thing, (Group, Node)):
                    self.order.append(thing)

    def unit(self, v: Value) -> Any:
        """The step that makes a value: its group, its node, or the value itself."""
        if v in self.home and (group := self.home[v]) in self.live:
            return group
        return v.node if v.kind in ("buffer", "full", "iota") and v.node is not None else v

    def needs(self, thing: Any) -> Sequence[Any]:
        if isinstance(thing, Group):
            read: dict[Value, None] = {}
            for m in thing.members:
                read.update(dict.fromkeys(self.sources_of(m)))
            return [self.unit(s) for s in read]
        if isinstance(thing, Value):
            return [self.unit(s) for s in self.sources_of(thing)]
        if isinstance(thing, Node) and not _is_constant(self.program.of.get(thing)):
            made = flatten(self.program.of.get(thing))
            own = [self.unit(s) for v in made for s in self.sources_of(v)]
            return [*own, *self.operands(thing)]
        return ()

    def operands(self, thing: Node) -> Iterator[Any]:
        for node in thing.all_input_nodes:
            entry = self.program.of.get(node)
            if isinstance(entry, Value):
                yield self.unit(base_of(entry))
            elif not isinstance(entry, (int, SizeArg, tuple)) or (
                isinstance(entry, SizeArg) and node in self.program.aten
            ):
                yield node


def _is_constant(entry: Any) -> bool:
    return isinstance(entry, Value) and entry.kind == "full"


# calls made together ----------------------------------------------------------------------------


def batches(steps: Sequence[Any]) -> Iterator[list[Any]]:
    """The steps, with runs of plain updates of inputs taken together, kind by kind.

    A run ends before an update of memory that it has written or read already.
    """
    run: dict[Any, list[Any]] = {}
    written: set[Node] = set()
    read: set[Node] = set()
    for step in steps:
        kind = _update_kind(step)
        if kind is not None:
            into, source = step.args[0], _memory_of(step.args[1])
            if into in written or into in read or source in written:
                yield from run.values()
                run, written, read = {}, set(), set()
            run.setdefault(kind, []).append(step)
            written.add(into)
            if source is not None:
                read.add(source)
            continue
        yield from run.values()
        run, written, read = {}, set(), set()
        yield [step]
    yield from run.values()


def _memory_of(value: Any) -> Node | None:
    """The node whose memory an operand lies in; None of a number."""
    while isinstance(value, Node) and is_view(value):
        value = value.all_input_nodes[0]
    return value if isinstance(value, Node) else None


def together(nodes: Sequence[Node]) -> tuple[Callable[..., Any], list[Any]]:
    """(a function, its operands) that does what all the nodes of one batch do."""
    targets = [n.args[0] for n in nodes]
    if nodes[0].target is aten.copy_.default:
        return torch._foreach_copy_, [targets, [n.args[1] for n in nodes]]
    return torch._foreach_add_, [targets, nodes[0].args[1]]


def _update_kind(step: Any) -> Any:
    """What updates of inputs must share to be made together; None for anything else."""
    if not isinstance(step, Node) or step.users or len(step.args) != 2 or step.kwargs:
        return None
    if step.target not in (aten.copy_.default, aten.add_.Tensor):
        return None
    args: Any = step.args
    into, other = args
    if into.op != "placeholder" or any(isinstance(n, torch.SymInt) for n in into.meta["val"].shape):
        return None
    a = into.meta["val"]
    if step.target is aten.add_.Tensor:
        return None if isinstance(other, Node) else ("add", repr(other), a.dtype, a.device)
    b = other.meta.get("val") if isinstance(other, Node) else None
    if not isinstance(b, torch.Tensor) or a.dtype != b.dtype or a.device != b.device:
        return None
    if any(isinstance(n, torch.SymInt) for n in b.shape):  # comparing would install a guard
        return None
    return ("copy", a.dtype, a.device) if a.shape == b.shape else None
