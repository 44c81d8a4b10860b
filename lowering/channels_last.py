"""Convolutions in channels-last, where a graph gains by it.

The graph is the one before it is split into forward and backward, so what is saved for backward has
the layout that both know. Activations are converted where the first convolution reads them, and
stay converted: whatever follows is traced again with its operands' new strides. A clone in the
graph is what converts: a kernel that makes the tensor, or reads it, does so in passing. Results
leave the graph in the layout that they were promised in, and so do operands of all that might ask
for their strides.
"""

from __future__ import annotations

import logging
import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from .convolutions import (
    BACKWARD,
    Convolution,
    bytes_of,
    convolution_of,
    saved_bytes,
    were_measured,
    why_not,
)
from .graph import Storage, is_tensor, is_view, output_node, same, value_of
from .options import Options
from .rewrite import is_fake
from .strides import (
    by_kernel,
    follows,
    is_channels_last,
    is_contiguous,
    order_of_axes,
    result_of_alike,
    same_but_ones,
    same_strides,
)

aten = torch.ops.aten
log = logging.getLogger("gems_compile.lowering")

#: in a clone's meta: whether it is a weight that convolutions alone read
WEIGHT = "gems_weight"
#: bytes of a conversion of ours count for this much: transposed, they take longer than copied
_SLOWER = 1.5


@dataclass
class Decision:
    """What was decided for a graph, in words, and what it came to."""

    reason: str = ""
    convolutions: int = 0  # that were given another layout
    copies: int = 0  # conversions in the graph, of activations and results
    weights: int = 0  # and of weights and their gradients

    def __str__(self) -> str:
        return self.reason


@dataclass
class Copy:
    """A tensor in another layout than its node's."""

    source: fx.Node
    value: torch.Tensor
    readers: list[fx.Node] = field(default_factory=list)
    node: fx.Node | None = None


class CannotRestore(Exception):
    """Strides that no clone has."""


def decide(gm: fx.GraphModule, options: Options) -> Decision:
    """``lay_out_convolutions``, or nothing where it fails."""
    try:
        return lay_out_convolutions(gm, options.target, options.layout)
    except Exception as e:
        if options.strict:
            raise
        log.warning("convolutions keep their layout: %s: %s", type(e).__name__, e)
        return Decision(f"layouts kept: {type(e).__name__}: {e}")


def lay_out_convolutions(gm: fx.GraphModule, target: Any, layout: str = "auto") -> Decision:
    """Decide, and edit the graph. ``layout``: "auto" weighs, "channels_last" does not, "keep"."""
    found = [c for c in map(convolution_of, gm.graph.nodes) if c is not None]
    if not found:
        return Decision()
    if layout == "keep":
        return Decision("layouts kept, as asked")
    if layout == "auto" and not were_measured(target):
        return Decision(f"layouts kept: nothing was measured on {target.label}")
    training = any(c.backward for c in found)
    slow = {c.node: why_not(c, training) if layout == "auto" else None for c in found}
    wanted = {c.node: c for c in found if slow[c.node] is None}
    changed = [c for c in wanted.values() if not is_channels_last(value_of(c.input))]
    saved = cost = 0
    try:  # where nothing would change there is nothing to weigh: only weights may be converted
        trial = Trial(gm.graph, found, wanted if changed else {})
        if changed:
            saved, cost = sum(map(saved_bytes, changed)), trial.cost()
    except CannotRestore as why:
        return Decision(f"channels-last: no: {why}")
    if changed and (saved > cost or layout == "channels_last"):
        reason = f"channels-last: {_mb(saved)} less for convolutions, {_mb(cost)} for conversions"
    else:
        reason = _why_kept(found, slow, changed, saved, cost)
        if changed:
            trial, changed = Trial(gm.graph, found, {}), []
    trial.commit(gm)
    moved = [copy for copy in trial.all_copies() if not trial.is_free(copy)]
    weights = sum(map(trial.is_weight, moved))
    return Decision(reason, len(changed), len(moved) - weights, weights)


def _why_kept(
    found: list[Convolution],
    slow: dict[fx.Node, str | None],
    changed: list[Convolution],
    saved: int,
    cost: int,
) -> str:
    if changed:
        return f"layouts kept: {_mb(saved)} less for convolutions, {_mb(cost)} for conversions"
    for conv in found:
        why = slow[conv.node]
        if why is not None and not is_channels_last(value_of(conv.input)):
            return f"layouts kept: {why}"
    return "channels-last already"


def _mb(count: float) -> str:
    return f"{count / 1e6:.0f} MB"


class Trial:
    """The graph as it would be: what is read in which layout, and the strides that follow."""

    def __init__(
        self, graph: fx.Graph, found: list[Convolution], wanted: dict[fx.Node, Convolution]
    ) -> None:
        self.graph, self.wanted = graph, wanted
        self.found = {c.node: c for c in found}
        self.storage = Storage(graph)
        self.values: dict[fx.Node, Any] = {}  # of nodes whose layout changes
        self.last: dict[fx.Node, Copy] = {}  # in channels-last
        self.first: dict[fx.Node, Copy] = {}  # as they were
        self.reads: dict[fx.Node, dict[fx.Node, Copy]] = {}
        for node in graph.nodes:
            if node.op == "output":
                self._keep(node)
            elif node.op == "call_function":
                self._visit(node)

    # one node ------------------------------------------------------------------------------------

    def value(self, node: fx.Node) -> Any:
        return self.values.get(node, value_of(node))

    def _visit(self, node: fx.Node) -> None:
        if node.target is operator.getitem:
            self._pick(node)
            return
        conv = self.found.get(node)
        if conv is not None:
            wants = self._wants(conv)
            may = node in self.wanted or not any(map(self._differs, conv.images))
        else:
            wants, may = set(), follows(node) and not self._is_shared(node)
        if not may or not self._follow(node, wants):
            self._keep(node)

    def _is_shared(self, node: fx.Node) -> bool:
        """Whether it is a view of memory of which several results leave: they must share a copy."""
        if not is_view(node):
            return False
        root = self.storage.root[node]
        return sum(self.storage.root[out] is root for out in self.storage.outputs) > 1

    def _pick(self, node: fx.Node) -> None:
        source: Any = node.args[0]
        if source in self.values:
            self._set(node, self.values[source][node.args[1]])

    def _wants(self, conv: Convolution) -> set[fx.Node]:
        """What a convolution reads in channels-last. A weight is so wherever images are: ATen
        converts it otherwise, each time."""
        images = set(conv.images) if conv.node in self.wanted else set()
        given = self._seen(conv.input)
        if images or is_channels_last(given.value if given else self.value(conv.input)):
            return {*images, conv.weight}
        return set()

    def _follow(self, node: fx.Node, wants: set[fx.Node]) -> bool:
        """Read operands in channels-last, where they are so or wanted so; False where the op cannot
        be called with them (a view that their strides do not allow)."""
        made = set(self.last)
        read = {s: c for s in node.all_input_nodes if (c := self._seen(s, s in wants))}
        if not read and not any(map(self._differs, node.all_input_nodes)):
            return True
        try:
            value = self._call(node, read)
        except (RuntimeError, ValueError, TypeError, NotImplementedError):
            for source in set(self.last) - made:
                del self.last[source]
            return False
        self._read(node, read)
        self._set(node, value)
        if by_kernel(node) and self._is_mixed(node, read):
            self._last(node)
        return True

    def _keep(self, node: fx.Node) -> None:
        """Read all operands as they were."""
        self._read(node, {s: self._first(s) for s in node.all_input_nodes if self._differs(s)})

    def _seen(self, source: fx.Node, wanted: bool = False) -> Copy | None:
        """The channels-last copy, where there is one or one is wanted and needed."""
        if source in self.last:
            return self.last[source]
        if not wanted or is_channels_last(self.value(source)) or self.storage.is_written(source):
            return None
        return self._last(source)

    def _is_mixed(self, node: fx.Node, read: dict[fx.Node, Copy]) -> bool:
        """Whether a kernel's result would leave channels-last only because of some operand."""
        value = self.value(node)
        if not is_tensor(value) or value.ndim != 4 or is_channels_last(value):
            return False
        operands = [read[s].value if s in read else self.value(s) for s in node.all_input_nodes]
        whole = [t for t in operands if is_tensor(t) and t.shape == value.shape]
        return any(map(is_channels_last, whole))

    def _call(self, node: fx.Node, read: dict[fx.Node, Copy]) -> Any:
        target: Any = node.target

        def held(n: fx.Node) -> Any:
            return read[n].value if n in read else self.value(n)

        known = result_of_alike(node, [held(n) for n in node.all_input_nodes])
        if known is not None:
            return known
        args, kwargs = fx.map_arg((node.args, node.kwargs), held)
        mode = next(v.fake_mode for v in map(held, node.all_input_nodes) if is_fake(v))
        with mode, torch.no_grad():
            return target(*args, **kwargs)

    def _read(self, node: fx.Node, read: dict[fx.Node, Copy]) -> None:
        if read:
            self.reads[node] = read
        for copy in read.values():
            copy.readers.append(node)

    def _set(self, node: fx.Node, value: Any) -> None:
        if not same_strides(value, value_of(node)):
            self.values[node] = value

    def _differs(self, node: fx.Node) -> bool:
        return node in self.values

    # copies --------------------------------------------------------------------------------------

    def _last(self, source: fx.Node) -> Copy:
        if source not in self.last:
            value = _cloned(self.value(source), torch.channels_last)
            self.last[source] = Copy(source, value)
        return self.last[source]

    def _first(self, source: fx.Node) -> Copy:
        if source not in self.first:
            value = value_of(source)
            if not is_tensor(value) or order_of_axes(value) is None:
                raise CannotRestore(f"{source.name} has strides that a copy of it would not have")
            self.first[source] = Copy(source, value)
        return self.first[source]

    def all_copies(self) -> list[Copy]:
        return [c for c in (*self.last.values(), *self.first.values()) if c.readers]

    def is_weight(self, copy: Copy) -> bool:
        """Whether it is a weight that convolutions alone read, or a weight's gradient."""
        source = copy.source
        if source.target is operator.getitem and source.args[1] == 1:
            made: Any = source.args[0]
            return made.target is BACKWARD
        convs = [self.found.get(r) for r in copy.readers]
        return all(c is not None and c.weight is source for c in convs)

    def is_free(self, copy: Copy) -> bool:
        return same_but_ones(self.value(copy.source), copy.value)

    def cost(self) -> int:
        """The bytes that conversions move, weights aside: cuDNN would convert those as well."""
        return int(sum(map(self._cost, self.all_copies())))

    def _cost(self, copy: Copy) -> float:
        if self.is_weight(copy) or self.is_free(copy):
            return 0
        size = bytes_of(copy.value)
        if by_kernel(copy.source):
            others = set(copy.source.users) - set(copy.readers)
            return size if others else 0
        return 0 if all(map(by_kernel, copy.readers)) else 2 * size * _SLOWER

    # the edit ------------------------------------------------------------------------------------

    def commit(self, gm: fx.GraphModule) -> None:
        for copy in self.all_copies():
            self._insert(copy)
        for reader, read in self.reads.items():
            for source, copy in read.items():
                assert copy.node is not None
                reader.replace_input_with(source, copy.node)
        for node, value in self.values.items():
            node.meta["val"] = value
        if self.reads:
            gm.recompile()

    def _insert(self, copy: Copy) -> None:
        source, graph = copy.source, self.graph
        at = source.next
        if copy is self.first.get(source) and self.is_weight(copy):
            at = output_node(graph)  # all gradients in one launch
        while at.op == "placeholder":
            at = at.next
        with graph.inserting_before(at):
            if copy is self.last.get(source):
                copy.node = _clone(graph, source, copy.value, torch.channels_last)
                copy.node.meta[WEIGHT] = self.is_weight(copy)
                return
            if is_contiguous(copy.value):
                if same_but_ones(self.value(source), copy.value):
                    copy.node = self._restride(source, copy.value)
                    return
                copy.node = _clone(graph, source, copy.value, torch.contiguous_format)
                return
            order = order_of_axes(copy.value) or []
            back = sorted(range(len(order)), key=order.__getitem__)
            straight = graph.call_function(aten.permute.default, (source, order))
            straight.meta = {**source.meta, "val": self._value_of_permuted(source, order)}
            value = _cloned(straight.meta["val"], torch.contiguous_format)
            whole = _clone(graph, straight, value, torch.contiguous_format)
            copy.node = graph.call_function(aten.permute.default, (whole, back))
            copy.node.meta = {**source.meta, "val": copy.value}

    def _restride(self, source: fx.Node, value: torch.Tensor) -> fx.Node:
        """Two views, where only axes of one element have other strides (weights' gradients)."""
        node, now = source, self.value(source)
        for shape in ([n for n in value.shape if not same(n, 1)], list(value.shape)):
            node = self.graph.call_function(aten.view.default, (node, shape))
            with now.fake_mode, torch.no_grad():
                now = aten.view.default(now, shape)
            node.meta = {**source.meta, "val": now}
        return node

    def _value_of_permuted(self, source: fx.Node, order: list[int]) -> Any:
        value = self.value(source)
        with value.fake_mode, torch.no_grad():
            return aten.permute.default(value, order)


def _clone(graph: fx.Graph, source: fx.Node, value: Any, layout: torch.memory_format) -> fx.Node:
    node = graph.call_function(aten.clone.default, (source,), {"memory_format": layout})
    node.meta = {**source.meta, "val": value}
    return node


def _cloned(value: Any, layout: torch.memory_format) -> Any:
    with value.fake_mode, torch.no_grad():
        return aten.clone.default(value, memory_format=layout)


__all__ = ["Decision", "decide", "is_channels_last", "lay_out_convolutions"]
