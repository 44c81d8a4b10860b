"""The gradient of an embedding table, as stores of the kernel that computes the tokens' gradients.

ATen sorts the tokens by id and sums those of one id in float32. In float32, here, each token adds
its row to the table's, which is zero before. In 16 bits that would round each sum, and a float32
copy of the table would be moved thrice; so, unless the table is small, only ids that occur more
than once are summed in float32, in a buffer of as many rows as there are tokens: the first token of
an id owns a row. Then each first token puts one row into the table. Of 16384 tokens of 4096 into
128256 rows that moves 1.7 GB, where a float32 copy of the table moves 5.3 GB.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .graph import is_tensor, value_of
from .indexing import is_static, product, size_of
from .scatter import OWN
from .updates import CACHED, NARROW

aten = torch.ops.aten

#: up to so many tokens ATen takes one kernel and sorts nothing
FEW_TOKENS = 3072
#: tokens a row from which on additions to one place wait for each other longer than ATen sorts
MOST_ADDED = 512


def take_embeddings_apart(gm: fx.GraphModule, device: torch.device) -> int:
    """Replace gradients of tables by updates of them; returns how many."""
    if torch.are_deterministic_algorithms_enabled():
        return 0
    changed = 0
    for node in list(gm.graph.nodes):
        if node.target is aten.embedding_dense_backward.default and _is_ours(node, device):
            changed += _replace(gm.graph, node)
    return changed


def _is_ours(node: fx.Node, device: torch.device) -> bool:
    args: Any = node.args
    value = value_of(node)
    known = is_tensor(value) and value.device == device and value.is_contiguous()
    return known and not (args[4] if len(args) > 4 else node.kwargs.get("scale_grad_by_freq"))


def _replace(graph: fx.Graph, node: fx.Node) -> bool:
    args: Any = node.args
    table, ids = value_of(node), value_of(args[1])
    tokens = product(size_of(s) for s in ids.shape)
    places = product(size_of(s) for s in table.shape)
    if not is_static(places) or (is_static(tokens) and tokens > MOST_ADDED * table.shape[0]):
        return False
    narrow = table.dtype in NARROW
    if narrow and (tokens <= FEW_TOKENS if is_static(tokens) else places > CACHED):
        return False
    with graph.inserting_before(node):
        call = _Calls(graph, node)
        if not narrow:
            new = call.added(table.dtype)
        elif places <= CACHED:
            new = call(aten._to_copy.default, call.added(torch.float32), dtype=table.dtype)
        else:
            new = call.put()
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    return True


class _Calls:
    """Adds nodes in the place of the gradient of a table."""

    def __init__(self, graph: fx.Graph, node: fx.Node) -> None:
        self.graph, self.node = graph, node
        args: Any = node.args
        self.table = value_of(node)
        self.count, self.width = value_of(args[1]).numel(), self.table.shape[1]
        self.ids = self(aten.reshape.default, args[1], [-1])
        self.rows = self(aten.reshape.default, args[0], [-1, self.width])
        padding = args[3] if len(args) > 3 else -1
        self.padding = padding if padding >= 0 else None

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        new = self.graph.call_function(target, args, kwargs)
        given: Any = fx.map_arg((args, kwargs), value_of)
        with self.table.fake_mode:
            value = target(*given[0], **given[1])
        new.meta = {**self.node.meta, "val": value}
        return new

    def filled(self, shape: list[Any], number: Any, dtype: torch.dtype) -> fx.Node:
        """Memory for an update, which a kernel fills."""
        where = {"dtype": dtype, "device": self.table.device}
        whole = self(aten.full.default, shape, number, **where)
        whole = self(aten.clone.default, whole)
        whole.meta[OWN] = True
        return whole

    def added(self, dtype: torch.dtype) -> fx.Node:
        """The table's gradient, each token's row added to it in ``dtype``."""
        whole = self.filled(list(self.table.shape), 0, dtype)
        rows = self.rows
        if value_of(rows).dtype != dtype:
            rows = self(aten._to_copy.default, rows, dtype=dtype)
        self(torch.ops.gems.add_rows_.default, whole, self.kept(None, self.ids), rows)
        return whole

    def put(self) -> fx.Node:
        """The same of 16 bits: summed in float32 where an id occurs more than once."""
        gems, wide = torch.ops.gems, torch.float32
        names = {"dtype": torch.int64, "device": self.table.device}
        token = self(aten.arange.start, 0, self.count, **names)
        ids, places = self.ids, [self.table.shape[0]]
        first = self.filled(places, self.count, torch.int64)
        self(aten.scatter_reduce_.two, first, 0, ids, token, "amin")
        often = self.filled(places, 0, torch.int64)
        one = self(aten.full.default, [self.count], 1, **names)
        self(aten.scatter_add_.default, often, 0, ids, one)
        owner = self(aten.index_select.default, first, 0, ids)
        shared = self(aten.gt.Scalar, self(aten.index_select.default, often, 0, ids), 1)
        owns = self(aten.eq.Tensor, owner, token)
        sums = self(
            aten.empty.memory_format, [self.count, self.width], dtype=wide, device=names["device"]
        )
        sums.meta[OWN] = True
        zeros = self(
            aten.full.default, [self.count, self.width], 0, dtype=wide, device=names["device"]
        )
        both = self(aten.logical_and.default, shared, owns)
        self(gems.put_rows_.default, sums, self.kept(both, token), zeros)
        widened = self(aten._to_copy.default, self.rows, dtype=wide)
        self(gems.add_rows_.default, sums, self.kept(shared, owner), widened)
        rounded = self(aten._to_copy.default, sums, dtype=self.table.dtype)
        column = self(aten.unsqueeze.default, shared, 1)
        rows = self(aten.where.self, column, rounded, self.rows)
        whole = self.filled(list(self.table.shape), 0, self.table.dtype)
        self(gems.put_rows_.default, whole, self.kept(owns, ids), rows)
        return whole

    def kept(self, when: fx.Node | None, place: fx.Node) -> fx.Node:
        """``place`` where that holds and the token is no padding, else -1."""
        if self.padding is not None:
            real = self(aten.ne.Scalar, self.ids, self.padding)
            when = real if when is None else self(aten.logical_and.default, when, real)
        if when is None:
            return place
        nowhere = self(aten.full.default, [], -1, dtype=torch.int64, device=self.table.device)
        return self(aten.where.self, when, place, nowhere)
