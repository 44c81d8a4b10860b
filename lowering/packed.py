"""Small tensors that forward saves for backward, in the memory of one.

The mean and the deviation of every norm are a few kB each; to allocate one, to hand it to autograd
and back, and to free it takes the host some ten microseconds, and a ResNet-50 saves 106 of them.
Here forward saves one tensor of bytes. Kernels write their parts where they lie in it, and
backward's kernels read them there: a kernel takes addresses, and those of its parts are the
tensor's plus a number, so that equal layers still share their kernels.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.fx import GraphModule, Node

from ..kernels.packed import offsets
from .flow import flatten
from .graph import is_tensor, is_view, output_node, value_of
from .group import Group
from .indexing import is_static
from .ir import SUPPORTED, Value, base_of, dtype_name, first_place
from .overload import name_of
from .rewrite import call_on_fakes
from .runs import TENSOR, Operand
from .translate import op_of
from .views import Reshape

if TYPE_CHECKING:
    from .executor import Writer

PACKED, UNPACKED = "gems.packed.default", "gems.unpacked.default"
#: larger tensors, whose time on the device is what counts, are free as soon as they are read
MOST_BYTES = 2**17
#: fewer are not worth another tensor
FEWEST = 4


def is_packed(node: Node) -> bool:
    return name_of(node.target) == PACKED


def is_unpacked(node: Node) -> bool:
    return name_of(node.target) == UNPACKED


# in the graphs ------------------------------------------------------------------------------------


def pack_saved(forward: GraphModule, backward: GraphModule, visible: int) -> int:
    """Pack what both graphs can do with packed; how many tensors. ``visible``: how many of
    forward's results are no saved ones."""
    end = output_node(forward.graph)
    results: list[Any] = list(end.args[0])  # type: ignore[arg-type]
    shown = set(results[:visible])
    readers = {n.target: n for n in backward.graph.find_nodes(op="placeholder")}
    parts = [
        n
        for n in dict.fromkeys(results[visible:])
        if _is_small(n)
        and n not in shown
        and _kernels_alone_read(n)
        and n.name in readers
        and _kernels_alone_read(readers[n.name])
    ]
    parts = [n for n in parts if value_of(n).device == value_of(parts[0]).device]
    taken = set(parts)
    if len(parts) < FEWEST or sum(n in taken for n in results) > len(parts):
        return 0
    with forward.graph.inserting_before(end):
        packed = forward.graph.call_function(torch.ops.gems.packed.default, (parts,))
    packed.meta["val"] = call_on_fakes(packed)
    _replace_results(end, results, parts, packed)
    _unpack(backward, [readers[n.name] for n in parts], packed)
    forward.recompile()
    backward.recompile()
    return len(parts)


def _is_small(node: Any) -> bool:
    """Whether a saved tensor is small, of a size that is known, and probably a kernel's result."""
    value: Any = value_of(node) if isinstance(node, Node) else None
    if not is_tensor(value) or node.op != "call_function" or is_view(node):
        return False
    source = node.args[0] if node.target is operator.getitem else node
    if not isinstance(source, Node) or op_of(source.target) is None:
        return False
    return (
        is_static(*value.shape)
        and dtype_name(value.dtype) in SUPPORTED
        and value.is_contiguous()
        and 0 < value.nbytes <= MOST_BYTES
        and not node.meta.get("saved_tensor_with_no_vc_check", False)
    )


def _kernels_alone_read(node: Node) -> bool:
    """Whether no user is certain to be ATen's."""
    return all(
        _kernels_alone_read(user) if is_view(user) else op_of(user.target) is not None
        for user in node.users
        if user.op != "output"
    )


def _with_offsets(parts: Sequence[Node]) -> Iterator[tuple[Node, int]]:
    return zip(parts, offsets(list(map(value_of, parts))), strict=False)


def _replace_results(end: Node, results: list[Any], parts: Sequence[Node], packed: Node) -> None:
    """The first part's place is the packed tensor's; the others go."""
    first = results.index(parts[0])
    taken = set(parts)
    kept = [k for k, n in enumerate(results) if k <= first or n not in taken]
    descs = end.meta.get("desc")
    if isinstance(descs, (list, tuple)) and len(descs) == len(results):
        end.meta["desc"] = type(descs)([descs[k] for k in kept])
    results[first] = packed
    shown: Any = end.args[0]
    end.args = (type(shown)([results[k] for k in kept]),)


def _unpack(backward: GraphModule, old: Sequence[Node], saved: Node) -> None:
    graph = backward.graph
    with graph.inserting_before(old[0]):
        packed = graph.placeholder(saved.name)
    packed.meta = {**old[0].meta, "val": value_of(saved)}
    unpacked, last = torch.ops.gems.unpacked.default, graph.find_nodes(op="placeholder")[-1]
    for node, offset in _with_offsets(old):
        val = value_of(node)
        with graph.inserting_after(last):
            last = graph.call_function(unpacked, (packed, offset, list(val.shape), val.dtype))
        last.meta = dict(node.meta)
        node.replace_all_uses_with(last)
        graph.erase_node(node)


# in the function ----------------------------------------------------------------------------------


class Packs:
    """The part of the Writer that knows where parts of packed tensors lie."""

    def __init__(self, writer: Writer) -> None:
        self.writer = writer
        self.made: dict[Value, tuple[Node, int]] = {}  # what kernels write in place: pack, offset
        self.read: dict[Value, tuple[Value, int]] = {}  # what kernels read in place: pack, offset
        self.sources: set[Value] = set()  # packed tensors of which kernels read parts
        for node in writer.plan.steps:
            if not isinstance(node, Node):
                continue
            if is_packed(node):
                self._place_parts(node)
            elif is_unpacked(node):
                self._place_part(node)

    @functools.cached_property
    def _asked(self) -> set[Value]:
        """What ATen reads, and what is returned."""
        steps = [s for s in self.writer.plan.steps if isinstance(s, Node) and not is_packed(s)]
        readers = [*steps, output_node(self.writer.gm.graph)]
        of = self.writer.program.of
        return {base_of(v) for r in readers for n in r.all_input_nodes for v in flatten(of.get(n))}

    def _place_parts(self, pack: Node) -> None:
        of = self.writer.program.of
        parts: Any = pack.args[0]
        home = self._part_of_pack(pack)
        for node, offset in _with_offsets(parts):
            value = of.get(node)
            base = _whole(value) if isinstance(value, Value) else None
            if base in home and base not in self._asked:
                self.made.setdefault(base, (pack, offset))

    def _part_of_pack(self, pack: Node) -> set[Value]:
        """What kernels write that run in the same CUDA graph as the pack."""
        cut, steps = self.writer.cut, self.writer.plan.steps
        if cut is not None:
            steps = next(part.steps for part in cut.parts if pack in part.steps)
        return {out for s in steps if isinstance(s, Group) for out in s.outputs}

    def _place_part(self, node: Node) -> None:
        of, args = self.writer.program.of, cast(tuple[Any, ...], node.args)
        value, whole = of.get(node), of.get(args[0])
        if isinstance(value, Value) and isinstance(whole, Value) and value.op != "opaque":
            self.read[value] = (whole, args[1])
            if self.writer.read_by_kernel(value):
                self.sources.add(whole)

    def begins(self, steps: Sequence[Any]) -> None:
        """Allocate what is packed in these steps."""
        writer = self.writer
        for node in (s for s in steps if isinstance(s, Node) and is_packed(s)):
            name = writer.names[node] = f"p{len(writer.names)}"
            writer.names[writer.program.of[node]] = name
            size, dtype = value_of(node).numel(), writer.constant(torch.uint8, "d")
            writer.ledger.allocate(name, len(writer.lines), size)
            writer.add(f"{name} = empty(({size},), (1,), {dtype})")

    def __contains__(self, value: Value) -> bool:
        return value in self.made or value in self.read

    def operand(self, value: Value) -> Operand:
        """Where a part is."""
        writer = self.writer
        if value in self.made:
            pack, offset = self.made[value]
            return Operand(TENSOR, writer.use(writer.names[pack]), offset)
        whole, offset = self.read[value]
        name = writer.aligned.get(whole) or writer.names[whole]
        return Operand(TENSOR, writer.use(name), offset)

    def call(self, node: Node) -> None:
        """Write the lines of ``gems::packed`` and ``gems::unpacked``, where there are any."""
        self.writer.plan.aten.pop(node, None)
        if is_packed(node):
            self._copy_others(node)
        elif (value := self.writer.program.of[node]) not in self.read or value in self._asked:
            name = f"a{len(self.writer.names)}"
            packed, offset, *_ = cast(tuple[Any, ...], node.args)
            text = self._view(self.writer.arg(packed), offset, node)
            self.writer.ledger.share(name, None)
            self.writer.add(f"{name} = {text}")
            self.writer.names[node] = self.writer.names[value] = name

    def _copy_others(self, pack: Node) -> None:
        """Copy what is not written where it belongs."""
        writer, of = self.writer, self.writer.program.of
        parts: Any = pack.args[0]
        places, sources = [], []
        for node, offset in _with_offsets(parts):
            value = of.get(node)
            in_place = isinstance(value, Value) and self.made.get(base_of(value)) == (pack, offset)
            if not in_place:
                places.append(self._view(writer.names[pack], offset, node))
                sources.append(writer.arg(node))
        if places:
            copy = writer.constant(torch.ops.aten._foreach_copy_.default, "f")
            writer.use(writer.names[pack])
            writer.calls += 1
            writer.add(f"{copy}([{', '.join(places)}], [{', '.join(sources)}])")

    def _view(self, packed: str, offset: int, node: Node) -> str:
        value = value_of(node)
        dtype = self.writer.constant(value.dtype, "d")
        size = self.writer.sizes(list(value.shape))
        return f"{packed}[{offset}:{offset + value.nbytes}].view({dtype}).view({size})"


def _whole(value: Value) -> Value | None:
    """The value in memory whose elements these are, in the same order, without gaps."""
    base = value
    while base.kind == "view":
        if not isinstance(base.params, Reshape):
            return None
        base = base.args[0]
    step = 1
    for size, stride in reversed(list(zip(base.shape, base.strides, strict=True))):
        if not is_static(size, stride) or (size != 1 and stride != step):
            return None
        step *= size
    return base if first_place(value) == 0 else None
