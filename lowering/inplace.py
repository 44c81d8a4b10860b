"""Which results are written over an operand that nobody reads any more: half the peak memory of a
residual add after a convolution.

Only where no program can meet another's writing: a pointwise kernel that reads the operand once, at
the very place where it writes the result that it computes from it.
"""

from __future__ import annotations

import re
from collections.abc import Collection

import torch
from torch.fx import GraphModule, Node

from .body import Body, Instr
from .flow import flatten
from .graph import is_tensor, is_view, mutated_arguments, output_node, value_of
from .group import Group, Plan
from .ir import Value, base_of, is_dense
from .source import Source
from .translate import Program

_REGISTER = re.compile(r"\bt\d+\b")


def plan_in_place(
    gm: GraphModule,
    program: Program,
    plan: Plan,
    sources: dict[Group, Source],
    scratch: Collection[Value],
) -> dict[Value, Value]:
    """result -> the operand whose memory it takes."""
    last = _last_reads(gm, program, plan, sources)
    taken: dict[Value, Value] = {}
    fresh: dict[Value, None] = {}  # in order
    for k, step in enumerate(plan.steps):
        if isinstance(step, Node):
            value = program.of.get(step)
            if isinstance(value, Value) and value.node is step and _is_fresh(step):
                fresh[value] = None
            continue
        own = [v for v in step.outputs if v not in scratch]
        dying = [v for v in fresh if last.get(v) == k]
        for operand in dying:
            result = next((v for v in own if v not in taken and _same_room(v, operand)), None)
            if result is not None and _written_where_read(sources[step], operand, result):
                taken[result] = operand
            del fresh[operand]
        fresh.update(dict.fromkeys(own))
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
    return not known or is_view(node) or next(mutated_arguments(node), None) is not None


def _is_fresh(node: Node) -> bool:
    return node.op == "call_function" and not _may_hold(node) and is_tensor(value_of(node))


def _same_room(a: Value, b: Value) -> bool:
    return (a.shape, a.strides, a.dtype) == (b.shape, b.strides, b.dtype) and is_dense(a)


def _written_where_read(source: Source, operand: Value, result: Value) -> bool:
    """Whether each element is read and written by the same thread, in that order."""
    body = source.body
    if not isinstance(body, Body) or body.looped or set(body.sections) != {("row", 0)}:
        return False
    if body.group.reduced or any(m.kind not in _PLAIN for m in body.group.members):
        return False
    names = {what: name for name, _, what in source.params}
    lines = body.sections["row", 0]
    loads = [i for i in lines if i.kind == "load" and i.text == names.get(operand)]
    stores = [i for i in lines if i.kind == "store" and i.text == names.get(result)]
    if len(loads) != 1 or len(stores) != 1:
        return False
    (load,), (store,) = loads, stores
    alike = load.indices == store.indices and load.cond is None and store.cond is None
    return alike and load.out in _behind(lines, store.out)


_PLAIN = ("pointwise", "cast")


def _behind(lines: list[Instr], register: str) -> set[str]:
    """The registers that one is computed from."""
    known = {register}
    for line in reversed(lines):
        if line.out in known:
            known.update(_REGISTER.findall(line.text))
    return known
