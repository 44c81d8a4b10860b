"""Users' rewrites in a Dynamo graph.

A chain of the graph with the calls that the pattern makes on its example is a candidate. Then both
functions are run again, on FakeTensors of what the chain reads: the chain must be the pattern's
calls with its numbers, and the replacement's result of the same shape, dtype and strides. So a
pattern may ask for shapes, and a dim counted from the front is not taken for one counted from the
back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from .calls import Calls, told
from .graph import is_symbolic, is_tensor, module_path, same, source_line
from .rewrite import (
    COMMUTATIVE,
    Constant,
    Match,
    NearMiss,
    Rewrite,
    RewriteLog,
    Term,
    Var,
    Write,
    is_fake,
    is_foreign,
    rewrite_dynamo_graph,
    unwritten,
)
from .traced import NoPattern, Rule, traced, tree_of, why_other
from .words import Reading

Reader = Callable[[fx.Node], Reading | None]


def rewrite_for_users(
    gm: fx.GraphModule, rules: Sequence[Rule], write: Write = unwritten
) -> RewriteLog:
    """Apply users' rewrites to a Dynamo graph in place; says what fired, and what nearly did."""
    if not rules or any(map(is_foreign, gm.graph.nodes)):
        return RewriteLog()
    calls = Calls()
    table = [_searched(rule, calls) for rule in rules]
    found = rewrite_dynamo_graph(gm, table, calls.of_node, write)
    told_of = {fired.rule for fired in found.fired} | {m.rule for m in found.near_misses}
    for rule in rules:
        if rule.name not in told_of:
            found.near_misses.extend(_nearest(gm.graph, rule, calls.of_node))
    return found


def _searched(rule: Rule, calls: Calls) -> Rewrite:
    search = _Search(rule, calls)
    return _Traced(
        rule.name, rule.pattern, search.write, rule.because, (), (), search.why_not, rule=rule
    )


@dataclass(frozen=True)
class _Traced(Rewrite):
    """A rewrite whose tree is what its pattern calls."""

    rule: Any = None

    @property
    def parameters(self) -> tuple[str, ...]:
        return self.rule.parameters

    @property
    def tree(self) -> Any:
        return self.rule.tree


@dataclass(frozen=True)
class _Made:
    """What the rule's functions make of arguments alike."""

    tree: Any
    graph: fx.Graph
    places: tuple[int, ...]  # of the parameters that are the graph's inputs
    other: str | None  # why the replacement's result is not the pattern's


@dataclass
class _Search:
    """One rule in one compile; what it makes of arguments alike is made once."""

    rule: Rule
    calls: Calls
    made: dict[Any, _Made | str] = field(default_factory=dict)

    def why_not(self, match: Match) -> str | None:
        """Why the chain is not the pattern, or may not be replaced; None where it may."""
        values = self._values(match)
        if isinstance(values, str):
            return values
        made = self._make(values)
        if isinstance(made, str):
            return made
        return (
            _difference(made.tree, match.root, match)
            or self._declined(values)
            or made.other
            or self.rule.why_wrong(values)
        )

    def write(self, match: Match, *proxies: Any) -> fx.Proxy:
        """The replacement's calls, on fx proxies; ``why_not`` has made them."""
        made = self._make(self._values(match))
        assert isinstance(made, _Made)
        inputs = made.graph.find_nodes(op="placeholder")
        (tracer,) = {p.tracer for p in proxies if isinstance(p, fx.Proxy)}
        here = {node: proxies[place].node for node, place in zip(inputs, made.places, strict=True)}
        result: Any = tracer.graph.graph_copy(made.graph, here)
        return fx.Proxy(result, tracer)

    def _values(self, match: Match) -> Any:
        """What the parameters stand for: FakeTensors and floats; or why that cannot be."""
        values: list[Any] = []
        for name, wanted in zip(self.rule.parameters, self.rule.example, strict=True):
            value = match.value(name)
            if is_tensor(wanted) and not is_fake(value):
                return f"{name} is {value!r}, where the pattern has a tensor"
            if not is_tensor(wanted):
                if isinstance(match[name], fx.Node) or type(value) not in (int, float):
                    return f"{name} is no number that is known while compiling"
                value = float(value)
            values.append(value)
        return values

    def _make(self, values: Sequence[Any]) -> _Made | str:
        key = tuple(map(told, values))
        if key not in self.made:
            try:
                self.made[key] = self._made(values)
            except NoPattern as why:
                self.made[key] = str(why)
        return self.made[key]

    def _made(self, values: Sequence[Any]) -> _Made:
        given = dict(zip(self.rule.parameters, values, strict=True))
        tree, wanted = tree_of(self.rule.pattern, given, self.calls)
        graph, result = traced(self.rule.replacement, values)
        places = tuple(i for i, v in enumerate(values) if is_tensor(v))
        return _Made(tree, graph, places, why_other(wanted, result, values))

    def _declined(self, values: Sequence[Any]) -> str | None:
        if self.rule.declines is None:
            return None
        try:
            reason = self.rule.declines(*values)
        except Exception as error:  # a condition that fails is not met
            return f"its declines fails: {type(error).__name__}: {error}"
        if reason is not None and not isinstance(reason, str):
            return f"its declines returned {reason!r}, which is neither a reason nor None"
        return reason


# chains and patterns ------------------------------------------------------------------------------


def _difference(tree: Any, value: Any, match: Match) -> str | None:
    """The first thing in which a chain is not ``tree``, the pattern on the chain's operands."""
    if isinstance(tree, Var):
        return None if match[tree.name] is value else f"{value} is not {tree.name}"
    if isinstance(tree, Constant):
        alike = _equal(tree.value, value)
        return None if alike else f"the program has {value}, where the pattern has {tree.value}"
    reading = match.reader(value) if isinstance(value, fx.Node) else None
    if reading is None or (reading.word, len(reading.args)) != (tree.word, len(tree.args)):
        return _other_call(tree, value, reading)
    first = None
    for args in _orders(reading):
        pairs = zip(tree.args, args, strict=True)
        reason = next(filter(None, (_difference(t, a, match) for t, a in pairs)), None)
        if reason is None:
            return None
        first = first or reason
    return first


def _orders(reading: Reading) -> Iterator[Sequence[Any]]:
    yield reading.args
    if reading.word in COMMUTATIVE and len(reading.args) == 2:
        yield reading.args[::-1]


def _other_call(tree: Term, value: Any, reading: Reading | None) -> str:
    found = "no call that a pattern can hold" if reading is None else reading.word
    if reading is not None and reading.word == tree.word:
        found = f"{found} with other arguments"
    return f"{value} is {found}, where the pattern has {tree.word}"


def _equal(wanted: Any, found: Any) -> bool:
    """Whether two constants are one; sizes that are symbols, for every call, without a guard."""
    if isinstance(wanted, (tuple, list)):
        alike = isinstance(found, (tuple, list)) and len(wanted) == len(found)
        return alike and all(map(_equal, wanted, found))
    if is_symbolic(wanted) or is_symbolic(found):
        return type(found) in (int, torch.SymInt) and same(wanted, found)
    return type(wanted) is type(found) and bool(wanted == found)


def _nearest(graph: fx.Graph, rule: Rule, reader: Reader) -> Iterator[NearMiss]:
    """Of the chains that begin as the pattern ends, the one with most of its calls, if more than
    half of them: where it leaves off."""
    best: tuple[int, fx.Node, str] | None = None
    for root in graph.nodes:
        calls, reason = _agreed(rule.tree, root, reader, {})
        if reason is not None and (best is None or calls > best[0]):
            best = calls, root, reason
    if best is not None and 2 * best[0] > _count(rule.tree):
        _, root, reason = best
        yield NearMiss(rule.name, root.name, reason, source_line(root), module_path(root))


def _agreed(tree: Any, value: Any, reader: Reader, bound: dict[str, Any]) -> tuple[int, str | None]:
    """How many calls agree, from the last one backwards, and the first thing that does not.
    ``bound``: what parameters stood for so far."""
    if isinstance(tree, Var):
        other = bound.setdefault(tree.name, value)
        agrees = other is value or (not isinstance(value, fx.Node) and other == value)
        return 0, None if agrees else f"{tree.name} is {other} in one place, {value} in another"
    if not isinstance(tree, Term):
        return 0, None
    reading = reader(value) if isinstance(value, fx.Node) else None
    if reading is None or (reading.word, len(reading.args)) != (tree.word, len(tree.args)):
        return 0, _other_call(tree, value, reading)
    found = []
    for args in _orders(reading):
        here = dict(bound)
        below = [_agreed(t, a, reader, here) for t, a in zip(tree.args, args, strict=True)]
        reason = next((why for _, why in below if why is not None), None)
        found.append((1 + sum(calls for calls, _ in below), reason, here))
    calls, reason, here = max(found, key=lambda one: one[0])
    bound.update(here)
    return calls, reason


def _count(tree: Any) -> int:
    return 1 + sum(map(_count, tree.args)) if isinstance(tree, Term) else 0
