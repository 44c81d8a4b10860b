"""Which results are written over an operand that nobody reads any more: half the peak memory of a
residual add after a convolution, or of a GELU between two linear layers.

Only where no thread can meet another's writing: the kernel loads the operand once, element for
element where it writes the result that it computes from it, and never goes through memory twice.
Then an element's value reaches the store either in the thread that loaded it, which the store waits
for, or through shared memory, behind a barrier that all loads precede. Other programs touch other
elements. What threads load besides, for want of whole vectors, they do not use.

A tile of fewer elements than threads is different: threads hold copies of an element, and one that
comes late loads what another one has stored. In a row kernel its copy of the row's mean would be
wrong, and Triton may let it store that. Hence ``MOST_THREADS``.
"""

from __future__ import annotations

import math
import operator
import re
from collections import defaultdict
from collections.abc import Collection
from itertools import count
from typing import Any

import torch
from torch.fx import GraphModule, Node

from .body import Body, Instr
from .flow import flatten
from .graph import is_tensor, is_view, mutated_arguments, output_node, value_of
from .group import Group, Plan
from .indexing import is_one, product
from .ir import Value, base_of, is_dense
from .source import Source
from .translate import Program

_REGISTER = re.compile(r"\bt\d+\b")
#: of a warp, on any target
MOST_THREADS = 64
#: what members compute from loads at places that the kernel's loop variables give
_PLAIN = {"pointwise", "cast", "random", "reduce", "partial", "gather"}


def plan_in_place(
    gm: GraphModule,
    program: Program,
    plan: Plan,
    sources: dict[Group, Source],
    apart: Collection[Value],
) -> dict[Value, Value]:
    """result -> the operand whose memory it takes. ``apart``: values in no tensor of their own."""
    last = _last_reads(gm, program, plan, sources)
    ends: dict[int, list[Value]] = defaultdict(list)
    for read, end in last.items():
        ends[end].append(read)
    taken: dict[Value, Value] = {}
    known: dict[Any, bool] = {}  # of kernels of one text: whether they may write over an operand
    fresh: dict[Value, int] = {}  # value -> how many were made before
    made = count()
    for k, step in enumerate(plan.steps):
        if isinstance(step, Node):
            value = program.of.get(step)
            if not isinstance(value, Value) or value.node is not step or value in apart:
                continue
            if _is_fresh(step):
                fresh[value] = next(made)
            continue
        own = [v for v in step.outputs if v not in apart]
        dying = sorted((v for v in ends[k] if v in fresh), key=fresh.__getitem__)
        for operand in dying:
            result = next((v for v in own if v not in taken and _same_room(v, operand)), None)
            if result is not None and _may_take(sources[step], operand, result, known):
                taken[result] = operand
            del fresh[operand]
        fresh.update(zip(own, made, strict=False))
    return taken


def _last_reads(
    gm: GraphModule, program: Program, plan: Plan, sources: dict[Group, Source]
) -> dict[Value, int]:
    """value -> the last step that reads it, or one past the end where its memory may live on."""
    last: dict[Value, int] = {}
    end = len(plan.steps)
    for k, step in enumerate(plan.steps):
        if isinstance(step, Node):
            _note(last, program, step, end if _may_hold(step) else k)
        else:
            for _, role, what in sources[step].params:
                if role == "in":
                    last[what] = max(last.get(what, 0), k)
    _note(last, program, output_node(gm.graph), end)
    return last


def _note(last: dict[Value, int], program: Program, node: Node, when: int) -> None:
    for source in node.all_input_nodes:
        for value in map(base_of, flatten(program.of.get(source))):
            last[value] = max(last.get(value, 0), when)


def _may_hold(node: Node) -> bool:
    """Whether a result of ATen's may share memory with an operand, or writes one."""
    known = isinstance(node.target, torch._ops.OpOverload)
    return not known or is_view(node) or bool(mutated_arguments(node))


def _is_fresh(node: Node) -> bool:
    if node.target is operator.getitem:
        whole: Any = node.args[0]
        return whole.target is torch.ops.aten.convolution_backward.default
    return node.op == "call_function" and not _may_hold(node) and is_tensor(value_of(node))


def _same_room(a: Value, b: Value) -> bool:
    """Whether they take the same bytes, in whatever shapes."""
    same = a.dtype == b.dtype and product(a.shape) == product(b.shape)
    return same and is_dense(a) and is_dense(b)


def _may_take(source: Source, operand: Value, result: Value, known: dict[Any, bool]) -> bool:
    """``_written_where_read``, asked once of kernels of one text."""
    names = {what: name for name, _, what in source.params}
    asked = source.like or source, names.get(operand), names.get(result)
    if asked not in known:
        known[asked] = _written_where_read(*asked)
    return known[asked]


def _written_where_read(source: Source, operand: str | None, result: str | None) -> bool:
    """Whether each element is read and written by the same program, once, in that order."""
    body = source.body
    if not isinstance(body, Body) or not _fills_warps(source):
        return False
    if not _PLAIN.issuperset(m.kind for m in body.group.members):
        return False
    lines = [i for section in body.sections.values() for i in section]
    loads = [i for i in lines if i.kind == "load" and i.text == operand]
    stores = [i for i in lines if i.kind == "store" and i.text == result]
    if len(loads) != 1 or len(stores) != 1:
        return False
    (load,), (store,) = loads, stores
    if load.indices != store.indices or load.cond is not None:
        return False
    everywhere = {a for a in body.group.domain if not is_one(body.size(a))}
    return everywhere.issubset(load.indices[0].atoms) and load.out in _behind(lines, store.out)


def _fills_warps(source: Source) -> bool:
    """Whether no two threads hold the same element."""
    meta = source.meta
    return math.prod(meta["constants"].values()) >= MOST_THREADS * meta["num_warps"]


def _behind(lines: list[Instr], register: str) -> set[str]:
    """The registers that one is computed from, element for element."""
    read = {i.out: _REGISTER.findall(i.text) for i in lines if i.kind == "line"}
    known, stack = {register}, [register]
    while stack:
        fresh = known.symmetric_difference(known.union(read.get(stack.pop(), ())))
        known |= fresh
        stack.extend(fresh)
    return known
