"""Multi-tensor ops taken apart, so that the chains of each tensor fuse.

``aten._foreach_add.List([a, b], [c, d])`` is ``add(a, c), add(b, d)``. An optimizer step is ten of
them over the same lists, each of which passes over all memory. Taken apart, each parameter's chain
becomes one kernel, and equal kernels one launch (``horizontal``).
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from .flow import has_effect
from .graph import nodes_in, value_of
from .translate import op_of, unsupported_tensor

aten = torch.ops.aten

#: _foreach_NAME.OVERLOAD -> the op on one tensor; unary ops and the like go by their own name
_OPS: dict[str, Any] = {
    "add": aten.add.Tensor,
    "sub": aten.sub.Tensor,
    "mul": aten.mul.Tensor,
    "div": aten.div.Tensor,
    "maximum.List": aten.maximum.default,
    "minimum.List": aten.minimum.default,
    "maximum": aten.clamp_min.default,
    "minimum": aten.clamp_max.default,
    "clamp_min.List": aten.clamp_min.Tensor,
    "clamp_max.List": aten.clamp_max.Tensor,
    "clamp_min": aten.clamp_min.default,
    "clamp_max": aten.clamp_max.default,
    "pow.List": aten.pow.Tensor_Tensor,
    "pow.ScalarAndTensor": aten.pow.Scalar,
    "pow": aten.pow.Tensor_Scalar,
    "lerp.List": aten.lerp.Tensor,
    "lerp": aten.lerp.Scalar,
    "addcmul": aten.addcmul.default,
    "addcdiv": aten.addcdiv.default,
    "copy": aten.copy.default,
}
#: scalars in a tensor on the CPU; reductions, of which ATen's kernels make many at once
_WHOLE = {"addcmul.Tensor", "addcdiv.Tensor", "norm.Scalar", "max.default"}


def take_foreach_apart(gm: fx.GraphModule, device: torch.device) -> int:
    """Turn multi-tensor nodes into a node a tensor; returns how many there were.

    Only for what kernels on ``device`` take; the rest of the list stays one multi-tensor node, for
    ATen's is better than many calls.
    """
    taken = 0

    @functools.cache
    def fits_kernel(node: fx.Node) -> bool:
        return _fits(value_of(node), device)

    for node in list(gm.graph.nodes):
        op = single_op(node.target)
        if op is None or not _parts_only(node):
            continue
        fits = [
            k
            for k, made in enumerate(value_of(node))
            if _fits(made, device)
            and all(map(fits_kernel, nodes_in(_arguments(node, operator.itemgetter(k)))))
        ]
        if fits:
            _take_apart(node, op, fits)
            taken += 1
    if taken:
        _chain_by_chain(gm.graph)
    return taken


def single_op(target: Any) -> Any:
    """The op that does for one tensor what a multi-tensor op does for many, or None."""
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return None
    name = target._opname.removeprefix("_foreach_")
    full = f"{name}.{target._overloadname}"
    if name == target._opname or name.endswith("_") or full in _WHOLE:
        return None
    op = _OPS.get(full) or _OPS.get(name) or getattr(getattr(aten, name, None), "default", None)
    return op if op is not None and op_of(op) is not None else None


def _parts_only(node: fx.Node) -> bool:
    values = value_of(node)
    return isinstance(values, (list, tuple)) and all(
        u.target is operator.getitem and type(u.args[1]) is int for u in node.users
    )


def _fits(value: Any, device: torch.device) -> bool:
    """Whether a kernel takes what a node holds."""
    return (
        isinstance(value, torch.Tensor)
        and value.device == device
        and unsupported_tensor(value) is None
    )


def _arguments(node: fx.Node, pick: Callable[[Any], Any]) -> Any:
    """(args, kwargs) with ``pick(items)`` for every list."""

    def picked(argument: Any) -> Any:
        return pick(argument) if isinstance(argument, (list, tuple)) else argument

    return tuple(map(picked, node.args)), {n: picked(a) for n, a in node.kwargs.items()}


def _take_apart(node: fx.Node, op: Any, fits: Sequence[int]) -> None:
    graph, values = node.graph, value_of(node)
    users: dict[int, list[fx.Node]] = {}
    for user in list(node.users):
        place: Any = user.args[1]
        users.setdefault(place, []).append(user)
    with graph.inserting_before(node):
        for k in fits:
            args, kwargs = _arguments(node, operator.itemgetter(k))
            if op in (aten.addcmul.default, aten.addcdiv.default) and len(args) > 3:
                args, kwargs = args[:3], {"value": args[3]}
            part = graph.call_function(op, args, kwargs)
            part.meta = {**node.meta, "val": values[k]}
            for user in users.pop(k, ()):
                user.replace_all_uses_with(part)
                graph.erase_node(user)
    if not users:
        graph.erase_node(node)
        return
    rest = sorted(users)
    node.args, node.kwargs = _arguments(node, lambda items: [items[k] for k in rest])
    node.meta["val"] = [values[k] for k in rest]
    for place, k in enumerate(rest):
        for user in users[k]:
            user.args = (node, place)


def _chain_by_chain(graph: fx.Graph) -> None:
    """Reorder what was taken apart, each tensor's chain in one piece, as the fuser goes through it.

    Between two calls with an effect the order is free.
    """
    run: list[fx.Node] = []
    for node in list(graph.nodes):
        if node.op == "call_function" and not has_effect(node):
            run.append(node)
        elif node.op == "output" or (node.op == "call_function" and run):
            _sort_run(run, node)
            run = []


def _sort_run(run: Sequence[fx.Node], end: fx.Node) -> None:
    """Move each node to right before the first that needs it; ``end`` follows the run."""
    inside, done = set(run), set[fx.Node]()
    wanted, after = list[fx.Node](), end
    while after.op != "root":  # what later calls take, in their order
        wanted += [n for n in after.all_input_nodes if n in inside]
        after = after.next
    for root in [*wanted, *run]:
        stack = [root]
        while stack:
            node = stack[-1]
            needs = [n for n in node.all_input_nodes if n in inside and n not in done]
            if node in done or not needs:
                stack.pop()
                if node not in done:
                    done.add(node)
                    end.prepend(node)
            else:
                stack += reversed(needs)
