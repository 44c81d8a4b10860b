"""Which calls of an ATen graph compute the same: ``passes.drop_duplicates`` keeps the first."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from .graph import Storage, schema_of, value_of
from .overload import facts_of


def duplicate_key(
    node: fx.Node,
    storage: Storage,
    version: dict[fx.Node, int],
    repeatable: dict[Any, bool],
    symbols: dict[fx.Node, Any],
) -> Any:
    """What two nodes that compute the same have in common; None of a node that stays.

    ``version``: how often memory was written so far; ``repeatable``: targets looked at before;
    ``symbols``: the nodes so far that hold a symbolic number, and which.
    """
    if node.op != "call_function" or "unbacked_bindings" in node.meta:
        return None
    if node in symbols:
        return type(value_of(node)), symbols[node]
    if node.target is operator.getitem:
        return operator.getitem, node.args
    facts = facts_of(node.target)
    if facts is None:
        return None
    pure = repeatable.get(facts)
    if pure is None:
        pure = repeatable[facts] = is_pure(node) and "empty" not in schema_of(node).name
    if not pure:
        return None
    roots = map(storage.root.__getitem__, node.all_input_nodes) if version else ()
    epochs = tuple((k, version[root]) for k, root in enumerate(roots) if root in version)
    return facts, _literal(node.args, symbols), _literal(node.kwargs, symbols), epochs


def _literal(value: Any, symbols: dict[fx.Node, Any]) -> Any:
    """A hashable twin of an argument, in which 1, 1.0 and True differ, and 0.0 and -0.0."""
    if isinstance(value, fx.Node):
        return symbols.get(value, value)
    if isinstance(value, (list, tuple)):
        return tuple([_literal(item, symbols) for item in value])
    if isinstance(value, dict):
        return tuple([(name, _literal(item, symbols)) for name, item in sorted(value.items())])
    kind = type(value)
    return kind, repr(value) if kind in (float, complex) else value


def is_pure(node: fx.Node) -> bool:
    """Whether a call does nothing but compute its result."""
    facts = facts_of(node.target)
    return facts is not None and facts.pure and not node.is_impure()
