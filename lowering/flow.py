"""Who reads which value, who writes it, and what must wait for what."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.fx import Node

from .graph import Storage, calls_of, is_only_write, nodes_in
from .indexing import product
from .ir import BITS, Value, base_of, is_further
from .overload import facts_of
from .translate import Program
from .views import Permute, Reshape


def is_widening(v: Value) -> bool:
    """A cast that only widens: what it reads is smaller in memory, or as small."""
    return v.kind == "cast" and BITS[v.args[0].dtype] < BITS[v.dtype]


ALL = -1
#: the place of an operand that is not read element for element
_READ_ELSEWHERE = {"gather": 0, "patch": 1, "concat": ALL, "whole": ALL}


def find_readers(program: Program) -> dict[Value, list[tuple[Value, bool]]]:
    """value -> [(reader, reads it element for element)]."""
    readers: dict[Value, list[tuple[Value, bool]]] = defaultdict(list)
    for v in program.values:
        if not v.computes:
            continue
        shape, kind, bases = v.args[0].shape if v.reduces else v.shape, v.kind, v.bases
        for k, a in enumerate(v.inputs):
            base = bases[k]
            same = a.shape == shape or product(a.shape) == product(shape)
            if same and (a is not base or kind in _READ_ELSEWHERE):
                same = _READ_ELSEWHERE.get(kind) not in (k, ALL) and _only_bijections(a)
            readers[base].append((v, same))
    return readers


def drop_unread(program: Program, escapes: set[Value]) -> None:
    """Drop computed values that nobody reads and that ``escapes`` lacks, and views of them."""
    read, dropped = set(escapes), set[Value]()
    kept = []
    for v in reversed(program.values):
        if v.kind == "view":
            kept.append(v)
        elif not v.computes or v in read or v.kind == "store" or _comes_with(v, read):
            kept.append(v)
            read.update(v.bases)
        else:
            dropped.add(v)
    program.values[:] = [
        v for v in reversed(kept) if v.kind != "view" or dropped.isdisjoint(v.bases)
    ]


def _comes_with(v: Value, read: set[Value]) -> bool:
    """Whether a kernel that is wanted for another result makes v as well."""
    return is_further(v) and v.args[0] in read


def find_escapes(program: Program, graph: Any) -> set[Value]:
    """Values that must be in memory: ATen reads them, the graph returns them or writes them."""
    escapes = set[Value]()
    for v in program.values:
        if v.kind == "store":
            escapes.add(base_of(v.params[0]))
        elif v.kind == "whole" and not is_further(v):
            escapes.update(v.bases)
    for node in graph.nodes:
        if node.op == "output" or node in program.aten:
            for source in node.all_input_nodes:
                for value in flatten(program.of.get(source)):
                    escapes.add(base_of(value))
    return escapes


def _only_bijections(v: Value) -> bool:
    while v.kind == "view":
        if not isinstance(v.params, (Permute, Reshape)):
            return False
        v = v.args[0]
    return True


def flatten(entry: Any) -> list[Value]:
    """The Values of what a node became: a Value, or tuples of them."""
    if isinstance(entry, Value):
        return [entry]
    if isinstance(entry, (tuple, list)):
        return [v for e in entry for v in flatten(e)]
    return []


def order_edges(
    program: Program, graph: Any, copies: Mapping[Node, str | None]
) -> tuple[dict[Value, list[Value]], set[Value]]:
    """(what each ATen result waits for besides its operands, memory that the graph writes).

    A node that writes an argument waits for everything that read that memory before; whatever
    reads the memory afterwards waits for the node. Nodes with an effect keep their order, but for
    copies into inputs (``copies``: see copies_alone), which only affect memory that has a name.
    """
    waits: dict[Value, list[Value]] = defaultdict(list)
    read_by: dict[Value, list[Value]] = defaultdict(list)
    written_by: dict[Value, Value] = {}
    last_effect: Value | None = None
    ever = _ever_written(program)
    for node in graph.nodes:
        if node.op in ("output", "placeholder", "get_attr"):
            continue
        own = program.made.get(node) or flatten(program.of.get(node))
        whole = node in program.aten or _is_pick(node, program)
        if not whole:
            own = [v for v in own if v.kind == "store" or not ever.isdisjoint(v.bases)]
            if not own:
                continue
        bases = [base_of(v) for s in node.all_input_nodes for v in flatten(program.of.get(s))]
        own = [v for v in own if v not in bases]  # a view of all of a tensor is that tensor
        if whole:
            for v in own:
                waits[v].extend(bases)
        for v in own:
            for base in bases if whole else v.bases:
                read_by[base].append(v)
                if base in written_by and v is not written_by[base]:
                    waits[v].append(written_by[base])
        store = next((v for v in own if v.kind == "store"), None)
        if store is not None:
            for base in _written_bases(node, program):
                waits[store].extend(r for r in read_by[base] if r not in own)
                if base.node.op != "placeholder":
                    waits[store].append(base)
                if base in written_by:
                    waits[store].append(written_by[base])
                written_by[base] = store
        elif node in program.aten and has_effect(node):
            me = own[0] if own else None
            if me is not None:
                if copies.get(node, "no copy") is not None:
                    if last_effect is not None:
                        waits[me].append(last_effect)
                    last_effect = me
                for base in _written_bases(node, program):
                    waits[me].extend(r for r in read_by[base] if r is not me)
                    written_by[base] = me
    return waits, set(written_by)


def _ever_written(program: Program) -> set[Value]:
    """Memory that some node writes."""
    nodes = [n for n in program.aten if has_effect(n)]
    if any(v.kind == "store" for v in program.values):
        stores = (n for n, made in program.made.items() if any(v.kind == "store" for v in made))
        nodes.extend(stores)
    return {base for node in nodes for base in _written_bases(node, program)}


def written_by_aten(program: Program, graph: Any) -> set[Value]:
    """Memory that calls of ATen write."""
    nodes = (n for n in graph.nodes if n in program.aten and has_effect(n))
    written = {base for node in nodes for base in _written_bases(node, program)}
    return {base for base in written if not base.computes}  # a kernel's result lies where it should


def copies_alone(program: Program, graph: Any) -> dict[Node, str | None]:
    """Each ``copy_`` -> why it is not the only write of an input that all readers name, or None."""
    copies = calls_of(graph, (torch.ops.aten.copy_.default,))
    storage = functools.cache(lambda: Storage(graph))
    return {n: _why_not_alone(n, program, storage) for n in copies}


def _why_not_alone(
    node: Node, program: Program, whole_storage: Callable[[], Storage]
) -> str | None:
    into: Any = node.args[0]
    memory = program.of.get(into)
    if into.op != "placeholder" or not isinstance(memory, Value) or memory.op == "opaque":
        return "it writes a part of an input, or what is no input"
    if is_only_write(node, into):
        return None
    storage = whole_storage()
    if storage.writes.get(into) != [node]:
        return "the input is written more than once"
    own = program.of.get(node)
    for alias in storage.members[into]:
        if any(base_of(v) not in (memory, own) for v in flatten(program.of.get(alias))):
            return "ATen makes another tensor of the input's memory"
    return None


def _is_pick(node: Node, program: Program) -> bool:
    entry = program.of.get(node)
    return isinstance(entry, Value) and entry.node is node and entry.kind == "buffer"


def _written_bases(node: Node, program: Program) -> list[Value]:
    schema = getattr(node.target, "_schema", None)
    nodes = node.all_input_nodes
    if schema is not None:
        nodes = []
        for k, arg in enumerate(schema.arguments):
            if arg.alias_info is not None and arg.alias_info.is_write:
                given = node.args[k] if k < len(node.args) else node.kwargs.get(arg.name)
                nodes += nodes_in(given)
    return [base_of(v) for n in nodes for v in flatten(program.of.get(n))]


def has_effect(node: Node) -> bool:
    """Whether a call changes memory, draws random numbers or has another effect."""
    facts = facts_of(node.target)
    if facts is None:
        return node.op == "call_function" and not _is_plain_function(node)
    return facts.effect


def _is_plain_function(node: Node) -> bool:
    return getattr(node.target, "__module__", "") in ("_operator", "operator", "math")
