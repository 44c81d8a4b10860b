"""Passes over an ATen graph: each edits ``gm.graph`` in place and says how much it changed.

All of them take one walk over the graph and compute no tensor, so 4500 nodes cost milliseconds.
"""

from __future__ import annotations

import logging
import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from .duplicates import duplicate_key, is_pure
from .fills import read_fills
from .functionalized import inline_functionalized_ops
from .graph import (
    Storage,
    calls_of,
    is_only_write,
    is_symbolic,
    is_tensor,
    mutated_arguments,
    nodes_in,
    same,
    same_layout,
    schema_of,
    value_of,
)
from .looks import looks

aten = torch.ops.aten
log = logging.getLogger("gems_compile")

# Casts that lose nothing, so the cast back gives the same bits.
_WIDER = {
    torch.float16: (torch.float32, torch.float64),
    torch.bfloat16: (torch.float32, torch.float64),
    torch.float32: (torch.float64,),
}

_VIEWS = frozenset(
    {
        aten.alias.default,
        aten.detach.default,
        aten.view.default,
        aten._unsafe_view.default,
        aten._reshape_alias.default,
        aten.expand.default,
        aten.permute.default,
        aten.transpose.int,
        aten.t.default,
        aten.slice.Tensor,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.unsqueeze.default,
        aten.as_strided.default,
        aten.select.int,
    }
)
_COPIES = frozenset(
    {
        aten.clone.default,
        aten._to_copy.default,
        aten.lift_fresh_copy.default,
        aten.contiguous.default,
        aten.reshape.default,
    }
)
_SCALAR_IDENTITIES: dict[Any, Callable[[Any, Any], bool]] = {
    # x + 0 is no identity for floats: -0.0 + 0 is +0.0. x - (+0.0) is.
    aten.mul.Tensor: lambda x, c: c == 1,
    aten.mul.Scalar: lambda x, c: c == 1,
    aten.div.Tensor: lambda x, c: c == 1,
    aten.div.Scalar: lambda x, c: c == 1,
    aten.add.Tensor: lambda x, c: c == 0 and not x.dtype.is_floating_point,
    aten.sub.Tensor: lambda x, c: c == 0 and math.copysign(1, c) > 0,
    aten.pow.Tensor_Scalar: lambda x, c: c == 1,
}
_MAY_COPY = _COPIES.union(_SCALAR_IDENTITIES, (aten.copy.default, aten.slice_scatter.default))
_MAY_DROP = _VIEWS | _MAY_COPY


def drop_no_ops(gm: fx.GraphModule) -> int:
    """Drop views, copies and arithmetic that change nothing; returns how many.

    A view goes when it, or the view of a view of it, has the geometry of something it came from:
    same memory and same geometry is the same tensor. A copy or a ``x * 1`` goes when the layout is
    the same, nobody writes either side, and no output starts to share memory with an input or with
    another output.
    """
    storage: Storage | None = None  # few graphs have a candidate
    dropped = 0
    for node in calls_of(gm.graph, _MAY_DROP):
        source = _view_source(node) or _original(node)
        if source is None:
            continue
        storage = storage or Storage(gm.graph)
        if node.target in _MAY_COPY and not _may_read(source, node, storage):
            continue
        if node in storage.outputs and _becomes_shared(source, storage):
            continue
        storage.merge(source, node)
        node.replace_all_uses_with(source)
        gm.graph.erase_node(node)
        dropped += 1
    return dropped


def _becomes_shared(source: fx.Node, storage: Storage) -> bool:
    return storage.is_fixed(source) or source in storage.outputs


def _view_source(node: fx.Node) -> fx.Node | None:
    """The nearest thing this view came from that is the same tensor."""
    value, source = value_of(node), node
    while source.target in _VIEWS and isinstance(source.args[0], fx.Node):
        source = source.args[0]
        base = value_of(source)
        if same_layout(value, base) and same(value.storage_offset(), base.storage_offset()):
            return source
    return None


def _original(node: fx.Node) -> fx.Node | None:
    """What this node is a copy of, in the same layout."""
    if node.target not in _MAY_COPY:
        return None
    scatter = node.target is aten.slice_scatter.default  # of as many elements: of all of them
    source = node.args[int(scatter)] if len(node.args) > scatter else None
    if not isinstance(source, fx.Node) or not is_tensor(value_of(source)):
        return None
    if node.target is aten._to_copy.default and source.target is aten._to_copy.default:
        source = _before_widening(node, source)
    elif node.target in _SCALAR_IDENTITIES:
        if len(node.args) != 2 or node.kwargs or type(node.args[1]) not in (int, float):
            return None
        if not _SCALAR_IDENTITIES[node.target](value_of(source), node.args[1]):
            return None
    elif node.target is aten.copy.default:
        source = node.args[1]  # what it is copied over does not matter
        if not isinstance(source, fx.Node):  # eager mode hands numbers on as they are
            return None
    return source if same_layout(value_of(node), value_of(source)) else None


def _may_read(source: fx.Node, node: fx.Node, storage: Storage) -> bool:
    """Whether those who read a copy can read what it was made of instead."""
    if storage.is_written(source) or storage.is_written(node):
        return False
    family = storage.members[storage.root[node]]
    if any(u.target is aten.as_strided.default for m in family for u in m.users):
        return False  # it counts from the start of the copy's memory
    return storage.root[node] not in storage.escaping or not (
        storage.is_fixed(source) or storage.root[source] in storage.escaping
    )


def _before_widening(node: fx.Node, cast: fx.Node) -> fx.Node:
    """x for ``narrow(widen(x))``: every 16-bit float is a float32, so nothing was rounded."""
    origin: Any = cast.args[0]
    narrow, wide = value_of(origin), value_of(cast)
    if is_tensor(narrow) and wide.dtype in _WIDER.get(narrow.dtype, ()):
        return origin
    return cast


def drop_duplicates(gm: fx.GraphModule, returned: bool = True) -> int:
    """Compute equal things once and drop what nobody reads; returns how many nodes went.

    Left alone: random, effectful and mutating ops, ops outside ATen, uninitialised memory, results
    that somebody writes, and pairs of which both are returned (they were two tensors), or, without
    ``returned``, one is: what backward reads of forward's results is no business of who has them.
    """
    storage = Storage(gm.graph)
    version: dict[fx.Node, int] = {}
    seen: dict[Any, fx.Node] = {}
    repeatable: dict[Any, bool] = {}
    symbols: dict[fx.Node, Any] = {}
    writers = {node for nodes in storage.writes.values() for node in nodes}
    dropped = 0
    for node in list(gm.graph.nodes):
        if node in writers:
            for written in mutated_arguments(node):
                root = storage.root[written]
                version[root] = version.get(root, 0) + 1
        if is_symbolic(value := value_of(node)):
            symbols[node] = "symbol", str(value.node.expr)
        key = duplicate_key(node, storage, version, repeatable, symbols)
        if key is None or (not returned and storage.root[node] in storage.escaping):
            continue
        first = seen.setdefault(key, node)
        if first is node or not _may_merge(first, node, storage):
            continue
        storage.merge(first, node)
        node.replace_all_uses_with(first)
        gm.graph.erase_node(node)
        dropped += 1
    return dropped + drop_dead_code(gm)


def _may_merge(first: fx.Node, node: fx.Node, storage: Storage) -> bool:
    if is_symbolic(value_of(node)):
        return True
    if first in storage.outputs and node in storage.outputs:
        return False
    a, b = storage.root[first], storage.root[node]
    if a is b:
        return True
    return a not in storage.writes and b not in storage.writes and not {a, b} <= storage.escaping


def draws_random_numbers(node: fx.Node) -> bool:
    """Whether two runs of the node may differ; of an op we cannot look into, that is assumed."""
    target: Any = node.target
    if node.op != "call_function" or target is operator.getitem:
        return False
    if isinstance(target, torch._ops.HigherOrderOperator):
        return True
    schema = schema_of(node)
    if schema is None:
        return False
    if schema.name == "gems::seed":
        return True
    if torch.Tag.nondeterministic_seeded not in target.tags:
        return False
    for place, argument in enumerate(schema.arguments):  # attention: only where it drops out
        if argument.name == "dropout_p":
            default = node.kwargs.get("dropout_p", argument.default_value)
            given: Any = node.args[place] if place < len(node.args) else default
            return given != 0
    return True


def drop_dead_code(gm: fx.GraphModule) -> int:
    """Erase what nobody reads, if computing it has no effect."""
    dropped = 0
    for node in reversed(list(gm.graph.nodes)):
        if node.users or node.op not in ("call_function", "get_attr"):
            continue
        if "unbacked_bindings" in node.meta:
            continue
        harmless = node.op == "get_attr" or node.target is operator.getitem
        if harmless or is_symbolic(value_of(node)) or is_pure(node):
            gm.graph.erase_node(node)
            dropped += 1
    return dropped


IN_PLACE: dict[Any, Any] = {  # overload -> overload
    aten.index_put.default: aten.index_put_.default,
    aten.index_copy.default: aten.index_copy_.default,
    aten.index_add.default: aten.index_add_.default,
    aten.index_fill.int_Scalar: aten.index_fill_.int_Scalar,
    aten.index_fill.int_Tensor: aten.index_fill_.int_Tensor,
    aten.scatter.src: aten.scatter_.src,
    aten.scatter.value: aten.scatter_.value,
    aten.scatter_add.default: aten.scatter_add_.default,
    aten.scatter_reduce.two: aten.scatter_reduce_.two,
    aten.masked_scatter.default: aten.masked_scatter_.default,
}
_PART: dict[Any, Any] = {
    aten.slice_scatter.default: aten.slice.Tensor,
    aten.select_scatter.default: aten.select.int,
}


def reinplace_updates(gm: fx.GraphModule) -> int:
    """``copy_(p, index_put(p, ...))`` -> ``index_put_(p, ...)``; returns how many inputs changed.

    A KV cache is then updated where it is, not copied twice. Needs: nobody reads p's old value
    afterwards, no other argument of the update shares memory with p, the new value is no output,
    and its layout is p's.
    """
    storage: Storage | None = None  # few graphs have a candidate
    changed = 0
    for node in _copies(gm):
        target, updates = node.args[0], _updates(*node.args)
        if not updates:
            continue
        storage = storage or Storage(gm.graph)
        if _may_update_in_place(target, updates, node, storage):
            for update in updates:
                _update_in_place(gm.graph, target, update, storage)
            gm.graph.erase_node(node)
            changed += 1
    if changed:
        drop_dead_code(gm)  # the old parts, and copies into them
    return changed


def count_in_place(gm: fx.GraphModule) -> int:
    """``copy_(p, p + number)`` -> ``p += number``: counters of batches; returns how many."""
    storage: Storage | None = None
    changed = 0
    for node in _copies(gm):
        target, new = node.args
        if not _is_count(target, new):
            continue
        if not is_only_write(node, target):
            storage = storage or Storage(gm.graph)
            if storage.writes.get(target) != [node]:
                continue
        if not same_layout(value_of(new), value_of(target)):
            continue
        node.target, node.args = aten.add_.Tensor, (target, new.args[1])
        gm.graph.erase_node(new)
        changed += 1
    return changed


def _copies(gm: fx.GraphModule) -> list[Any]:
    """The copies into something whose result nobody reads."""
    copies = gm.graph.find_nodes(op="call_function", target=aten.copy_.default)
    return [node for node in copies if not node.users and len(node.args) == 2]


def _is_count(target: fx.Node, new: Any) -> bool:
    """Whether ``new`` is ``target`` plus a number, for nobody else."""
    if not isinstance(new, fx.Node) or new.target is not aten.add.Tensor or new.kwargs:
        return False
    args: Any = new.args
    return args[0] is target and type(args[1]) in (int, float) and len(new.users) == 1


def _updates(target: fx.Node, new: Any) -> list[fx.Node]:
    """The chain of updates that leads from ``target`` to ``new``, first one first."""
    chain: list[fx.Node] = []
    while isinstance(new, fx.Node) and new is not target:
        if new.target not in IN_PLACE and new.target not in _PART:
            return []
        if len(new.args) < 2 or not isinstance(new.args[0], fx.Node):
            return []
        if new.target is aten.index_put.default and looks(new):
            return []  # ATen would wait for the GPU to count the places of a mask
        chain.append(new)
        new = new.args[0]
    return chain[::-1] if new is target and target.op == "placeholder" else []


def _may_update_in_place(
    target: fx.Node, updates: list[fx.Node], final: fx.Node, storage: Storage
) -> bool:
    value = value_of(target)
    if storage.writes.get(target) != [final] or not is_tensor(value):
        return False
    if any(same(s, 0) and not same(n, 1) for n, s in zip(value.shape, value.stride(), strict=True)):
        return False  # an expanded input: one write would show in many places
    old = target
    family = {target, *updates}  # every root that will be the memory of target
    for update in updates:
        if update in storage.escaping or update in storage.writes:
            return False
        if not same_layout(value_of(update), value):
            return False
        others = [n for n in update.all_input_nodes if n is not old]
        if old in nodes_in(update.args[1:]) or any(storage.root[n] in family for n in others):
            return False
        moment = storage.position[update]
        for alias in storage.members[old]:
            for reader in alias.users:
                late = storage.position[reader] > moment
                if late and reader is not final and reader.op != "output":
                    return False
        old = update
    return True


def _update_in_place(graph: fx.Graph, target: fx.Node, update: fx.Node, storage: Storage) -> None:
    with graph.inserting_before(update):
        for node in _write(graph, target, update, {target, update}, storage):
            storage.position[node] = storage.position[update]
    storage.merge(target, update)
    update.replace_all_uses_with(target)
    graph.erase_node(update)


def _write(
    graph: fx.Graph, target: fx.Node, update: fx.Node, family: set[fx.Node], storage: Storage
) -> list[fx.Node]:
    """The nodes that do ``update`` to the memory of ``target``.

    An update of a slice of a slice writes the inner slice alone, and copies nothing else.
    """

    def add(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
        node = graph.call_function(op, args, kwargs)
        node.meta = dict(update.meta)
        return node

    rest = update.args[1:]
    if update.target in IN_PLACE:
        node = add(IN_PLACE[update.target], (target, *rest), update.kwargs)
        node.meta["val"] = value_of(target)
        return [node]
    part = add(_PART[update.target], (target, *rest[1:]), update.kwargs)
    part.meta["val"] = _part_value(part)
    source = rest[0]
    if (
        isinstance(source, fx.Node)
        and len(source.users) == 1
        and not any(
            storage.root[n] in family or storage.is_written(n)
            for n in source.all_input_nodes
            if n is not source.args[0]
        )
    ):
        if source.target is aten.copy.default:
            source = source.args[1]
        elif (source.target in IN_PLACE or source.target in _PART) and _is_old_part(
            source.args[0], update
        ):
            return [part, *_write(graph, part, source, family, storage)]
    node = add(aten.copy_.default, (part, source), {})
    node.meta["val"] = part.meta["val"]
    return [part, node]


def _is_old_part(node: Any, update: fx.Node) -> bool:
    """Whether ``node`` is the part that ``update`` replaces, as it was before."""
    return (
        isinstance(node, fx.Node)
        and node.target is _PART.get(update.target)
        and node.args == (update.args[0], *update.args[2:])
        and node.kwargs == update.kwargs
    )


def _part_value(part: fx.Node) -> Any:
    """The view that a slice or select makes, on the fake tensors of its arguments."""
    target: Any = part.target
    given: Any = fx.map_arg((part.args, part.kwargs), value_of)
    args, kwargs = given
    with args[0].fake_mode:
        return target(*args, **kwargs)


PASSES = (
    inline_functionalized_ops,  # custom ops that mutate, without the copies
    drop_no_ops,  # views and casts that change nothing
    read_fills,  # constants that Python made into tensors
    drop_duplicates,  # the same pure call twice
    count_in_place,  # counters add to themselves, which is then one call for all
    reinplace_updates,  # a cache update writes its input instead of a copy
)

__all__ = [
    "IN_PLACE",
    "PASSES",
    "count_in_place",
    "drop_dead_code",
    "drop_duplicates",
    "drop_no_ops",
    "inline_functionalized_ops",
    "read_fills",
    "reinplace_updates",
]
