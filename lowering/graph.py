"""Questions about an fx graph. Nothing here changes one."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx

from .overload import Facts, facts_of

_FRAME = re.compile(r'File "([^"]+)", line (\d+), in [^\n]*\n\s*([^\n]*)')


def value_of(node: fx.Node) -> Any:
    """What the node holds, as a FakeTensor, SymInt or tuple: ``val`` of an ATen graph, or
    ``example_value`` of a Dynamo graph; None where tracing left nothing."""
    value = node.meta.get("val")
    return node.meta.get("example_value") if value is None else value


#: where an op that the user wrote is called, on behalf of the user's line
_CALLS_FOR_THE_USER = "gems_compile/authoring.py"


def source_line(node: fx.Node) -> str:
    """The user's line that made the node: ``model.py:42  return self.ln(h)``, or ``""``."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    frames = [frame for frame in frames if not frame[0].endswith(_CALLS_FOR_THE_USER)]
    if not frames:
        return ""
    path, line, code = frames[-1]
    return f"{path.rsplit('/', 1)[-1]}:{line}  {code.strip()}".rstrip()


def module_path(node: fx.Node) -> str:
    """The user's module that made the node: ``layers.3.mlp``, or ``""``."""
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack")
    if not stack:
        return ""
    path = next(reversed(stack.values()))
    return clean_path(path[0] if isinstance(path, tuple) else str(path))


def clean_path(path: str) -> str:
    """``L['self']._modules['layers']._modules['3'].mlp`` -> ``layers.3.mlp``."""
    path = re.sub(r"\._modules\['([^']*)'\]", r".\1", path)
    path = re.sub(r"\.?(?:_modules|modules)\.", ".", path)
    path = re.sub(r"\[['\"]?([^'\"\]]*)['\"]?\]", r".\1", path)
    return re.sub(r"^L\.(?:self\.?|fn\.?)?", "", path).strip(".")


def is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


#: in the meta of a backward graph's input: forward computed it, and the program got it as well
RETURNED = "returned"


def saved_inputs(graph: fx.Graph) -> list[fx.Node]:
    """Of a backward graph what forward computed: AOTAutograd lets the program's own tensors and the
    gradients keep their names."""
    inputs = graph.find_nodes(op="placeholder")
    if not any(node.name.startswith("tangents_") for node in inputs):
        return []
    return [node for node in inputs if not node.name.startswith(("primals_", "tangents_"))]


def is_symbolic(value: Any) -> bool:
    return isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool))


def same(a: Any, b: Any) -> bool:
    """Whether two sizes are equal for every size the graph may be called with; adds no guard."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return a is b or statically_known_true(a == b)


def all_same(a: Iterable[Any], b: Iterable[Any]) -> bool:
    a, b = tuple(a), tuple(b)
    return len(a) == len(b) and all(map(same, a, b))


def same_layout(a: Any, b: Any) -> bool:
    """Same shape, strides, dtype and device: one tensor can stand where the other stood."""
    return (
        is_tensor(a)
        and is_tensor(b)
        and a.dtype == b.dtype
        and len(a.shape) == len(b.shape)  # most that differ do so here, and cost least to tell
        and all_same(a.shape, b.shape)
        and a.device == b.device
        and a.layout == b.layout == torch.strided
        and a.is_conj() == b.is_conj()
        and a.is_neg() == b.is_neg()
        and all_same(a.stride(), b.stride())
    )


def schema_of(node: fx.Node) -> Any:
    return node.target._schema if isinstance(node.target, torch._ops.OpOverload) else None


def is_view(node: fx.Node) -> bool:
    """Whether the result shares (or may share) the memory of the first argument."""
    facts = facts_of(node.target)
    return facts is not None and facts.view


def viewed(node: fx.Node) -> fx.Node:
    """What a node is a view of, through all views between; the node itself if it is none."""
    while is_view(node):
        node = node.all_input_nodes[0]
    return node


def mutated_arguments(node: fx.Node) -> Sequence[fx.Node]:
    """The nodes whose memory this node writes. Of a higher-order op all inputs may be written."""
    facts = facts_of(node.target)
    if facts is None:
        whole = isinstance(node.target, torch._ops.HigherOrderOperator)
        return node.all_input_nodes if whole else ()
    if not facts.written:
        return ()
    args, kwargs = node.args, node.kwargs
    return nodes_in([args[i] if i < len(args) else kwargs.get(n) for i, n in facts.written])


def is_only_write(node: fx.Node, into: fx.Node) -> bool:
    """Whether it is plain that only ``node`` writes the memory of an input, which has no other
    name: ``Storage`` knows of more such, but looks at the whole graph."""
    others = [user for user in (*into.users, *node.users) if user is not node]
    known = map(facts_of, (user.target for user in others))
    return into.op == "placeholder" and all(facts is not None and facts.fresh for facts in known)


def nodes_in(argument: Any) -> list[fx.Node]:
    """The nodes in an argument, however nested."""
    found: list[fx.Node] = []
    fx.map_arg(argument, found.append)
    return found


def calls_of(graph: fx.Graph, targets: Iterable[Any]) -> list[fx.Node]:
    """The calls of any of these, in the graph's order: a graph keeps a table of them."""
    found = (graph.find_nodes(op="call_function", target=t, sort=False) for t in targets)
    return sorted(node for nodes in found for node in nodes)


def output_node(graph: fx.Graph) -> fx.Node:
    return next(iter(reversed(graph.nodes)))


class Storage:
    """Which nodes share memory, who writes it, and what leaves the graph.

    ``root[node]`` is the node that allocated the memory (a placeholder, or an op with a fresh
    result). The parts of a tuple share its root. All of it may claim too much sharing, never too
    little.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.root: dict[fx.Node, fx.Node] = {}
        self.members: dict[fx.Node, list[fx.Node]] = {}
        self.position: dict[fx.Node, int] = {}
        self.writes: dict[fx.Node, list[fx.Node]] = {}
        for i, node in enumerate(graph.nodes):
            self.position[node] = i
            facts = facts_of(node.target) if node.op == "call_function" else None
            plain = facts.fresh if facts is not None else node.op != "call_function"
            root = self.root[node] = node if plain else self._root(node, facts)
            if root is node:
                self.members[node] = [node]
            else:
                self.members[root].append(node)
            if not plain and node.target is not operator.getitem:
                for written in mutated_arguments(node):
                    self.writes.setdefault(self.root[written], []).append(node)
        self.outputs = set(output_node(graph).all_input_nodes)
        self.escaping = {self.root[node] for node in self.outputs}

    def _root(self, node: fx.Node, facts: Facts | None) -> fx.Node:
        if facts is not None:
            memory = facts.memory
        else:
            memory = "first" if node.target is operator.getitem else "new"
        if memory == "new":
            return node
        shared = node.all_input_nodes if memory == "first" else mutated_arguments(node)
        return self.root[shared[0]] if shared else node

    def merge(self, kept: fx.Node, gone: fx.Node) -> None:
        """``kept`` takes the place of ``gone``, with all that shares its memory."""
        root, old = self.root[kept], self.root[gone]
        if gone in self.outputs:
            self.outputs.add(kept)
        if old in self.escaping:
            self.escaping.add(root)
        if old is gone and old is not root:
            for member in self.members.pop(old):
                self.root[member] = root
                self.members[root].append(member)

    def is_written(self, node: fx.Node) -> bool:
        return self.root[node] in self.writes

    def is_fixed(self, node: fx.Node) -> bool:
        """Whether the memory is the caller's (an input or a constant), not made by the graph."""
        return self.root[node].op in ("placeholder", "get_attr")


def kernel_device(gm: fx.GraphModule, kind: str) -> torch.device:
    """The device of the graph's kernels: the first one of type ``kind`` that occurs."""
    for node in gm.graph.nodes:
        val = node.meta.get("val")
        for tensor in val if isinstance(val, (tuple, list)) else [val]:
            if isinstance(tensor, torch.Tensor) and tensor.device.type == kind:
                return tensor.device
    return torch.device(kind)
