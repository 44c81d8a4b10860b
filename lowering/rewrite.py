"""Rewrite: one chain of ops that is a known algorithm, and the matcher that finds it.

A pattern is a plain function over *words* (``o.matmul``, ``o.softmax``). A word stands for every
spelling of an op, in a Dynamo graph (``torch.matmul``, ``a @ b``, ``a.matmul(b)``) and in an ATen
graph (expand, view, bmm, view): see ``words.py`` for the spellings. Parameters bind to nodes or
literals. One pattern therefore serves both levels.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import fx
from torch.fx.proxy import GraphAppendingTracer

from .graph import is_tensor, module_path, source_line, value_of
from .words import Reading, read_aten, read_dynamo

log = logging.getLogger("gems_compile")

COMMUTATIVE = frozenset({"add", "mul", "aten.add.Tensor", "aten.mul.Tensor"})
_INHERITED = ("stack_trace", "nn_module_stack", "fwd_nn_module_stack", "source_fn_stack", "custom")


@dataclass(frozen=True)
class Var:
    """A parameter of a pattern: whatever stands there, and the same thing wherever it stands."""

    name: str


@dataclass(frozen=True)
class Term:
    word: str
    args: tuple[Any, ...]


@dataclass(frozen=True)
class Constant:
    """A number, dtype or the like of a pattern that was run; what it must be is checked later."""

    value: Any


@dataclass(frozen=True)
class Either:
    options: tuple[Any, ...]


@dataclass(frozen=True)
class Through:
    """``inner``, perhaps wrapped in some of ``words``; most wrapping is tried first."""

    words: tuple[str, ...]
    inner: Any


class _Words:
    def __getattr__(self, word: str) -> Callable[..., Term]:
        return lambda *args: Term(word, args)


o = _Words()


def either(*options: Any) -> Either:
    return Either(options)


def through(*words_and_inner: Any) -> Through:
    *words, inner = words_and_inner
    return Through(tuple(words), inner)


@dataclass(frozen=True)
class Sample:
    """A program in eager PyTorch and what it is called with (``kernels.op.T`` or plain values)."""

    program: Callable[..., Any]
    inputs: tuple[Any, ...]


def sample(program: Callable[..., Any], *inputs: Any) -> Sample:
    return Sample(program, inputs)


@dataclass(frozen=True)
class Rewrite:
    """``pattern`` -> ``replacement``, and why.

    ``replacement(match, *parameters)`` is run on fx proxies with what the parameters are bound to
    (None if unbound). ``check(match)`` gives the reason to decline, or None. The rewrite must fire
    once on each of ``samples`` and on none of ``leaves_alone``.
    """

    name: str
    pattern: Callable[..., Any]
    replacement: Callable[..., Any]
    because: str
    samples: Sequence[Sample]
    leaves_alone: Sequence[Sample]
    check: Callable[[Match], str | None] = lambda match: None

    @cached_property
    def parameters(self) -> tuple[str, ...]:
        return tuple(inspect.signature(self.pattern).parameters)

    @cached_property
    def tree(self) -> Any:
        return self.pattern(*map(Var, self.parameters))

    @cached_property
    def roots(self) -> frozenset[str]:
        return frozenset(_root_words(self.tree))


def _root_words(tree: Any) -> Iterator[str]:
    if isinstance(tree, Term):
        yield tree.word
    elif isinstance(tree, Either):
        for option in tree.options:
            yield from _root_words(option)


@dataclass
class Match:
    """Where a pattern was found: its root, every node it covers, what its parameters are."""

    rule: Rewrite
    root: fx.Node
    bound: Mapping[str, Any]
    readings: Mapping[fx.Node, Reading]
    reader: Callable[[fx.Node], Reading | None]

    def __getitem__(self, name: str) -> Any:
        return self.bound.get(name)

    def value(self, name: str) -> Any:
        """The fake tensor that a parameter stands for; the literal itself if it is one."""
        bound = self.bound.get(name)
        return value_of(bound) if isinstance(bound, fx.Node) else bound

    def read(self, word: str) -> list[tuple[fx.Node, Reading]]:
        """The matched nodes that are this word."""
        return [(n, r) for n, r in self.readings.items() if r.word == word]

    @cached_property
    def nodes(self) -> set[fx.Node]:
        covered = set(self.readings)
        for reading in self.readings.values():
            covered.update(reading.inside)
        return covered


#: writes nodes as lines of text, in the graph's order, for who asked to see them
Write = Callable[[Iterable[fx.Node]], tuple[str, ...]]


def unwritten(nodes: Iterable[fx.Node]) -> tuple[str, ...]:
    """Nobody asked: a compile spends no time on texts."""
    return ()


@dataclass(frozen=True)
class Fired:
    rule: str
    because: str
    nodes_before: int
    nodes_after: int
    source: str
    module: str
    before: tuple[str, ...] = ()  # the nodes, as a ``Write`` has them
    after: tuple[str, ...] = ()


@dataclass(frozen=True)
class NearMiss:
    rule: str
    node: str
    reason: str
    source: str
    module: str


@dataclass
class RewriteLog:
    fired: list[Fired] = field(default_factory=list)
    near_misses: list[NearMiss] = field(default_factory=list)

    def extend(self, other: RewriteLog) -> None:
        self.fired += other.fired
        self.near_misses += other.near_misses


_State = tuple[dict[str, Any], dict[fx.Node, Reading]]


class _Matcher:
    """Finds patterns in one graph; a node is read once."""

    def __init__(self, graph: fx.Graph, reader: Callable[[fx.Node], Reading | None]) -> None:
        self._reader = reader
        self._readings: dict[fx.Node, Reading | None] = {}
        self.by_word: dict[str, list[fx.Node]] = {}
        self.position: dict[fx.Node, int] = {}
        self._barriers: list[int] = [0]  # barriers before each position
        for i, node in enumerate(graph.nodes):
            self.position[node] = i
            self._barriers.append(self._barriers[-1] + is_barrier(node))
            reading = self.read(node)
            if reading is not None:
                self.by_word.setdefault(reading.word, []).append(node)

    def read(self, node: fx.Node) -> Reading | None:
        if node not in self._readings:
            self._readings[node] = self._reader(node)
        return self._readings[node]

    def forget(self) -> None:
        """After a replacement: what was read of nodes may name some that are gone."""
        self._readings.clear()

    def matches(self, rule: Rewrite, root: fx.Node) -> Iterator[Match]:
        for bound, readings in self._match(rule.tree, root, ({}, {})):
            yield Match(rule, root, bound, readings, self.read)

    def _match(self, tree: Any, value: Any, state: _State) -> Iterator[_State]:
        bound, readings = state
        if isinstance(tree, Var):
            if tree.name not in bound:
                yield {**bound, tree.name: value}, readings
            elif bound[tree.name] is value or (_is_number(value) and bound[tree.name] == value):
                yield state
        elif isinstance(tree, Either):
            for option in tree.options:
                yield from self._match(option, value, state)
        elif isinstance(tree, Through):
            reading = self.read(value) if isinstance(value, fx.Node) else None
            if reading is not None and reading.word in tree.words:
                yield from self._match(tree, reading.args[0], (bound, {**readings, value: reading}))
            yield from self._match(tree.inner, value, state)
        elif isinstance(tree, Term):
            reading = self.read(value) if isinstance(value, fx.Node) else None
            if reading is None or reading.word != tree.word or len(reading.args) != len(tree.args):
                return
            covered = (bound, {**readings, value: reading})
            yield from self._match_all(tree.args, reading.args, covered)
            if tree.word in COMMUTATIVE and len(tree.args) == 2 and not reading.in_place:
                yield from self._match_all(tree.args, reading.args[::-1], covered)
        elif isinstance(tree, Constant):
            if not isinstance(value, fx.Node):
                yield state
        elif type(tree) is type(value) and tree == value:
            yield state

    def _match_all(self, trees: Sequence[Any], values: Sequence[Any], state: _State) -> Any:
        if not trees:
            yield state
            return
        for following in self._match(trees[0], values[0], state):
            yield from self._match_all(trees[1:], values[1:], following)

    def why_not(self, match: Match) -> str | None:
        """The reason, if any, why the matched nodes may not be replaced at the root."""
        nodes, root = match.nodes, match.root
        for node in nodes:
            if node is not root and any(user not in nodes for user in node.users):
                outside = next(user for user in node.users if user not in nodes)
                where = "returned" if outside.op == "output" else f"used by {outside.name}"
                return f"{node.name} is also {where}"
            reading = match.readings.get(node)
            if reading is not None and reading.in_place and reading.args[0] not in nodes:
                return f"{node.name} writes into {reading.args[0]}, which is not part of the chain"
        first = min(self.position[node] for node in nodes)
        between = self._barriers[self.position[root]] - self._barriers[first]
        if between > sum(map(is_barrier, nodes - {root})):
            return "an in-place op or a change of mode stands between the first op and the last"
        return match.rule.check(match)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def is_barrier(node: fx.Node) -> bool:
    """Whether values read before and after this node may differ: a write, or a change of mode."""
    if node.op == "call_method":
        name = str(node.target)
        return name.endswith("_") and not name.endswith("__")
    if node.op == "call_module":
        return True
    if node.op != "call_function":
        return False
    if node.kwargs.get("out") is not None or node.kwargs.get("inplace") is True:
        return True
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.is_mutable
    if isinstance(target, torch._ops.OpOverloadPacket):
        return True
    if isinstance(target, torch._ops.HigherOrderOperator):
        return target.name() not in ("tag_activation_checkpoint", "invoke_subgraph")
    name, module = getattr(target, "__name__", ""), getattr(target, "__module__", "") or ""
    if module == "_operator":
        return name == "setitem" or name in _IN_PLACE_OPERATORS
    return (name.endswith("_") and not name.endswith("__")) or name in _MODE_CHANGES


_IN_PLACE_OPERATORS = frozenset(
    {"iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul"}
    | {"iand", "ior", "ixor", "ilshift", "irshift"}
)
_MODE_CHANGES = frozenset(
    {"_set_grad_enabled", "_enter_autocast", "_exit_autocast"}
    | {"_enter_inference_mode", "_exit_inference_mode"}
    | {"_saved_tensors_hooks_disable", "_saved_tensors_hooks_enable"}
)


def apply_rewrites(
    gm: fx.GraphModule,
    table: Sequence[Rewrite],
    reader: Callable[[fx.Node], Reading | None] = read_aten,
    write: Write = unwritten,
) -> RewriteLog:
    """Apply each rewrite of ``table`` wherever it fits; says what fired and what nearly did."""
    found, matcher = RewriteLog(), _Matcher(gm.graph, reader)
    for rule in table:
        for word in sorted(rule.roots):
            for root in matcher.by_word.get(word, ()):
                if not root._erased:
                    _try(gm, rule, root, matcher, found, write)
    return found


def _try(
    gm: fx.GraphModule,
    rule: Rewrite,
    root: fx.Node,
    matcher: _Matcher,
    found: RewriteLog,
    write: Write,
) -> None:
    first_reason = None
    for match in matcher.matches(rule, root):
        reason = matcher.why_not(match)
        where = source_line(root), module_path(root)
        if reason is None:
            old = len(match.nodes)
            before = write(match.nodes)
            new = _replace(gm.graph, match, matcher)
            fired = Fired(rule.name, rule.because, old, len(new), *where, before, write(new))
            found.fired.append(fired)
            return
        first_reason = first_reason or NearMiss(rule.name, root.name, reason, *where)
    if first_reason is not None:
        found.near_misses.append(first_reason)


def _replace(graph: fx.Graph, match: Match, matcher: _Matcher) -> list[fx.Node]:
    """Write the replacement before the root, hand it the root's users, erase what is left over;
    returns the new nodes."""
    root, tracer = match.root, GraphAppendingTracer(graph)
    last = root.prev
    arguments = [
        fx.Proxy(bound, tracer) if isinstance(bound, fx.Node) else bound
        for bound in map(match.bound.get, match.rule.parameters)
    ]
    with graph.inserting_before(root):
        result = match.rule.replacement(match, *arguments).node
    new, node = [], last.next
    while node is not root:
        new.append(node)
        node = node.next
    _give_meta(new, root, result)
    for node in new:
        matcher.position[node] = matcher.position[root]
    root.replace_all_uses_with(result)
    outside = [n for n in match.bound.values() if isinstance(n, fx.Node)]
    for node in sorted(match.nodes, key=matcher.position.__getitem__, reverse=True):
        graph.erase_node(node)
    for node in outside:  # a transpose that only the old chain read
        reading = None if node._erased or node.users else matcher.read(node)
        if reading is not None and reading.word == "transpose":
            graph.erase_node(node)
    matcher.forget()
    return new


def _give_meta(new: Sequence[fx.Node], root: fx.Node, result: fx.Node) -> None:
    """Users' lines and fake values for new nodes; the last one holds what the root held."""
    traced = "val" in root.meta
    inherited = {name: root.meta[name] for name in _INHERITED if name in root.meta}
    for node in new:
        node.meta.update(inherited)
        if traced:
            node.meta["val"] = call_on_fakes(node)
    if not traced:  # AOTAutograd will trace again: only checks of further rewrites read this
        result.meta["example_value"] = root.meta.get("example_value")


def call_on_fakes(node: fx.Node) -> Any:
    target: Any = node.target
    args, kwargs = fx.map_arg((node.args, node.kwargs), value_of)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    mode = next((v.fake_mode for v in map(value_of, node.all_input_nodes) if is_fake(v)), None)
    if mode is None:
        return target(*args, **kwargs)
    with mode, torch.no_grad():
        return target(*args, **kwargs)


def call_before(at: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """A new call ahead of a node, which comes from the same line of the user's code."""
    with at.graph.inserting_before(at):
        node = at.graph.call_function(target, args, kwargs)
    node.meta = {**at.meta, "val": call_on_fakes(node)}
    return node


def is_fake(value: Any) -> bool:
    return is_tensor(value) and hasattr(value, "fake_mode")


_BODIES = frozenset({"tag_activation_checkpoint", "invoke_subgraph", "wrap"})


def rewrite_dynamo_graph(
    gm: fx.GraphModule,
    table: Sequence[Rewrite] | None = None,
    reader: Callable[[fx.Node], Reading | None] = read_dynamo,
    write: Write = unwritten,
) -> RewriteLog:
    """Rewrite a Dynamo graph in place, before AOTAutograd sees it: training and inference alike.

    Bodies of checkpoints and of nested regions are rewritten too. A graph that runs a function
    transform (vmap, jvp, grad) or holds tensor subclasses is left alone: the replacements have no
    rule for those.
    """
    from ..kernels.fused import register_torch_ops
    from .rewrites import TABLE

    table = TABLE if table is None else table
    if any(map(is_foreign, gm.graph.nodes)):
        return RewriteLog()
    register_torch_ops()
    found = apply_rewrites(gm, table, reader, write)
    for body in bodies(gm):
        found.extend(rewrite_dynamo_graph(body, table, reader, write))
    if found.fired:
        gm.recompile()
    return found


def bodies(gm: fx.GraphModule) -> Iterator[fx.GraphModule]:
    """The graphs of checkpoints and of nested regions."""
    for node in list(gm.graph.nodes):
        for body in node.all_input_nodes if is_body_call(node) else ():
            module = getattr(gm, str(body.target), None) if body.op == "get_attr" else None
            if isinstance(module, fx.GraphModule):
                yield module


def is_body_call(node: fx.Node) -> bool:
    """Whether a node runs a part of the program that was set apart: a checkpoint, a region."""
    target = node.target
    return isinstance(target, torch._ops.HigherOrderOperator) and target.name() in _BODIES


def is_foreign(node: fx.Node) -> bool:
    """Whether a node belongs to a function transform or holds a tensor subclass."""
    if node.op == "placeholder":
        value = value_of(node)
        return is_tensor(value) and not is_fake(value) and type(value) is not torch.Tensor
    module = getattr(node.target, "__module__", "") or ""
    name = getattr(node.target, "__name__", "")
    return "functorch" in module or name in ("_make_dual", "_unpack_dual", "_enter_dual_level")
