"""Functional updates at computed places, made calls that write memory of their own.

``out = scatter_add(base, dim, index, src)`` copies base and adds to the copy. Here the copy is a
node of its own, ``new = clone(base)``, and ``scatter_add_(new, dim, index, src)`` writes it: the
kernel that makes base stores the copy (or a fill does), and the one that makes src adds it to what
is there. Whoever read out reads new. If no kernel takes the update, ATen runs these two calls, as
it would inside the functional one.

Sums of 16-bit floats: ATen's ``scatter_add`` and ``index_add`` add atomically on a GPU and round
each sum, so the same is done where the target can. Elsewhere, and for ``index_put``, which ATen
sorts by place and sums with fewer roundings, the sums are float32 in memory and rounded once, if
that memory is small beside what is added.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..kernels.op import OPS
from ..kernels.target import Target
from .graph import Storage, is_tensor, is_view, nodes_in, same_layout, value_of
from .indexing import is_static, product, size_of
from .ir import SUPPORTED, dtype_name, is_dense_layout
from .looks import looks
from .passes import IN_PLACE
from .scatter import NATIVE, OWN
from .translate import schema_args
from .view_ops import VIEWS

aten = torch.ops.aten

#: elements of a float32 buffer for sums of 16 bits that stays in a GPU's cache, and how many times
#: as large as what is added it may be elsewhere
CACHED = 2**22
TIMES = 4

_INDEX_PUT = (aten.index_put.default, aten.index_put_.default)
_REDUCE = (aten.scatter_reduce.two, aten.scatter_reduce_.two)
_ADD = (
    aten.scatter_add.default,
    aten.scatter_add_.default,
    aten.index_add.default,
    aten.index_add_.default,
)
NARROW = (torch.float16, torch.bfloat16)


def take_updates_apart(gm: fx.GraphModule, device: torch.device, target: Target) -> int:
    """Turn functional updates of this device's tensors into in-place calls; returns how many."""
    updates = [n for n in gm.graph.nodes if n.target in IN_PLACE and _is_ours(n, device)]
    if updates:
        _Updates(gm.graph, target).run(updates)
    in_place = set(IN_PLACE.values())
    for node in gm.graph.nodes:  # also of those that write an input
        if node.target in in_place and _sums(node) and _rounds_each(node, target):
            node.meta[NATIVE] = True
    return len(updates)


def _rounds_each(node: fx.Node, target: Target) -> bool:
    """Whether the target adds atomically in the dtype, and ATen rounds as often."""
    base: Any = node.args[0]
    dtype = value_of(base).dtype
    if node.target in _INDEX_PUT or dtype not in NARROW:
        return False
    if dtype == torch.float16 or not target.backend:
        return True
    arch = target.arch  # an older one has a loop that tries
    return arch >= 90 if isinstance(arch, int) else arch in ("gfx942", "gfx950")


def _is_ours(node: fx.Node, device: torch.device) -> bool:
    """Whether its memory can be a kernel's, and is laid out as a copy of the base would be."""
    base, value = node.args[0], value_of(node)
    if not isinstance(base, fx.Node) or not is_tensor(value) or value.device != device:
        return False
    if not same_layout(value_of(base), value) or dtype_name(value.dtype) not in SUPPORTED:
        return False
    if not is_dense_layout(list(map(size_of, value.shape)), list(map(size_of, value.stride()))):
        return False
    return not looks(node)


def _sums(node: fx.Node) -> bool:
    """Whether the update adds to what is there."""
    if node.target in _INDEX_PUT:
        return bool(node.args[3] if len(node.args) > 3 else node.kwargs.get("accumulate"))
    if node.target in _REDUCE:
        *_, how, kept = schema_args(node)
        return how == "sum" and kept
    return node.target in _ADD


def _is_worth_float32(node: fx.Node) -> bool:
    """Whether a float32 buffer for all places costs little beside what is added."""
    indices: Any = node.args[1] if node.target in _INDEX_PUT else ()
    masked = any(i is not None and value_of(i).dtype == torch.bool for i in indices)
    if masked or torch.are_deterministic_algorithms_enabled():
        return False  # ATen makes the sums
    size = product(size_of(s) for s in value_of(node).shape)
    added = product(size_of(s) for s in value_of(_source(node)).shape)
    if not is_static(size):
        return True  # as many places as data, not a table of parameters
    return size <= CACHED or (is_static(added) and size <= TIMES * added)


def _source_place(node: fx.Node) -> int:
    return 2 if node.target in _INDEX_PUT else 3


def _source(node: fx.Node) -> Any:
    return node.args[_source_place(node)]


class _Updates:
    """The updates of one graph, taken apart one after the other."""

    def __init__(self, graph: fx.Graph, target: Target) -> None:
        self.graph, self.target = graph, target

    def run(self, updates: list[fx.Node]) -> None:
        storage = Storage(self.graph)
        free = {n for n in updates if _is_free(n.args[0], n, storage)}
        for node in updates:
            narrow = value_of(node).dtype in NARROW and _sums(node)
            with self.graph.inserting_before(node):
                if narrow and not _rounds_each(node, self.target) and _is_worth_float32(node):
                    new = self._in_float32(node)
                else:
                    new = self._in_place(node, node in free)
            node.replace_all_uses_with(new)
            self.graph.erase_node(node)

    def _in_place(self, node: fx.Node, free: bool) -> fx.Node:
        base: Any = node.args[0]
        if not free:
            base = self._add(node, aten.clone.default, (base,), value_of(node))
        base.meta[OWN] = True
        self._update(node, (base, *node.args[1:]))
        return base

    def _in_float32(self, node: fx.Node) -> fx.Node:
        base, source = node.args[0], _source(node)
        whole = self._cast(node, base, torch.float32)
        whole.meta[OWN] = True
        args = [whole, *node.args[1:]]
        args[_source_place(node)] = self._cast(node, source, torch.float32)
        self._update(node, tuple(args))
        return self._cast(node, whole, value_of(node).dtype)

    def _update(self, node: fx.Node, args: tuple[Any, ...]) -> None:
        new = self._add(node, IN_PLACE[node.target], args, value_of(args[0]))
        new.kwargs = node.kwargs

    def _cast(self, node: fx.Node, source: Any, dtype: torch.dtype) -> fx.Node:
        with value_of(source).fake_mode:
            value = value_of(source).to(dtype)
        new = self._add(node, aten._to_copy.default, (source,), value)
        new.kwargs = {"dtype": dtype}
        return new

    def _add(self, node: fx.Node, target: Any, args: tuple[Any, ...], value: Any) -> fx.Node:
        new = self.graph.call_function(target, args)
        new.meta = {**node.meta, "val": value}
        return new


def _is_free(base: Any, node: fx.Node, storage: Storage) -> bool:
    """Whether base is a tensor of ATen's or of an earlier update, which ``node`` reads last.

    What kernels compute is stored as the copy, which costs no more.
    """
    name = str(base.target)
    if base.op != "call_function" or not isinstance(base.target, torch._ops.OpOverload):
        return False
    if base.target not in IN_PLACE and (name in OPS or name in VIEWS or is_view(base)):
        return False
    if storage.root[base] is not base or base in storage.escaping or base in storage.writes:
        return False
    if base in nodes_in((node.args[1:], node.kwargs)):
        return False
    last = storage.position[node]
    return all(storage.position[u] <= last for m in storage.members[base] for u in m.users)
